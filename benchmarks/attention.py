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
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.attention_report import Row, markdown, rich_table
from benchmarks.codegen import Case
from benchmarks.contenders import CONTENDERS, OURS, Call, Contender, Forward, draw_call
from benchmarks.timing import Timing, environment, interleave, peak_memory, write_json
from benchmarks.workloads import (
    FORWARD,
    TRAINING,
    WORKS,
    plain_windows,
    released_cases,
    tiny_cases,
    useful_work,
)

PIXELS = (224, 448, 896, 1792)
FAST = (OURS, "unfold + SDPA")
SLOW = (OURS, "FlexAttention", "eager", "reference")  # compiled for each case, or slow to run
# Bounds on ‖got − expected‖ / ‖expected‖ that tell a mistake from rounding.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 6e-3,
    torch.bfloat16: 4e-2,
}
SLOW_MILLISECONDS = 1000.0  # a contender this slow is timed once


@dataclass(frozen=True)
class Plan:
    """A case, the type of its tensors, and the contenders to time in turns."""

    case: Case
    dtype: torch.dtype
    contenders: tuple[str, ...]


class Deadline:
    """The time that is left, and whether another contender fits into it."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._longest: dict[str, float] = {}

    @property
    def seconds_left(self) -> float:
        """Negative once it has passed."""
        return self._end - time.monotonic()

    def exceeds(self, seconds: float) -> bool:
        """Whether more than ``seconds`` are left."""
        return self.seconds_left > seconds

    def allows(self, contender: str) -> bool:
        """Whether the contender's longest preparation so far would end in time."""
        return self.exceeds(self._longest.get(contender, 0.0))

    def note(self, contender: str, seconds: float) -> None:
        """Remember how long a contender took to prepare."""
        self._longest[contender] = max(seconds, self._longest.get(contender, 0.0))


class DeviceLostError(RuntimeError):
    """A contender broke the GPU's context: this process can compute nothing more."""

    def __init__(self, contender: str, reason: str) -> None:
        super().__init__(reason)
        self.contender, self.reason = contender, reason


def gpu_plans(dtypes: Sequence[torch.dtype], pixels: Sequence[int], images: int) -> list[Plan]:
    """What to measure, the most telling first, so that a short budget gives a useful report."""
    plans = []
    for dtype in dtypes:
        cases = released_cases(pixels, images)
        plain = plain_windows(pixels[0], images)
        plans += [Plan(case, dtype, FAST) for case in [*cases, *plain]]
        plans += [Plan(case, dtype, SLOW) for case in [*cases, *plain]]
    return plans


def measure_ceilings(dtypes: Sequence[torch.dtype], device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large matrix product in each type, GB/s of a large copy, read and write."""
    side, count = (8192, 2**28) if device.type == "cuda" else (128, 2**16)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    functions: dict[str, Any] = {"copy": lambda: target.copy_(source)}
    for dtype in dtypes:
        factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        functions[_name(dtype)] = partial(torch.matmul, *factors)
    for function in functions.values():
        function()
    timings = interleave(functions, device, seconds=2.0, max_rounds=20)
    found = {"copy": 2 * source.nbytes / timings.pop("copy").milliseconds / 1e6}
    for name, timing in timings.items():
        found[name] = 2 * side**3 / timing.milliseconds / 1e9
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- one case -------------------------------------------------------------------------------------


def run_once(call: Call, forward: Forward, work: str, grad_out: Tensor) -> dict[str, Tensor]:
    """The output, and with backward the gradient of every leaf."""
    if work == FORWARD:
        with torch.no_grad():
            return {"out": forward()}
    out = forward()
    grads = torch.autograd.grad(out, list(call.leaves.values()), grad_out)
    return {"out": out.detach(), **dict(zip(call.leaves, grads, strict=True))}


class Checker:
    """Compares contenders with the oracle on the first and the last image of a call."""

    def __init__(self, call: Call) -> None:
        dtype = call.grad_out.dtype
        self.tolerance = TOLERANCES[dtype]
        self.images = torch.tensor(sorted({0, call.case.batch - 1}), device=call.grad_out.device)
        part = call.images(self.images, torch.float32 if dtype.itemsize < 4 else torch.float64)
        self.expected = run_once(part, CONTENDERS["reference"](part), TRAINING, part.grad_out)
        # Other images send nothing back, so that shared gradients are those of these images.
        self.grad_out = torch.zeros_like(call.grad_out)
        self.grad_out[self.images] = call.grad_out[self.images]

    def error(self, call: Call, forward: Forward, work: str) -> float:
        """The largest relative error of the output and the gradients.

        Raises:
            ArithmeticError: It is beyond rounding.
        """
        worst = 0.0
        for name, x in run_once(call, forward, work, self.grad_out).items():
            expected = self.expected[name]
            got = (x[self.images] if x.dim() == 5 else x).to(expected.dtype)
            error = ((got - expected).norm() / expected.norm()).item()
            if not error <= self.tolerance:  # NaN fails as well
                raise ArithmeticError(f"relative error {error:.1e} of {name}")
            worst = max(worst, error)
        return worst


def blank_row(plan: Plan, work: str, contender: str) -> Row:
    """A row without figures."""
    case = plan.case
    return Row(
        case=case.name,
        map=f"{case.height} x {case.width}",
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        dtype=_name(plan.dtype),
        work=work,
        contender=contender,
    )


def failed_rows(plan: Plan, contender: str, reason: str) -> list[Row]:
    """Rows of a contender that could not be measured."""
    rows = [blank_row(plan, work, contender) for work in WORKS]
    return [replace(row, status="failed", note=reason) for row in rows]


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _device_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def measure(
    plan: Plan,
    device: torch.device,
    ceilings: Mapping[str, float],
    deadline: Deadline,
    contenders: Mapping[str, Contender] = CONTENDERS,
    seconds: float = 0.5,
    min_rounds: int = 5,
) -> list[Row]:
    """Check and time the contenders of one plan.

    Raises:
        DeviceLostError: A contender left the GPU unusable.
    """
    call = draw_call(plan.case, plan.dtype, device)
    checker = Checker(call)
    rows: dict[tuple[str, str], Row] = {}
    functions: dict[tuple[str, str], partial] = {}
    for name in plan.contenders:
        start, forward = time.monotonic(), None
        for work in WORKS:
            row = blank_row(plan, work, name)
            if not deadline.allows(name):
                rows[work, name] = replace(row, status="not reached")
                continue
            try:
                forward = forward or contenders[name](call)
                error = checker.error(call, forward, work)
                function = partial(run_once, call, forward, work, call.grad_out)
                peak = peak_memory(function, device)
            except Exception as problem:  # whatever it is, the others go on
                if _device_lost(device):
                    raise DeviceLostError(name, reason_of(problem)) from problem
                status = "unsupported" if isinstance(problem, NotImplementedError) else "failed"
                rows[work, name] = replace(row, status=status, note=reason_of(problem))
                continue
            functions[work, name] = function
            rows[work, name] = replace(row, error=error, peak_mib=peak and peak / 2**20)
        deadline.note(name, time.monotonic() - start)
    for work in WORKS:
        ready = {
            name: functions[work, name] for name in plan.contenders if (work, name) in functions
        }
        timings = _time(ready, device, seconds, min_rounds)
        for name, timing in timings.items():
            row = _with_figures(rows[work, name], plan, timing, ceilings)
            if OURS in timings:
                row = replace(row, times_ours=timing.milliseconds / timings[OURS].milliseconds)
            rows[work, name] = row
    return [rows[work, name] for work in WORKS for name in plan.contenders]


def _time(
    functions: Mapping[str, partial], device: torch.device, seconds: float, min_rounds: int
) -> dict[str, Timing]:
    timings = {
        name: interleave({name: function}, device, min_rounds=1, max_rounds=1)[name]
        for name, function in functions.items()
    }
    quick = {
        name: function
        for name, function in functions.items()
        if min_rounds > 1 and timings[name].milliseconds < SLOW_MILLISECONDS
    }
    return timings | interleave(quick, device, seconds=seconds, min_rounds=min_rounds)


def _with_figures(row: Row, plan: Plan, timing: Timing, ceilings: Mapping[str, float]) -> Row:
    operations, least_bytes = useful_work(plan.case, plan.dtype, row.work)
    tflops = operations / timing.milliseconds / 1e9
    gbps = least_bytes / timing.milliseconds / 1e6
    return replace(
        row,
        milliseconds=timing.milliseconds,
        host_milliseconds=timing.host_milliseconds,
        runs=timing.runs,
        tflops=tflops,
        tflops_share=tflops / ceilings[_name(plan.dtype)],
        gbps=gbps,
        gbps_share=gbps / ceilings["copy"],
    )


# -- all cases ------------------------------------------------------------------------------------


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
            rows = [row for n in rest.contenders for row in failed_rows(rest, n, reason_of(error))]
        for number, name, reason in state["lost"]:
            if number == index:
                rows += failed_rows(plan, name, f"broke the GPU's context: {reason}")
        state["rows"] += [asdict(row) for row in rows]
        state["done"] = index + 1
        write_json(path, state)
        if device.type == "cuda":
            torch.cuda.empty_cache()


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
    path = arguments.output / "attention.json"
    if arguments.resume:
        state = json.loads(path.read_text())
    else:
        ceilings = measure_ceilings(dtypes, device)
        state = {"environment": environment(device), "ceilings": ceilings, "rows": [], "done": 0}
        state["lost"] = []
    if on_gpu:
        plans = gpu_plans(dtypes, arguments.pixels, arguments.images)
        settings = {}
    else:
        plans = [Plan(case, dtype, tuple(CONTENDERS)) for case in tiny_cases() for dtype in dtypes]
        settings = {"seconds": 0.0, "min_rounds": 1}
    try:
        run_plans(plans, device, deadline, path, state, **settings)
    except DeviceLostError:
        left = ["--minutes", f"{deadline.seconds_left / 60:.3f}", "--resume"]
        command = [sys.executable, "-m", "benchmarks.attention", *sys.argv[1:], *left]
        os.execv(sys.executable, command)  # a fresh context, and all files closed
    rows = [Row(**row) for row in state["rows"]]
    Console().print(rich_table(rows))
    (arguments.output / "attention.md").write_text(markdown(state))
    if any(row.status == "failed" for row in rows):
        sys.exit("a contender failed: see its note")


if __name__ == "__main__":
    main()
