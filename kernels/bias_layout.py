"""The bias as score tiles take it: divided by the scale, padded, in fragment order.

A tensor core leaves a 16 × 8 block of scores in 32 threads: row ``r`` and column ``c`` are in
thread ``4 · (r % 8) + c // 2``, each holding two columns of two rows. Stored in that order a
thread's four numbers are 16 bytes in a row, so the bias goes from memory into the accumulator by
the widest load and without an exchange. Any other order of the hardware's costs time and stays
correct.

Layouts: bias `[heads, window², num_keys]` with any strides; the result
`[heads, query blocks, n_pad / 8, block_m / 16, 8, 4, 2, 2]`: 8 keys, 16 queries, row and column of
threads, upper or lower row, left or right column. -inf beyond the last key of a level.

Grid: (query blocks · groups of 8 keys, heads).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Strides, sum_dtype
from kernels.prepared import PreparedLaunch
from kernels.tiles import Shape

__all__ = ["BiasPlan"]


@triton.jit
def bias_kernel(
    bias_ptr, stride_h, stride_m, stride_n, layout_ptr,
    S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """8 keys of the queries of one tile."""
    GROUPS: tl.constexpr = S.n_pad // 8
    block = tl.program_id(0) // GROUPS
    group = tl.program_id(0) % GROUPS
    head = tl.program_id(1).to(tl.int64)
    # -- the query and the column that a place in fragment order holds
    place = tl.arange(0, 8 * BLOCK_M)
    m = block * BLOCK_M + place // 128 * 16 + place // 2 % 2 * 8 + place // 16 % 8
    column = group * 8 + place // 4 % 4 * 2 + place % 2
    # -- its key, if it holds one
    key = column * 0
    is_key = column < 0
    for i in tl.static_range(len(S.levels)):
        k = column - S.levels[i].column
        here = (k >= 0) & (k < S.levels[i].region * S.levels[i].region)
        key = tl.where(here, S.levels[i].first + k, key)
        is_key = is_key | here
    rows = bias_ptr + head * stride_h + m.to(tl.int64) * stride_m
    bias = tl.load(rows + key * stride_n, mask=is_key & (m < S.num_queries), other=0.0)
    bias = bias.to(layout_ptr.dtype.element_ty) * (1.0 / S.scale)
    target = layout_ptr + head * (S.m_pad * S.n_pad) + tl.program_id(0) * (8 * BLOCK_M) + place
    tl.store(target, tl.where(is_key, bias, -float("inf")))


class BiasPlan:
    """How a kernel's bias is laid out.

    Args:
        shape: Of the kernel that reads it.
        block_m: Queries of its tiles.
        heads: Heads of the bias.
        strides: Of the bias.
        dtype: Of query, key and value.
    """

    def __init__(
        self, shape: Shape, block_m: int, heads: int, strides: Strides, dtype: torch.dtype
    ) -> None:
        blocks, groups = shape.m_pad // block_m, shape.n_pad // 8
        self._sizes = (heads, blocks, groups, block_m // 16, 8, 4, 2, 2)
        self._dtype = sum_dtype(dtype)
        constants = {
            "stride_h": strides[0],
            "stride_m": strides[1],
            "stride_n": strides[2],
            "S": shape,
            "BLOCK_M": block_m,
            "num_warps": 4,
        }
        self._launch = PreparedLaunch((blocks * groups, heads), {}, constants)

    def launch(self, bias: Tensor) -> Tensor:
        """Lay out a bias.

        Args:
            bias: `[heads, window², num_keys]`, with the strides of the plan.

        Returns:
            See the top of this file; float32, or float64 for float64.
        """
        layout = torch.empty(self._sizes, dtype=self._dtype, device=bias.device)
        self._launch(bias_kernel, bias_ptr=bias, layout_ptr=layout)
        return layout
