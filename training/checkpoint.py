"""Checkpoint files: written atomically with a checksum, read without executing code.

A file is what `torch.save` writes, a zip archive, with the SHA-256 of its bytes as the archive's
comment: any reader of PyTorch files can open it, and one file has one checksum, with no second file
that a crash could leave behind. The checksum tells damage; that a file cannot run code is the work
of `weights_only=True`, which reads tensors and plain containers and nothing else.
"""

import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from conf.schema import ConfigError

FORMAT = "focal-transformer-run"
VERSION = 2
LAST, PREVIOUS, BEST = "last.ckpt", "last.1.ckpt", "best.ckpt"

_LABEL = b"sha256:"
_COMMENT_SIZE = len(_LABEL) + 64
# A zip archive ends with the length of its comment, two bytes, and the comment.
_SIZE_FIELD, _NO_COMMENT = _COMMENT_SIZE.to_bytes(2, "little"), b"\0\0"
_CHUNK = 1 << 20


class CheckpointError(ConfigError):
    """A checkpoint cannot be used; the message names the file and the reason."""


class _Writer:
    """A file that counts what `torch.save` gives it into a checksum.

    PyTorch turns an error of the file into one of its own that hides the reason: it is kept here.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()

    def close_archive(self) -> None:
        """Put the checksum where the archive says that it has no comment."""
        self.file.seek(-len(_NO_COMMENT), os.SEEK_END)
        self.file.write(_SIZE_FIELD + _LABEL + self.sha256.hexdigest().encode())


def temporary(path: Path) -> Path:
    """Where `path` is written before it is renamed."""
    # One name, not one for each process: what a killed process leaves, the next save overwrites.
    return path.with_name(f"{path.name}.tmp")


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(path: Path, content: dict[str, Any], *, previous: Path | None = None) -> str:
    """Write `content` so that a crash at any moment leaves a whole file.

    Args:
        path: Where to write; its folder must exist.
        content: Tensors and plain Python containers.
        previous: Where to keep the file that is replaced; None: nowhere.

    Returns:
        The SHA-256 of the content.

    Raises:
        OSError: The file cannot be written; `path` and `previous` are as they were.
    """
    unfinished = temporary(path)
    try:
        with open(unfinished, "w+b") as file:
            writer = _Writer(file)
            try:
                torch.save(
                    {"format": FORMAT, "version": VERSION, **content}, cast(BinaryIO, writer)
                )
            except RuntimeError as error:
                if writer.error is None:
                    raise
                raise writer.error from error
            writer.close_archive()
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            if path.is_dir() or previous.is_dir():  # in parts: see `training.shards`
                remove(previous)
            os.replace(path, previous)  # a crash here leaves `previous`, which `load_first` finds
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync_folder(path.parent)
    return writer.sha256.hexdigest()


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files of a process that was killed while saving."""
    for path in folder.glob("*.tmp"):
        remove(path)


def _verify(path: Path) -> None:
    """Compare the file's bytes with its checksum."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        left = size - len(_SIZE_FIELD) - _COMMENT_SIZE
        while left > 0:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                break
            sha256.update(chunk)
            left -= len(chunk)
        end = file.read()
    sha256.update(_NO_COMMENT)
    label = _SIZE_FIELD + _LABEL
    if not end.startswith(label):
        raise CheckpointError(
            f"cannot read {path}: no checksum at its end, so it is cut off or not a last.ckpt or "
            "best.ckpt of this program; to start from other weights use finetune"
        )
    if end != label + sha256.hexdigest().encode():
        raise CheckpointError(f"cannot read {path}: altered, its SHA-256 does not match")


def digest(path: Path) -> str:
    """The SHA-256 that a checkpoint file carries."""
    with open(path, "rb") as file:
        file.seek(-64, os.SEEK_END)
        return file.read().decode("ascii", errors="replace")


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; code in the file is refused, never run.

    Raises:
        CheckpointError: The file is missing, cut off, altered or no checkpoint of this program.
    """
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}: no such file")
    try:
        _verify(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"cannot read {path}: not a last.ckpt or best.ckpt of this program; to start from "
            "other weights use finetune"
        )
    if content["version"] != VERSION:
        raise CheckpointError(
            f"cannot read {path}: its version must be {VERSION}, got {content['version']}"
        )
    return content


def load_first(
    paths: Sequence[Path], read: Callable[[Path], dict[str, Any]] = load
) -> tuple[dict[str, Any], Path, list[str]]:
    """Read the first of `paths` that is good.

    Args:
        paths: Checkpoints, the best first.
        read: Reads one; `training.shards.load` knows those in parts too.

    Returns:
        The content, its path, and for each file before it why it was passed over.

    Raises:
        CheckpointError: None is good; gives the reason for each.
    """
    faults: list[str] = []
    for path in paths:
        try:
            return read(path), path, faults
        except CheckpointError as error:
            faults.append(str(error))
    raise CheckpointError(f"resume must name a whole checkpoint: {'; '.join(faults)}")


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
