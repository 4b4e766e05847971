"""Backward focal attention, without atomics: one program sums each gradient, in a fixed order.

With ``P = softmax(S)``, ``dP = dO vᵀ`` and ``Δ = rowsum(dO · out)``, the gradient of a score is
``dS = P (dP − Δ)``, and scores are computed again from q, k, bias and the saved statistics. Three kernels:

* `query_gradient_kernel`: one program per window, query block and head walks over keys as forward
  does: ``dq = scale · dS k``. It also writes Δ, which the others read.
* `key_gradient_kernel`: one program per square of tokens or cells walks over the windows that
  attend it: ``dk = scale · dSᵀ q`` and ``dv = Pᵀ dO``. Launched once per level; a coarse level's
  result is the gradient of its pooled map, which `kernels.pooling` takes to tokens.
* `bias_gradient_kernel`: one program per key tile, query block, head and group of windows sums dS
  over its windows; the groups' sums are added at the end.

Layouts as in `kernels.forward`; gradients are contiguous.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import Problem, token_map
from kernels.tiles import (
    cell_is_key,
    cell_rows,
    exclude,
    keep_mask,
    key_seam_side,
    key_tile,
    load_rows,
    locate_fine,
    locate_queries,
    seam_side,
    store_rows,
    token_rows,
)

__all__ = ["launch_backward"]

# Groups of windows that the bias gradient is summed in: enough programs to fill a large GPU.
BIAS_PROGRAMS = 1024


@triton.jit
def load_stats(stats_ptr, row_id, m, S: tl.constexpr):
    """Each query's largest score and one over its sum of exponentials, as forward left them.

    Both are 0 beyond the last query, so that weights are 0 there.
    """
    rows = stats_ptr + row_id * 2 * S.num_queries + m
    peak = tl.load(rows, mask=m < S.num_queries, other=0.0)
    return peak, tl.load(rows + S.num_queries, mask=m < S.num_queries, other=0.0)


@triton.jit
def load_delta(delta_ptr, row_id, m, S: tl.constexpr):
    """Each query's Δ, which `query_gradient_kernel` wrote."""
    return tl.load(delta_ptr + row_id * S.num_queries + m, mask=m < S.num_queries, other=0.0)


@triton.jit
def score_gradient(
    n, q, do, peak, inverse, delta, m, query_side, bias_rows, row_id, seed_ptr,
    batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
    S: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """``dS`` `[BLOCK_M, BLOCK_N]` of one tile of keys, and the keys."""
    k, v, valid, side = key_tile(
        n, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size, S,
        FINE, COARSE,
    )  # fmt: skip
    score = tl.dot(q, tl.trans(k), input_precision=S.precision, out_dtype=delta.dtype)
    bias = tl.load(bias_rows[:, None] + n[None, :])
    score = score * S.score_factor + bias.to(delta.dtype)
    score = exclude(
        score, query_side[:, None], side[None, :], valid[None, :], S, S.wrap and not COARSE, FINE
    )
    weight = tl.exp2(score - peak[:, None]) * inverse[:, None]
    d_weight = tl.dot(do, tl.trans(v), input_precision=S.precision, out_dtype=delta.dtype)
    if S.drop_threshold > 0:
        keep = keep_mask(seed_ptr, row_id, m[:, None] * S.num_keys + n[None, :], S)
        d_weight = tl.where(keep, d_weight * S.keep_factor, 0.0)
    return weight * (d_weight - delta[:, None]), k


@triton.jit
def query_gradient_kernel(
    query, key, value, grad_out, coarse_k_ptr, coarse_v_ptr, bias_ptr, out_ptr, stats_ptr, delta_ptr,
    grad_query_ptr, seed_ptr, size,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """``dq`` and Δ; grid (windows · query blocks, heads, batch)."""
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

    # -- load queries, gradients and outputs
    row, col, stored = locate_queries(m, win_row, win_col, size, S)
    q = load_rows(token_rows(query, batch, row, col, head), stored, S)
    do = load_rows(token_rows(grad_out, batch, row, col, head), stored, S)
    token = (batch.to(tl.int64) * size.height + row) * size.width + col
    token = (token * size.num_heads + head) * S.head_dim
    out = load_rows(out_ptr + token, stored, S)
    delta = tl.sum(do.to(ACC_TYPE) * out.to(ACC_TYPE), axis=1)
    tl.store(delta_ptr + row_id * S.num_queries + m, delta, mask=m < S.num_queries)
    peak, inverse = load_stats(stats_ptr, row_id, m, S)
    query_side = seam_side(
        win_row * S.window + m // S.window, win_col * S.window + m % S.window, size, S
    )
    bias_rows = bias_ptr + (head * S.m_pad + m) * S.n_pad

    acc = tl.zeros([BLOCK_M, S.block_d], dtype=ACC_TYPE)
    FINE_END: tl.constexpr = S.region * S.region // BLOCK_N * BLOCK_N
    MIXED_END: tl.constexpr = (S.region * S.region + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    for start in range(0, FINE_END, BLOCK_N):
        ds, k = score_gradient(
            start + tl.arange(0, BLOCK_N), q, do, peak, inverse, delta, m, query_side, bias_rows,
            row_id, seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, True, False,
        )  # fmt: skip
        acc += tl.dot(ds.to(k.dtype), k, input_precision=S.precision, out_dtype=ACC_TYPE)
    if MIXED_END > FINE_END:
        ds, k = score_gradient(
            FINE_END + tl.arange(0, BLOCK_N), q, do, peak, inverse, delta, m, query_side, bias_rows,
            row_id, seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, True, True,
        )  # fmt: skip
        acc += tl.dot(ds.to(k.dtype), k, input_precision=S.precision, out_dtype=ACC_TYPE)
    for start in range(MIXED_END, S.n_pad, BLOCK_N):
        ds, k = score_gradient(
            start + tl.arange(0, BLOCK_N), q, do, peak, inverse, delta, m, query_side, bias_rows,
            row_id, seed_ptr, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
            S, False, True,
        )  # fmt: skip
        acc += tl.dot(ds.to(k.dtype), k, input_precision=S.precision, out_dtype=ACC_TYPE)

    # -- store
    store_rows(grad_query_ptr + token, acc * S.scale, stored, S)


@triton.jit
def bias_gradient_kernel(
    query, key, value, grad_out, coarse_k_ptr, coarse_v_ptr, bias_ptr, stats_ptr, delta_ptr,
    partial_ptr, seed_ptr, size, num_items, items_per_group,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Sums of dS over groups of (image, window) items.

    Grid (key tiles · query blocks, heads, groups); ``partial`` `[groups, heads, m_pad, n_pad]`.
    """
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    n = (tl.program_id(0) // BLOCKS) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tl.program_id(0) % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    group = tl.program_id(2)
    win_cols = size.pad_w // S.window
    num_windows = (size.pad_h // S.window) * win_cols
    bias_rows = bias_ptr + (head * S.m_pad + m) * S.n_pad

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC_TYPE)
    first = group * items_per_group
    for i in range(tl.minimum(items_per_group, num_items - first)):
        item = first + i
        batch = item // num_windows
        window = item % num_windows
        win_row = window // win_cols
        win_col = window % win_cols
        row_id = item.to(tl.int64) * size.num_heads + head
        row, col, stored = locate_queries(m, win_row, win_col, size, S)
        q = load_rows(token_rows(query, batch, row, col, head), stored, S)
        do = load_rows(token_rows(grad_out, batch, row, col, head), stored, S)
        peak, inverse = load_stats(stats_ptr, row_id, m, S)
        delta = load_delta(delta_ptr, row_id, m, S)
        query_side = seam_side(
            win_row * S.window + m // S.window, win_col * S.window + m % S.window, size, S
        )
        ds, _ = score_gradient(
            n, q, do, peak, inverse, delta, m, query_side, bias_rows, row_id, seed_ptr, batch, head,
            win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size, S, True, True,
        )  # fmt: skip
        acc += ds
    rows = (group.to(tl.int64) * size.num_heads + head) * S.m_pad + m
    tl.store(partial_ptr + rows[:, None] * S.n_pad + n[None, :], acc)


@triton.jit
def key_gradient_kernel(
    query, key, value, grad_out, coarse_k_ptr, coarse_v_ptr, bias_t_ptr, stats_ptr, delta_ptr,
    grad_key_ptr, grad_value_ptr, seed_ptr, size, level_start,
    S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ACC_TYPE: tl.constexpr,
    FINE: tl.constexpr, FIRST: tl.constexpr, SUB: tl.constexpr, CELLS: tl.constexpr,
    REGION: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of the keys of one level; grid (squares · key blocks, heads, batch).

    A square is what lies under GROUP × GROUP windows: ``side × side`` cells (tokens when FINE).
    FIRST is the level's first key in canonical order, ``level_start`` its first cell in the packed
    maps.
    """
    SIDE: tl.constexpr = GROUP * CELLS
    BLOCKS: tl.constexpr = (SIDE * SIDE + BLOCK_K - 1) // BLOCK_K
    MARGIN: tl.constexpr = (REGION - CELLS) // 2
    REACH: tl.constexpr = (MARGIN + CELLS - 1) // CELLS  # windows beyond the square, each side
    # -- locate keys
    win_rows = size.pad_h // S.window
    win_cols = size.pad_w // S.window
    squares = (win_cols + GROUP - 1) // GROUP
    square = tl.program_id(0) // BLOCKS
    head = tl.program_id(1)
    batch = tl.program_id(2)
    first_row = square // squares * GROUP  # in windows
    first_col = square % squares * GROUP
    k_id = (tl.program_id(0) % BLOCKS) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_row = first_row * CELLS + k_id // SIDE  # cells of the rolled map
    k_col = first_col * CELLS + k_id % SIDE
    exists = (k_id < SIDE * SIDE) & (k_row < win_rows * CELLS) & (k_col < win_cols * CELLS)
    if FINE:
        row, col, stored, is_key = locate_fine(k_row, k_col, size, S)
        stored = stored & exists
        is_key = is_key & exists
        # Tokens that are no keys are stored as well: their gradient is zero.
        inside = exists & (row < size.height) & (col < size.width)
        k = load_rows(token_rows(key, batch, row, col, head), stored, S)  # [BLOCK_K, block_d]
        v = load_rows(token_rows(value, batch, row, col, head), stored, S)
        token = (batch.to(tl.int64) * size.height + row) * size.width + col
        target = (token * size.num_heads + head) * S.head_dim
    else:
        is_key = exists & cell_is_key(k_row, size.pad_h, size.map_h, SUB, S)
        is_key = is_key & cell_is_key(k_col, size.pad_w, size.map_w, SUB, S)
        inside = exists
        cell = level_start + k_row * (win_cols * CELLS) + k_col
        k = load_rows(cell_rows(coarse_k_ptr, batch, cell, head, size, S), is_key, S)
        v = load_rows(cell_rows(coarse_v_ptr, batch, cell, head, size, S), is_key, S)
        index = batch.to(tl.int64) * size.coarse_cells + cell
        target = (index * size.num_heads + head) * S.head_dim

    # -- windows that attend the square; beyond the edge they wrap, or there is none
    low_row = first_row - REACH
    low_col = first_col - REACH
    high_row = first_row + GROUP + REACH
    high_col = first_col + GROUP + REACH
    if not (FINE and S.wrap):
        low_row = tl.maximum(low_row, 0)
        low_col = tl.maximum(low_col, 0)
        high_row = tl.minimum(high_row, win_rows)
        high_col = tl.minimum(high_col, win_cols)

    dk = tl.zeros([BLOCK_K, S.block_d], dtype=ACC_TYPE)
    dv = tl.zeros([BLOCK_K, S.block_d], dtype=ACC_TYPE)
    bias_base = bias_t_ptr + head * (S.num_keys + 1) * S.m_pad
    for at_row in range(low_row, high_row):
        for at_col in range(low_col, high_col):
            # The keys' places in this window's region; elsewhere the bias row is all -inf.
            y = k_row - at_row * CELLS + MARGIN
            x = k_col - at_col * CELLS + MARGIN
            attended = is_key & (y >= 0) & (y < REGION) & (x >= 0) & (x < REGION)
            slot = tl.where(attended, FIRST + y * REGION + x, S.num_keys)
            win_row = (at_row % win_rows + win_rows) % win_rows
            win_col = (at_col % win_cols + win_cols) % win_cols
            window = win_row * win_cols + win_col
            row_id = (batch.to(tl.int64) * (win_rows * win_cols) + window) * size.num_heads + head
            for start in range(0, S.m_pad, BLOCK_M):
                m = start + tl.arange(0, BLOCK_M)
                q_row, q_col, q_stored = locate_queries(m, win_row, win_col, size, S)
                q = load_rows(token_rows(query, batch, q_row, q_col, head), q_stored, S)
                do = load_rows(token_rows(grad_out, batch, q_row, q_col, head), q_stored, S)
                peak, inverse = load_stats(stats_ptr, row_id, m, S)
                delta = load_delta(delta_ptr, row_id, m, S)
                score = tl.dot(k, tl.trans(q), input_precision=S.precision, out_dtype=ACC_TYPE)
                bias = tl.load(bias_base + slot[:, None] * S.m_pad + m[None, :])
                score = score * S.score_factor + bias.to(ACC_TYPE)  # [BLOCK_K, BLOCK_M]
                if FINE and S.shift > 0:
                    side = key_seam_side(k_row, k_col, at_row, at_col, size, S)
                    query_side = seam_side(
                        win_row * S.window + m // S.window,
                        win_col * S.window + m % S.window, size, S,
                    )  # fmt: skip
                    score = exclude(score, query_side[None, :], side[:, None], True, S, True, True)
                weight = tl.exp2(score - peak[None, :]) * inverse[None, :]
                d_weight = tl.dot(v, tl.trans(do), input_precision=S.precision, out_dtype=ACC_TYPE)
                kept = weight
                if S.drop_threshold > 0:
                    pair = m[None, :] * S.num_keys + slot[:, None]
                    keep = keep_mask(seed_ptr, row_id, pair, S)
                    kept = tl.where(keep, weight * S.keep_factor, 0.0)
                    d_weight = tl.where(keep, d_weight * S.keep_factor, 0.0)
                dv += tl.dot(kept.to(do.dtype), do, input_precision=S.precision, out_dtype=ACC_TYPE)
                ds = weight * (d_weight - delta[None, :])
                dk += tl.dot(ds.to(q.dtype), q, input_precision=S.precision, out_dtype=ACC_TYPE)

    # -- store
    store_rows(grad_key_ptr + target, dk * S.scale, inside, S)
    store_rows(grad_value_ptr + target, dv, inside, S)


def launch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    stats: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernels.

    Args:
        grad_out: Gradient of ``out``; last axis contiguous.
        query: As for `launch_forward`; so are key, value and bias.
        key: as there.
        value: as there.
        bias: as there.
        out: What forward returned.
        stats: What forward returned.
        problem: Sizes, coarse maps and tile sizes of this call.

    Returns:
        Gradients of query, key, value, bias, and of the packed coarse keys and values.
    """
    grad_query, grad_key, grad_value = (
        torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3)
    )
    grad_coarse_key = torch.empty_like(problem.coarse_key)
    grad_coarse_value = torch.empty_like(problem.coarse_value)
    grads = (grad_query, grad_key, grad_value, grad_coarse_key, grad_coarse_value)
    if query.numel() == 0:
        return (*grads[:3], torch.zeros_like(bias), *grads[3:])
    delta = stats.new_empty(stats.shape[:3] + stats.shape[4:])
    tile, batch, heads = problem.tile, query.shape[0], query.shape[3]
    maps = {
        "query": token_map(query),
        "key": token_map(key),
        "value": token_map(value),
        "grad_out": token_map(grad_out),
        "coarse_k_ptr": problem.coarse_key,
        "coarse_v_ptr": problem.coarse_value,
        "stats_ptr": stats,
        "delta_ptr": delta,
        **problem.common_arguments(),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    padded_bias = problem.padded_bias(bias)
    query_gradient_kernel[(problem.num_windows * problem.query_blocks, heads, batch)](
        **maps,
        bias_ptr=padded_bias,
        out_ptr=out,
        grad_query_ptr=grad_query,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )

    items = batch * problem.num_windows
    tiles = problem.shape.n_pad // tile.block_n * problem.query_blocks
    per_group = -(-items // max(1, min(items, BIAS_PROGRAMS // (tiles * heads))))
    groups = -(-items // per_group)
    partial = stats.new_empty(groups, heads, problem.shape.m_pad, problem.shape.n_pad)
    bias_gradient_kernel[(tiles, heads, groups)](
        **maps,
        bias_ptr=padded_bias,
        partial_ptr=partial,
        num_items=items,
        items_per_group=per_group,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
    grad_bias = partial.sum(0)[:, : bias.shape[1], : bias.shape[2]].to(bias.dtype).contiguous()

    transposed_bias = problem.transposed_bias(bias)
    for level in problem.key_levels():
        grad_k, grad_v = (grad_key, grad_value) if level.fine else grads[3:]
        grid = (level.squares * level.blocks, heads, batch)
        key_gradient_kernel[grid](
            **maps,
            bias_t_ptr=transposed_bias,
            grad_key_ptr=grad_k,
            grad_value_ptr=grad_v,
            level_start=level.start,
            # Four products per tile: half the queries at a time, or registers spill.
            BLOCK_M=min(tile.block_m, 32),
            BLOCK_K=level.block_k,
            FINE=level.fine,
            FIRST=level.first,
            SUB=level.sub,
            CELLS=level.cells,
            REGION=level.region,
            GROUP=level.group,
        )
    return (*grads[:3], grad_bias, *grads[3:])
