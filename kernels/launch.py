"""From tensors to a launch: tile sizes by head and device, padded biases, argument bundles.

The table is plain Python: tuning is a measurement that rewrites it, never a search at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import keep_threshold
from kernels.geometry import FocalGeometry
from kernels.launch_table import ANY_TARGET, TABLE, Tile
from kernels.tiles import CoarseLevel, PoolShape, Shape, Size, TokenMap

LOG2E = 1.4426950408889634
__all__ = ["PoolProblem", "Problem", "Tile", "pick_tile", "sum_dtype", "token_map"]


@dataclass(frozen=True)
class KeyLevel:
    """How the gradients of one level's keys are cut into programs; see `kernels.backward`."""

    fine: bool
    start: int  # first cell of the level in the packed maps
    first: int  # first key of the level in canonical order
    sub: int
    cells: int
    region: int
    group: int  # windows along one side of the square of keys that a program owns
    squares: int
    blocks: int
    block_k: int


FLOAT64_TILE = Tile(64, 64, 4, 1)  # float64 runs under the interpreter alone, where fewer is faster
LARGEST_HEAD_TILE = Tile(16, 16, 8, 1)


def pick_tile(
    kernel: str, head_dim: int, dtype: torch.dtype, num_queries: int, target: str = ANY_TARGET
) -> Tile:
    """The launch configuration for a head; windows of few queries take a smaller query tile.

    Args:
        kernel: ``"forward"``, ``"query_gradient"``, ``"bias_gradient"`` or ``"key_gradient"``.
        head_dim: Numbers of a head.
        dtype: Of query, key and value.
        num_queries: Queries of a window.
        target: Architecture, as `device_target` names it.
    """
    if dtype == torch.float64:
        tile = FLOAT64_TILE
    else:
        key = (kernel, padded_head_dim(head_dim), dtype.itemsize)
        tile = TABLE.get((*key, target)) or TABLE.get((*key, ANY_TARGET), LARGEST_HEAD_TILE)
    block_m = min(tile.block_m, max(16, triton.next_power_of_2(num_queries)))
    return replace(tile, block_m=block_m)


def device_target(device: torch.device) -> str:
    """A device's architecture as the launch table names it: "sm_90", "gfx942"; else "any"."""
    if device.type != "cuda":
        return ANY_TARGET
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def padded_head_dim(head_dim: int) -> int:
    """A tile's last axis: a power of two, and at least the 16 that a tensor core takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def float32_precision() -> str:
    """How float32 products are made: exactly, unless the user allowed TF32 in PyTorch."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def token_map(tensor: Tensor) -> TokenMap:
    """The kernels' view of a map; only its last axis must be contiguous."""
    return TokenMap(tensor, *tensor.stride()[:4])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """`sum_dtype` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@dataclass(frozen=True)
class Problem:
    """One call of the operator: everything that its kernels are launched with.

    Args:
        geometry: Window, levels, boundary and shift.
        query_shape: `(batch, height, width, heads, head_dim)`.
        dtype: Of query, key, value and out.
        coarse_key: Packed pooled keys `[batch, coarse_cells, heads, head_dim]`.
        coarse_value: Packed pooled values.
        scale: Factor on the scores.
        map_size: Rows and columns that hold real tokens.
        dropout_p: Probability that a weight is dropped.
        dropout_seed: int64 `[1]`, or None without dropout.
    """

    geometry: FocalGeometry
    query_shape: tuple[int, ...]
    dtype: torch.dtype
    coarse_key: Tensor
    coarse_value: Tensor
    scale: float
    map_size: tuple[int, int]
    dropout_p: float
    dropout_seed: Tensor | None

    @cached_property
    def tile(self) -> Tile:
        """Tile sizes and launch options."""
        return pick_tile("forward", self.query_shape[4], self.dtype, self.geometry.num_queries)

    @cached_property
    def shape(self) -> Shape:
        """Compile-time settings."""
        geometry, tile, head_dim = self.geometry, self.tile, self.query_shape[4]
        coarse, first = [], geometry.keys_per_level[0]
        for level, spec in enumerate(geometry.levels[1:], start=1):
            cells = geometry.cells(level)
            coarse.append(CoarseLevel(first, spec.subwindow_size, cells, spec.region_size))
            first += spec.region_size**2
        return Shape(
            window=geometry.window_size,
            region=geometry.levels[0].region_size,
            coarse=tuple(coarse),
            num_queries=geometry.num_queries,
            num_keys=geometry.num_keys,
            shift=geometry.shift,
            wrap=geometry.boundary == "wrap",
            one_period=geometry.margin(0) + geometry.shift <= min(self.size.pad_h, self.size.pad_w),
            head_dim=head_dim,
            block_d=padded_head_dim(head_dim),
            m_pad=self.m_pad,
            n_pad=_round_up(geometry.num_keys, tile.block_n),
            precision=float32_precision(),
            score_factor=self.scale * LOG2E,
            scale=self.scale,
            drop_threshold=keep_threshold(self.dropout_p),
            keep_factor=1.0 / (1.0 - self.dropout_p),
        )

    @cached_property
    def num_windows(self) -> int:
        """Windows of one image."""
        return math.prod(self.geometry.num_windows(*self.query_shape[1:3]))

    @property
    def m_pad(self) -> int:
        """Queries of a window, rounded up to whole tiles."""
        return _round_up(self.geometry.num_queries, self.tile.block_m)

    @property
    def query_blocks(self) -> int:
        """Query tiles of a window."""
        return self.m_pad // self.tile.block_m

    def new_stats(self, like: Tensor) -> Tensor:
        """Empty `[batch, windows, heads, 2, window²]`: two numbers per query."""
        batch, _, _, heads, _ = self.query_shape
        sizes = (batch, self.num_windows, heads, 2, self.geometry.num_queries)
        return torch.empty(sizes, dtype=sum_dtype(self.dtype), device=like.device)

    @cached_property
    def size(self) -> Size:
        """Run-time sizes."""
        _, height, width, heads, _ = self.query_shape
        padded = self.geometry.padded_size(height, width)
        return Size(height, width, *padded, *self.map_size, heads, self.coarse_key.shape[1])

    def common_arguments(self) -> dict[str, Any]:
        """Arguments that every attention kernel takes."""
        return {
            # Without dropout no kernel reads the seed: any pointer serves.
            "seed_ptr": self.coarse_key if self.dropout_seed is None else self.dropout_seed,
            "size": self.size,
            "S": self.shape,
            "ACC_TYPE": acc_type(self.dtype),
        }

    def key_levels(self) -> list[KeyLevel]:
        """The levels of this call, finest first."""
        geometry, (rows, cols) = self.geometry, self.geometry.num_windows(*self.query_shape[1:3])
        levels, start, first = [], 0, 0
        for index, spec in enumerate(geometry.levels):
            cells = geometry.cells(index)
            # A tensor core takes 16 keys: a square of coarse cells spans several windows.
            group = 1 if index == 0 else max(1, 4 // cells)
            keys = (group * cells) ** 2
            block_k = min(self.tile.block_m, max(16, triton.next_power_of_2(keys)))
            levels.append(
                KeyLevel(
                    fine=index == 0,
                    start=start,
                    first=first,
                    sub=spec.subwindow_size,
                    cells=cells,
                    region=spec.region_size,
                    group=group,
                    squares=-(-rows // group) * -(-cols // group),
                    blocks=-(-keys // block_k),
                    block_k=block_k,
                )
            )
            first += spec.region_size**2
            if index > 0:
                start += math.prod(geometry.map_cells(index, *self.query_shape[1:3]))
        return levels

    def padded_bias(self, bias: Tensor) -> Tensor:
        """`[heads, m_pad, n_pad]`, times log2(e), -inf beyond the last key: tiles need no mask."""
        rows = self.shape.m_pad - self.geometry.num_queries
        cols = self.shape.n_pad - self.geometry.num_keys
        scaled = F.pad(bias.to(sum_dtype(self.dtype)) * LOG2E, (0, cols), value=-torch.inf)
        return F.pad(scaled, (0, 0, 0, rows)).to(self.dtype)

    def transposed_bias(self, bias: Tensor) -> Tensor:
        """`[heads, num_keys + 1, m_pad]`, times log2(e), for kernels that walk over queries.

        A key that a window does not attend reads the last row, which is -inf throughout, and so are
        the columns beyond the last query.
        """
        cols = self.shape.m_pad - self.geometry.num_queries
        scaled = bias.to(sum_dtype(self.dtype)).mT * LOG2E
        return F.pad(scaled, (0, cols, 0, 1), value=-torch.inf).to(self.dtype)


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

    BLOCK = 16  # cells of a tile

    @cached_property
    def num_cells(self) -> int:
        """Cells of the level in one image."""
        return math.prod(self.geometry.map_cells(self.level, *self.shape[1:3]))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Cell tiles, heads, batch."""
        return -(-self.num_cells // self.BLOCK), self.shape[3], self.shape[0]

    def common_arguments(self) -> dict[str, Any]:
        """Arguments that both pooling kernels take."""
        _, height, width, heads, head_dim = self.shape
        padded = self.geometry.padded_size(height, width)
        return {
            "size": Size(height, width, *padded, height, width, heads, self.num_cells),
            "num_cells": self.num_cells,
            "S": PoolShape(self.geometry.shift, head_dim, padded_head_dim(head_dim)),
            "SUB": self.geometry.levels[self.level].subwindow_size,
            "BLOCK": self.BLOCK,
            "ACC_TYPE": acc_type(self.dtype),
            "num_warps": 4,
        }
