"""A run small enough for a test."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from conf import compose
from training import run

MODEL = (
    "model=focal_micro",
    "model.depths=[1,1]",
    "model.num_heads=[1,2]",
    "model.region_sizes=[5,3]",
)
# Beside the model. Exact comparisons need one device and one precision everywhere.
SETTINGS = (
    "data.img_size=28",
    "logger=none",
    "schedule.warmup_epochs=0",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)
TINY = (*MODEL, *SETTINGS)


def trainer(options: tuple[str, ...]) -> Callable[..., dict[str, float]]:
    """A function that trains with `options` and its own arguments, in a folder that it makes."""

    def train(folder: Path, *overrides: str) -> dict[str, float]:
        folder.mkdir(exist_ok=True)
        return run(compose(*options, *overrides), folder)

    return train


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """Two sets of tensors with the same names and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
