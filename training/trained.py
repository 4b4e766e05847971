"""The model that a run trained, ready to be used or exported."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import timm
from torch import nn

import models
from conf.schema import SCHEMAS, ConfigError, DataConfig, DigitsConfig, ImageConfig
from data import ImageData, build
from training import checkpoint

# Settings of how to train or to run, which the model that comes out does not depend on.
_RUN_OPTIONS = ("name", "kwargs", "grad_checkpointing", "attention_backend")


def load_run(path: Path) -> nn.Module:
    """The best weights of a run (their moving average where it kept one), in evaluation mode.

    Args:
        path: A run folder, or a checkpoint file.

    Returns:
        A model that `models.save` can write: it knows what images it wants and, where the run's
        data can still be read, the names of its classes.

    Raises:
        ConfigError: There is no checkpoint of this program.
    """
    content = checkpoint.load(path if path.suffix == ".ckpt" else path / "best.ckpt")
    state = content.get("ema") or content["model"]
    settings, data = content["config"]["model"], data_config(content["config"]["data"])
    name = settings["name"]
    layout: Any = timm.get_pretrained_cfg(name)
    in_chans = state[f"{layout.first_conv}.weight"].shape[1]
    options = {
        key: value
        for key, value in settings.items()
        if value is not None and key not in _RUN_OPTIONS
    }
    options |= {"in_chans": in_chans, **settings["kwargs"]}
    options.pop("pretrained", None)  # the weights are the run's
    if name.startswith("focal_"):
        options["img_size"] = data.img_size
    num_classes = state[f"{layout.classifier}.weight"].shape[0]
    model = timm.create_model(name, num_classes=num_classes, **options)
    model.load_state_dict(state)
    source = _open(data)
    models.describe(
        model,
        architecture=name,
        options=options,
        preprocessing={
            "input_size": (in_chans, data.img_size, data.img_size),
            **_preprocessing(data, source),
        },
        class_names=None if source is None else source.class_names,
    )
    return model.eval()


def data_config(values: dict[str, Any]) -> DataConfig:
    """The plain values of a data configuration as what they were: the kind that has their keys."""
    kinds = [kind for kind in SCHEMAS.values() if issubclass(kind, DataConfig)]
    fitting = [kind for kind in kinds if values.keys() <= {field.name for field in fields(kind)}]
    if not fitting:
        raise ConfigError(f"data must be a configuration of this program, got {values}")
    return min(fitting, key=lambda kind: len(fields(kind)))(**values)


def _open(config: DataConfig) -> ImageData | None:
    """The run's data; None where it is not on this machine."""
    if getattr(config, "download", False):
        config = replace(config, download=False)  # type: ignore[call-arg]
    try:
        return build(config)
    except ConfigError:
        return None


def _preprocessing(config: DataConfig, source: ImageData | None) -> dict[str, Any]:
    """What evaluation does to an image, as timm's keys say it."""
    if isinstance(config, ImageConfig):
        random = config.interpolation == "random"
        return {
            "mean": tuple(config.mean),
            "std": tuple(config.std),
            "interpolation": "bicubic" if random else config.interpolation,
            "crop_pct": config.crop_pct,
        }
    mean, std = 0.0, 1.0  # noise comes as it is
    if isinstance(config, DigitsConfig):
        # The images hold ink / std, 16 at most, and the background is -mean / std: back to a scale
        # where full ink is 1, as in a picture.
        digits: Any = source.val if source is not None else None
        full = float(digits.images.max())
        mean, std = -digits.background / full, 1.0 / full
    return {
        "mean": (mean,) * 3,
        "std": (std,) * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
