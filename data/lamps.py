"""Lamps: images whose class takes fine detail and far-away context, made by a seeded generator.

An image has four rows, one under the other, with an arrow and a lamp at random places in each. An
arrow is a tile with a bright and a dark half: it points left, right, up or down. Two lamps are red,
two blue. The arrows in rows with a red lamp point one way, those in rows with a blue lamp another:
the class is the way of the former.

So arrows tell two candidates, and where they stand relative to the lamps chooses. The way of an
arrow is detail of a few pixels, cut through by the borders of patches and windows; whether it
counts is context from its own row, near or far, and from no other.
"""

import numpy as np
import torch

from conf.schema import LampsConfig
from data.base import ImageData

CLASSES = ("left", "right", "up", "down")
ROWS, PITCH = 4, 10  # rows and the pixels from one to the next
TILE = 8  # side of arrows and lamps, pixels
NEAREST = 9  # columns from an arrow to its lamp, at least
BEYOND = 4  # pixels of a tile that may lie outside the image
ARROW, LAMP = 1.5, 1.5  # contrasts
BLUE, RED = np.array([[-1, -1, 1], [1, -1, -1]], np.float32)
SCALE = 40.0  # grey levels in a unit of contrast
CHUNK = 1000  # images made at a time

_side = np.where(np.arange(TILE) < TILE // 2, ARROW, -ARROW).astype(np.float32)
_left = np.broadcast_to(_side, (TILE, TILE))
ARROWS = np.stack([_left, -_left, _left.T, -_left.T])  # by class


class Lamps(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images `[3, img_size, img_size]` with a mean near zero.

    Args:
        images: uint8 `[count, 3, img_size, img_size]`.
        labels: Index into `CLASSES`, one per image.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = torch.from_numpy(images)
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return (self.images[index].float() - 128) / SCALE, self.labels[index]


def make(
    count: int, *, img_size: int, noise: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images.

    Args:
        count: Number of images.
        img_size: Their side, pixels.
        noise: Standard deviation of each pixel's noise, in units of contrast.
        generator: Source of all that is random.

    Returns:
        uint8 images `[count, 3, img_size, img_size]` and labels `[count]`.
    """
    parts = [
        _chunk(min(CHUNK, count - start), img_size, noise, generator)
        for start in range(0, count, CHUNK)
    ]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _chunk(
    count: int, img_size: int, noise: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    every = np.arange(count)
    ways = generator.permuted(np.tile(np.arange(len(CLASSES)), (count, 1)), axis=1)[:, :2]
    red = generator.permuted(np.tile(np.arange(ROWS) < ROWS // 2, (count, 1)), axis=1)
    side = img_size + 2 * BEYOND
    canvas = noise * generator.standard_normal((count, 3, side, side), dtype=np.float32)

    def put(top: np.ndarray, left: np.ndarray, tile: np.ndarray) -> None:
        """Add `tile`, `[count, channels, height, width]` or what broadcasts to it."""
        rows, cols = (corner[:, None] + np.arange(TILE) for corner in (top, left))
        # Indices around a slice put their axes first: [count, TILE, TILE, 3].
        canvas[every[:, None, None], :, rows[:, :, None], cols[:, None, :]] += np.moveaxis(
            np.broadcast_to(tile, (count, 3, TILE, TILE)), 1, 3
        )

    first = generator.integers(side - (ROWS - 1) * PITCH - TILE, size=count)
    for row in range(ROWS):
        # Two columns at least NEAREST apart, in either order.
        places = np.sort(generator.integers(side - TILE - NEAREST + 2, size=(count, 2)), axis=1)
        places[:, 1] += NEAREST - 1
        places = generator.permuted(places, axis=1)
        way = np.where(red[:, row], ways[:, 0], ways[:, 1])
        colour = np.where(red[:, row, None], RED, BLUE)
        for column, tile in ((0, ARROWS[way, None]), (1, LAMP * colour[:, :, None, None])):
            top = first + row * PITCH + generator.integers(2, size=count)
            put(top, places[:, column], tile)
    inner = slice(BEYOND, BEYOND + img_size)
    images = np.rint(128 + SCALE * canvas[:, :, inner, inner]).clip(0, 255).astype(np.uint8)
    return images, ways[:, 0]


def build_lamps(config: LampsConfig) -> ImageData:
    """Draw the training and the evaluation images, each from a generator of its own."""
    train, val = (
        Lamps(
            *make(
                size,
                img_size=config.img_size,
                noise=config.noise,
                generator=np.random.default_rng((config.data_seed, split)),
            )
        )
        for split, size in enumerate((config.train_size, config.val_size))
    )
    return ImageData(
        train=train, val=val, class_names=CLASSES, in_chans=3, img_size=config.img_size
    )
