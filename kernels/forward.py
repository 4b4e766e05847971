"""Forward focal attention: one program per window, query block and head (paper, equation 2).

    out = softmax(scale · q kᵀ + bias + mask) v

Layouts: q, k, v `[batch, height, width, heads, head_dim]` with any strides but a contiguous last
axis (views of a fused qkv projection are read in place); the pooled maps of all coarse levels
packed, `[batch, coarse_cells, heads, head_dim]`, empty where this kernel pools; out contiguous, as
q; stats `[batch, windows, heads, 2, window²]`.

Grid: (windows of all images · query blocks, heads). A program walks over the keys of its window,
level after level, with an online softmax in base 2. The bias starts the sum of each score: it comes
divided by the scale, with -inf for the places beyond a level's last key, so that no score needs a
mask for a tile's end (`kernels.bias_layout`). Coarse keys are read from maps that a pass of its
own pooled (`kernels.pooling`), or pooled here (`launch.pools_inline` chooses).

Saved for backward: each query's largest score in base 2 and one over its sum of exponentials, both
0 for a query without any key. Their usual union, the logarithm of the sum of
exponentials, would lose the digits of large scores to rounding.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bias_layout import BiasPlan
from kernels.launch import (
    PLANS,
    Problem,
    Strides,
    acc_type,
    cut_with_tail,
    stats_shape,
    strides_of,
    sum_dtype,
)
from kernels.launch_table import Tile
from kernels.prepared import PreparedLaunch
from kernels.tiles import (
    Pool,
    exclude,
    image_ptr,
    keep_mask,
    key_tile,
    load_bias,
    load_rows,
    locate_queries,
    locate_window,
    packed_ptr,
    pool_tile,
    query_seam_side,
    row_offset,
    store_rows,
    token_offset,
)

__all__ = ["forward_kernel", "forward_plan", "launch_forward"]


@triton.jit
def attend_tile(
    start, acc, peak, total, q, m, query_side, bias_ptr, row_id, seed_ptr, level_start,
    batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, pool, size,
    L: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold a tile of one level's keys into the running softmax; returns ``(acc, peak, total)``."""
    k = start + tl.arange(0, BLOCK_N)
    if L.inline:
        keys, values, valid, side = pool_tile(
            k, pool, batch, head, win_row, win_col, key, value, size, L, S, BLOCK_N, acc.dtype
        )
    else:
        keys, values, valid, side = key_tile(
            k, level_start, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr,
            size, L, S,
        )  # fmt: skip
    bias = load_bias(bias_ptr, start, L, BLOCK_M, BLOCK_N)
    score = tl.dot(q, tl.trans(keys), acc=bias, input_precision=S.precision, out_dtype=acc.dtype)
    score = exclude(score, query_side[:, None], side[None, :], valid[None, :], L, S)
    new_peak = tl.maximum(peak, tl.max(score, axis=1) * S.score_factor)
    # A row without any key so far has peak -inf: subtract 0 there, for -inf - -inf is NaN.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weight = tl.exp2(score * S.score_factor - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(weight, axis=1)
    if S.drop_threshold > 0:
        pair = m[:, None] * S.num_keys + (L.first + k)[None, :]
        weight = tl.where(keep_mask(seed_ptr, row_id, pair, S), weight * S.keep_factor, 0.0)
    acc = acc * rescale[:, None]
    acc = tl.dot(
        weight.to(values.dtype), values, acc=acc, input_precision=S.precision, out_dtype=acc.dtype
    )
    return acc, new_peak, total


@triton.jit
def forward_kernel(
    query, key, value, coarse_k_ptr, coarse_v_ptr, pools, bias_ptr, out_ptr, stats_ptr, seed_ptr,
    size,
    S: tl.constexpr, BLOCK_M: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """See the top of this file."""
    # -- locate
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    item = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(1)
    batch, win_row, win_col = locate_window(item, size, S)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_id = item.to(tl.int64) * size.num_heads + head

    # -- load queries
    row, col, stored = locate_queries(m, win_row, win_col, size, S)
    q_rows = image_ptr(query, batch, head) + token_offset(query, row, col, S)
    q = load_rows(q_rows, stored, False, S)  # [BLOCK_M, block_d]
    query_side = query_seam_side(m, win_row, win_col, size, S)
    bias_ptr += (head * BLOCKS + block) * (BLOCK_M * S.n_pad)

    acc = tl.zeros([BLOCK_M, S.block_d], dtype=ACC_TYPE)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=ACC_TYPE)
    total = tl.zeros([BLOCK_M], dtype=ACC_TYPE)

    # -- for each level: whole tiles, then the smaller ones of its end
    level_start = 0
    for i in tl.static_range(len(S.levels)):
        for start in range(0, S.levels[i].full, S.levels[i].block):
            acc, peak, total = attend_tile(
                start, acc, peak, total, q, m, query_side, bias_ptr, row_id, seed_ptr, level_start,
                batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, pools[i],
                size, S.levels[i], S, BLOCK_M, S.levels[i].block,
            )  # fmt: skip
        for j in tl.static_range(len(S.levels[i].tail)):
            acc, peak, total = attend_tile(
                S.levels[i].tail[j][0], acc, peak, total, q, m, query_side, bias_ptr, row_id,
                seed_ptr, level_start, batch, head, win_row, win_col, key, value, coarse_k_ptr,
                coarse_v_ptr, pools[i], size, S.levels[i], S, BLOCK_M, S.levels[i].tail[j][1],
            )  # fmt: skip
        if i > 0:
            level_start += (size.pad_h // S.levels[i].sub) * (size.pad_w // S.levels[i].sub)

    # -- finish and store
    no_key = peak == -float("inf")
    total = tl.where(no_key, 1.0, total)
    inverse = 1.0 / total
    # One product less exact than a quotient: only 16 bits are too few to show it.
    acc = acc / total[:, None] if q.dtype == ACC_TYPE else acc * inverse[:, None]
    inverse = tl.where(no_key, 0.0, inverse)
    out = packed_ptr(out_ptr, batch, size.height * size.width, head, size, S)
    store_rows(out + row_offset(row * size.width + col, size, S), acc, stored, S)
    stats = stats_ptr + row_id * 2 * S.num_queries + m
    tl.store(stats, tl.where(no_key, 0.0, peak), mask=m < S.num_queries)
    tl.store(stats + S.num_queries, inverse, mask=m < S.num_queries)


class ForwardPlan:
    """Launches of the forward pass.

    Args:
        problem: The call.
        tile: Its launch configuration.
        maps: Strides of query, key and value.
        bias: Strides of the bias.
    """

    def __init__(
        self, problem: Problem, tile: Tile, maps: tuple[Strides, ...], bias: Strides
    ) -> None:
        geometry, dtype = problem.geometry, problem.dtype
        batch, _, _, heads, _ = problem.query_shape
        cuts = [
            cut_with_tail(keys, tile.block_n, problem.least_keys(tile, level))
            for level, keys in enumerate(geometry.keys_per_level)
        ]
        shape = problem.shape(cuts, tile.block_m, maps)
        self.stats_shape = stats_shape(geometry, problem.query_shape)
        self.bias = BiasPlan(shape, tile.block_m, heads, bias, dtype)
        constants = {
            "size": problem.size,
            "S": shape,
            "BLOCK_M": tile.block_m,
            "ACC_TYPE": acc_type(dtype),
            **problem.options(tile),
        }
        programs = batch * problem.num_windows * shape.m_pad // tile.block_m
        strides = dict(zip(("query", "key", "value"), maps, strict=True))
        self.attend = PreparedLaunch((programs, heads), strides, constants)


@lru_cache(maxsize=PLANS)
def forward_plan(
    problem: Problem, tile: Tile, maps: tuple[Strides, ...], bias: Strides
) -> ForwardPlan:
    """The plan of a call; calls that are alike share it."""
    return ForwardPlan(problem, tile, maps, bias)


def launch_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    coarse: tuple[Tensor, Tensor],
    pools: tuple[Pool, ...],
    seed: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        query: `[batch, height, width, heads, head_dim]`, last axis contiguous.
        key: as ``query``.
        value: as ``query``.
        bias: `[heads, window², num_keys]`.
        coarse: Packed pooled keys and values, `[batch, coarse_cells, heads, head_dim]`.
        pools: Weights and offsets of every coarse level where the kernel pools them, else none.
        seed: Dropout's, int64 `[1]`, or None without dropout.
        problem: What else the call depends on.

    Returns:
        ``out`` as ``query`` and contiguous, and the statistics that backward needs,
        `[batch, windows, heads, 2, window²]`: largest score (base 2), one over the sum.
    """
    plan = forward_plan(
        problem, problem.tile("forward"), strides_of(query, key, value), bias.stride()
    )
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    stats = torch.empty(plan.stats_shape, dtype=sum_dtype(query.dtype), device=query.device)
    if query.numel() == 0:
        return out, stats
    unread = Pool(out, out, out)  # any pointers, where no kernel reads them
    plan.attend(
        forward_kernel,
        query=query,
        key=key,
        value=value,
        coarse_k_ptr=coarse[0],
        coarse_v_ptr=coarse[1],
        pools=(unread, *(pools or (unread,) * (len(problem.geometry.levels) - 1))),
        bias_ptr=plan.bias.launch(bias),
        out_ptr=out,
        stats_ptr=stats,
        seed_ptr=stats if seed is None else seed,
    )
    return out, stats
