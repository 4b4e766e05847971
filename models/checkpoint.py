"""Reading weights: ours, the released code's and Swin's.

The released weights no longer download, so a file comes from the user. Code in a file is never run:
PyTorch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.official import rename_official
from models.resize import resize_parameter
from models.swin import is_swin, rename_swin

__all__ = ["convert_official", "from_swin", "load_weights"]

# What a model with other levels, or another number of classes, has or lacks.
_LEVEL_PARAMETERS = re.compile(r"\.attn\.(bias\.ring$|bias\.coarse\.|pools\.)")
_HEAD = ("head.", "fc.")


def convert_official(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the released code as one of ours; the function it computes stays the same.

    Differentiable, so that gradients can be had with respect to the released parameters.

    Args:
        state_dict: Released names to tensors, or such a dict under ``"model"``.
        model: A `FocalTransformer` built with the same settings.

    Returns:
        Every parameter of ``model``, for ``model.load_state_dict``.

    Raises:
        ValueError: Missing or unexpected parameters, other shapes, a ring with holes
            (``expand_size`` beyond half the window) or a sub-window that does not divide the
            window.
    """
    renamed = rename_official(_unwrap(state_dict), getattr(model, "map_sizes", (None,))[0])
    target = model.state_dict()
    wrong = [
        f"missing {_shorten(sorted(target.keys() - renamed.keys()))}",
        f"unexpected {_shorten(sorted(renamed.keys() - target.keys()))}",
    ]
    problems = [text for text in wrong if not text.endswith("none")]
    problems += [
        f"{name} has shape {list(renamed[name].shape)}, the model {list(tensor.shape)}"
        for name, tensor in target.items()
        if name in renamed and renamed[name].shape != tensor.shape
    ][:4]
    if problems:
        raise ValueError(
            "state_dict must hold the released parameters of a model with the settings of this one "
            f"(names after renaming): {'; '.join(problems)}"
        )
    return {name: renamed[name] for name in target}


def from_swin(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The part of ``model``'s parameters that a Swin Transformer's weights can give.

    Window tables of another window are resized. Load the result with ``strict=False``; the ring,
    the coarse levels, the pooling and the downsampling norms keep their initialisation.

    Args:
        state_dict: timm's or Microsoft's names to tensors, or such a dict under ``"model"``.
        model: A `FocalTransformer`.

    Raises:
        ValueError: Not Swin's names, or no tensor fits.
    """
    state_dict = _unwrap(state_dict)
    if not is_swin(state_dict):
        raise ValueError(
            "state_dict must be a Swin Transformer's (with layers.*.downsample.reduction.weight), "
            f"got {_shorten(sorted(state_dict))}"
        )
    fitted, _ = _fit(rename_swin(state_dict), model, strict=False)
    if not fitted:
        raise ValueError("state_dict must share shapes with the model, got none that fits")
    return fitted


def load_weights(model: nn.Module, path: str | PathLike[str]) -> list[str]:
    """Load a file's weights into ``model``, resized where the windows, levels or classes differ.

    Understands our state dicts, the released code's and Swin's (timm's or Microsoft's), bare or
    under ``"model"`` or ``"state_dict"``.

    Args:
        model: A `FocalTransformer`, or a model of timm for a file of its own names; unchanged if an
            error is raised.
        path: A ``.safetensors``, ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file.

    Returns:
        Notes on everything that was not loaded, or not as it was in the file.

    Raises:
        ValueError: The file cannot be read, or its weights do not fit; names the file and the
            reason.
    """
    path = Path(path)
    try:
        state_dict = _unwrap(_read(path))
        own = state_dict.keys() == model.state_dict().keys()  # of any model of timm
        if own or any(name.endswith(".attn.bias.window") for name in state_dict):
            fitted, notes = _fit(state_dict, model, strict=True)
        elif is_swin(state_dict):
            fitted, notes = _fit(rename_swin(state_dict), model, strict=False)
            notes.insert(0, "Swin weights: downsampling norms have no counterpart, left out")
        elif any(name.endswith("relative_position_bias_table") for name in state_dict):
            grid = getattr(model, "map_sizes", (None,))[0]
            fitted, notes = _fit(rename_official(state_dict, grid), model, strict=True)
        else:
            raise ValueError(
                "neither a Focal Transformer's nor a Swin Transformer's parameters, but "
                f"{_shorten(sorted(state_dict))}"
            )
    except ValueError as error:
        raise ValueError(f"cannot load {path}: {error}") from error
    model.load_state_dict(fitted, strict=False)
    return notes


def _read(path: Path) -> object:
    """The content of a weights file."""
    if not path.is_file():
        raise ValueError("no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file: {error}") from error
    if path.suffix not in (".pt", ".pth", ".bin", ".ckpt"):
        raise ValueError(
            f"the suffix must be .safetensors, .pt, .pth, .bin or .ckpt, got {path.suffix!r}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it holds more than tensors, or is no PyTorch file; where you trust it, save its state "
            "dict alone as .safetensors (reading it here could run code). First line of the error: "
            f"{str(error).splitlines()[0]}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"not a PyTorch weights file: {error}") from error


def _unwrap(content: object) -> dict[str, Tensor]:
    """The state dict in ``content``, without wrappers and without prefixes of wrapping modules."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"a state dict must map names to tensors, got {type(content).__name__}")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"a state dict must map names to tensors, got {type(tensor).__name__} for {name!r}"
            )
    state_dict = dict(content)
    for prefix in ("_orig_mod.", "module."):
        if all(name.startswith(prefix) for name in state_dict):
            state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict


def _fit(
    state_dict: dict[str, Tensor], model: nn.Module, *, strict: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """What of ``state_dict`` fits ``model``, resized if need be, and notes on the rest.

    With ``strict`` only what depends on levels, window and classes may be missing, left over or of
    another shape.
    """
    target = model.state_dict()
    fitted: dict[str, Tensor] = {}
    notes: Counter[str] = Counter()
    problems = []
    for name, tensor in target.items():
        loose = not strict or name.startswith(_HEAD)
        if name not in state_dict:
            if loose or _LEVEL_PARAMETERS.search(name):
                notes[f"{_pattern(name)}: not in the file, keeps its initialisation"] += 1
            else:
                problems.append(f"{name} is missing")
            continue
        saved = state_dict[name]
        if saved.shape == tensor.shape:
            fitted[name] = saved
            continue
        window = state_dict.get(re.sub(r"\.bias\.ring$", ".bias.window", name))
        resized = resize_parameter(name, saved, tensor.shape, window)
        if resized is not None:
            fitted[name] = resized
            notes[f"{_pattern(name)}: resized for other windows, levels or maps"] += 1
        elif loose:
            notes[f"{_pattern(name)}: of another shape, keeps its initialisation"] += 1
        else:
            problems.append(f"{name} is {list(saved.shape)}, the model's {list(tensor.shape)}")
    for name in state_dict.keys() - target.keys():
        if not strict or name.startswith(_HEAD) or _LEVEL_PARAMETERS.search(name):
            notes[f"{_pattern(name)}: not in the model, left out"] += 1
        else:
            problems.append(f"{name} is not in the model")
    if problems:
        raise ValueError(f"the weights are of another model: {_shorten(sorted(problems))}")
    return fitted, sorted(_counted(text, count) for text, count in notes.items())


def _pattern(name: str) -> str:
    """A name with the stage and block left open, so that notes on all blocks are one."""
    return re.sub(
        r"^layers\.\d+\.(blocks\.\d+\.)?",
        lambda m: "layers.*." + ("blocks.*." if m[1] else ""),
        name,
    )


def _counted(text: str, count: int) -> str:
    return text if count == 1 else f"{text} ({count} tensors)"


def _shorten(names: list[str], most: int = 4) -> str:
    """The first few of many names."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + rest
