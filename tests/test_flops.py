"""The formulas for `torch.utils.flop_counter` against a hand count and against plain products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from kernels import FocalGeometry, FocalLevel, focal_attention
from kernels.api import TRITON_INSTALLED
from kernels.flops import backward_flops, forward_flops
from kernels.geometry import encode_geometry

if TRITON_INSTALLED:
    from kernels.ops import INTERPRETED
else:
    INTERPRETED = False

GEOMETRIES = {
    "window": FocalGeometry(4, (FocalLevel(1, 4),)),
    "ring": FocalGeometry(3, (FocalLevel(1, 5),), "mask", 1),
}


def test_first_released_stage_matches_a_hand_count():
    geometry = FocalGeometry(7, (FocalLevel(1, 13), FocalLevel(7, 7)))
    shape, code = (2, 56, 56, 3, 32), encode_geometry(geometry)
    # 2 images, 8·8 windows, 3 heads, 49 queries, 169 + 49 keys, 32 multiply-adds, 2 operations.
    product = 2 * 64 * 3 * 49 * 218 * 32 * 2
    assert forward_flops(shape, code) == 2 * product
    assert backward_flops(shape, code) == 5 * product


def test_map_that_is_no_multiple_of_the_window_counts_whole_windows():
    code = encode_geometry(GEOMETRIES["window"])
    assert forward_flops((1, 5, 9, 2, 8), code) == forward_flops((1, 8, 12, 2, 8), code)
    assert forward_flops((0, 8, 8, 2, 8), code) == 0


@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_formulas_equal_the_count_of_plain_products(name):
    geometry = GEOMETRIES[name]
    batch, height, width, heads, head_dim = shape = (2, 7, 5, 3, 8)
    rows, cols = geometry.num_windows(height, width)
    groups = batch * rows * cols * heads
    query = torch.randn(groups, geometry.num_queries, head_dim, requires_grad=True)
    key, value = (
        torch.randn(groups, geometry.num_keys, head_dim, requires_grad=True) for _ in range(2)
    )
    with FlopCounterMode(display=False) as counter:
        out = (query @ key.mT).softmax(-1) @ value
    assert counter.get_total_flops() == forward_flops(shape, encode_geometry(geometry))
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.randn_like(out))
        _ = query @ key.mT  # the scores, which the operator computes again
    assert counter.get_total_flops() == backward_flops(shape, encode_geometry(geometry))


BACKENDS = [
    "eager",
    pytest.param(
        "triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", list(GEOMETRIES))
def test_operator_is_counted_by_the_formulas(name, backend):
    geometry, shape = GEOMETRIES[name], (1, 7, 5, 2, 16)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, geometry.num_queries, geometry.num_keys, requires_grad=True)
    code = encode_geometry(geometry)
    with FlopCounterMode(display=False) as counter:
        out = focal_attention(query, key, value, bias, geometry=geometry, backend=backend)
    assert counter.get_total_flops() == forward_flops(shape, code)
    with FlopCounterMode(display=False) as counter:
        out.backward(torch.randn_like(out))
    assert counter.get_total_flops() == backward_flops(shape, code)
