"""Images in ImageNet's folder layout, `root/train/<class>/*` and `root/val/<class>/*`.

Labels follow the sorted class names.
"""

import os
from pathlib import Path

from torchvision.datasets import ImageFolder

from conf.schema import ConfigError, ImageFolderConfig
from data.base import ImageData
from data.images import eval_transform, image_data, load_rgb, shown, train_transform

LAYOUT = "root/train/<class>/<image> and root/val/<class>/<image>"


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


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
            f"it holds {shown(found) or 'no folders'}"
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
            f"{shown(differing)}"
        )
    return classes["train"]


def build_imagefolder(config: ImageFolderConfig) -> ImageData:
    """Index the folder and attach timm's transforms.

    Raises:
        ConfigError: The folder is missing, empty or laid out otherwise.
    """
    root = Path(config.root).expanduser()
    classes = check_layout(root)
    try:
        train = ImageFolder(str(root / "train"), train_transform(config), loader=load_rgb)
        val = ImageFolder(str(root / "val"), eval_transform(config), loader=load_rgb)
    except FileNotFoundError as error:  # names the class folders without images
        raise ConfigError(f"data.root must hold {LAYOUT}; in {root}: {error}") from error
    return image_data(config, train, val, classes)
