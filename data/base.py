"""What a data source hands to training."""

from dataclasses import dataclass
from typing import Protocol

import torch


class BrokenImageError(RuntimeError):
    """One stored image that cannot be decoded.

    Args:
        name: Where the image is: a file, or a file and the place in it.
        reason: What is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot decode the image {self.name}: {self.reason}"


class ImageDataset(Protocol):
    """A map-style dataset of `(image, label)`.

    `image` is a float tensor `[channels, height, width]`, normalised; `label` is in
    `[0, num_classes)`. Augmentation may use `random`, `numpy.random` and `torch` freely: the loader
    seeds all three for every sample. An image that cannot be decoded raises `BrokenImageError`,
    which the loader deals with.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]: ...


@dataclass(frozen=True)
class ImageData:
    """A training set, an evaluation set and what a model must know about them.

    Attributes:
        train: Augmented training images.
        val: Evaluation images, never augmented.
        class_names: One name per label, in label order.
        in_chans: Channels per image.
        img_size: Height and width of the images, in pixels.
        max_broken: Most images that a run may leave out because they cannot be decoded.
    """

    train: ImageDataset
    val: ImageDataset
    class_names: tuple[str, ...]
    in_chans: int
    img_size: int
    max_broken: int = 0

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)
