"""Sub-window pooling of keys and values, forward and backward (paper, section 3.2, equation 1).

    pooled[cell] = Σ_i weight_i · x[token i of the cell] + offset

One weight per position of the sub-window, shared by all channels. Keys and values are pooled by the
same program: they share weights and places. The pooled maps are a factor ``subwindow_size²``
smaller than the map, so they are written once and every window that attends a cell reads them.

Layouts: k, v `[batch, height, width, heads, head_dim]` with a contiguous last axis, zero beyond
their storage; pooled `[batch, coarse_cells, heads, head_dim]`, level after level, a level's cells
those of the rolled, padded map row-major. Grid: (tiles of the level's cells of all images, heads).
Backward adds to the gradients of the tokens that attention left. It gives each program the tokens
under its cells, so that no two write the same place; gradients of the weights are summed per
program and then over programs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.geometry import FocalGeometry
from kernels.launch import (
    COPYING_THREADS,
    PLANS,
    Strides,
    acc_type,
    offsets_fit,
    strides_of,
    sum_dtype,
    tile_side,
    warp_size,
)
from kernels.prepared import PreparedLaunch
from kernels.tiles import (
    Pool,
    PoolShape,
    Size,
    image_ptr,
    load_rows,
    packed_ptr,
    row_offset,
    store_rows,
    token_offset,
    unroll,
)

__all__ = ["PoolProblem", "launch_pool", "launch_pool_backward", "pool_plan"]


@triton.jit
def locate_token(cell, exists, i, size, S: tl.constexpr, SUB: tl.constexpr):
    """Stored row and column of token ``i`` of cells, and whether memory holds it."""
    cols = size.pad_w // SUB
    row = unroll(cell // cols * SUB + i // SUB, size.pad_h, S)
    col = unroll(cell % cols * SUB + i % SUB, size.pad_w, S)
    return row, col, exists & (row < size.height) & (col < size.width)


@triton.jit
def locate_cells(cells, count, BLOCK: tl.constexpr):
    """Batch, cell and existence of this program's part of the ``count`` cells of all images."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return index // cells, index % cells, index < count


@triton.jit
def pool_kernel(
    key, value, weight_ptr, k_offset_ptr, v_offset_ptr, pooled_k_ptr, pooled_v_ptr, size,
    cells, count, level_start,
    S: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Pooled keys and values of one tile of cells."""
    batch, cell, exists = locate_cells(cells, count, BLOCK)
    head = tl.program_id(1)
    acc_k = tl.zeros([BLOCK, S.block_d], dtype=ACC_TYPE)
    acc_v = tl.zeros([BLOCK, S.block_d], dtype=ACC_TYPE)
    k_image = image_ptr(key, batch, head)
    v_image = image_ptr(value, batch, head)
    for i in range(SUB * SUB):
        weight = tl.load(weight_ptr + i).to(ACC_TYPE)
        row, col, stored = locate_token(cell, exists, i, size, S, SUB)
        k = load_rows(k_image + token_offset(key, row, col, S), stored, False, S)
        v = load_rows(v_image + token_offset(value, row, col, S), stored, False, S)
        acc_k += weight * k.to(ACC_TYPE)
        acc_v += weight * v.to(ACC_TYPE)
    offset = head * S.head_dim + cell * 0  # one row of offsets for every cell
    acc_k += load_rows(k_offset_ptr + offset, exists, False, S).to(ACC_TYPE)
    acc_v += load_rows(v_offset_ptr + offset, exists, False, S).to(ACC_TYPE)
    place = row_offset(level_start + cell, size, S)
    k_target = packed_ptr(pooled_k_ptr, batch, size.coarse_cells, head, size, S)
    v_target = packed_ptr(pooled_v_ptr, batch, size.coarse_cells, head, size, S)
    store_rows(k_target + place, acc_k, exists, S)
    store_rows(v_target + place, acc_v, exists, S)


@triton.jit
def pool_backward_kernel(
    key, value, weight_ptr, coarse_grad_k_ptr, coarse_grad_v_ptr, grad_key, grad_value,
    partial_ptr, size, cells, count, level_start,
    S: tl.constexpr, SUB: tl.constexpr, BLOCK: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of the tokens under one tile of cells; its part of the weights'.

    ``partial`` `[cell tiles, heads, SUB²]`.
    """
    batch, cell, exists = locate_cells(cells, count, BLOCK)
    head = tl.program_id(1)
    place = row_offset(level_start + cell, size, S)
    k_source = packed_ptr(coarse_grad_k_ptr, batch, size.coarse_cells, head, size, S)
    v_source = packed_ptr(coarse_grad_v_ptr, batch, size.coarse_cells, head, size, S)
    grad_k = load_rows(k_source + place, exists, False, S).to(ACC_TYPE)  # [BLOCK, block_d]
    grad_v = load_rows(v_source + place, exists, False, S).to(ACC_TYPE)
    k_target = image_ptr(grad_key, batch, head)
    v_target = image_ptr(grad_value, batch, head)
    program = tl.program_id(0).to(tl.int64) * size.num_heads + head
    k_image = image_ptr(key, batch, head)
    v_image = image_ptr(value, batch, head)
    for i in range(SUB * SUB):
        weight = tl.load(weight_ptr + i).to(ACC_TYPE)
        row, col, stored = locate_token(cell, exists, i, size, S, SUB)
        k = load_rows(k_image + token_offset(key, row, col, S), stored, False, S).to(ACC_TYPE)
        v = load_rows(v_image + token_offset(value, row, col, S), stored, False, S).to(ACC_TYPE)
        tl.store(partial_ptr + program * (SUB * SUB) + i, tl.sum(grad_k * k + grad_v * v))
        k_rows = k_target + token_offset(grad_key, row, col, S)
        v_rows = v_target + token_offset(grad_value, row, col, S)
        sum_k = load_rows(k_rows, stored, False, S).to(ACC_TYPE) + weight * grad_k
        sum_v = load_rows(v_rows, stored, False, S).to(ACC_TYPE) + weight * grad_v
        store_rows(k_rows, sum_k, stored, S)
        store_rows(v_rows, sum_v, stored, S)


@dataclass(frozen=True)
class PoolProblem:
    """What sub-window pooling depends on but for its tensors.

    Args:
        geometry: Window, levels, boundary and shift.
        shape: `(batch, height, width, heads, head_dim)` of the map.
        dtype: Of the map.
        target: Architecture, as `launch.device_target` names it.
        level: The coarse level that is pooled.
    """

    geometry: FocalGeometry
    shape: tuple[int, ...]
    dtype: torch.dtype
    target: str
    level: int

    BLOCK = 32  # cells of a tile

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the cells of all images, heads."""
        return -(-self.arguments["count"] // self.BLOCK), self.shape[3]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments that both pooling kernels take whatever the strides."""
        _, height, width, heads, _ = self.shape
        padded = self.geometry.padded_size(height, width)
        starts = self.geometry.coarse_starts(height, width)
        cells = starts[self.level] - starts[self.level - 1]
        return {
            "size": Size(height, width, *padded, height, width, heads, starts[-1]),
            "cells": cells,
            "count": self.shape[0] * cells,
            "level_start": starts[self.level - 1],
            "SUB": self.geometry.levels[self.level].subwindow_size,
            "BLOCK": self.BLOCK,
            "ACC_TYPE": acc_type(self.dtype),
            "num_warps": COPYING_THREADS // warp_size(self.target),
        }


@lru_cache(maxsize=PLANS)
def pool_plan(
    problem: PoolProblem, names: tuple[str, ...], maps: tuple[Strides, ...]
) -> PreparedLaunch:
    """The launch of a pooling kernel; calls that are alike share it.

    Args:
        problem: The call.
        names: Of the maps that the kernel takes by their strides.
        maps: Their strides.
    """
    _, height, width, heads, head_dim = problem.shape
    padded = problem.geometry.padded_size(height, width)
    image = math.prod(padded) * heads * head_dim
    narrow = offsets_fit(problem.shape, maps) and image < 2**31
    shape = PoolShape(problem.geometry.shift, narrow, head_dim, tile_side(head_dim))
    strides = dict(zip(names, maps, strict=True))
    return PreparedLaunch(problem.grid, strides, {"S": shape, **problem.arguments})


def launch_pool(
    key: Tensor,
    value: Tensor,
    pool: Pool,
    coarse: tuple[Tensor, Tensor],
    problem: PoolProblem,
) -> None:
    """Pool one coarse level.

    Args:
        key: `[batch, height, width, heads, head_dim]`, last axis contiguous; so is value.
        value: as ``key``.
        pool: Contiguous weights `[subwindow_size²]` and offsets `[heads, head_dim]`.
        coarse: Packed maps of keys and of values, which the level's cells are written to.
        problem: What else the call depends on.
    """
    if key.numel() == 0:
        return
    launch = pool_plan(problem, ("key", "value"), strides_of(key, value))
    launch(
        pool_kernel,
        key=key,
        value=value,
        **pool._asdict(),
        pooled_k_ptr=coarse[0],
        pooled_v_ptr=coarse[1],
    )


def launch_pool_backward(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    grad_coarse: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    problem: PoolProblem,
) -> Tensor:
    """Gradients of `launch_pool`.

    Args:
        key: What was pooled; so is value.
        value: as ``key``.
        weight: `[subwindow_size²]`, contiguous.
        grad_coarse: Gradients of the packed maps of keys and of values.
        grads: Gradients of key and value without this level's part, which is added.
        problem: What else the call depends on.

    Returns:
        Gradient of the weight.
    """
    if key.numel() == 0:
        return torch.zeros_like(weight)
    names = ("key", "value", "grad_key", "grad_value")
    launch = pool_plan(problem, names, strides_of(key, value, *grads))
    programs = math.prod(launch.grid)
    partial = torch.empty(programs, weight.numel(), dtype=sum_dtype(key.dtype), device=key.device)
    launch(
        pool_backward_kernel,
        key=key,
        value=value,
        weight_ptr=weight,
        coarse_grad_k_ptr=grad_coarse[0],
        coarse_grad_v_ptr=grad_coarse[1],
        grad_key=grads[0],
        grad_value=grads[1],
        partial_ptr=partial,
    )
    return partial.sum(0).to(weight.dtype)
