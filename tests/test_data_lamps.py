"""The embedded task: drawn from its seed alone, balanced, and not solved by a linear model."""

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier

from conf import compose
from conf.schema import LampsConfig
from data import ImageData, build
from data.lamps import CLASSES, PITCH, ROWS, TILE, make


def lamps(**options: int) -> ImageData:
    return build(LampsConfig("lamps", 48, **options))  # type: ignore[arg-type]


def test_lamps_have_ten_thousand_training_images() -> None:
    config = compose("scale=cpu").data
    assert isinstance(config, LampsConfig)
    assert config.train_size >= 10_000


def test_lamps_depend_on_their_seed_alone_and_the_splits_differ() -> None:
    data, again, other = (lamps(train_size=30, val_size=30, data_seed=seed) for seed in (0, 0, 1))
    image, label = data.train[7]
    assert torch.equal(image, again.train[7][0])
    assert label == again.train[7][1]
    assert not torch.equal(image, other.train[7][0])
    assert not torch.equal(image, data.val[7][0])


def test_lamps_are_normalised_balanced_and_named() -> None:
    data = lamps(train_size=1000, val_size=10)
    image, _ = data.train[0]
    assert image.shape == (3, data.img_size, data.img_size) == (3, 48, 48)
    assert image.dtype == torch.float32
    assert data.class_names == CLASSES
    samples = [data.train[index] for index in range(1000)]
    assert np.bincount([label for _, label in samples]).min() > 200
    pixels = torch.stack([image for image, _ in samples])
    assert pixels.mean().abs() < 0.1
    assert 0.5 < pixels.std() < 1.5


def where(images: np.ndarray, *colour: float) -> np.ndarray:
    """Pixels `[count, height, width]` of exactly this contrast in red, green and blue."""
    levels = 128 + 40 * np.array(colour).reshape(1, 3, 1, 1)
    return (images == levels).all(axis=1)


def way(bright: np.ndarray, dark: np.ndarray) -> int:
    """The class of the way from the dark to the bright half of an arrow."""
    down, right = np.argwhere(bright).mean(axis=0) - np.argwhere(dark).mean(axis=0)
    return int(np.argmax([-right, right, -down, down]))  # as in CLASSES


def test_the_class_is_the_way_of_the_arrows_in_the_rows_of_red_lamps() -> None:
    """Without noise colours tell the parts: an independent reading of the images."""
    images, labels = make(200, img_size=48, noise=0.0, generator=np.random.default_rng(0))
    bright, dark = where(images, 1.5, 1.5, 1.5), where(images, -1.5, -1.5, -1.5)
    red, blue = where(images, 1.5, -1.5, -1.5), where(images, -1.5, -1.5, 1.5)
    read = 0
    for image, label in enumerate(labels):
        halves = np.stack([bright[image], dark[image]])
        first = np.argwhere(halves.any(axis=0) | red[image] | blue[image])[:, 0].min()
        if first == 0:  # the first row may be cut off, and would not tell where the others are
            continue
        for row in range(ROWS):
            band = slice(first + row * PITCH, first + (row + 1) * PITCH - 1)
            arrow = halves[:, band]
            seen = arrow.sum(axis=(1, 2)).min() >= TILE * TILE / 2 - TILE  # not cut off at a side
            if seen and red[image, band].any():
                assert way(*arrow) == label
                read += 1
            elif seen and blue[image, band].any():
                assert way(*arrow) != label
                read += 1
    assert read > 400


def test_a_linear_model_is_at_chance_on_lamps() -> None:
    images, labels = make(3000, img_size=48, noise=0.15, generator=np.random.default_rng(0))
    pixels = (images.reshape(3000, -1).astype(np.float32) - 128) / 40
    model = RidgeClassifier(alpha=1e3, solver="lsqr", max_iter=20).fit(pixels[:2000], labels[:2000])
    assert model.score(pixels[2000:], labels[2000:]) < 0.32
