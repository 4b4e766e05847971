"""The bias in the order in which tensor cores hold scores: every number of it."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import needs_interpreter
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
pytestmark = needs_interpreter

from sanitizer import Sanitizer  # noqa: E402

from kernels import FocalGeometry  # noqa: E402
from kernels.bias_layout import BiasPlan  # noqa: E402
from kernels.launch import Cut, Problem, strides_of  # noqa: E402

# 25 queries in two tiles of 16; 49 + 9 keys in tiles of 32 + 16 + 16 and 16: 80 columns.
GEOMETRY = FocalGeometry(5, ((1, 7), (5, 3)))
CUTS = (Cut(32, 32, ((32, 16), (48, 16))), Cut(32, 0, ((0, 16),)))
BLOCK_M, COLUMNS = 16, 80
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "keys first": lambda x: x.mT.contiguous().mT,
    "inside NaN": lambda x: F.pad(x, (1, 1) * 3, value=math.nan)[1:-1, 1:-1, 1:-1],
    "shared by heads": lambda x: x[:1].expand_as(x),
}


def lay_out(bias: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """What the kernel makes of a bias."""
    query = torch.empty(1, 5, 5, bias.shape[0], 16, dtype=dtype)
    problem = Problem(GEOMETRY, tuple(query.shape), dtype, scale, (5, 5), 0.0, "any")
    shape = problem.shape(CUTS, BLOCK_M, strides_of(query, query, query))
    plan = BiasPlan(shape, BLOCK_M, bias.shape[0], bias.stride(), dtype)
    with Sanitizer(protected=[bias]) as sanitizer:
        layout = plan.launch(bias)
    assert not sanitizer.findings
    assert sanitizer.launches == {"bias_kernel": 1}
    return layout


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("bias_dtype", "dtype", "kept"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
def test_every_number_of_the_bias_is_where_a_thread_looks_for_it(layout, bias_dtype, dtype, kept):
    bias = torch.randn(3, 25, 58, generator=torch.Generator().manual_seed(0)).to(bias_dtype)
    bias = LAYOUTS[layout](bias)
    result = lay_out(bias, dtype, scale=0.5)
    assert result.dtype == kept
    # Rows beyond the last query hold zeros, columns beyond a level's last key -inf.
    expected = torch.zeros(3, 2 * BLOCK_M, COLUMNS, dtype=kept)
    expected[:, :25, :49] = bias[:, :, :49] / 0.5
    expected[:, :25, 64:73] = bias[:, :, 49:] / 0.5
    expected[:, :, 49:64] = expected[:, :, 73:] = -math.inf
    # A 16 × 8 block of scores lies in 32 threads, 2 × 2 to each.
    head, m, n = torch.meshgrid(*map(torch.arange, expected.shape), indexing="ij")
    block, row, column = m // BLOCK_M, m % BLOCK_M, n % 8
    thread = (row % 8, column // 2, row // 8, column % 2)
    found = result[head, block, n // 8, row // 16, *thread]
    assert torch.equal(found, expected)
    assert result.numel() == expected.numel()
