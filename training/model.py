"""From the model configuration to a model that fits the data."""

from dataclasses import asdict
from typing import Any, cast

import timm
import torch
from torch import nn

from conf.schema import ConfigError, ModelConfig
from data import ImageData
from data.seeding import seed_global
from kernels import resolve_backend
from models.focal_attention import FocalAttention  # also registers the family with timm

FAMILY = "focal_"
COMPUTE_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


def build_model(config: ModelConfig, data: ImageData, *, seed: int) -> nn.Module:
    """Create `config.name` for the channels, size and classes of `data`, initialised from `seed`.

    Options left at None keep the variant's own value. Other timm models get their options from
    `config.kwargs`, and those of `config` that are set.

    Raises:
        ConfigError: timm has no such model, or the model refuses an option; says which.
    """
    options: dict[str, Any] = {
        name: value
        for name, value in asdict(config).items()
        if value is not None and name not in ("name", "kwargs")
    }
    checkpointing = options.pop("grad_checkpointing", False)
    if config.name.startswith(FAMILY):
        options["img_size"] = data.img_size
    seed_global(seed)
    try:
        model = timm.create_model(
            config.name,
            num_classes=data.num_classes,
            in_chans=data.in_chans,
            **options,
            **config.kwargs,
        )
        if checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"model {config.name} cannot be built: {error}") from error
    return model


def freeze_backbone(model: nn.Module) -> None:
    """Leave the classifier alone trainable: linear evaluation of the features before it."""
    model.requires_grad_(False)
    cast(nn.Module, model.get_classifier()).requires_grad_(True)  # type: ignore[operator]


def attention_backend(model: nn.Module, device: torch.device, precision: str) -> str | None:
    """The attention backend that `model` will run; None for a model without focal attention.

    Raises:
        ConfigError: The backend asked for cannot run on `device`.
    """
    asked = {module.backend for module in model.modules() if isinstance(module, FocalAttention)}
    if not asked:
        return None
    dtype = COMPUTE_DTYPES[precision]
    try:
        return "+".join(sorted({resolve_backend(backend, device, dtype) for backend in asked}))
    except ValueError as error:
        raise ConfigError(f"model.attention_backend: {error}") from error
