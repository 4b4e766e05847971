"""Entry points of `torch.hub`: `torch.hub.load("FOLDER", "focal_tiny", source="local")`.

Nothing is downloaded: `pretrained` is the path of a file or folder of yours.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm

import models

dependencies = ["torch", "timm", "einops", "safetensors"]


def _entry(name: str) -> Callable[..., Any]:
    def create(pretrained: str | bool = False, **options: Any) -> Any:
        if pretrained is True:
            raise ValueError(
                "pretrained must be the path of a weights file or an exported folder: the released "
                "weights no longer download, got True"
            )
        model = timm.create_model(name, **options)
        if pretrained:
            path = Path(pretrained)
            file = path / models.loading.WEIGHTS if path.is_dir() else path
            for note in models.load_weights(model, file):
                print(f"{file}: {note}")
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""{name}, with timm's options for it.

    Args:
        pretrained: A weights file (this project's, the released code's or Swin's) or a folder that
            `export.py` wrote; False for the initialisation.
        options: Options of `models.FocalTransformer`.
    """
    return create


focal_tiny = _entry("focal_tiny")
focal_small = _entry("focal_small")
focal_base = _entry("focal_base")
focal_large = _entry("focal_large")
focal_tiny_conv = _entry("focal_tiny_conv")
focal_small_conv = _entry("focal_small_conv")
focal_base_conv = _entry("focal_base_conv")
focal_large_conv = _entry("focal_large_conv")
focal_micro = _entry("focal_micro")
