"""A trained model as a folder: weights and a description, nothing that could run.

Origin: the layout of timm's model folders (``config.json`` with ``architecture``, ``model_args``,
``label_names`` and ``pretrained_cfg``), so that its tools find what they look for. What differs:
every part of the description is checked before it is used, and weights are safetensors alone.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

__all__ = ["CONFIG", "WEIGHTS", "describe", "load", "save"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# How images must come: the keys of timm's `pretrained_cfg` that say so.
PREPROCESSING = ("input_size", "mean", "std", "interpolation", "crop_pct")
# Options of timm's factory itself, some of which fetch or read other files.
_FACTORY_OPTIONS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"}


def describe(
    model: nn.Module,
    *,
    architecture: str,
    options: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:
    """Tell a model what it is, so that `save` can write it.

    Args:
        model: A model of timm's, this family's among them.
        architecture: The name that ``timm.create_model`` knows.
        options: The options it was created with.
        preprocessing: How images must come: ``input_size`` (channels, height, width), ``mean``,
            ``std``, ``interpolation`` and ``crop_pct``, as timm has them.
        class_names: One name per class; None where they are not known.

    Raises:
        ValueError: A key of ``preprocessing`` is missing, or there are more or fewer names than
            classes.
    """
    missing = [key for key in PREPROCESSING if key not in preprocessing]
    if missing:
        raise ValueError(f"preprocessing must have {', '.join(PREPROCESSING)}, lacks {missing}")
    classes: Any = model.num_classes
    if class_names is not None and len(class_names) != classes:
        raise ValueError(
            f"class_names must hold one name for each of {classes} classes, got {len(class_names)}"
        )
    known: Any = model.pretrained_cfg
    config = {
        **known,
        "architecture": architecture,
        "num_classes": classes,
        **{key: preprocessing[key] for key in PREPROCESSING},
        "label_names": None if class_names is None else list(class_names),
    }
    for name, value in (("pretrained_cfg", config), ("default_cfg", config)):  # timm has both
        setattr(model, name, value)
    model.model_args = dict(options)  # type: ignore[assignment]


def save(model: nn.Module, folder: str | PathLike[str], *, weights: bool = True) -> None:
    """Write ``model.safetensors`` and ``config.json``; `load` makes the model from them.

    Args:
        model: A model that `describe` was told about, or that `load` made.
        folder: Made if need be; files of these names in it are replaced.
        weights: Write the weights; False leaves the description alone.

    Raises:
        ValueError: The model has no description.
    """
    if not hasattr(model, "model_args"):
        raise ValueError("model must be described first, by models.describe")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known: Any = model.pretrained_cfg
    config = {
        "architecture": known["architecture"],
        "num_classes": known["num_classes"],
        "model_args": model.model_args,
        "label_names": known["label_names"],
        "pretrained_cfg": {
            **{key: known[key] for key in PREPROCESSING},
            "classifier": known.get("classifier"),
            "first_conv": known.get("first_conv"),
        },
    }
    if weights:
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(path: str | PathLike[str]) -> nn.Module:
    """The model of a folder that `save` wrote, in evaluation mode.

    What images it wants is in ``model.pretrained_cfg``, where timm looks for it:
    ``create_transform(**resolve_model_data_config(model))`` of ``timm.data`` is the transform;
    ``label_names`` in it are the names of the classes, or None. No code is executed.

    Args:
        path: The folder, or the ``.safetensors`` file in it.

    Raises:
        ValueError: A file is missing or damaged, the description names no model, or the weights
            are of another one; names the file and the reason.
    """
    path = Path(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    weights = path if path.suffix == ".safetensors" else folder / WEIGHTS
    for file in (folder / CONFIG, weights):
        if not file.is_file():
            raise ValueError(
                f"path must name a folder with {WEIGHTS} and {CONFIG}, got {path}: no {file.name}"
            )
    try:
        model = _build(folder / CONFIG)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"cannot read {folder / CONFIG}: {error}") from error
    try:
        model.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"cannot load {weights}: {error}") from error
    return model.eval()


def _build(file: Path) -> nn.Module:
    """The model that a description stands for, with the weights it is initialised with."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"it must hold an object, got {type(config).__name__}")
    absent = [k for k in ("architecture", "num_classes", "pretrained_cfg") if k not in config]
    if absent:
        raise ValueError(f"it lacks {', '.join(absent)}")
    name, options = config["architecture"], config.get("model_args", {})
    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        raise ValueError(f"architecture must be the name of a model of timm, got {name!r}")
    refused = sorted(_FACTORY_OPTIONS & options.keys())
    if refused:
        raise ValueError(f"model_args must be options of the model, got {', '.join(refused)}")
    model = timm.create_model(name, num_classes=config["num_classes"], **options)
    describe(
        model,
        architecture=name,
        options=options,
        preprocessing=config["pretrained_cfg"],
        class_names=config.get("label_names"),
    )
    return model
