"""What each kernel has to do: the rules that turn a launch into trip counts and totals.

A rule reads the launch alone: its grid, its arguments and its constants. It names the loops of the
kernel's source with their trips, and the totals that one program must reach whatever the compiler
made of those loops: multiply-adds over whole tiles, exponentials of scores, bytes of token rows.
`solve_trips` fits the loops of the machine code to those totals, and fails if they do not add up.
Programs that differ (at the map's border, the last group) enter with their mean.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from benchmarks.assembly import Instruction, Loop, Program

__all__ = ["Launch", "Product", "Work", "solve_trips", "work_of"]

# Warps for which a tile is too small compute it once more.
COPIES = (1, 2, 3, 4)
# A tail that is evaluated under both outcomes of a test takes its exponentials twice; running sums
# take a few for each tile.
MOST_EXPONENTIALS = Fraction(5, 2)
# A tile with keys of several levels is loaded once for each, or a tile once for each use of it.
MOST_ROW_BYTES = 2
# Each product is issued under a branch of its own, so that the last trip seems to start products
# of a next one that is not there.
MOST_TCGEN05 = Fraction(9, 8)
TCGEN05_ROWS, TCGEN05_COLS, HALF_DEPTH = 128, 256, 16


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel, its grid and its keyword arguments."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name, with the level that it is specialised for."""
        name = self.kernel.__name__
        if "FINE" in self.arguments:
            name += " (fine)" if self.arguments["FINE"] else " (coarse)"
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
        tiles = math.ceil(self.m / TCGEN05_ROWS) * math.ceil(self.n / TCGEN05_COLS)
        return tiles * math.ceil(self.k / HALF_DEPTH) * self.count


@dataclass(frozen=True)
class Work:
    """What one program does, on average over the grid.

    Args:
        loops: Trips of the nested loops of the source, outermost first; several nests if they
            follow each other.
        products: Products of tiles.
        exponentials: Of scores, over whole tiles.
        pairs: Distinct query-key pairs; 0 for a kernel without any.
        row_bytes: Least bytes of rows of tokens and cells loaded, over whole tiles.
        kept: Part of the products that remains if the compiler drops columns without a key.
    """

    loops: tuple[tuple[Fraction, ...], ...]
    products: tuple[Product, ...]
    exponentials: Fraction
    pairs: Fraction
    row_bytes: Fraction
    kept: Fraction = Fraction(1)

    @property
    def multiply_adds(self) -> Fraction:
        """Of all products, over whole tiles."""
        return sum((product.multiply_adds for product in self.products), Fraction(0))


def _row(launch: Launch) -> int:
    """Bytes of a padded row of a token."""
    element = launch.arguments["key"].ptr.element_size()
    return launch.arguments["S"].block_d * element


def _walk_over_keys(launch: Launch, products: int, query_rows: int) -> Work:
    """Forward and the query gradient: fine tiles in a loop, then the rest."""
    shape, block_m = launch.arguments["S"], launch.arguments["BLOCK_M"]
    block_n = launch.arguments["BLOCK_N"]
    tiles = Fraction(shape.n_pad, block_n)
    fine = shape.region**2
    whole = fine // block_n
    rest = tiles - math.ceil(fine / block_n)
    across = Product(block_m, block_n, shape.block_d, (products - 1) * tiles)
    along = Product(block_m, shape.block_d, block_n, tiles)
    return Work(
        loops=((Fraction(whole),), (rest,)),
        products=(across, along),
        exponentials=Fraction(block_m * shape.n_pad),
        pairs=Fraction(shape.num_queries * shape.num_keys * block_m, shape.m_pad),
        row_bytes=Fraction((query_rows * block_m + 2 * shape.n_pad) * _row(launch)),
        kept=Fraction(shape.num_keys, shape.n_pad),
    )


def _forward(launch: Launch) -> Work:
    return _walk_over_keys(launch, products=2, query_rows=1)


def _query_gradient(launch: Launch) -> Work:
    return _walk_over_keys(launch, products=3, query_rows=3)


def _bias_gradient(launch: Launch) -> Work:
    """One trip per (image, window) of a group; the last group may be smaller."""
    arguments = launch.arguments
    shape, block_m, block_n = (arguments[name] for name in ("S", "BLOCK_M", "BLOCK_N"))
    items = Fraction(arguments["num_items"], launch.grid[2])
    return Work(
        loops=((items,),),
        products=(Product(block_m, block_n, shape.block_d, 2 * items),),
        exponentials=block_m * block_n * items,
        pairs=shape.num_queries * shape.num_keys * items / launch.grid[0],
        row_bytes=2 * (block_m + block_n) * items * _row(launch),
    )


def _key_gradient(launch: Launch) -> Work:
    """Rows and columns of the windows that attend a square, and query tiles of each."""
    arguments, size = launch.arguments, launch.arguments["size"]
    shape, block_m, block_k = (arguments[name] for name in ("S", "BLOCK_M", "BLOCK_K"))
    cells, region, group = (arguments[name] for name in ("CELLS", "REGION", "GROUP"))
    margin = (region - cells) // 2
    reach = math.ceil(margin / cells)
    wraps = arguments["FINE"] and shape.wrap
    trips, attended = [], Fraction(1)
    for side in (size.pad_h // shape.window, size.pad_w // shape.window):
        firsts = range(0, side, group)
        if wraps:
            spans = [group + 2 * reach for _ in firsts]
            lines = side * region
        else:
            spans = [min(at + group + reach, side) - max(at - reach, 0) for at in firsts]
            starts = [window * cells - margin for window in range(side)]
            lines = sum(min(at + region, side * cells) - max(at, 0) for at in starts)
        trips.append(Fraction(sum(spans), len(spans)))
        attended *= lines
    tiles = Fraction(shape.m_pad, block_m)
    visits = trips[0] * trips[1] * tiles
    return Work(
        loops=((*trips, tiles),),
        products=(
            Product(block_k, block_m, shape.block_d, 2 * visits),
            Product(block_k, shape.block_d, block_m, 2 * visits),
        ),
        exponentials=block_k * block_m * visits,
        pairs=shape.num_queries * attended / launch.grid[0],
        row_bytes=2 * (block_k + block_m * visits) * _row(launch),
    )


def _pool(launch: Launch) -> Work:
    """One trip per position of the sub-window."""
    positions = Fraction(launch.arguments["SUB"] ** 2)
    return Work(
        loops=((positions,),),
        products=(),
        exponentials=Fraction(0),
        pairs=Fraction(0),
        row_bytes=2 * positions * launch.arguments["BLOCK"] * _row(launch),
    )


RULES: dict[str, Callable[[Launch], Work]] = {
    "forward_kernel": _forward,
    "query_gradient_kernel": _query_gradient,
    "bias_gradient_kernel": _bias_gradient,
    "key_gradient_kernel": _key_gradient,
    "pool_kernel": _pool,
    "pool_backward_kernel": _pool,
}


def work_of(launch: Launch) -> Work:
    """What one program of a launch does.

    Raises:
        KeyError: If the kernel has no rule in `RULES`.
    """
    return RULES[launch.kernel.__name__](launch)


@dataclass(frozen=True)
class Totals:
    """What one program executed: numbers per program, not per warp.

    Args:
        multiply_adds: Of tensor-core instructions whose names tell their shape.
        tcgen05_steps: Tensor-core instructions whose names do not.
        exponentials: Lanes times instructions.
        row_bytes: Bytes of token rows loaded.
    """

    multiply_adds: Fraction
    tcgen05_steps: Fraction
    exponentials: Fraction
    row_bytes: Fraction

    @classmethod
    def count(
        cls,
        instructions: Sequence[Instruction],
        executions: Sequence[Fraction],
        warps: int,
        lanes: int,
        is_row: Callable[[Instruction], bool],
    ) -> Totals:
        """Add up."""
        products = steps = exponentials = row_bytes = Fraction(0)
        for instruction, times in zip(instructions, executions, strict=True):
            if instruction.multiply_adds is None:
                steps += times
            else:
                products += times * warps * instruction.multiply_adds
            exponentials += times * warps * lanes * instruction.exponential
            access = instruction.access
            if access and not access.store and is_row(instruction):
                row_bytes += times * warps * lanes * access.bytes
        return cls(products, steps, exponentials, row_bytes)

    def products(self, work: Work) -> Fraction:
        """Products executed for each one that the tiles take."""
        if self.tcgen05_steps:
            steps = sum((product.tcgen05_steps for product in work.products), Fraction(0))
            return self.tcgen05_steps / steps
        return self.multiply_adds / work.multiply_adds if work.multiply_adds else Fraction(1)

    def problem(self, work: Work, tensor_cores: bool, loops: bool) -> str | None:
        """What does not add up, if anything; without loops there may be more rows."""
        products = self.products(work) if tensor_cores else Fraction(1)
        copies = max(products, Fraction(1))
        if self.tcgen05_steps:
            if not 1 <= products <= MOST_TCGEN05:
                return f"products: {float(products):.4f} of what the tiles take"
        elif products not in COPIES and not work.kept <= products < 1:
            return f"products: {float(products):.4f} of what the tiles take"
        most = MOST_EXPONENTIALS * copies * work.exponentials
        # The compiler drops those of columns that it knows to hold no key.
        if not work.pairs <= self.exponentials <= most:
            return f"exponentials: {float(self.exponentials)}, needed {float(work.exponentials)}"
        most = MOST_ROW_BYTES * work.row_bytes if loops else self.row_bytes
        if not work.row_bytes <= self.row_bytes <= most:
            return f"bytes of rows: {float(self.row_bytes)}, needed {float(work.row_bytes)}"
        return None


def _working(program: Program, loops: Sequence[Loop]) -> Iterator[Loop]:
    """Loops with products, exponentials or accesses inside; the others wait, and go round once."""
    for loop in loops:
        body = [program.instructions[at] for block in loop.blocks for at in program.span(block)]
        if any(i.kind == "tensor" or i.exponential or i.access for i in body):
            yield loop


def _nests(program: Program, loops: Sequence[Loop]) -> list[list[int]]:
    """Headers of nested loops that do work, outermost first; one list per nest."""
    nests = []
    for loop in _working(program, loops):
        inside = _nests(program, loop.inner)
        nests += [[loop.header, *nest] for nest in inside] or [[loop.header]]
    return nests


def _candidates(source: Sequence[Fraction], depth: int) -> Iterator[tuple[Fraction, ...]]:
    """Trips that ``depth`` loops may have, made of those of the source.

    The compiler may fuse neighbours, unroll the innermost or all of them, run an iteration before
    or behind the loop, or enter the header once more to find that it is done.
    """
    for kept in range(len(source), 0, -1):
        for cuts in itertools.combinations(range(1, kept), depth - 1):
            ends = [*cuts, kept]
            groups = [
                math.prod(source[a:b], start=Fraction(1))
                for a, b in zip([0, *cuts], ends, strict=True)
            ]
            for change in (0, -1, 1):
                for unroll in (1, 2, 4, 8):
                    if unroll == 1 or groups[-1] % unroll == 0:
                        yield (*groups[:-1], Fraction(groups[-1], unroll) + change)


def _all_headers(loops: Sequence[Loop]) -> Iterator[int]:
    for loop in loops:
        yield loop.header
        yield from _all_headers(loop.inner)


def solve_trips(
    program: Program, work: Work, count: Callable[[list[Fraction]], Totals], tensor_cores: bool
) -> tuple[list[Fraction], Totals]:
    """Executions of each instruction, with trip counts that add up to the work.

    Args:
        program: The machine code.
        work: What one program must do.
        count: Adds up what given executions do.
        tensor_cores: Whether products must be found as tensor-core instructions.

    Raises:
        ValueError: If no trip counts that the source allows reach the totals.
    """
    nests = _nests(program, program.loops)
    sources = [nest for nest in work.loops if math.prod(nest) > 1]
    waiting = dict.fromkeys(_all_headers(program.loops), Fraction(1))
    problems, solutions = [], []
    for chosen in itertools.combinations(sources, len(nests)):
        choices = [_candidates(s, len(nest)) for s, nest in zip(chosen, nests, strict=True)]
        for trips in itertools.product(*choices):
            known = {
                header: number
                for nest, numbers in zip(nests, trips, strict=True)
                for header, number in zip(nest, numbers, strict=True)
            }
            executions = program.executions({**waiting, **known})
            totals = count(executions)
            problem = totals.problem(work, tensor_cores, bool(nests))
            if problem is None:
                solutions.append((executions, totals))
            else:
                problems.append(f"{[[float(n) for n in nest] for nest in trips]}: {problem}")
    if solutions:
        # A program that repeats nothing is never mistaken for one that repeats everything.
        def order(solution: tuple[list[Fraction], Totals]) -> tuple[Fraction, ...]:
            executions, totals = solution
            dropped = max(Fraction(0), 1 - totals.products(work)) if tensor_cores else Fraction(0)
            return dropped, totals.row_bytes, sum(executions, Fraction(0))

        return min(solutions, key=order)
    found = f"{len(nests)} nests of loops with work, in the source {len(sources)}"
    raise ValueError(f"trip counts do not add up ({found})\n" + "\n".join(problems))
