"""Data sets built into torchvision, read from `root` or, on request, downloaded to it."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST, Imagenette
from torchvision.transforms import Compose

from conf.schema import ConfigError, TorchvisionConfig
from data.base import ImageData
from data.images import (
    Transform,
    check_labels,
    eval_transform,
    image_data,
    load_rgb,
    shown,
    train_transform,
)


@dataclass(frozen=True)
class _BuiltIn:
    """How to open one of the sets and where torchvision keeps it."""

    open: Callable[..., Any]
    layout: str  # what must lie under root
    by_flag: bool = True  # the split is chosen by train=True, else by split="train"


_IDX = "{train,t10k}-{images-idx3,labels-idx1}-ubyte"


def _imagenette(folder: str, size: str) -> _BuiltIn:
    return _BuiltIn(
        partial(Imagenette, size=size, loader=load_rgb),
        f"{folder}/{{train,val}}/<class>/*.JPEG",
        by_flag=False,
    )


BUILT_IN = {
    "cifar10": _BuiltIn(CIFAR10, "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}"),
    "cifar100": _BuiltIn(CIFAR100, "cifar-100-python/{train,test,meta}"),
    "fashion_mnist": _BuiltIn(FashionMNIST, f"FashionMNIST/raw/{_IDX}"),
    "mnist": _BuiltIn(MNIST, f"MNIST/raw/{_IDX}"),
    "imagenette": _imagenette("imagenette2", "full"),
    "imagenette_320": _imagenette("imagenette2-320", "320px"),
    "imagenette_160": _imagenette("imagenette2-160", "160px"),
}


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")  # grey images in colour, so that colour models fit


def _found(root: Path) -> str:
    if not root.is_dir():
        return "there is no such folder"
    return f"it holds {shown(sorted(os.listdir(root))) or 'nothing'}"


def _open(config: TorchvisionConfig, root: Path, transform: Transform, *, train: bool) -> Any:
    kind = BUILT_IN[config.dataset]
    split = {"train": train} if kind.by_flag else {"split": "train" if train else "val"}
    return kind.open(
        str(root), transform=Compose([_rgb, transform]), download=config.download, **split
    )


def build_torchvision(config: TorchvisionConfig) -> ImageData:
    """Open both splits of the data set that `config.dataset` names.

    Raises:
        ConfigError: It is not there, damaged, or cannot be downloaded.
    """
    if config.dataset not in BUILT_IN:
        raise ConfigError(
            f"data.dataset must be one of {', '.join(sorted(BUILT_IN))}, got {config.dataset!r}"
        )
    layout = BUILT_IN[config.dataset].layout
    root = Path(config.root).expanduser()
    transforms = train_transform(config), eval_transform(config)
    lock: AbstractContextManager = nullcontext()
    try:
        if config.download:
            root.mkdir(parents=True, exist_ok=True)
            # Of several processes one downloads.
            lock = FileLock(root / f".{config.dataset}.lock")
        with lock:
            train = _open(config, root, transforms[0], train=True)
            val = _open(config, root, transforms[1], train=False)
    except Exception as error:  # torchvision reports damage with whatever its parsers raise
        way = "the download failed" if config.download else "data.download=true downloads it"
        raise ConfigError(
            f"data.root must hold {layout} as torchvision lays it out, got {root}: {_found(root)}; "
            f"{way} ({type(error).__name__}: {error})"
        ) from error
    # Imagenette gives all synonyms of a class.
    names, val_names = (
        [name if isinstance(name, str) else name[0] for name in dataset.classes]
        for dataset in (train, val)
    )
    if names != val_names:
        differing = sorted(set(names) ^ set(val_names))
        raise ConfigError(
            f"data.root must hold the same classes in both splits of {layout}; only in one: "
            f"{shown(differing)}"
        )
    for split, dataset in (("training", train), ("test", val)):
        if BUILT_IN[config.dataset].by_flag:
            where = f"the {split} split in {root}"
            if len(dataset.targets) != len(dataset):
                raise ConfigError(
                    f"data.root must hold one label per image; {where} has {len(dataset)} images "
                    f"and {len(dataset.targets)} labels"
                )
            check_labels(np.asarray(dataset.targets), len(names), key="data.root", where=where)
    return image_data(config, train, val, names)
