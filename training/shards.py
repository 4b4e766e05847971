"""A checkpoint in parts: a folder to which every process writes its own part.

`index.ckpt` holds what is not sharded and the SHA-256 of each part; `part_R.ckpt` holds process R's
slices. Each is a checkpoint file (`training.checkpoint`): with a checksum, and read without
executing code. (The metadata of `torch.distributed.checkpoint` is a pickle, which is why that is
not used.) The folder is made under another name and renamed when it is whole.

Slices are cut along the first dimension in the order of processes, so that a reader of any number
of processes, one included, puts them together again.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Shard

from training import checkpoint
from training.checkpoint import CheckpointError

INDEX = "index.ckpt"
_SLICES = "slices of"  # key of the mark that stands in the index where a sharded tensor was


def is_sharded(path: Path) -> bool:
    """Whether `path` is, or would be, a checkpoint in parts: a folder with a checkpoint's name."""
    return path.suffix == ".ckpt" and path.is_dir()


def _part(folder: Path, rank: int) -> Path:
    return folder / f"part_{rank}.ckpt"


def split(tree: Any, slices: dict[str, torch.Tensor], name: str = "") -> Any:
    """Move this process's slices of all sharded tensors in `tree` to `slices`; gives the rest."""
    if isinstance(tree, DTensor):
        (placement,) = tree.placements
        assert placement == Shard(0)
        slices[name] = tree.to_local().detach().to("cpu", copy=True)
        return {_SLICES: name}
    if isinstance(tree, dict):
        return {key: split(value, slices, f"{name}/{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [split(value, slices, f"{name}/{key}") for key, value in enumerate(tree)]
    return tree


def _join(tree: Any, parts: list[dict[str, torch.Tensor]]) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_SLICES}:
            return torch.cat([part[tree[_SLICES]] for part in parts])
        return {key: _join(value, parts) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_join(value, parts) for value in tree]
    return tree


def save_part(path: Path, rank: int, slices: dict[str, torch.Tensor]) -> str:
    """Write the part of process `rank` of the checkpoint that `commit` will put at `path`.

    Returns:
        Its SHA-256.

    Raises:
        OSError: It cannot be written.
    """
    folder = checkpoint.temporary(path)
    folder.mkdir(exist_ok=True)
    return checkpoint.save(_part(folder, rank), {"slices": slices})


def commit(path: Path, rest: dict[str, Any], digests: list[str], *, previous: Path) -> None:
    """Complete the checkpoint when all parts are written, and put it in its place.

    Args:
        path: Where the checkpoint goes; what is there becomes `previous`.
        rest: What `split` gave.
        digests: The SHA-256 of each part.
        previous: Where to keep the checkpoint that is replaced.

    Raises:
        OSError: It cannot be written; `path` or `previous` is still whole.
    """
    folder = checkpoint.temporary(path)
    checkpoint.save(folder / INDEX, {**rest, "parts": digests})
    if path.exists():
        checkpoint.remove(previous)  # a folder cannot be replaced as a file can
        os.replace(path, previous)
    os.replace(folder, path)
    checkpoint.sync_folder(path.parent)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint, a file or in parts, onto the CPU with whole tensors.

    Raises:
        CheckpointError: A file of it is missing, cut off, altered, or of another checkpoint.
    """
    if not is_sharded(path):
        return checkpoint.load(path)
    content = checkpoint.load(path / INDEX)
    parts = []
    for rank, digest in enumerate(content.pop("parts")):
        file = _part(path, rank)
        parts.append(checkpoint.load(file)["slices"])
        if checkpoint.digest(file) != digest:
            raise CheckpointError(f"cannot read {path}: {file.name} is of another checkpoint")
    return _join(content, parts)


def discard(path: Path) -> None:
    """Remove the unfinished parts of a checkpoint that could not be saved."""
    shutil.rmtree(checkpoint.temporary(path), ignore_errors=True)
