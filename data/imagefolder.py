"""Images in ImageNet's folder layout, `root/train/<class>/*` and `root/val/<class>/*`.

Labels follow the sorted class names. Transforms are timm's: random resized crop, flip, colour
jitter or an automatic policy and random erasing for training; resize and centre crop otherwise.
"""

import os
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from timm.data.transforms_factory import create_transform
from torchvision.datasets import ImageFolder

from conf.schema import ConfigError, ImageFolderConfig
from data.base import ImageData

LAYOUT = "root/train/<class>/<image> and root/val/<class>/<image>"


def load_rgb(path: str) -> Image.Image:
    """Decode one image as RGB.

    Raises:
        RuntimeError: The file is not an image that can be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise RuntimeError(f"cannot decode the image {path}: {error}") from error


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")


def check_layout(root: Path) -> list[str]:
    """Check the folders before anything is read and return the class names.

    Raises:
        ConfigError: The layout is not the expected one; the message says what was found.
    """
    if not root.is_dir():
        raise ConfigError(f"data.root must be a folder with {LAYOUT}, got {root}: no such folder")
    found = _subfolders(root)
    missing = [split for split in ("train", "val") if split not in found]
    if missing:
        raise ConfigError(
            f"data.root must hold {LAYOUT}; {root} has no {' and no '.join(missing)} folder, "
            f"it holds {_shown(found) or 'no folders'}"
        )
    classes = {split: _subfolders(root / split) for split in ("train", "val")}
    for split, names in classes.items():
        if not names:
            raise ConfigError(
                f"data.root must hold {LAYOUT}; {root / split} has no class folders in it"
            )
    if classes["train"] != classes["val"]:
        differing = sorted(set(classes["train"]) ^ set(classes["val"]))
        raise ConfigError(
            f"{root}/train and {root}/val must hold the same classes; only in one: "
            f"{_shown(differing)}"
        )
    return classes["train"]


def build_imagefolder(config: ImageFolderConfig) -> ImageData:
    """Index the folder and attach timm's transforms.

    Raises:
        ConfigError: The folder is missing, empty or laid out otherwise.
    """
    root = Path(config.root).expanduser()
    classes = check_layout(root)
    mean, std = tuple(config.mean), tuple(config.std)
    train_transform = create_transform(
        config.img_size,
        is_training=True,
        scale=(config.min_crop_area, 1.0),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment,
        interpolation=config.interpolation,
        mean=mean,
        std=std,
        re_prob=config.erase_prob,
        re_mode=config.erase_mode,
    )
    val_transform = create_transform(
        config.img_size,
        interpolation="bicubic" if config.interpolation == "random" else config.interpolation,
        mean=mean,
        std=std,
        crop_pct=config.crop_pct,
    )
    try:
        train = ImageFolder(str(root / "train"), train_transform, loader=load_rgb)
        val = ImageFolder(str(root / "val"), val_transform, loader=load_rgb)
    except FileNotFoundError as error:  # names the class folders without images
        raise ConfigError(f"data.root must hold {LAYOUT}; in {root}: {error}") from error
    return ImageData(
        train=train,
        val=val,
        class_names=tuple(classes),
        in_chans=3,
        img_size=config.img_size,
    )
