"""Noise images held in memory, for measuring training speed without disk or decoding."""

import torch

from conf.schema import SyntheticConfig
from data.base import ImageData

DISTINCT_IMAGES = 64


class Synthetic(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """`size` samples that share a few noise images `[in_chans, img_size, img_size]`."""

    def __init__(self, size: int, *, num_classes: int, in_chans: int, img_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (min(size, DISTINCT_IMAGES), in_chans, img_size, img_size)
        self.images = torch.randn(shape, generator=generator)
        self.num_classes = num_classes
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index % len(self.images)], index % self.num_classes


def build_synthetic(config: SyntheticConfig) -> ImageData:
    """Make the noise images."""

    def noise(size: int) -> Synthetic:
        return Synthetic(
            size,
            num_classes=config.num_classes,
            in_chans=config.in_chans,
            img_size=config.img_size,
        )

    return ImageData(
        train=noise(config.train_size),
        val=noise(config.val_size),
        class_names=tuple(str(label) for label in range(config.num_classes)),
        in_chans=config.in_chans,
        img_size=config.img_size,
    )
