"""What launches are made of: tile sizes by head and device, compile-time and run-time sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from kernels.dropout import keep_threshold
from kernels.geometry import FocalGeometry
from kernels.launch_table import ANY_TARGET, TABLE, Tile
from kernels.tiles import Level, Shape, Size

__all__ = [
    "Problem",
    "device_target",
    "pick_tile",
    "pools_inline",
    "stats_shape",
    "strides_of",
    "sum_dtype",
    "tile_side",
]

Strides = tuple[int, ...]  # of a map's batch, rows, columns and heads

PLANS = 256  # kept of each kind: a model of a few sizes needs one for each stage and size
LOG2E = 1.4426950408889634
FLOAT64_TILE = Tile(64, 64, 4, 1)  # float64 runs under the interpreter alone, where fewer is faster
LEAST_SIDE = 16  # of a tile that a tensor core takes
WIDEST_ACCESS = 16  # bytes of a thread
COPYING_THREADS = 128  # of a kernel that moves 32 rows of 32 16-bit numbers at a time
LARGEST_HEAD_TILE = Tile(16, 16, 8, 1)


def pick_tile(
    kernel: str, head_dim: int, dtype: torch.dtype, num_queries: int, target: str = ANY_TARGET
) -> Tile:
    """The launch configuration for a head; windows of few queries take a smaller query tile.

    Args:
        kernel: ``"forward"`` or ``"gradient"``.
        head_dim: Numbers of a head.
        dtype: Of query, key and value.
        num_queries: Queries of a window.
        target: Architecture, as `device_target` names it.
    """
    if dtype == torch.float64:
        tile = FLOAT64_TILE
    else:
        key = (kernel, tile_side(head_dim), dtype.itemsize)
        tile = TABLE.get((*key, target)) or TABLE.get((*key, ANY_TARGET), LARGEST_HEAD_TILE)
    side = tile_side(num_queries)
    return tile if tile.block_m <= side else replace(tile, block_m=side)


@lru_cache
def device_target(device: torch.device) -> str:
    """A device's architecture as the launch table names it: "sm_90", "gfx942"; else "any"."""
    if device.type != "cuda":
        return ANY_TARGET
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def warp_size(target: str) -> int:
    """Threads of a warp of an architecture."""
    return 64 if target.startswith("gfx") else 32


def tile_side(count: int) -> int:
    """The least side of a tile that holds ``count``: a power of two that a tensor core takes."""
    return max(LEAST_SIDE, 1 << (count - 1).bit_length())


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class Cut(NamedTuple):
    """A level's keys cut into tiles; see `kernels.tiles.Level`."""

    block: int
    full: int
    tail: tuple[tuple[int, int], ...]


def cut_with_tail(keys: int, block: int, least: int) -> Cut:
    """Whole tiles, then smaller ones, powers of two from ``least`` up: least padding."""
    start = full = keys // block * block
    tail = []
    while start < keys:
        rest = _round_up(keys - start, least)
        size = 1 << (rest.bit_length() - 1)
        tail.append((start, size))
        start += size
    return Cut(block, full, tuple(tail))


def cut_evenly(keys: int, block: int) -> Cut:
    """Tiles of one size, at most ``block``: programs of one kernel can share them out."""
    block = min(block, tile_side(keys))
    return Cut(block, _round_up(keys, block), ())


def float32_precision() -> str:
    """How float32 products are made: exactly, unless the user allowed TF32 in PyTorch."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def strides_of(*maps: Tensor) -> tuple[Strides, ...]:
    """All but the last axis, which is contiguous, of maps that the kernels take as `TokenMap`."""
    return tuple(x.stride()[:4] for x in maps)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums over ``dtype`` are kept in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """`sum_dtype` as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def offsets_fit(shape: Sequence[int], maps: Iterable[Strides]) -> bool:
    """Whether 32 bits hold every offset inside one image of maps of this shape."""
    sides = [side - 1 for side in shape[1:4]]
    rows = (sum(map(operator.mul, sides, strides[1:])) for strides in maps)
    return all(row + shape[4] <= 2**31 for row in rows)


def _levels(geometry: FocalGeometry, cuts: Iterable[Cut], *, inline: bool) -> tuple[Level, ...]:
    levels, first, column = [], 0, 0
    for index, cut in enumerate(cuts):
        spec = geometry.levels[index]
        level = Level(
            fine=index == 0,
            sub=spec.subwindow_size,
            cells=geometry.cells(index),
            region=spec.region_size,
            first=first,
            column=column,
            inline=index > 0 and inline,
            **cut._asdict(),
        )
        levels.append(level)
        first += spec.region_size**2
        column += level.width
    return tuple(levels)


@dataclass(frozen=True)
class Problem:
    """What a call's launches depend on but for its tensors: calls that agree in it share plans.

    Args:
        geometry: Window, levels, boundary and shift.
        query_shape: `(batch, height, width, heads, head_dim)`.
        dtype: Of query, key, value and out.
        scale: Factor on the scores, positive.
        map_size: Rows and columns that hold real tokens.
        dropout_p: Probability that a weight is dropped.
        target: Architecture, as `device_target` names it.
        inline: Coarse levels are pooled in the attention kernel; there are no packed maps then.
        precision: See `float32_precision`.
    """

    geometry: FocalGeometry
    query_shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float
    map_size: tuple[int, int]
    dropout_p: float
    target: str
    inline: bool = False
    precision: str = field(default_factory=float32_precision)

    def tile(self, kernel: str) -> Tile:
        """Tile sizes and launch options of a kernel."""
        head_dim, queries = self.query_shape[4], self.geometry.num_queries
        return pick_tile(kernel, head_dim, self.dtype, queries, self.target)

    def least_keys(self, tile: Tile, level: int) -> int:
        """Keys of a level's smallest tile: 16 bytes of it for each thread that loads it."""
        if level > 0 and self.inline:  # not keys but whole tiles of tokens are loaded
            return LEAST_SIDE
        threads = tile.num_warps * warp_size(self.target)
        return max(LEAST_SIDE, min(tile.block_n, threads * WIDEST_ACCESS // self.row_bytes))

    @property
    def row_bytes(self) -> int:
        """Of a token's row in a tile."""
        return tile_side(self.query_shape[4]) * self.dtype.itemsize

    def options(self, tile: Tile, keys: int | None = None) -> dict[str, int]:
        """A kernel's options for the compiler.

        Args:
            tile: Its launch configuration.
            keys: Of its only tile, if that may be too small for 16 bytes to every thread: it then
                takes fewer warps.
        """
        warps = tile.num_warps
        if keys is not None:
            threads = keys * self.row_bytes // WIDEST_ACCESS
            warps = max(1, min(warps, threads // warp_size(self.target)))
        options = {"num_warps": warps, "num_stages": tile.num_stages}
        if warps < tile.num_warps and self.target.startswith("sm_"):
            # Else the compiler aims at more blocks than it has registers for, and spills.
            options["maxnreg"] = 255
        if self.target.startswith("gfx"):
            # AMD's matrix instructions are 32 or 16 rows high: four warps share 64 rows only by 16,
            # and would make every product twice by 32.
            options["matrix_instr_nonkdim"] = 16
        return options

    def shape(self, cuts: Iterable[Cut], block_m: int, maps: Sequence[Strides]) -> Shape:
        """Compile-time settings.

        Args:
            cuts: How each level's keys are cut into tiles.
            block_m: Queries of a tile.
            maps: Strides of query, key, value and other maps that the kernels read.
        """
        geometry, size, head_dim = self.geometry, self.size, self.query_shape[4]
        levels = _levels(geometry, cuts, inline=self.inline)
        image = size.pad_h * size.pad_w * size.num_heads * head_dim
        return Shape(
            window=geometry.window_size,
            levels=levels,
            num_queries=geometry.num_queries,
            num_keys=geometry.num_keys,
            shift=geometry.shift,
            wrap=geometry.boundary == "wrap",
            one_period=geometry.margin(0) + geometry.shift <= min(size.pad_h, size.pad_w),
            even=(size.height, size.width) == (size.pad_h, size.pad_w) == (size.map_h, size.map_w),
            narrow=offsets_fit(self.query_shape, maps) and image < 2**31,
            same_strides=maps[1][1:] == maps[2][1:],
            head_dim=head_dim,
            block_d=tile_side(head_dim),
            m_pad=_round_up(geometry.num_queries, block_m),
            n_pad=levels[-1].column + levels[-1].width,
            precision=self.precision,
            score_factor=self.scale * LOG2E,
            scale=self.scale,
            drop_threshold=keep_threshold(self.dropout_p),
            keep_factor=1.0 / (1.0 - self.dropout_p),
        )

    @property
    def num_windows(self) -> int:
        """Windows of one image."""
        return math.prod(self.geometry.num_windows(*self.query_shape[1:3]))

    @property
    def size(self) -> Size:
        """Run-time sizes."""
        _, height, width, heads, _ = self.query_shape
        padded = self.geometry.padded_size(height, width)
        cells = 0 if self.inline else self.geometry.coarse_starts(height, width)[-1]
        return Size(height, width, *padded, *self.map_size, heads, cells)


def stats_shape(geometry: FocalGeometry, query_shape: Sequence[int]) -> tuple[int, ...]:
    """`(batch, windows, heads, 2, window²)`: two numbers per query that backward needs."""
    batch, height, width, heads, _ = query_shape
    windows = math.prod(geometry.num_windows(height, width))
    return batch, windows, heads, 2, geometry.num_queries


# Thread-instructions that pooling in the attention kernel spends on a token, and those that a large
# GPU executes while a launch is on its way (3 µs); both from instruction counts. What follows from
# them was measured (docs/decisions.md).
INLINE_INSTRUCTIONS = 400
LAUNCH_INSTRUCTIONS = 9e7
LARGEST_INLINE_REGION = 32  # cells: a level pooled in the kernel is a single small tile


def pools_inline(geometry: FocalGeometry, query_shape: Sequence[int]) -> bool:
    """Whether pooling inside the attention kernel costs less than a pass of its own (forward).

    A pass reads each token once, and costs a launch for each level. In the kernel every window
    pools the cells of its region again, so a token is pooled as often as windows attend its cell;
    the products are the same. The kernel is cheaper where what it pools in excess takes less time
    than the launch: where a region holds few windows (stage 4 always, stage 3 for small batches).

    Args:
        geometry: Window, levels, boundary and shift.
        query_shape: `(batch, height, width, heads, head_dim)`.
    """
    batch, height, width, heads, _ = query_shape
    excess = 0
    for level in range(1, len(geometry.levels)):
        if geometry.levels[level].region_size ** 2 > LARGEST_INLINE_REGION:
            return False
        cells = [
            sum(min(at + reach, side) - max(at - margin, 0) for at in range(0, side, step))
            for side in geometry.map_cells(level, height, width)
            for step, margin in [(geometry.cells(level), geometry.margin(level))]
            for reach in [step + margin]
        ]
        pooled = math.prod(cells) - math.prod(geometry.map_cells(level, height, width))
        excess += pooled * geometry.levels[level].subwindow_size ** 2
    launches = len(geometry.levels) - 1
    return batch * heads * excess * INLINE_INSTRUCTIONS <= launches * LAUNCH_INSTRUCTIONS
