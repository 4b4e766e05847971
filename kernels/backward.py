"""Backward focal attention, without atomics: every product once, then sums in a fixed order.

With ``P = softmax(S)``, ``dP = dO vᵀ`` and ``Δ = rowsum(dO · out)``, the gradient of a score is
``dS = P (dP − Δ)``, and scores are computed again from q, k, bias and the saved statistics. Then

    dv = Pᵀ dO      dk = scale · dSᵀ q      dq = scale · dS k      dbias = Σ dS over windows

* `delta_kernel` writes Δ; in full precision as ``Σ P dP``, which rounds less.
* `gradient_kernel`: one program per key tile of a level, head and group of windows. It keeps the
  tile's bias and the sum of dS in registers and walks over its windows. What one window gives to
  keys, values and queries goes to a workspace: a key is shared by several windows, a query's
  gradient has a part from every key tile.
* `fold_keys_kernel` and `fold_queries_kernel` (`kernels.fold`) sum these parts per token or cell,
  windows and tiles in ascending order. A coarse level's result is the gradient of its pooled map,
  which `kernels.pooling` adds to those of the tokens.

The workspace holds some images at a time, so that it takes no more memory for a larger batch.
Layouts as in `kernels.forward`; gradients of query, key and value lie side by side, as in a fused
projection to all three.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.bias_layout import BiasPlan
from kernels.fold import FOLD_BLOCK, fold_keys_kernel, fold_queries_kernel
from kernels.gradient_plan import GradientPlan
from kernels.launch import (
    COPYING_THREADS,
    PLANS,
    Problem,
    Strides,
    acc_type,
    strides_of,
    warp_size,
)
from kernels.launch_table import Tile
from kernels.prepared import PreparedLaunch
from kernels.tiles import (
    exclude,
    image_ptr,
    keep_tile,
    key_tile,
    load_bias,
    load_rows,
    locate_queries,
    locate_window,
    packed_ptr,
    query_seam_side,
    row_offset,
    token_offset,
)

__all__ = ["backward_plan", "launch_backward"]


@triton.jit
def weight_tile(
    k, q, m, peak, inverse, bias_ptr, level_start, batch, head, win_row, win_col,
    key, value, coarse_k_ptr, coarse_v_ptr, size,
    L: tl.constexpr, S: tl.constexpr, BLOCK_M: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Weights `[BLOCK_M, L.block]` from key ``k`` on, before dropout, and the keys and values."""
    n = k + tl.arange(0, L.block)
    keys, values, valid, side = key_tile(
        n, level_start, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
        L, S,
    )  # fmt: skip
    # Loaded anew for each window: it comes from the first-level cache straight into the sum.
    bias = load_bias(bias_ptr, k, L, BLOCK_M, L.block)
    score = tl.dot(q, tl.trans(keys), acc=bias, input_precision=S.precision, out_dtype=ACC_TYPE)
    query_side = query_seam_side(m, win_row, win_col, size, S)
    score = exclude(score, query_side[:, None], side[None, :], valid[None, :], L, S)
    if q.dtype == ACC_TYPE:
        weight = tl.exp2(score * S.score_factor - peak[:, None]) * inverse[:, None]
    else:  # the same with one product less, which costs digits that 16 bits do not have
        base = tl.where(inverse > 0, peak - tl.log2(tl.maximum(inverse, 1e-30)), float("inf"))
        weight = tl.exp2(score * S.score_factor - base[:, None])
    return weight, keys, values


@triton.jit
def load_stats(stats_ptr, row_id, m, S: tl.constexpr):
    """Each query's largest score and one over its sum of exponentials, as forward left them.

    Both are 0 beyond the last query, so that weights are 0 there.
    """
    stats = stats_ptr + row_id * 2 * S.num_queries + m
    peak = tl.load(stats, mask=m < S.num_queries, other=0.0)
    return peak, tl.load(stats + S.num_queries, mask=m < S.num_queries, other=0.0)


@triton.jit
def delta_kernel(
    query, key, value, grad_out, coarse_k_ptr, coarse_v_ptr, bias_ptr, out_ptr, stats_ptr,
    delta_ptr, seed_ptr, size,
    S: tl.constexpr, BLOCK_M: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Δ of every query, `[batch, windows, heads, window²]`; grid (items · query blocks, heads).

    From the output where that is rounded to 16 bits. In full precision ``Σ P dP / Σ P`` with the
    weights as `gradient_kernel` computes them again: gradients of scores then sum to zero over the
    keys, also where they all but vanish and the rounding of the output would be what is left.
    """
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    item = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(1)
    batch, win_row, win_col = locate_window(item, size, S)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row, col, stored = locate_queries(m, win_row, win_col, size, S)
    do_rows = image_ptr(grad_out, batch, head) + token_offset(grad_out, row, col, S)
    do = load_rows(do_rows, stored, False, S)  # [BLOCK_M, block_d]
    row_id = item.to(tl.int64) * size.num_heads + head
    if do.dtype == ACC_TYPE:
        q_rows = image_ptr(query, batch, head) + token_offset(query, row, col, S)
        q = load_rows(q_rows, stored, False, S)
        peak, inverse = load_stats(stats_ptr, row_id, m, S)
        bias_ptr += (head * BLOCKS + block) * (BLOCK_M * S.n_pad)
        delta = tl.zeros([BLOCK_M], dtype=ACC_TYPE)
        total = tl.zeros([BLOCK_M], dtype=ACC_TYPE)
        level_start = 0
        for i in tl.static_range(len(S.levels)):
            for k in range(0, S.levels[i].full, S.levels[i].block):
                weight, _, values = weight_tile(
                    k, q, m, peak, inverse, bias_ptr, level_start, batch, head, win_row, win_col,
                    key, value, coarse_k_ptr, coarse_v_ptr, size, S.levels[i], S, BLOCK_M, ACC_TYPE,
                )  # fmt: skip
                d_weight = tl.dot(
                    do, tl.trans(values), input_precision=S.precision, out_dtype=ACC_TYPE
                )
                if S.drop_threshold > 0:
                    keep = keep_tile(seed_ptr, row_id, m, k, S.levels[i], S)
                    d_weight = tl.where(keep, d_weight * S.keep_factor, 0.0)
                delta += tl.sum(weight * d_weight, axis=1)
                total += tl.sum(weight, axis=1)
            if i > 0:
                level_start += (size.pad_h // S.levels[i].sub) * (size.pad_w // S.levels[i].sub)
        delta = delta / tl.where(total > 0, total, 1.0)
    else:
        out_rows = packed_ptr(out_ptr, batch, size.height * size.width, head, size, S)
        out_rows += row_offset(row * size.width + col, size, S)
        out = load_rows(out_rows, stored, False, S)
        delta = tl.sum(do.to(ACC_TYPE) * out.to(ACC_TYPE), axis=1)
    tl.store(delta_ptr + row_id * S.num_queries + m, delta, mask=m < S.num_queries)


# Numbers that change from round to round must not make a compiled kernel each.
@triton.jit(do_not_specialize=["first_item", "num_items", "items_per_program"])
def gradient_kernel(
    query, key, value, grad_out, coarse_k_ptr, coarse_v_ptr, bias_ptr, stats_ptr, delta_ptr,
    query_part_ptr, key_part_ptr, value_part_ptr, bias_part_ptr, seed_ptr, size,
    first_item, num_items, items_per_program, first_tile, num_tiles, level_start,
    S: tl.constexpr, L: tl.constexpr, BLOCK_M: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Every product of one tile of a level's keys, for a group of windows.

    Grid (tiles · query blocks, heads, groups). Parts, with items (windows of images) counted inside
    the launch: query `[items, heads, num_tiles, m_pad, block_d]`; key and value
    `[items, heads, query blocks, keys, block_d]`; bias `[groups, heads, window², num_keys]`, to
    which the launch adds.
    """
    # -- locate
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    tile = tl.program_id(0) // BLOCKS
    block = tl.program_id(0) % BLOCKS
    head = tl.program_id(1)
    group = tl.program_id(2)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile * L.block + tl.arange(0, L.block)
    bias_ptr += (head * BLOCKS + block) * (BLOCK_M * S.n_pad)

    # The sum over windows goes on where the launch before, for other images, left it.
    sum_rows = (group.to(tl.int64) * size.num_heads + head) * S.num_queries + m
    sum_ptr = bias_part_ptr + sum_rows[:, None] * S.num_keys + (L.first + k)[None, :]
    inside = (m < S.num_queries)[:, None] & (k < L.region * L.region)[None, :]
    d_bias = tl.load(sum_ptr, mask=inside, other=0.0)
    first = group * items_per_program
    for i in range(first, tl.minimum(first + items_per_program, num_items)):
        # -- load queries, gradients and statistics
        item = first_item + i
        batch, win_row, win_col = locate_window(item, size, S)
        row, col, stored = locate_queries(m, win_row, win_col, size, S)
        q_rows = image_ptr(query, batch, head) + token_offset(query, row, col, S)
        do_rows = image_ptr(grad_out, batch, head) + token_offset(grad_out, row, col, S)
        q = load_rows(q_rows, stored, False, S)  # [BLOCK_M, block_d]
        do = load_rows(do_rows, stored, False, S)
        row_id = item.to(tl.int64) * size.num_heads + head
        peak, inverse = load_stats(stats_ptr, row_id, m, S)
        delta = tl.load(delta_ptr + row_id * S.num_queries + m, mask=m < S.num_queries, other=0.0)
        weight, keys, values = weight_tile(
            tile * L.block, q, m, peak, inverse, bias_ptr, level_start, batch, head, win_row,
            win_col, key, value, coarse_k_ptr, coarse_v_ptr, size, L, S, BLOCK_M, ACC_TYPE,
        )  # fmt: skip
        place = (item - first_item).to(tl.int64) * size.num_heads + head
        d = tl.arange(0, S.block_d)[None, :]
        key_place = ((place * BLOCKS + block) * L.full + k)[:, None] * S.block_d + d
        query_place = (place * num_tiles + first_tile + tile) * S.m_pad + m
        query_place = query_place[:, None] * S.block_d + d
        kept = weight
        if S.drop_threshold > 0:
            keep = keep_tile(seed_ptr, row_id, m, tile * L.block, L, S)
            kept = tl.where(keep, weight * S.keep_factor, 0.0)
        # Each product is stored as soon as it is made: registers are what is scarce here.
        kept = tl.trans(kept.to(do.dtype))
        dv = tl.dot(kept, do, input_precision=S.precision, out_dtype=ACC_TYPE)
        tl.store(value_part_ptr + key_place, dv.to(q.dtype))
        d_weight = tl.dot(do, tl.trans(values), input_precision=S.precision, out_dtype=ACC_TYPE)
        if S.drop_threshold > 0:
            d_weight = tl.where(keep, d_weight * S.keep_factor, 0.0)
        d_score = weight * (d_weight - delta[:, None])
        d_bias += d_score
        d_score = d_score.to(q.dtype)
        dk = tl.dot(tl.trans(d_score), q, input_precision=S.precision, out_dtype=ACC_TYPE)
        tl.store(key_part_ptr + key_place, dk.to(q.dtype))
        dq = tl.dot(d_score, keys, input_precision=S.precision, out_dtype=ACC_TYPE)
        tl.store(query_part_ptr + query_place, dq.to(q.dtype))
    tl.store(sum_ptr, d_bias, mask=inside)


class Step(NamedTuple):
    """The gradients that one level's keys give and get, and where they are summed."""

    gradient: PreparedLaunch
    fold_keys: PreparedLaunch
    fine: bool


class Round(NamedTuple):
    """Launches for the images whose parts the workspace holds at a time."""

    steps: list[Step]
    fold_queries: PreparedLaunch


class BackwardPlan:
    """Launches of the backward pass.

    Args:
        problem: The call.
        tile: Its launch configuration.
        maps: Strides of query, key, value and the gradient of the output.
        bias: Strides of the bias.
    """

    def __init__(
        self, problem: Problem, tile: Tile, maps: tuple[Strides, ...], bias: Strides
    ) -> None:
        self._problem = problem
        batch, rows, cols, heads, head_dim = problem.query_shape
        self.fused_shape = (batch, rows, cols, 3, heads, head_dim)
        token = 3 * heads * head_dim
        self._grad = (rows * cols * token, cols * token, token, head_dim)  # of each of its maps
        self.gradients = GradientPlan(problem, tile, (*maps, self._grad))
        self.bias = BiasPlan(self.gradients.shape, tile.block_m, heads, bias, problem.dtype)
        self._read = dict(zip(("query", "key", "value", "grad_out"), maps, strict=True))
        self.delta_shape = (batch, problem.num_windows, heads, problem.geometry.num_queries)
        programs = batch * problem.num_windows * self.gradients.query_blocks
        self.delta = self._prepare(
            (programs, heads), self._read, BLOCK_M=tile.block_m, **problem.options(tile)
        )
        self.rounds = [self._round(images) for images in self.gradients.chunks()]

    def _prepare(
        self, grid: tuple[int, ...], strides: Mapping[str, Strides], **constants: Any
    ) -> PreparedLaunch:
        common = {
            "size": self._problem.size,
            "S": self.gradients.shape,
            "ACC_TYPE": acc_type(self._problem.dtype),
        }
        return PreparedLaunch(grid, strides, {**common, **constants})

    def _round(self, images: range) -> Round:
        plan, tile = self.gradients, self.gradients.tile
        first_item = images.start * self._problem.num_windows
        items, heads = len(images) * self._problem.num_windows, self._problem.query_shape[3]
        steps = []
        for part in plan.levels:
            gradient = self._prepare(
                (part.tiles * plan.query_blocks, heads, plan.groups),
                self._read,
                first_item=first_item,
                num_items=items,
                items_per_program=-(-items // plan.groups),
                first_tile=part.first_tile,
                num_tiles=plan.num_tiles,
                level_start=part.start,
                L=part.level,
                BLOCK_M=tile.block_m,
                **self._problem.options(tile, part.level.block),
            )
            written = self._grad if part.level.fine else self._coarse
            fold = self._prepare(
                (-(-part.cells // FOLD_BLOCK), heads, len(images)),
                {"grad_key": written, "grad_value": written},
                first_batch=images.start,
                count=part.cells,
                level_start=part.start,
                L=part.level,
                BLOCKS=plan.query_blocks,
                BLOCK=FOLD_BLOCK,
                num_warps=COPYING_THREADS // warp_size(self._problem.target),
            )
            steps.append(Step(gradient, fold, fine=part.level.fine))
        fold_queries = self._prepare(
            (items * plan.query_blocks, heads),
            {"grad": self._grad},
            first_item=first_item,
            NUM_TILES=plan.num_tiles,
            BLOCK_M=tile.block_m,
            num_warps=tile.num_warps,
        )
        return Round(steps, fold_queries)

    @property
    def _coarse(self) -> Strides:
        """Packed maps `[batch, cells, heads, head_dim]` count as maps of one row."""
        heads, head_dim = self._problem.query_shape[3:]
        row = self._problem.size.coarse_cells * heads * head_dim
        return row, row, heads * head_dim, head_dim


@lru_cache(maxsize=PLANS)
def backward_plan(
    problem: Problem, tile: Tile, maps: tuple[Strides, ...], bias: Strides
) -> BackwardPlan:
    """The plan of a call; calls that are alike share it."""
    return BackwardPlan(problem, tile, maps, bias)


def launch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    out: Tensor,
    stats: Tensor,
    coarse: tuple[Tensor, Tensor],
    seed: Tensor | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Run the backward kernels.

    Args:
        grad_out: Gradient of ``out``; last axis contiguous.
        query: As for `launch_forward`; so are key, value, bias, coarse and seed.
        key: as there.
        value: as there.
        bias: as there.
        out: What forward returned.
        stats: What forward returned.
        coarse: as there.
        seed: as there.
        problem: What else the call depends on.

    Returns:
        Gradients of query, key and value as attended, `[batch, height, width, 3, heads, head_dim]`,
        of the bias, and of the packed coarse keys and values.
    """
    maps = strides_of(query, key, value, grad_out)
    plan = backward_plan(problem, problem.tile("gradient"), maps, bias.stride())
    grad_maps = torch.empty(plan.fused_shape, dtype=query.dtype, device=query.device)
    grad_query, *fine = grad_maps.unbind(3)
    grad_coarse = torch.empty_like(coarse[0]), torch.empty_like(coarse[1])
    if query.numel() == 0:
        return grad_maps, torch.zeros_like(bias), grad_coarse
    delta = stats.new_empty(plan.delta_shape)
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "grad_out": grad_out,
        "coarse_k_ptr": coarse[0],
        "coarse_v_ptr": coarse[1],
        "bias_ptr": plan.bias.launch(bias),
        "stats_ptr": stats,
        "delta_ptr": delta,
        "seed_ptr": stats if seed is None else seed,
    }
    plan.delta(delta_kernel, **inputs, out_ptr=out)
    query_part, key_part, value_part = plan.gradients.workspace(query)
    bias_part = stats.new_zeros(plan.gradients.groups, *bias.shape)
    for steps, fold_queries in plan.rounds:
        for step in steps:
            step.gradient(
                gradient_kernel,
                **inputs,
                query_part_ptr=query_part,
                key_part_ptr=key_part,
                value_part_ptr=value_part,
                bias_part_ptr=bias_part,
            )
            grad_key, grad_value = fine if step.fine else grad_coarse
            step.fold_keys(
                fold_keys_kernel,
                key_part_ptr=key_part,
                value_part_ptr=value_part,
                grad_key=grad_key,
                grad_value=grad_value,
            )
        fold_queries(fold_queries_kernel, part_ptr=query_part, grad=grad_query)
    return grad_maps, bias_part.sum(0).to(bias.dtype), grad_coarse
