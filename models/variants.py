"""The models of the paper, registered with timm.

Paper: arXiv 2107.00641, table 1, and the released configurations: Tiny, Small, Base, and Large as
Swin-L is sized. The ``_conv`` forms embed by overlapping convolutions. ``focal_micro`` is for CPUs
and tests, and not in the paper.
"""

from __future__ import annotations

import logging
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from models.checkpoint import load_weights
from models.focal_transformer import FocalTransformer

__all__ = [
    "focal_base",
    "focal_base_conv",
    "focal_large",
    "focal_large_conv",
    "focal_micro",
    "focal_small",
    "focal_small_conv",
    "focal_tiny",
    "focal_tiny_conv",
]

_logger = logging.getLogger(__name__)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",  # the released weights no longer download
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "focal_micro": _cfg(input_size=(3, 56, 56), pool_size=(1, 1)),
        **{
            f"focal_{size}{form}": _cfg()
            for size in ("tiny", "small", "base", "large")
            for form in ("", "_conv")
        },
    }
)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}


def _create(
    variant: str, pretrained: bool, sizes: dict[str, Any], options: dict[str, Any]
) -> FocalTransformer:
    """Build a variant through timm; ``options`` are the user's and go before ``sizes``."""
    weights: str = (options.get("pretrained_cfg_overlay") or {}).get("file", "")
    if pretrained and not weights:
        raise ValueError(
            f"pretrained must be False for {variant}: its released weights no longer download. To "
            "use a file you have, build the model and call models.load_weights(model, path), or "
            'pass pretrained=True, pretrained_cfg_overlay={"file": path}'
        )
    options = {**sizes, **options}
    stages = len(options.get("depths", _TINY["depths"]))
    out_indices = options.pop("out_indices", tuple(range(stages)))

    def build(**settings: Any) -> FocalTransformer:
        model = FocalTransformer(**settings)
        if pretrained:  # our own loader, as timm's knows neither Swin's names nor other windows
            for note in load_weights(model, weights):
                _logger.warning("%s: %s", weights, note)
        return model

    return build_model_with_cfg(
        build,
        variant,
        pretrained=False,
        feature_cfg={
            "out_indices": out_indices,
            "feature_cls": "getter",
            "flatten_sequential": True,  # for the extractors a user may name instead
        },
        **options,
    )


@register_model
def focal_micro(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """A small model for 56×56 images, to train and test on a CPU."""
    sizes = {
        "img_size": 56,
        "embed_dim": 32,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
    }
    return _create("focal_micro", pretrained, sizes, kwargs)


@register_model
def focal_tiny(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-T: 28.9M parameters."""
    return _create("focal_tiny", pretrained, _TINY, kwargs)


@register_model
def focal_small(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-S: 51.1M parameters."""
    return _create("focal_small", pretrained, _SMALL, kwargs)


@register_model
def focal_base(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-B: 89.8M parameters."""
    return _create("focal_base", pretrained, _BASE, kwargs)


@register_model
def focal_large(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-L, the widths of Swin-L."""
    return _create("focal_large", pretrained, _LARGE, kwargs)


@register_model
def focal_tiny_conv(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-T with overlapping convolutional embeddings: 30.8M parameters."""
    return _create("focal_tiny_conv", pretrained, {**_TINY, "conv_embed": True}, kwargs)


@register_model
def focal_small_conv(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-S with overlapping convolutional embeddings: 53.1M parameters."""
    return _create("focal_small_conv", pretrained, {**_SMALL, "conv_embed": True}, kwargs)


@register_model
def focal_base_conv(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-B with overlapping convolutional embeddings: 93.3M parameters."""
    return _create("focal_base_conv", pretrained, {**_BASE, "conv_embed": True}, kwargs)


@register_model
def focal_large_conv(pretrained: bool = False, **kwargs: Any) -> FocalTransformer:
    """Focal-L with overlapping convolutional embeddings."""
    return _create("focal_large_conv", pretrained, {**_LARGE, "conv_embed": True}, kwargs)
