"""Forward focal attention: one program per window, query block and head (paper, equation 2).

    out = softmax(scale · q kᵀ + bias + mask) v

Layouts: q, k, v `[batch, height, width, heads, head_dim]` with any strides but a contiguous last
axis (views of a fused qkv projection are read in place); the pooled maps of all coarse levels
packed, `[batch, coarse_cells, heads, head_dim]`; out contiguous, as q; stats
`[batch, windows, heads, 2, window²]`.

Grid: (windows · query blocks, heads, batch). A program walks over the keys of its window in
canonical order, first the tiles that hold fine keys alone, then the rest, with an online softmax in
base 2. The bias comes multiplied by log2(e) and padded to whole tiles with -inf, so that no score
needs a mask for the tile's end. Saved for backward: each query's largest score and one over its sum
of exponentials, both 0 for a query without any key. Their usual union, the logarithm of the sum of
exponentials, would lose the digits of large scores to rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Problem, token_map
from kernels.tiles import (
    exclude,
    keep_mask,
    key_tile,
    load_rows,
    locate_queries,
    seam_side,
    store_rows,
    token_rows,
)

__all__ = ["forward_kernel", "launch_forward"]


@triton.jit
def attend_tile(
    n, acc, peak, total, q, m, query_side, bias_rows, row_id, seed_ptr,
    batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
    S: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """Fold one tile of keys into the running softmax; returns the new ``(acc, peak, total)``."""
    k, v, valid, side = key_tile(
        n, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size, S,
        FINE, COARSE,
    )  # fmt: skip
    score = tl.dot(q, tl.trans(k), input_precision=S.precision, out_dtype=acc.dtype)
    bias = tl.load(bias_rows[:, None] + n[None, :])  # [BLOCK_M, BLOCK_N], padded: needs no mask
    score = score * S.score_factor + bias.to(acc.dtype)
    score = exclude(
        score, query_side[:, None], side[None, :], valid[None, :], S, S.wrap and not COARSE, FINE
    )
    new_peak = tl.maximum(peak, tl.max(score, axis=1))
    # A row without any key so far has peak -inf: subtract 0 there, for -inf - -inf is NaN.
    base = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weight = tl.exp2(score - base[:, None])
    rescale = tl.exp2(peak - base)
    total = total * rescale + tl.sum(weight, axis=1)
    if S.drop_threshold > 0:
        keep = keep_mask(seed_ptr, row_id, m[:, None] * S.num_keys + n[None, :], S)
        weight = tl.where(keep, weight * S.keep_factor, 0.0)
    acc = acc * rescale[:, None]
    acc += tl.dot(weight.to(v.dtype), v, input_precision=S.precision, out_dtype=acc.dtype)
    return acc, new_peak, total


@triton.jit
def forward_kernel(
    query, key, value, coarse_k_ptr, coarse_v_ptr, bias_ptr, out_ptr, stats_ptr, seed_ptr, size,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """See the top of this file."""
    # -- locate
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    window = tl.program_id(0) // BLOCKS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    win_cols = size.pad_w // S.window
    num_windows = (size.pad_h // S.window) * win_cols
    win_row = window // win_cols
    win_col = window % win_cols
    m = (tl.program_id(0) % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_id = (batch.to(tl.int64) * num_windows + window) * size.num_heads + head

    # -- load queries
    row, col, stored = locate_queries(m, win_row, win_col, size, S)
    q = load_rows(token_rows(query, batch, row, col, head), stored, S)  # [BLOCK_M, block_d]
    query_side = seam_side(
        win_row * S.window + m // S.window, win_col * S.window + m % S.window, size, S
    )
    bias_rows = bias_ptr + (head * S.m_pad + m) * S.n_pad

    acc = tl.zeros([BLOCK_M, S.block_d], dtype=ACC_TYPE)
    peak = tl.full([BLOCK_M], -float("inf"), dtype=ACC_TYPE)
    total = tl.zeros([BLOCK_M], dtype=ACC_TYPE)

    # -- level 0, in whole tiles; the tile where it ends; the coarse levels
    FINE_END: tl.constexpr = S.region * S.region // BLOCK_N * BLOCK_N
    MIXED_END: tl.constexpr = (S.region * S.region + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for start in range(0, FINE_END, BLOCK_N):
        acc, peak, total = attend_tile(
            start + tl.arange(0, BLOCK_N), acc, peak, total, q, m, query_side, bias_rows, row_id,
            seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, True, False,
        )  # fmt: skip
    if MIXED_END > FINE_END:
        acc, peak, total = attend_tile(
            FINE_END + tl.arange(0, BLOCK_N), acc, peak, total, q, m, query_side, bias_rows, row_id,
            seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, True, True,
        )  # fmt: skip
    for start in range(MIXED_END, S.n_pad, BLOCK_N):
        acc, peak, total = attend_tile(
            start + tl.arange(0, BLOCK_N), acc, peak, total, q, m, query_side, bias_rows, row_id,
            seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, False, True,
        )  # fmt: skip

    # -- finish and store
    no_key = peak == -float("inf")
    total = tl.where(no_key, 1.0, total)
    acc = acc / total[:, None]
    inverse = tl.where(no_key, 0.0, 1.0 / total)
    token = (batch.to(tl.int64) * size.height + row) * size.width + col
    out_rows = out_ptr + (token * size.num_heads + head) * S.head_dim
    store_rows(out_rows, acc, stored, S)
    stats = stats_ptr + row_id * 2 * S.num_queries + m
    tl.store(stats, tl.where(no_key, 0.0, peak), mask=m < S.num_queries)
    tl.store(stats + S.num_queries, inverse, mask=m < S.num_queries)


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel.

    Args:
        query: `[batch, height, width, heads, head_dim]`, last axis contiguous.
        key: as ``query``.
        value: as ``query``.
        bias: `[heads, window_size², num_keys]`.
        problem: Sizes, coarse maps and tile sizes of this call.

    Returns:
        ``out`` as ``query`` and contiguous, and the statistics that backward needs,
        `[batch, windows, heads, 2, window²]`: largest score (base 2), one over the sum.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    stats = problem.new_stats(query)
    if query.numel() == 0:
        return out, stats
    tile = problem.tile
    grid = (problem.num_windows * problem.query_blocks, query.shape[3], query.shape[0])
    forward_kernel[grid](
        query=token_map(query),
        key=token_map(key),
        value=token_map(value),
        coarse_k_ptr=problem.coarse_key,
        coarse_v_ptr=problem.coarse_value,
        bias_ptr=problem.padded_bias(bias),
        out_ptr=out,
        stats_ptr=stats,
        **problem.common_arguments(),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out, stats
