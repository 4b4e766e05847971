"""Data sets of the Hugging Face `datasets` library: memory-mapped Arrow tables.

The table is read by index, so that order, augmentation and continuing are exact as for files. The
images are decoded here, from the stored bytes, so that a broken one can be named.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conf.schema import ConfigError, HuggingFaceConfig
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


class HuggingFaceImages(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """One split as `(image, label)`.

    Args:
        table: The split, with image and label as its columns in this order, images not decoded.
        transform: From a decoded image to a tensor.
        labels: Label of each value of the label column; None where they are labels already.
        split: Name of the split, for messages.
    """

    def __init__(
        self, table: Any, transform: Transform, *, labels: dict[Any, int] | None, split: str
    ) -> None:
        self.table = table
        self.transform = transform
        self.labels = labels
        self.split = split

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        stored, label = self.table[index].values()
        name = f"{self.split}[{index}]"
        if stored is None:
            raise BrokenImageError(name, "the row has no image")
        path = stored["path"]
        if stored["bytes"] is not None:
            image = decode_rgb(stored["bytes"], f"{name} ({path})" if path else name)
        else:
            image = decode_rgb(Path(path), f"{name} ({path})")
        return self.transform(image), label if self.labels is None else self.labels[label]


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Keep the library from asking the Hub inside the block."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _load(datasets: Any, config: HuggingFaceConfig) -> Any:
    """The splits at `config.path`."""
    path = Path(config.path).expanduser()
    looks_local = config.path.startswith((".", "~", os.sep)) or config.path.count("/") > 1
    if looks_local and not path.is_dir():
        raise ConfigError(
            "data.path must be a folder or a name on the Hugging Face Hub, got "
            f"{config.path}: no such folder"
        )
    if (path / "state.json").is_file():
        raise ConfigError(
            f"data.path must hold the splits {config.train_split} and {config.val_split}; {path} "
            "is a single split: give the folder that DatasetDict.save_to_disk made"
        )
    try:
        if (path / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(path))
        source = str(path) if path.is_dir() else config.path
        if config.download:
            return datasets.load_dataset(source, config.subset)
        with _offline(datasets):
            return datasets.load_dataset(source, config.subset)
    except Exception as error:  # the library's readers and its client have errors of every kind
        if path.is_dir():
            rule = (
                "be a folder made by save_to_disk, or one of parquet files or images that "
                f"load_dataset can read; it holds {shown(sorted(os.listdir(path))) or 'nothing'}"
            )
        elif config.download:
            rule = "name a data set on the Hugging Face Hub that you may read"
        else:
            rule = "name a data set in the local cache, or data.download=true be set to fetch it"
        raise ConfigError(
            f"data.path must {rule}; got {config.path} ({type(error).__name__}: {error})"
        ) from error


def _split(datasets: Any, loaded: Any, config: HuggingFaceConfig, key: str) -> Any:
    """The two columns of the split that the setting `key` names, images not decoded."""
    name = getattr(config, key)
    if name not in loaded:
        raise ConfigError(
            f"data.{key} must be one of {', '.join(sorted(loaded))}, the splits of {config.path}, "
            f"got {name}"
        )
    table = loaded[name]
    for column_key in ("image_column", "label_column"):
        column = getattr(config, column_key)
        if column not in table.column_names:
            raise ConfigError(
                f"data.{column_key} must be one of {', '.join(table.column_names)}, the columns "
                f"of {config.path}, got {column}"
            )
    table = table.select_columns([config.image_column, config.label_column]).with_format(None)
    try:
        return table.cast_column(config.image_column, datasets.Image(decode=False))
    except (NotImplementedError, TypeError, ValueError) as error:  # of pyarrow
        raise ConfigError(
            f"data.image_column must hold images, encoded or as paths; {config.image_column} of "
            f"{config.path} holds {table.features[config.image_column]}"
        ) from error


def build_huggingface(config: HuggingFaceConfig) -> ImageData:
    """Open both splits and find out the classes.

    Class names come from the label column's type. Where that is not `ClassLabel`, the sorted
    distinct values of the training split are the classes.

    Raises:
        ConfigError: The library is missing, or path, splits, columns or labels are not as
            configured.
    """
    datasets = require("datasets", "huggingface")
    transforms = train_transform(config), eval_transform(config)
    loaded = _load(datasets, config)
    train = _split(datasets, loaded, config, "train_split")
    val = _split(datasets, loaded, config, "val_split")

    column = config.label_column
    values = {key: table.unique(column) for key, table in (("train", train), ("val", val))}
    if any(None in present for present in values.values()):
        raise ConfigError(
            f"data.label_column must hold a label in every row; {column} of {config.path} does not"
        )
    kinds = train.features[column], val.features[column]
    labels: dict[Any, int] | None = None
    if isinstance(kinds[0], datasets.ClassLabel):
        names = kinds[0].names
        if kinds[1] != kinds[0]:
            raise ConfigError(
                f"data.label_column must have the same classes in both splits; {column} of "
                f"{config.path} is {kinds[0]} in one and {kinds[1]} in the other"
            )
    else:
        if not all(isinstance(value, int | str) for value in values["train"]):
            raise ConfigError(
                f"data.label_column must hold whole numbers or texts; {column} of {config.path} "
                f"holds {kinds[0]}"
            )
        classes = sorted(values["train"])
        labels = {value: label for label, value in enumerate(classes)}
        names = [str(value) for value in classes]
        unknown = [str(value) for value in values["val"] if value not in labels]
        if unknown:
            raise ConfigError(
                "data.val_split must hold classes of the training split alone; "
                f"{config.val_split} of {config.path} also has {shown(unknown)}"
            )
    for key, split in (("train", config.train_split), ("val", config.val_split)):
        present = values[key] if labels is None else [labels[value] for value in values[key]]
        where = f"{split} of {config.path}"
        check_labels(np.array(present), len(names), key="data.label_column", where=where)
    return image_data(
        config,
        HuggingFaceImages(train, transforms[0], labels=labels, split=config.train_split),
        HuggingFaceImages(val, transforms[1], labels=labels, split=config.val_split),
        names,
    )
