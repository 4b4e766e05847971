"""Checkpoints of a run: written atomically, read without executing code.

`last.ckpt` holds everything that continuing needs: weights, their moving average, optimiser, loss
scaler, position, metrics so far and the Weights & Biases run id. Learning rate, sample order,
augmentation and dropout are functions of the position and the seed (see `data.seeding`), so no
generator state is stored. `best.ckpt` holds the evaluated weights alone.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from conf.schema import ConfigError

FORMAT = "focal-transformer-run"
VERSION = 1


def save(path: Path, content: dict[str, Any]) -> None:
    """Write `content` so that `path` is always a whole file: the old one or the new one.

    Args:
        path: Where to write; its folder must exist.
        content: Tensors and plain Python containers.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself durable
    finally:
        os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; code in the file is refused, never run.

    Raises:
        ConfigError: The file is missing, damaged or no checkpoint of this program.
    """
    if not path.is_file():
        raise ConfigError(f"resume must name a checkpoint, got {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise ConfigError(
            f"resume must name a whole checkpoint, cannot read {path}: {error}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(
            f"resume must name a last.ckpt or best.ckpt of this program, got {path}; "
            "to start from other weights use finetune"
        )
    if content["version"] != VERSION:
        raise ConfigError(
            f"resume must name a checkpoint of version {VERSION}, {path} has {content['version']}"
        )
    return content


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Each setting that two configurations do not share, as `key: old → new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{name}.")
        elif before != after:
            lines.append(f"{name}: {before!r} → {after!r}")
    return lines
