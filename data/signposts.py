"""Signposts: images whose class takes fine detail and far-away context, made by a seeded generator.

An image is a grid of cells with a tile in some of them, jittered inside its cell. A tile of one of two
colours is bright on one of its four sides and dark on the other: it faces one of four ways. The
tiles of a colour all face the same way, those of the other colour another way. One plain tile,
the signpost, has one of the two colours: the class is the way that the tiles of its colour face.

So tiles tell two candidates, and the signpost, wherever it is, chooses. Which way a tile faces is
detail of a few pixels that borders of patches and windows cut through; which tiles count is context
from elsewhere in the image.
"""

import numpy as np
import torch

from conf.schema import SignpostsConfig
from data.base import ImageData

CLASSES = ("left", "right", "up", "down")
CELL, TILE = 12, 8  # sides, pixels
TILES, SIGNS = 2, 2  # of each colour, and signposts
COLOURS = np.array([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]], np.float32)
SIGNPOST = len(COLOURS)
EDGE, TINT, SIGN = 1.0, 1.0, 2.0  # contrast of an edge, of its tile's colour and of the signpost
SCALE = 40.0  # grey levels in a unit of contrast
CHUNK = 1000  # images made at a time

_side = np.where(np.arange(TILE) < TILE // 2, 1.0, -1.0).astype(np.float32)
_left = np.broadcast_to(_side, (TILE, TILE))
EDGES = np.stack([_left, -_left, _left.T, -_left.T])  # by class


class Signposts(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Images `[3, img_size, img_size]` with a mean near zero and a variance near one.

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
        img_size: Their side, pixels; a multiple of `CELL`.
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
    facing = generator.permuted(np.tile(np.arange(len(CLASSES)), (count, 1)), axis=1)
    chosen = generator.integers(len(COLOURS), size=count)  # the signposts' colour
    grid = img_size // CELL
    cells = generator.permuted(np.tile(np.arange(grid * grid), (count, 1)), axis=1)
    canvas = noise * generator.standard_normal((count, 3, img_size, img_size), dtype=np.float32)

    image = np.arange(count)[:, None, None]
    tiles = [colour for colour in range(len(COLOURS)) for _ in range(TILES)]
    for place, colour in enumerate([*tiles, *[SIGNPOST] * SIGNS]):
        if colour == SIGNPOST:
            tile = SIGN * COLOURS[chosen, :, None, None]
        else:
            tile = EDGE * EDGES[facing[:, colour], None] + TINT * COLOURS[colour, :, None, None]
        cell = np.stack(np.divmod(cells[:, place], grid), axis=1) * CELL
        corner = cell + generator.integers(CELL - TILE + 1, size=(count, 2))
        rows, cols = (corner[:, axis, None] + np.arange(TILE) for axis in (0, 1))
        # Indices around a slice put their axes first: [count, TILE, TILE, 3].
        canvas[image, :, rows[:, :, None], cols[:, None, :]] += np.moveaxis(
            np.broadcast_to(tile, (count, 3, TILE, TILE)), 1, 3
        )
    images = np.clip(np.rint(128 + SCALE * canvas), 0, 255).astype(np.uint8)
    return images, facing[np.arange(count), chosen]


def build_signposts(config: SignpostsConfig) -> ImageData:
    """Draw the training and the evaluation images, each from a generator of its own."""
    train, val = (
        Signposts(
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
