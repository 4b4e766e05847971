"""Focal attention on a GPU: our kernels against other ways to compute it.

    python -m benchmarks.attention                          # bfloat16, stages 1 to 4, 224 to 1792
    python -m benchmarks.attention --minutes 4 --dtypes float16 --pixels 224 896
    TRITON_INTERPRET=1 python -m benchmarks.attention --device cpu      # checks itself, tiny sizes

Every contender is checked first, at the size that is timed, against the oracle in a wider type on
the first and the last image of the batch; what fails is reported with its error and not timed.
Times are medians of interleaved rounds with cold caches. TFLOP/s count the products of distinct
query-key pairs that take part, GB/s the least bytes (in each pass every input read once and every
output written once); both also as shares of a matrix product and a copy measured on the same card.
On a CPU the times say nothing about the kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.attention_report import Row, markdown, rich_table
from benchmarks.codegen import Case
from benchmarks.contenders import CONTENDERS, OURS, draw_call
from benchmarks.contest import (
    Deadline,
    DeviceLostError,
    Plan,
    blank_row,
    device_lost,
    dtype_name,
    failed_rows,
    measure,
    reason_of,
    run_once,
)
from benchmarks.interpreter import patch_once_per_launch
from benchmarks.timing import environment, interleave, write_json
from benchmarks.workloads import WORKS, plain_windows, released_cases, tiny_cases

PIXELS = (224, 448, 896, 1792)
FAST = (OURS, "unfold + SDPA")
SLOW = (OURS, "FlexAttention")  # compiled for every case
SLOWEST = ("eager", "reference")  # at one size: eager is made for CPUs, the oracle for clarity
COMPILED = (OURS, "FlexAttention")
COMPILING_PROCESSES = 12
COMPILING_SHARE = 0.4  # of the time, at most


def gpu_plans(dtypes: Sequence[torch.dtype], pixels: Sequence[int], images: int) -> list[Plan]:
    """What to measure, the most telling first, so that a short budget gives a useful report."""
    plans = []
    for dtype in dtypes:
        cases, plain = released_cases(pixels, images), plain_windows(pixels[0], images)
        plans += [Plan(case, dtype, FAST) for case in [*cases, *plain]]
        plans += [Plan(case, dtype, SLOW + SLOWEST) for case in released_cases(pixels[:1], images)]
        largest_first = released_cases(pixels[:0:-1], images)
        plans += [Plan(case, dtype, SLOW) for case in [*largest_first, *plain]]
    return plans


def measure_ceilings(dtypes: Sequence[torch.dtype], device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product in each type, GB/s of a large copy, read and write."""
    side, count = (8192, 2**28) if device.type == "cuda" else (128, 2**16)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    for dtype in dtypes:
        factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        functions[dtype_name(dtype)] = partial(torch.matmul, *factors)
    for function in functions.values():
        function()
    timings = interleave(functions, device, seconds=2.0, max_rounds=20)
    found = {"copy": 2 * source.nbytes / timings.pop("copy").milliseconds / 1e6}
    for name, timing in timings.items():
        found[name] = 2 * side**3 / timing.milliseconds / 1e9
    return found


def run_plans(
    plans: Sequence[Plan],
    device: torch.device,
    deadline: Deadline,
    path: Path,
    state: dict[str, Any],
    **settings: Any,
) -> None:
    """Measure the plans that ``state`` does not hold yet, saving it to ``path`` after each.

    Raises:
        DeviceLostError: ``state`` then says who broke the device; a fresh process can go on.
    """
    for index in range(state["done"], len(plans)):
        plan = plans[index]
        lost = {name for number, name, _ in state["lost"] if number == index}
        rest = replace(plan, contenders=tuple(n for n in plan.contenders if n not in lost))
        broken = None
        try:
            if deadline.seconds_left > 0:
                rows = measure(rest, device, state["ceilings"], deadline, **settings)
            else:
                blanks = [blank_row(rest, work, n) for work in WORKS for n in rest.contenders]
                rows = [replace(row, status="not reached") for row in blanks]
        except DeviceLostError as error:
            state["lost"].append((index, error.contender, error.reason))
            write_json(path, state)
            raise
        except Exception as error:  # the inputs or the oracle do not fit: the other cases may
            broken = reason_of(error)
            rows = [row for n in rest.contenders for row in failed_rows(rest, n, broken)]
        for number, name, reason in state["lost"]:
            if number == index:
                rows += failed_rows(plan, name, f"broke the GPU's context: {reason}")
        state["rows"] += [asdict(row) for row in rows]
        state["done"] = index + 1
        write_json(path, state)
        if broken and device_lost(device):
            raise DeviceLostError("timing", broken)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compile_ahead(plans: Sequence[Plan], arguments: Sequence[str], seconds: float) -> None:
    """Fill the compilers' caches on disk from many processes: it takes most of the time in one.

    What goes wrong there, or is not ready after ``seconds``, the measuring process meets itself.
    """
    command = [sys.executable, "-m", "benchmarks.attention", *arguments, "--compile"]
    # One compiling thread each: the processes are many.
    variables = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    workers = min(COMPILING_PROCESSES, os.cpu_count() or 1, len(_compilations(plans)))
    processes = [
        subprocess.Popen(
            [*command, f"{worker}/{workers}"],
            env=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for worker in range(workers)
    ]
    end = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _compilations(plans: Sequence[Plan]) -> list[tuple[Case, torch.dtype, str]]:
    found = [(plan.case, plan.dtype, n) for plan in plans for n in plan.contenders if n in COMPILED]
    return list(dict.fromkeys(found))


def compile_part(plans: Sequence[Plan], part: str, device: torch.device) -> None:
    """One process's part of the compilations: ``"2/8"`` is the third of eight."""
    worker, workers = (int(number) for number in part.split("/"))
    for case, dtype, name in _compilations(plans)[worker::workers]:
        with suppress(Exception):  # measuring meets it again, and reports it
            call = draw_call(case, dtype, device)
            forward = CONTENDERS[name](call)
            for work in WORKS:
                run_once(call, forward, work, call.grad_out)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=["cuda", "cpu"])
    types = ["bfloat16", "float16", "float32"]
    parser.add_argument("--dtypes", nargs="+", choices=types, help="default: bfloat16")
    parser.add_argument("--pixels", nargs="+", type=int, choices=PIXELS, default=list(PIXELS))
    parser.add_argument(
        "--images", type=int, default=128, help="batch at 224 pixels; as many tokens at the others"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="start nothing after that")
    parser.add_argument("--output", type=Path, default=Path("outputs/attention"))
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    """Command-line entry."""
    arguments = parse_arguments()
    device, deadline = torch.device(arguments.device), Deadline(arguments.minutes)
    on_gpu = device.type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no GPU found: --device cpu checks the benchmark itself")
    names = arguments.dtypes or (["bfloat16"] if on_gpu else ["float32"])
    dtypes = [getattr(torch, name) for name in names]
    if on_gpu:
        plans, settings = gpu_plans(dtypes, arguments.pixels, arguments.images), {}
    else:
        plans = [Plan(case, dtype, tuple(CONTENDERS)) for case in tiny_cases() for dtype in dtypes]
        settings = {"seconds": 0.0, "min_rounds": 1}
        patch_once_per_launch()
    if arguments.compile:
        compile_part(plans, arguments.compile, device)
        return
    path = arguments.output / "attention.json"
    if arguments.resume:
        state = json.loads(path.read_text())
    else:
        if on_gpu:
            compile_ahead(plans, sys.argv[1:], COMPILING_SHARE * deadline.seconds_left)
        ceilings = measure_ceilings(dtypes, device)
        state = {"environment": environment(device), "ceilings": ceilings, "rows": [], "done": 0}
        state["lost"] = []
    try:
        run_plans(plans, device, deadline, path, state, **settings)
    except DeviceLostError:
        left = ["--minutes", f"{deadline.seconds_left / 60:.3f}", "--resume"]
        command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:], *left]
        os.execv(sys.executable, command)  # a fresh context, and all files closed
    rows = [Row(**row) for row in state["rows"]]
    Console(width=None if sys.stdout.isatty() else 240).print(rich_table(rows))
    (arguments.output / "attention.md").write_text(markdown(state))
    if any(row.status == "failed" for row in rows):
        sys.exit("a contender failed: see its note")


if __name__ == "__main__":
    main()
