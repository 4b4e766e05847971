"""What each kernel has to do: the rules that turn a launch into trip counts and totals.

A rule reads the launch alone: its grid, its arguments and its constants. It names the loops of the
kernel's source with their trips, and the totals that one program must reach whatever the compiler
made of those loops: multiply-adds over whole tiles, exponentials of scores, bytes of token rows.
`benchmarks.trips` fits the loops of the machine code to those totals. Programs that differ (at the
map's border, the last group) enter with their mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from kernels.tiles import Level

__all__ = ["Launch", "Product", "Work", "work_of"]

TCGEN05_ROWS, TCGEN05_COLS, HALF_DEPTH = 128, 256, 16
TCGEN05_LEAST_ROWS = 64  # smaller tiles go to the instructions of earlier generations
POOL_TOKENS = 64  # of a trip of `kernels.tiles.pool_tile`
ROW_TENSORS = ("key", "part_ptr", "key_part_ptr")  # one of them is an argument of every kernel


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid, its keyword arguments and the pass it is part of."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    direction: str

    @property
    def name(self) -> str:
        """The kernel's name, with the variant that it is specialised for."""
        name = self.kernel.__name__
        if "L" in self.arguments:
            name += " (fine)" if self.arguments["L"].fine else " (coarse)"
        if self.arguments.get("pools") and any(x.inline for x in self.arguments["S"].levels):
            name += " (pooling inside)"
        return name


@dataclass(frozen=True)
class Product:
    """``count`` products of an ``m × k`` by a ``k × n`` tile."""

    m: int
    n: int
    k: int
    count: Fraction

    @property
    def multiply_adds(self) -> Fraction:
        """Over whole tiles."""
        return self.m * self.n * self.k * self.count

    @property
    def tcgen05_steps(self) -> Fraction:
        """Instructions of the fifth generation of tensor cores, whose names hide their shape."""
        if self.m < TCGEN05_LEAST_ROWS:
            return Fraction(0)
        tiles = math.ceil(self.m / TCGEN05_ROWS) * math.ceil(self.n / TCGEN05_COLS)
        return tiles * math.ceil(self.k / HALF_DEPTH) * self.count


@dataclass(frozen=True)
class Work:
    """What one program does, on average over the grid.

    Args:
        loops: Trips of the nested loops of the source, outermost first; several nests if they
            follow each other. Without those that every compiler takes away.
        products: Products of tiles.
        exponentials: Of scores, over whole tiles.
        pairs: Query-key pairs, those of a tile's padding left out; 0 without scores.
        row_bytes: Least bytes of rows of tokens, cells and the workspace loaded, over whole tiles.
        images: That the whole launch works on; None for the same work however many there are.
    """

    loops: tuple[tuple[Fraction, ...], ...]
    products: tuple[Product, ...]
    exponentials: Fraction
    pairs: Fraction
    row_bytes: Fraction
    images: Fraction | None = Fraction(1)

    @property
    def multiply_adds(self) -> Fraction:
        """Of all products, over whole tiles."""
        return sum((product.multiply_adds for product in self.products), Fraction(0))


def _row(launch: Launch) -> int:
    """Bytes of a padded row of a token."""
    tensor = next(launch.arguments[name] for name in ROW_TENSORS if name in launch.arguments)
    return launch.arguments["S"].block_d * getattr(tensor, "ptr", tensor).element_size()


def _windows(launch: Launch) -> tuple[int, int]:
    """Rows and columns of windows of one image."""
    size, window = launch.arguments["size"], launch.arguments["S"].window
    return size.pad_h // window, size.pad_w // window


def _blocks(launch: Launch) -> int:
    """Query tiles of a window."""
    return launch.arguments["S"].m_pad // launch.arguments["BLOCK_M"]


def _pool_trips(launch: Launch, level: Level) -> Fraction:
    """Trips over the tokens under a window's region, on average: it ends at the map's border."""
    margin = (level.region - level.cells) // 2
    sides = []
    for windows in _windows(launch):
        starts = [window * level.cells - margin for window in range(windows)]
        ends = [min(start + level.region, windows * level.cells) for start in starts]
        sides.append([(b - max(a, 0)) * level.sub for a, b in zip(starts, ends, strict=True)])
    trips = [math.ceil(rows * cols / POOL_TOKENS) for rows in sides[0] for cols in sides[1]]
    return Fraction(sum(trips), len(trips))


def _walk_over_keys(launch: Launch, query_rows: int, products: tuple[int, int]) -> Work:
    """Whole tiles of each level in a loop, then those of its end.

    Args:
        launch: Of a program per query tile of a window.
        query_rows: Tiles of rows loaded once.
        products: How many products of each tile sum over the head, and over the keys.
    """
    shape, block_m = launch.arguments["S"], launch.arguments["BLOCK_M"]
    row, across, along = _row(launch), *products
    loops: list[tuple[Fraction, ...]] = []
    found: list[Product] = []
    row_bytes = Fraction(query_rows * block_m * row)
    for level in shape.levels:
        repeats = level.full // level.block
        tiles = [(level.block, repeats)] if repeats else []
        for keys, count in [*tiles, *((size, 1) for _, size in level.tail)]:
            # The compiler takes a loop of one trip away.
            nest = (Fraction(count),) if count > 1 else ()
            rows = Fraction(keys)
            if level.inline:
                trips = _pool_trips(launch, level)
                nest, rows = (*nest, trips), POOL_TOKENS * trips
                found.append(Product(keys, shape.block_d, POOL_TOKENS, 2 * count * trips))
            loops += [nest] if nest else []
            row_bytes += 2 * count * rows * row
            if across:
                found.append(Product(block_m, keys, shape.block_d, Fraction(across * count)))
            if along:
                found.append(Product(block_m, shape.block_d, keys, Fraction(along * count)))
    return Work(
        loops=tuple(loops),
        products=tuple(found),
        exponentials=Fraction(block_m * shape.n_pad),
        pairs=Fraction(shape.num_queries * shape.num_keys * block_m, shape.m_pad),
        row_bytes=row_bytes,
        images=Fraction(launch.grid[0], _blocks(launch) * math.prod(_windows(launch))),
    )


def _forward(launch: Launch) -> Work:
    return _walk_over_keys(launch, query_rows=1, products=(1, 1))


def _delta(launch: Launch) -> Work:
    """From two rows per query; in full precision from all scores, computed again."""
    whole = _walk_over_keys(launch, query_rows=2, products=(2, 0))
    if launch.arguments["query"].ptr.element_size() > 2:
        return whole
    rows = Fraction(2 * launch.arguments["BLOCK_M"] * _row(launch))
    return Work((), (), Fraction(0), Fraction(0), rows, whole.images)


def _gradient(launch: Launch) -> Work:
    """One trip per window of a group; the last group may be smaller, or empty."""
    arguments = launch.arguments
    shape, level, block_m = (arguments[name] for name in ("S", "L", "BLOCK_M"))
    items = Fraction(arguments["num_items"], launch.grid[2])
    return Work(
        loops=((items,),),
        products=(
            Product(block_m, level.block, shape.block_d, 2 * items),
            Product(level.block, shape.block_d, block_m, 2 * items),
            Product(block_m, shape.block_d, level.block, items),
        ),
        exponentials=block_m * level.block * items,
        pairs=shape.num_queries * level.region**2 * items / launch.grid[0],
        row_bytes=2 * (block_m + level.block) * items * _row(launch),
        images=Fraction(arguments["num_items"], math.prod(_windows(launch))),
    )


def _fold_queries(launch: Launch) -> Work:
    """One trip per key tile."""
    arguments = launch.arguments
    tiles = Fraction(arguments["NUM_TILES"])
    return _copy(
        trips=tiles if tiles > 1 else None,
        row_bytes=arguments["BLOCK_M"] * tiles * _row(launch),
        images=Fraction(launch.grid[0], _blocks(launch) * math.prod(_windows(launch))),
    )


def _fold_keys(launch: Launch) -> Work:
    """One trip per window that may attend a cell."""
    arguments, level = launch.arguments, launch.arguments["L"]
    windows = Fraction(math.ceil(level.region / level.cells) ** 2)
    return _copy(
        trips=windows if windows > 1 else None,
        row_bytes=2 * windows * arguments["BLOCKS"] * arguments["BLOCK"] * _row(launch),
        images=Fraction(launch.grid[2]),
    )


def _pool(launch: Launch, maps: int = 2) -> Work:
    """One trip per position of the sub-window, which reads a row of each of ``maps``."""
    arguments = launch.arguments
    positions = Fraction(arguments["SUB"] ** 2)
    tiles = math.ceil(arguments["cells"] / arguments["BLOCK"])
    return _copy(
        trips=positions if positions > 1 else None,
        row_bytes=maps * positions * arguments["BLOCK"] * _row(launch),
        images=Fraction(launch.grid[0], tiles),
    )


def _copy(trips: Fraction | None, row_bytes: Fraction, images: Fraction) -> Work:
    """Work without products: one loop at most, over rows."""
    loops = () if trips is None else ((trips,),)
    return Work(loops, (), Fraction(0), Fraction(0), row_bytes, images)


def _bias_layout(launch: Launch) -> Work:
    """A few numbers of a table for each thread, once a call."""
    return Work((), (), Fraction(0), Fraction(0), Fraction(0), images=None)


RULES: dict[str, Callable[[Launch], Work]] = {
    "bias_kernel": _bias_layout,
    "forward_kernel": _forward,
    "delta_kernel": _delta,
    "gradient_kernel": _gradient,
    "fold_queries_kernel": _fold_queries,
    "fold_keys_kernel": _fold_keys,
    "pool_kernel": _pool,
    "pool_backward_kernel": partial(_pool, maps=4),  # keys, values and their gradients
}


def work_of(launch: Launch) -> Work:
    """What one program of a launch does.

    Raises:
        KeyError: If the kernel has no rule in `RULES`.
    """
    return RULES[launch.kernel.__name__](launch)
