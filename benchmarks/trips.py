"""How often each loop of a kernel's machine code goes round.

`solve_trips` tries the trips that the source's loops may have become in the compiler's hands, and
takes those whose totals are the ones that `benchmarks.work` says the launch must reach. It fails if
there are none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from benchmarks.assembly import Instruction, Loop, Program
from benchmarks.work import Product, Work

__all__ = ["Totals", "solve_trips"]

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


@cache
def _repeats(products: tuple[Product, ...]) -> frozenset[Fraction]:
    """Multiply-adds that products may take: a warp without a part of a tile repeats another's."""
    sums = {Fraction(0)}
    for product in products:
        sums = {total + copies * product.multiply_adds for total in sums for copies in COPIES}
    return frozenset(sums)


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
            return self.tcgen05_steps / sum(product.tcgen05_steps for product in work.products)
        return self.multiply_adds / work.multiply_adds if work.multiply_adds else Fraction(1)

    def problem(self, work: Work, tensor_cores: bool, loops: bool) -> str | None:
        """What does not add up, if anything; without loops there may be more rows."""
        products = self.products(work) if tensor_cores else Fraction(1)
        copies = max(products, Fraction(1))
        named = work.products
        if self.tcgen05_steps:
            named = tuple(product for product in named if not product.tcgen05_steps)
            if not 1 <= products <= MOST_TCGEN05:
                return f"products: {float(products):.4f} of what the tiles take"
        if tensor_cores and self.multiply_adds not in _repeats(named):
            return f"products: {float(products):.4f} of what the tiles take"
        most = MOST_EXPONENTIALS * copies * work.exponentials
        # The compiler may drop those of places that it knows to hold no key.
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
    sources = work.loops
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
            return totals.row_bytes, sum(executions, Fraction(0))

        return min(solutions, key=order)
    found = f"{len(nests)} nests of loops with work, in the source {len(sources)}"
    raise ValueError(f"trip counts do not add up ({found})\n" + "\n".join(problems))
