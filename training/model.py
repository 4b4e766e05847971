"""From the model configuration to a model that fits the data."""

from dataclasses import asdict
from typing import Any

import timm
from torch import nn

import models  # noqa: F401  registers the Focal Transformers with timm
from conf.schema import ConfigError, ModelConfig
from data import ImageData

FAMILY = "focal_"


def build_model(config: ModelConfig, data: ImageData) -> nn.Module:
    """Create `config.name` for the channels, size and classes of `data`.

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
    if config.name.startswith(FAMILY):
        options["img_size"] = data.img_size
    try:
        return timm.create_model(
            config.name,
            num_classes=data.num_classes,
            in_chans=data.in_chans,
            **options,
            **config.kwargs,
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"model {config.name} cannot be built: {error}") from error


def attention_backend(model: nn.Module) -> str | None:
    """The attention backend a model runs; None for a model without focal attention."""
    backends = {
        module.attention_backend for module in model.modules() if hasattr(module, "attention_backend")
    }
    return "+".join(sorted(backends)) or None
