"""What the compiler makes of the kernels, for GPUs that need not be present.

    python -m benchmarks.codegen                        # every kernel, stage 1 to 4, five targets
    python -m benchmarks.codegen --targets sm_90 --dtypes float16 --stages 1 --kernels forward

Each row tells registers, spills, shared memory, resident blocks, tensor-core instructions, widths
of global accesses, and the instructions that a program executes: those of each loop times its
trips, which `benchmarks.trips` fits to the launch and checks against the products and
exponentials that the tiles take. Below, `benchmarks.floors` puts the least that a layer must move
and do beside what the kernels move and do.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import multiprocessing
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console

from benchmarks.assembly import Instruction
from benchmarks.codegen_tables import Row, layers, markdown, print_layers, print_rows
from benchmarks.compiled import (
    KERNELS,
    RELEASED,
    Case,
    compile_launch,
    disassemble,
    distinct,
    record,
    resources,
)
from benchmarks.floors import floors, print_floors
from benchmarks.limits import TARGETS
from benchmarks.trips import Totals, solve_trips
from benchmarks.work import Launch, work_of
from kernels import fold, tiles

__all__ = ["KERNELS", "RELEASED", "Case", "Row", "describe", "print_rows", "report"]

# Every access to a row of query, key, value, out or a gradient of one is made in one of these, and
# every load of the workspace.
ROW_ACCESS = (
    tiles.load_rows,
    tiles.store_rows,
    fold.fold_queries_kernel,
    fold.fold_keys_kernel,
)
BIAS_ACCESS = (tiles.load_bias,)
WIDEST_ACCESS = 16  # bytes of a thread that every target has
EXACT_DTYPES = (torch.float32, torch.float64)  # products in full precision avoid tensor cores


def _inside(functions: Sequence[Any]) -> Callable[[Instruction], bool]:
    """Whether an instruction comes from a line of one of some functions."""
    lines: dict[str, list[range]] = {}
    for function in functions:
        source, first = inspect.getsourcelines(function.fn)
        file = Path(inspect.getsourcefile(function.fn) or "").name
        # What a function returns has the line behind its last as its place; a decorator takes one.
        lines.setdefault(file, []).append(range(first, first + len(source) + 2))

    def is_inside(instruction: Instruction) -> bool:
        file, line = instruction.place or ("", 0)
        return any(line in some for some in lines.get(Path(file).name, ()))

    return is_inside


def layer_pairs(case: Case) -> int:
    """Pairs of a query and a key that a layer's windows list, cells beyond the map included."""
    windows = math.prod(case.geometry.num_windows(case.height, case.width))
    pairs = case.geometry.num_queries * case.geometry.num_keys
    return case.batch * windows * case.heads * pairs


def describe(case: Case, dtype: torch.dtype, target: str, launch: Launch) -> Row:
    """Compile a launch and read its machine code.

    Raises:
        ValueError: If the trips of its loops do not add up to its work.
    """
    limits, work, name = TARGETS[target], work_of(launch), str(dtype).split(".")[1]
    compiled = compile_launch(launch, limits)
    registers, spilled, shared = resources(compiled, limits)
    warps = compiled.metadata.num_warps
    program, is_row, is_bias = (
        disassemble(compiled, limits),
        _inside(ROW_ACCESS),
        _inside(BIAS_ACCESS),
    )

    def count(executions: list[Any]) -> Totals:
        return Totals.count(program.instructions, executions, warps, limits.lanes, is_row)

    try:
        executions, totals = solve_trips(program, work, count, dtype not in EXACT_DTYPES)
    except ValueError as error:
        raise ValueError(f"{case.name}, {launch.name}, {name}, {target}: {error}") from error
    reached = [program.instructions[at] for block in program.order for at in program.span(block)]
    tensor = Counter(i.opcode for i in reached if i.kind == "tensor")
    accesses = [i.access for i in reached if i.access]
    rows = [i.access.bytes for i in reached if i.access and is_row(i)]
    kinds = dict.fromkeys((i.kind for i in reached), Fraction(0))
    for instruction, times in zip(program.instructions, executions, strict=True):
        if times:
            kinds[instruction.kind] += times
    executed = sum(executions)
    images = case.batch if work.images is None else work.images
    threads = math.prod(launch.grid) * warps * limits.lanes
    exponentials = totals.exponentials / work.exponentials if work.exponentials else None
    return Row(
        case=case.name,
        direction=launch.direction,
        kernel=launch.name,
        dtype=name,
        target=target,
        warps=warps,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=shared,
        resident_blocks=limits.resident_blocks(warps, registers, shared),
        tensor_kind=" ".join(sorted(tensor)),
        tensor_instructions=tensor.total(),
        products=float(totals.products(work)),
        row_bytes=min(rows, default=None),
        narrow_rows=sum(wide < WIDEST_ACCESS for wide in rows),
        bias_bytes=min((i.access.bytes for i in reached if i.access and is_bias(i)), default=None),
        row_traffic=float(totals.row_bytes / work.row_bytes) if work.row_bytes else None,
        loads=dict(sorted(Counter(a.bytes for a in accesses if not a.store).items())),
        stores=dict(sorted(Counter(a.bytes for a in accesses if a.store).items())),
        instructions=len(reached),
        executed=float(executed),
        per_pair=float(threads * executed / (images * layer_pairs(replace(case, batch=1)))),
        exponentials=None if exponentials is None else float(exponentials),
        kinds={kind: float(number) for kind, number in sorted(kinds.items())},
    )


def describe_all(case: Case, dtype: torch.dtype, target: str, kernels: Sequence[str]) -> list[Row]:
    """One row for each launch of a call whose kernel's name starts with one of ``kernels``."""
    launches = [
        entry
        for entry in distinct(record(case, dtype, target))
        if entry.name.startswith(tuple(kernels))
    ]
    return [describe(case, dtype, target, entry) for entry in launches]


def report(
    cases: Sequence[Case],
    dtypes: Sequence[torch.dtype],
    targets: Sequence[str],
    kernels: Sequence[str] = ("",),
    jobs: int = 1,
) -> Iterator[list[Row]]:
    """Rows of each case, dtype and target, as they are done."""
    calls = [(case, dtype, target) for case in cases for dtype in dtypes for target in targets]
    if jobs == 1:
        for call in calls:
            yield describe_all(*call, kernels)
        return
    # Threads of the parent do not survive a fork: start the workers afresh.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(calls)), mp_context=context) as pool:
        for done in as_completed(pool.submit(describe_all, *c, kernels) for c in calls):
            yield done.result()


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float16", "bfloat16"],
        choices=["float16", "bfloat16", "float32"],
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=RELEASED, default=list(RELEASED))
    parser.add_argument("--kernels", nargs="+", default=[""], help="starts of kernels' names")
    parser.add_argument("--batch", type=int, default=64, help="images of the floors' calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", type=Path, help="save the rows to this file")
    parser.add_argument("--markdown", type=Path, help="save short tables to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it")
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    cases = [RELEASED[stage] for stage in arguments.stages]
    rows: list[Row] = []
    progress = Console(stderr=True)
    calls = len(cases) * len(dtypes) * len(arguments.targets)
    reports = report(cases, dtypes, arguments.targets, arguments.kernels, arguments.jobs)
    for done, found in enumerate(reports, start=1):
        rows += found
        if found:
            progress.print(f"{done}/{calls} {found[0].case} {found[0].dtype} {found[0].target}")
    rows.sort(key=lambda row: (row.target, row.dtype, row.case))
    console = Console(width=None if sys.stdout.isatty() else 240)
    print_rows(rows, console)
    summary = layers(rows)
    print_layers(summary, console)
    batched = [replace(case, batch=arguments.batch) for case in cases]
    least = floors(batched, dtypes[0], arguments.targets[0])
    print_floors(least, console)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if arguments.markdown:
        command = " ".join(["python -m benchmarks.codegen", *sys.argv[1:]])
        arguments.markdown.write_text(markdown(rows, least, versions, command))
    if arguments.json:
        saved = {
            "versions": versions,
            "targets": {name: asdict(TARGETS[name]) for name in arguments.targets},
            "rows": [asdict(row) for row in rows],
            "layers": [asdict(layer) for layer in summary],
            "floors": [asdict(row) for row in least],
        }
        arguments.json.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
