"""The embedded task: it is what its description says, and no shortcut solves it."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from conf import ConfigError, compose
from conf.schema import SignpostsConfig
from data import build
from data.signposts import CLASSES, COLOURS, make


def signposts(**options: object) -> SignpostsConfig:
    return SignpostsConfig("signposts", 48, **options)  # type: ignore[arg-type]


def draw(count: int, **options: float) -> tuple[torch.Tensor, np.ndarray]:
    settings = {"img_size": 48, "noise": 0.3} | options
    images, labels = make(count, generator=np.random.default_rng(0), **settings)  # type: ignore[arg-type]
    return torch.from_numpy(images).float(), labels


def test_signposts_have_at_least_ten_thousand_training_images() -> None:
    config = compose("data=signposts").data
    assert isinstance(config, SignpostsConfig)
    assert config.train_size >= 10_000


def test_signposts_depend_on_their_seed_alone_and_splits_differ() -> None:
    options = {"train_size": 30, "val_size": 30}
    data, again = build(signposts(**options)), build(signposts(**options))
    other = build(signposts(**options, data_seed=1))
    image, label = data.train[7]
    assert torch.equal(image, again.train[7][0])
    assert label == again.train[7][1]
    assert not torch.equal(image, other.train[7][0])
    assert not torch.equal(image, data.val[7][0])


def test_signposts_are_normalised_balanced_and_named() -> None:
    data = build(signposts(train_size=1000, val_size=10))
    image, _ = data.train[0]
    assert image.shape == (3, data.img_size, data.img_size) == (3, 48, 48)
    assert image.dtype == torch.float32
    assert data.class_names == CLASSES
    assert np.bincount([data.train[i][1] for i in range(1000)]).min() > 200
    pixels = torch.stack([data.train[i][0] for i in range(100)])
    assert pixels.mean().abs() < 0.05
