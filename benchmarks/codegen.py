"""What the compiler makes of the kernels, for GPUs that need not be present.

    python -m benchmarks.codegen                        # every kernel, stage 1 to 4, five targets
    python -m benchmarks.codegen --targets sm_90 --dtypes float16 --stages 1 --kernels forward

Each row tells registers, spills, shared memory, resident blocks, tensor-core instructions, widths
of global accesses, and the instructions that a program executes: those of each loop times its
trips, which `benchmarks.work` takes from the launch and checks against the products and
exponentials that the tiles take. Below, `benchmarks.floors` puts the least that a layer must move
and do beside what the kernels move and do.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table

from benchmarks.assembly import Instruction
from benchmarks.compiled import (
    KERNELS,
    RELEASED,
    Case,
    compile_launch,
    disassemble,
    record,
    resources,
)
from benchmarks.floors import floors, print_floors
from benchmarks.limits import TARGETS
from benchmarks.work import Launch, Totals, solve_trips, work_of
from kernels import tiles

__all__ = ["KERNELS", "RELEASED", "Case", "Row", "describe", "print_rows", "report"]

# Every access to a row of query, key, value, out or a gradient of one is made in one of these.
ROW_ACCESS = (tiles.load_rows, tiles.store_rows)
EXACT_DTYPES = (torch.float32, torch.float64)  # products in full precision avoid tensor cores


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Args:
        case: Name of the call.
        kernel: Name of the kernel.
        dtype: Of query, key and value.
        target: Name of the architecture.
        warps: Of a program.
        registers: Of a thread.
        spilled_bytes: Of a thread, local memory included.
        shared_bytes: Of a program.
        resident_blocks: Programs that a multiprocessor holds at once.
        tensor_kind: Mnemonics of the tensor-core instructions.
        tensor_instructions: How many there are.
        products: Executed for each one that the tiles take; more than 1 where warps repeat a tile.
        row_bytes: Least bytes of one access to a row of a token or cell.
        row_traffic: Bytes of rows loaded for each one that whole tiles take.
        loads: Number of global loads by their bytes.
        stores: Number of global stores by their bytes.
        instructions: All that can be reached.
        executed: Instructions that one warp executes.
        per_pair: Thread-instructions per distinct query-key pair; None without pairs.
        exponentials: Executed for each one needed; None where none is.
        kinds: ``executed`` by kind of instruction.
    """

    case: str
    kernel: str
    dtype: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_blocks: int
    tensor_kind: str
    tensor_instructions: int
    products: float
    row_bytes: int
    row_traffic: float
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    executed: float
    per_pair: float | None
    exponentials: float | None
    kinds: dict[str, float]


def _row_lines() -> dict[str, list[range]]:
    """Lines of the functions that access rows, by file name."""
    lines: dict[str, list[range]] = {}
    for function in ROW_ACCESS:
        source, first = inspect.getsourcelines(function.fn)
        file = Path(inspect.getsourcefile(function.fn) or "").name
        # What a function returns has the line behind its last as its place.
        lines.setdefault(file, []).append(range(first, first + len(source) + 1))
    return lines


def describe(case: Case, dtype: torch.dtype, target: str, launch: Launch) -> Row:
    """Compile a launch and read its machine code.

    Raises:
        ValueError: If the trips of its loops do not add up to its work.
    """
    limits, work, name = TARGETS[target], work_of(launch), str(dtype).split(".")[1]
    compiled = compile_launch(launch, limits)
    registers, spilled, shared = resources(compiled, limits)
    warps = compiled.metadata.num_warps
    program, row_lines = disassemble(compiled, limits), _row_lines()

    def is_row(instruction: Instruction) -> bool:
        file, line = instruction.place or ("", 0)
        return any(line in lines for lines in row_lines.get(Path(file).name, ()))

    def count(executions: list[Any]) -> Totals:
        return Totals.count(program.instructions, executions, warps, limits.lanes, is_row)

    try:
        executions, totals = solve_trips(program, work, count, dtype not in EXACT_DTYPES)
    except ValueError as error:
        raise ValueError(f"{case.name}, {launch.name}, {name}, {target}: {error}") from error
    reached = [program.instructions[at] for block in program.order for at in program.span(block)]
    tensor = Counter(i.opcode for i in reached if i.kind == "tensor")
    accesses = [i.access for i in reached if i.access]
    kinds = dict.fromkeys((i.kind for i in reached), Fraction(0))
    for instruction, times in zip(program.instructions, executions, strict=True):
        if times:
            kinds[instruction.kind] += times
    executed = sum(executions)
    exponentials = totals.exponentials / work.exponentials if work.exponentials else None
    return Row(
        case=case.name,
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
        row_bytes=min(i.access.bytes for i in reached if i.access and is_row(i)),
        row_traffic=float(totals.row_bytes / work.row_bytes),
        loads=dict(sorted(Counter(a.bytes for a in accesses if not a.store).items())),
        stores=dict(sorted(Counter(a.bytes for a in accesses if a.store).items())),
        instructions=len(reached),
        executed=float(executed),
        per_pair=float(executed * warps * limits.lanes / work.pairs) if work.pairs else None,
        exponentials=None if exponentials is None else float(exponentials),
        kinds={kind: float(number) for kind, number in sorted(kinds.items())},
    )


def describe_all(case: Case, dtype: torch.dtype, target: str, kernels: Sequence[str]) -> list[Row]:
    """One row for each launch of a call whose kernel's name starts with one of ``kernels``."""
    launches = [
        entry for entry in record(case, dtype, target) if entry.name.startswith(tuple(kernels))
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


def _text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, dict):
        return " ".join(f"{number}x{key}" for key, number in value.items())
    return str(value)


COLUMNS = {
    "case": "case", "kernel": "kernel", "dtype": "dtype", "target": "target", "registers": "regs",
    "spilled_bytes": "spilled", "shared_bytes": "shared", "resident_blocks": "blocks",
    "tensor_kind": "tensor cores", "tensor_instructions": "count", "products": "copies",
    "row_bytes": "row access", "loads": "loads x bytes", "stores": "stores x bytes",
    "instructions": "static", "executed": "executed", "per_pair": "per pair",
    "exponentials": "exponentials",
}  # fmt: skip


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table; what it leaves out is in the saved file."""
    table = Table()
    for heading in COLUMNS.values():
        table.add_column(heading, no_wrap=heading in ("case", "dtype", "target"))
    for row in rows:
        table.add_row(*(_text(getattr(row, name)) for name in COLUMNS))
    console.print(table)


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
    batched = [replace(case, batch=arguments.batch) for case in cases]
    least = floors(batched, dtypes[0], arguments.targets[0])
    print_floors(least, console)
    if arguments.json:
        saved = {
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
            },
            "targets": {name: asdict(TARGETS[name]) for name in arguments.targets},
            "rows": [asdict(row) for row in rows],
            "floors": [asdict(row) for row in least],
        }
        arguments.json.write_text(json.dumps(saved, indent=2) + "\n")


if __name__ == "__main__":
    main()
