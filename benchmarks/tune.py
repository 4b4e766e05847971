"""Measure launch configurations on this machine's GPU and write them into the launch table.

    python -m benchmarks.tune --dry-run --minutes 5         # prints the change
    python -m benchmarks.tune --kernels forward --dtypes bfloat16

For each kernel and width of type a walk starts at the table's tile and steps to the best neighbour
(one of the four numbers halved, doubled or one off) as long as that saves time: the mean over
stages 1 to 4 of the candidate's time over that of the tile in hand, both measured in turns, all
launches of the kernel's pass included, for a tile also settles what is left to the others. A
candidate that does not compile, spills registers, or whose results the oracle rejects is refused.
Only entries of this GPU's architecture are written; those of others stay as they are. On a CPU,
under TRITON_INTERPRET=1, the same runs at tiny sizes to check itself, and nothing is written.
"""

from __future__ import annotations

import argparse
import difflib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.codegen import Case
from benchmarks.contenders import CONTENDERS, OURS, Call, draw_call
from benchmarks.contest import Checker, Deadline, reason_of
from benchmarks.interpreter import patch_once_per_launch
from benchmarks.launch_file import Key, rewrite
from benchmarks.timing import environment, interleave, write_json
from benchmarks.workloads import TRAINING, released_cases, tiny_cases
from kernels import backward, forward, launch_table
from kernels.launch import device_target, pick_tile, tile_side
from kernels.launch_table import TABLE, Tile

TUNED = tuple(dict.fromkeys(key[0] for key in TABLE))  # kernels, as the table names them
CHOICES = {
    "block_m": (16, 32, 64),  # a window of the released models has 49 queries
    "block_n": (16, 32, 64, 128),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4),
}
NOISE = 0.98  # a smaller saving is no saving


class RefusedError(RuntimeError):
    """A candidate that must not be used."""


@dataclass
class Outcome:
    """What the walk for one entry of the table came to."""

    key: Key
    before: Tile
    after: Tile
    ratio: float = 1.0  # time with ``after`` over time with ``before``, mean over the stages
    tried: int = 0
    refused: list[str] = field(default_factory=list)
    complete: bool = True


Compare = Callable[[Tile, Tile], Sequence[float]]


def neighbours(tile: Tile) -> list[Tile]:
    """Tiles one step away along one axis."""
    found = []
    for name, choices in CHOICES.items():
        value = getattr(tile, name)
        lower = [choice for choice in choices if choice < value][-1:]
        higher = [choice for choice in choices if choice > value][:1]
        found += [replace(tile, **{name: choice}) for choice in lower + higher]
    return found


def walk(key: Key, start: Tile, compare: Compare, allows: Callable[[], bool]) -> Outcome:
    """Step to the best neighbour until none saves time.

    Args:
        key: The entry of the table.
        start: Its tile now.
        compare: Time ratios of a candidate and the tile in hand, one per stage; it raises
            `RefusedError` for a candidate that must not be used.
        allows: Whether there is time for another candidate.
    """
    outcome, seen = Outcome(key, start, start), {start}
    while True:
        best, best_ratio = outcome.after, NOISE
        for candidate in neighbours(outcome.after):
            if candidate in seen:
                continue
            if not allows():
                outcome.complete = False
                break
            seen.add(candidate)
            outcome.tried += 1
            try:
                ratio = statistics.mean(compare(candidate, outcome.after))
            except RefusedError as error:
                outcome.refused.append(f"{candidate}: {error}")
                continue
            if ratio < best_ratio:
                best, best_ratio = candidate, ratio
        if best == outcome.after:
            return outcome
        outcome.after, outcome.ratio = best, outcome.ratio * best_ratio


# -- on the device --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launched:
    """A launch that took place."""

    kernel: Any
    grid: Any
    arguments: dict[str, Any]
    compiled: Any

    def again(self) -> None:
        """Launch it once more."""
        self.kernel[self.grid](**self.arguments)


class _Tap:
    """Stands in for a kernel: launches it and keeps what it was launched with."""

    def __init__(self, kernel: Any, launches: list[Launched]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            compiled = self.kernel[grid](**arguments)
            self.launches.append(Launched(self.kernel, grid, arguments, compiled))

        return launch


@contextmanager
def tapped(kernel: str) -> Iterator[list[Launched]]:
    """Within it, launches are kept: those of the pass that an entry of the table belongs to."""
    module, launches = forward if kernel == "forward" else backward, list[Launched]()
    with ExitStack() as stack:
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                stack.enter_context(mock.patch.object(module, name, _Tap(value, launches)))
        yield launches


class Bench:
    """Compares tiles of one kernel on the device, over the stages."""

    def __init__(self, cases: Sequence[Case], dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self.calls = [draw_call(case, dtype, device) for case in cases]
        self.checkers = [Checker(call) for call in self.calls]
        self._launches: dict[tuple[Key, Tile], list[list[Launched]]] = {}

    def launches(self, key: Key, tile: Tile) -> list[list[Launched]]:
        """The launches of the kernel's pass with a tile, stage by stage, their results checked.

        Raises:
            Exception: Whatever the compiler, the device or the check says against the tile.
        """
        if (key, tile) not in self._launches:
            self._launches[key, tile] = [
                self._launch(key, tile, call, checker)
                for call, checker in zip(self.calls, self.checkers, strict=True)
            ]
        return self._launches[key, tile]

    def _launch(self, key: Key, tile: Tile, call: Call, checker: Checker) -> list[Launched]:
        with mock.patch.dict(TABLE, {key: tile}), tapped(key[0]) as launches:
            checker.error(call, CONTENDERS[OURS](call), TRAINING)
        expected = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if not any(expected.items() <= launch.arguments.items() for launch in launches):
            raise RuntimeError(f"the launcher does not read {key} from the table")
        return launches

    def compare(self, key: Key, candidate: Tile, incumbent: Tile) -> list[float]:
        """Time with a candidate over time with the incumbent, stage by stage.

        Raises:
            RefusedError: The candidate does not run, computes something else, or spills.
        """
        theirs = self.launches(key, incumbent)
        try:
            mine = self.launches(key, candidate)
        except Exception as error:
            raise RefusedError(reason_of(error)) from error
        # Launches hold their tensors: only the tile in hand and its rival stay.
        self._launches = {(key, incumbent): theirs, (key, candidate): mine}
        spills = max(getattr(x.compiled, "n_spills", 0) for launches in mine for x in launches)
        if spills:
            raise RefusedError(f"spills {spills} registers")
        return [self._ratio(*pair) for pair in zip(mine, theirs, strict=True)]

    def _ratio(self, candidate: Sequence[Launched], incumbent: Sequence[Launched]) -> float:
        def repeat(launches: Sequence[Launched]) -> None:
            for launch in launches:
                launch.again()

        functions = {"new": partial(repeat, candidate), "old": partial(repeat, incumbent)}
        rounds = (5, 15) if self.device.type == "cuda" else (1, 1)
        timings = interleave(
            functions, self.device, seconds=0.1, min_rounds=rounds[0], max_rounds=rounds[1]
        )
        return timings["new"].milliseconds / timings["old"].milliseconds


def tune(
    benches: Mapping[torch.dtype, Callable[[], Bench]],
    kernels: Sequence[str],
    deadline: Deadline,
    case: Case,
    target: str,
) -> Iterator[Outcome | str]:
    """Walk for every kernel and type; yields an outcome, or what went wrong.

    Args:
        benches: Makes the comparison for a type.
        kernels: Names as in the launch table.
        deadline: Shared fairly: every walk gets its part of what is left.
        case: Says head_dim and queries.
        target: The architecture that is measured.
    """
    jobs = [(dtype, kernel) for dtype in benches for kernel in kernels]
    bench, bench_dtype = None, None
    for index, (dtype, kernel) in enumerate(jobs):
        key = (kernel, tile_side(case.head_dim), dtype.itemsize, target)
        start = pick_tile(kernel, case.head_dim, dtype, case.geometry.num_queries, target)
        reserve = deadline.seconds_left * (1 - 1 / (len(jobs) - index))
        if deadline.seconds_left <= 0:
            yield f"{key}: not reached in time"
            continue
        try:
            if bench is None or bench_dtype != dtype:
                bench, bench_dtype = benches[dtype](), dtype
            compare = partial(bench.compare, key)
            yield walk(key, start, compare, partial(deadline.exceeds, reserve))
        except Exception as error:  # the other walks go on
            yield f"{key}: {reason_of(error)}"


def provenance(found: Mapping[str, str], target: str) -> list[str]:
    """The comment above measured entries."""
    versions = ", ".join(f"{name} {found[name]}" for name in ("driver", "torch", "triton"))
    return [f"{target}: {found['device']}, {found['date']}", f"{versions}; benchmarks.tune"]


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    types = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=types, default=["bfloat16", "float32"])
    parser.add_argument("--kernels", nargs="+", choices=TUNED, default=list(TUNED))
    parser.add_argument("--images", type=int, default=64, help="batch at 224 pixels")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--dry-run", action="store_true", help="print the change, write nothing")
    parser.add_argument("--output", type=Path, default=Path("outputs/tune"))
    arguments = parser.parse_args()
    device, deadline = torch.device(arguments.device), Deadline(arguments.minutes)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        patch_once_per_launch()
    cases = released_cases([224], arguments.images) if on_gpu else tiny_cases()[2:]
    dtypes = [getattr(torch, name) for name in arguments.dtypes if on_gpu or name == "float32"]
    benches = {dtype: partial(Bench, cases, dtype, device) for dtype in dtypes}
    target = device_target(device)
    outcomes, problems = [], []
    for outcome in tune(benches, arguments.kernels, deadline, cases[0], target):
        if isinstance(outcome, str):
            problems.append(outcome)
            print(outcome)
            continue
        outcomes.append(outcome)
        state = "" if outcome.complete else ", out of time"
        print(
            f"{outcome.key}: {outcome.before} -> {outcome.after}, {outcome.ratio:.3f} of the time"
        )
        print(f"  {outcome.tried} tried, {len(outcome.refused)} refused{state}")
        for refused in outcome.refused:
            print(f"  refused {refused}")
    found = environment(device)
    saved = {"environment": found, "outcomes": [asdict(o) for o in outcomes], "problems": problems}
    write_json(arguments.output / "tune.json", saved)
    if on_gpu:
        path = Path(launch_table.__file__)
        before = path.read_text()
        entries = {outcome.key: outcome.after for outcome in outcomes}
        after = rewrite(before, entries, provenance(found, target))
        old, new = (text.splitlines(keepends=True) for text in (before, after))
        print("".join(difflib.unified_diff(old, new, path.name, path.name)))
        if not arguments.dry_run:
            path.write_text(after)
    if any("not reached" not in problem for problem in problems):
        sys.exit("a walk failed: see above")


if __name__ == "__main__":
    main()
