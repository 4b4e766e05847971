"""WebDataset shards, read by index: local tar files of `KEY.jpg` next to `KEY.cls`.

A start reads the headers of each shard once, for where its images lie. Any image can then be read
by itself, so that order, augmentation, continuing inside an epoch and unequal shards are exact as
for files, with no shuffle buffer. The `webdataset` library says what a pattern and a sample are.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch

from conf.schema import ConfigError, WebDatasetConfig
from data.base import BrokenImageError, ImageData
from data.extras import require
from data.images import (
    Transform,
    check_labels,
    decode_rgb,
    eval_transform,
    image_data,
    shown,
    train_transform,
)

# Files about a shard rather than of a sample, which the library leaves out as well.
META = re.compile(r"__[^/]*__($|/)")

# Columns of an index: where the image begins in its shard, its bytes, its label.
OFFSET, SIZE, LABEL = range(3)


class ShardImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """The images of all shards of a split, in their order.

    Args:
        shards: The tar files.
        indices: One `[images, 3]` array per shard: offset, size, label.
        transform: From a decoded image to a tensor.
    """

    def __init__(self, shards: list[Path], indices: list[np.ndarray], transform: Transform) -> None:
        self.shards = shards
        self.entries = np.concatenate(indices)
        self.ends = np.cumsum([len(index) for index in indices])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        shard = self.shards[np.searchsorted(self.ends, index, side="right")]
        offset, size, label = (int(value) for value in self.entries[index])
        # Opened each time: processes forked from one another would share the place in the file.
        with open(shard, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        try:
            return self.transform(decode_rgb(content, str(shard))), label
        except BrokenImageError as error:  # rare enough to look its name up
            name = f"{shard}/{_member_name(shard, offset)}"
            raise BrokenImageError(name, error.reason) from error


def _member_name(shard: Path, offset: int) -> str:
    with tarfile.open(shard, "r:") as tar:
        return next(member.name for member in tar if member.offset_data == offset)


def _expand(webdataset: Any, pattern: str, key: str) -> list[Path]:
    """The shards of a pattern, all of which must be there."""
    if urlparse(pattern).scheme or pattern.startswith("pipe:"):
        raise ConfigError(
            f"data.{key} must be a pattern of local files, whose images can be read one by one, "
            f"got {pattern}"
        )
    paths = [Path(name).expanduser() for name in webdataset.shardlists.expand_urls(pattern)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        folder = paths[0].parent
        held = shown(sorted(os.listdir(folder))) if folder.is_dir() else "no such folder"
        raise ConfigError(
            f"data.{key} must be a pattern of tar files such as DIR/{key}-{{0000..0146}}.tar, got "
            f"{pattern}; missing: {shown(missing)}; {folder} holds: {held or 'nothing'}"
        )
    return paths


def _members(shard: Path, tar: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The files of a shard as the library's grouping wants them, places in place of contents."""
    for member in tar:
        if member.isreg() and not META.match(member.name):
            yield {"fname": member.name, "data": member, "__url__": str(shard)}


def _read_index(webdataset: Any, shard: Path, config: WebDatasetConfig, key: str) -> np.ndarray:
    """Offset, size and label of each image of a shard, `[images, 3]`."""
    expected = f"KEY.{{{','.join(config.image_keys)}}} next to KEY.{config.label_key}"
    rows = []
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for sample in webdataset.tariterators.group_by_keys(_members(shard, tar)):
                image = next((sample[ext] for ext in config.image_keys if ext in sample), None)
                label = sample.get(config.label_key)
                if image is None or label is None:
                    parts = [name for name in sample if not name.startswith("__")]
                    raise ConfigError(
                        f"data.{key} must lead to shards with {expected} (data.image_keys, "
                        f"data.label_key); {sample['__key__']} in {shard} has {shown(parts)}"
                    )
                file.seek(label.offset_data)
                content = file.read(label.size)
                try:
                    rows.append((image.offset_data, image.size, int(content)))
                except ValueError as error:
                    raise ConfigError(
                        f"data.label_key must name a whole number as text; {label.name} in {shard} "
                        f"holds {content[:20]!r}"
                    ) from error
    except ConfigError:
        raise
    except ValueError as error:  # of the grouping, which adds other arguments to its message
        raise ConfigError(
            f"data.{key} must lead to shards with {expected}; {shard}: {error.args[0]}"
        ) from error
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(
            f"data.{key} must lead to whole, uncompressed tar files; {shard}: {error}"
        ) from error
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _index(webdataset: Any, shard: Path, config: WebDatasetConfig, key: str) -> np.ndarray:
    """The index of a shard, from `config.index_dir` if that has it."""
    if config.index_dir is None:
        return _read_index(webdataset, shard, config, key)
    stat = shard.stat()
    # A changed shard or other extensions make another name.
    made_of = (str(shard.resolve()), stat.st_size, stat.st_mtime_ns, config.image_keys)
    name = sha256(repr((*made_of, config.label_key)).encode()).hexdigest()[:16]
    path = Path(config.index_dir).expanduser() / f"{shard.stem}-{name}.npy"
    if path.is_file():
        return np.load(path)
    index = _read_index(webdataset, shard, config, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with open(unfinished, "wb") as file:
        np.save(file, index)
    os.replace(unfinished, path)  # whole or not there, whichever process writes it
    return index


def build_webdataset(config: WebDatasetConfig) -> ImageData:
    """Index the shards of both splits.

    Raises:
        ConfigError: The library is missing, a shard is missing, damaged or holds other samples, or
            a label is no class.
    """
    webdataset = require("webdataset", "webdataset")
    transforms = {"train": train_transform(config), "val": eval_transform(config)}
    splits: dict[str, ShardImages] = {}
    for key, transform in transforms.items():
        shards = _expand(webdataset, getattr(config, key), key)
        indices = [_index(webdataset, shard, config, key) for shard in shards]
        splits[key] = ShardImages(shards, indices, transform)
        if not len(splits[key]):
            raise ConfigError(f"data.{key} must lead to images; {getattr(config, key)} has none")
    num_classes = config.num_classes
    if num_classes is None:
        num_classes = int(splits["train"].entries[:, LABEL].max()) + 1
    for key, split in splits.items():
        where = getattr(config, key)
        check_labels(split.entries[:, LABEL], num_classes, key=f"data.{key}", where=where)
    return image_data(
        config, splits["train"], splits["val"], [str(label) for label in range(num_classes)]
    )
