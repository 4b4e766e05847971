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
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.geometry import FocalGeometry
from kernels.launch import (
    COPYING_THREADS,
    acc_type,
    offsets_fit,
    sum_dtype,
    tile_side,
    token_map,
    warp_size,
)
from kernels.tiles import (
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

__all__ = ["PoolProblem", "launch_pool", "launch_pool_backward"]


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
    """One call of sub-window pooling: everything that its kernels are launched with.

    Args:
        geometry: Window, levels, boundary and shift.
        shape: `(batch, height, width, heads, head_dim)` of the map.
        dtype: Of the map.
        level: The coarse level that is pooled.
    """

    geometry: FocalGeometry
    shape: tuple[int, ...]
    dtype: torch.dtype
    level: int

    BLOCK = 32  # cells of a tile

    @cached_property
    def starts(self) -> list[int]:
        """See `FocalGeometry.coarse_starts`."""
        return self.geometry.coarse_starts(*self.shape[1:3])

    @property
    def num_cells(self) -> int:
        """Cells of the level in one image."""
        return self.starts[self.level] - self.starts[self.level - 1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles of the cells of all images, heads."""
        return -(-self.shape[0] * self.num_cells // self.BLOCK), self.shape[3]

    def common_arguments(self, *maps: Tensor) -> dict[str, Any]:
        """Arguments that both pooling kernels take.

        Args:
            maps: Key, value and other maps that the kernel takes by their strides.
        """
        _, height, width, heads, head_dim = self.shape
        padded = self.geometry.padded_size(height, width)
        narrow = offsets_fit(*maps) and math.prod(padded) * heads * head_dim < 2**31
        return {
            "key": token_map(maps[0]),
            "value": token_map(maps[1]),
            "size": Size(height, width, *padded, height, width, heads, self.starts[-1]),
            "cells": self.num_cells,
            "count": self.shape[0] * self.num_cells,
            "level_start": self.starts[self.level - 1],
            "S": PoolShape(self.geometry.shift, narrow, head_dim, tile_side(head_dim)),
            "SUB": self.geometry.levels[self.level].subwindow_size,
            "BLOCK": self.BLOCK,
            "ACC_TYPE": acc_type(self.dtype),
            "num_warps": COPYING_THREADS // warp_size(maps[0].device),
        }


def launch_pool(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    key_offset: Tensor,
    value_offset: Tensor,
    coarse: tuple[Tensor, Tensor],
    problem: PoolProblem,
) -> None:
    """Pool one coarse level.

    Args:
        key: `[batch, height, width, heads, head_dim]`, last axis contiguous; so is value.
        value: as ``key``.
        weight: `[subwindow_size²]`.
        key_offset: `[heads, head_dim]`.
        value_offset: as ``key_offset``.
        coarse: Packed maps of keys and of values, which the level's cells are written to.
        problem: Sizes of this call.
    """
    if key.numel() == 0:
        return
    pool_kernel[problem.grid](
        weight_ptr=weight.contiguous(),
        k_offset_ptr=key_offset.contiguous(),
        v_offset_ptr=value_offset.contiguous(),
        pooled_k_ptr=coarse[0],
        pooled_v_ptr=coarse[1],
        **problem.common_arguments(key, value),
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
        weight: `[subwindow_size²]`.
        grad_coarse: Gradients of the packed maps of keys and of values.
        grads: Gradients of key and value without this level's part, which is added.
        problem: Sizes of this call.

    Returns:
        Gradient of the weight.
    """
    if key.numel() == 0:
        return torch.zeros_like(weight)
    partial = torch.empty(
        math.prod(problem.grid), weight.numel(), dtype=sum_dtype(key.dtype), device=key.device
    )
    pool_backward_kernel[problem.grid](
        weight_ptr=weight.contiguous(),
        coarse_grad_k_ptr=grad_coarse[0],
        coarse_grad_v_ptr=grad_coarse[1],
        grad_key=token_map(grads[0]),
        grad_value=token_map(grads[1]),
        partial_ptr=partial,
        **problem.common_arguments(key, value, *grads),
    )
    return partial.sum(0).to(weight.dtype)
