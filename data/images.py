"""What the sources of stored images share: decoding, timm's transforms, checks of labels."""

import io
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.transforms_factory import create_transform

from conf.schema import ConfigError, ImageConfig
from data.base import BrokenImageError, ImageData, ImageDataset

_logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], torch.Tensor]


def decode_rgb(source: Path | bytes, name: str) -> Image.Image:
    """Decode one image, a file or its content, as RGB.

    Raises:
        BrokenImageError: It cannot be decoded; the message gives its `name`.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BrokenImageError(name, "no image format that Pillow knows") from error
    except Exception as error:  # on damaged data Pillow's decoders raise almost anything
        raise BrokenImageError(name, f"{type(error).__name__}: {error}") from error


def load_rgb(path: str) -> Image.Image:
    """Decode an image file as RGB, for torchvision's datasets.

    Raises:
        BrokenImageError: It cannot be decoded; the message names it.
    """
    return decode_rgb(Path(path), path)


def train_transform(config: ImageConfig) -> Transform:
    """timm's training transform: random resized crop, flip, colours, normalisation, erasing.

    Raises:
        ConfigError: `data.auto_augment` is no policy of timm's.
    """
    try:
        return create_transform(
            config.img_size,
            is_training=True,
            scale=(config.min_crop_area, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter,
            auto_augment=config.auto_augment,
            interpolation=config.interpolation,
            mean=tuple(config.mean),
            std=tuple(config.std),
            re_prob=config.erase_prob,
            re_mode=config.erase_mode,
        )
    except (AssertionError, KeyError, ValueError) as error:  # all else was validated before
        raise ConfigError(
            "data.auto_augment must be a policy of timm's, such as rand-m9-mstd0.5-inc1, got "
            f"{config.auto_augment!r}: {error}"
        ) from error


def eval_transform(config: ImageConfig) -> Transform:
    """timm's evaluation transform: resize, centre crop, normalisation."""
    return create_transform(
        config.img_size,
        interpolation="bicubic" if config.interpolation == "random" else config.interpolation,
        mean=tuple(config.mean),
        std=tuple(config.std),
        crop_pct=config.crop_pct,
    )


def image_data(
    config: ImageConfig, train: ImageDataset, val: ImageDataset, class_names: Sequence[str]
) -> ImageData:
    """Put together what a source of RGB images hands to training."""
    return ImageData(
        train=train,
        val=val,
        class_names=tuple(class_names),
        in_chans=3,
        img_size=config.img_size,
        max_broken=config.max_broken,
    )


def shown(names: Sequence[str]) -> str:
    """The first few of `names` for a message, and their number if there are more."""
    return ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")


def check_labels(labels: np.ndarray, num_classes: int, *, key: str, where: str) -> None:
    """Check the labels of one split; a class without images is worth a warning.

    Args:
        labels: The labels, in any order.
        num_classes: Number of classes.
        key: The setting to name in the message.
        where: What the labels belong to, for the message.

    Raises:
        ConfigError: There is none, or one lies outside `[0, num_classes)`.
    """
    if not len(labels):
        raise ConfigError(f"{key} must lead to images; {where} has none")
    present = np.unique(labels)
    if present[0] < 0 or present[-1] >= num_classes:
        outside = present[(present < 0) | (present >= num_classes)]
        raise ConfigError(
            f"{key} must give labels from 0 to {num_classes - 1}; {where} also has "
            f"{shown([str(label) for label in outside])}"
        )
    if len(present) < num_classes:
        missing = np.setdiff1d(np.arange(num_classes), present)
        _logger.warning(
            "%s has no image of %d of the %d classes: labels %s",
            where,
            len(missing),
            num_classes,
            shown([str(label) for label in missing]),
        )
