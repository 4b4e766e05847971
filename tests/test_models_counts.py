"""Parameters and FLOPs against the released README, counted by PyTorch; differences explained.

Parameters: a released ring has 132 entries per query and head where 120 cells are distinct, so ours
has 12 · 49 fewer per head and block with a ring. Added back, the totals agree to the last digit.

FLOPs: the README counts a multiply-add once, PyTorch's counter twice. Ours are 0.4 % fewer for one
reason: the released code projects every pooled cell to query, key and value, while here keys and
values are pooled after the projection of the tokens. With that projection added back, they agree.
"""

from functools import lru_cache
from typing import Any

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  registers the variants
from conf import compose

RELEASED = [  # millions of parameters, billions of multiply-adds at 224×224
    ("focal_tiny", 28.88, 4.92),
    ("focal_small", 51.14, 9.43),
    ("focal_base", 89.82, 16.37),
    ("focal_tiny_conv", 30.83, 5.17),
    ("focal_small_conv", 53.09, 9.68),
    ("focal_base_conv", 93.27, 16.80),
]


@pytest.fixture(autouse=True)
def _no_initial_values(monkeypatch):
    """Counting needs shapes alone: drawing millions of values is most of the building time."""
    monkeypatch.setattr("models.focal_transformer.init_linear", lambda module: None)


@lru_cache(maxsize=1)
def variant(name: str) -> Any:
    return timm.create_model(name, attention_backend="reference").eval()


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: Any) -> float:
    """Billions for one 224×224 image, counted on shapes alone."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.empty(1, 3, 224, 224, device="meta"))
    return counter.get_total_flops() / 2 / 1e9


def doubled_ring_entries(model: Any) -> int:
    """Entries that a released model has beyond ours."""
    rings = [p for name, p in model.named_parameters() if name.endswith(".bias.ring")]
    return sum(12 * ring.shape[0] * ring.shape[1] for ring in rings)


def second_projection(model: Any) -> float:
    """Billions of multiply-adds for projecting pooled cells to query, key and value."""
    total = 0
    for (height, width), stage in zip(model.map_sizes, model.stages, strict=True):
        for block in stage.blocks:
            geometry, dim = block.attn.geometry, block.attn.dim
            for level in range(1, len(geometry.levels)):
                rows, cols = geometry.map_cells(level, height, width)
                total += rows * cols * dim * 3 * dim
    return total / 1e9


@pytest.mark.parametrize(("name", "parameters", "flops"), RELEASED)
def test_a_variant_has_the_released_size_and_cost(name, parameters, flops):
    model = variant(name)
    assert round((count(model) + doubled_ring_entries(model)) / 1e6, 2) == parameters
    ours = multiply_adds(model)
    assert 0.994 * flops < ours < flops
    assert ours + second_projection(model) == pytest.approx(flops, rel=1e-3)


def test_focal_tiny_has_the_exact_number_of_released_parameters():
    model = variant("focal_tiny")
    assert count(model) + doubled_ring_entries(model) == 28_880_380
    assert count(model) == 28_827_460


@pytest.mark.parametrize(
    ("interaction", "parameters", "flops"),
    [
        ("window", 28.29, 4.49),
        ("local", 28.87, 4.82),
        ("global", 28.30, 4.60),
        ("both", 28.88, 4.92),
    ],
)
def test_members_of_the_interaction_ablation_have_the_released_cost(interaction, parameters, flops):
    config = compose(
        "experiment=ablation/interaction",
        "scale=imagenet",
        "data.root=x",
        f"interaction={interaction}",
    ).model
    options = {"focal_levels": config.focal_levels, "expand_size": config.expand_size}
    model = timm.create_model(config.name, attention_backend="reference", **options).eval()
    assert round((count(model) + doubled_ring_entries(model)) / 1e6, 2) == parameters
    assert multiply_adds(model) + second_projection(model) == pytest.approx(flops, rel=2e-3)
