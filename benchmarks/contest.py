"""One case of the attention benchmark: contenders checked by the oracle, then timed in turns."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.attention_report import Row
from benchmarks.codegen import Case
from benchmarks.contenders import CONTENDERS, OURS, Call, Contender, Forward, draw_call
from benchmarks.timing import Timing, interleave, peak_memory
from benchmarks.workloads import FORWARD, TRAINING, WORKS, useful_work

__all__ = [
    "Checker",
    "Deadline",
    "DeviceLostError",
    "Plan",
    "blank_row",
    "device_lost",
    "dtype_name",
    "failed_rows",
    "measure",
    "reason_of",
    "run_once",
]

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


def dtype_name(dtype: torch.dtype) -> str:
    """Without the module: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


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
        dtype=dtype_name(plan.dtype),
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


def device_lost(device: torch.device) -> bool:
    """Whether an error broke the GPU's context."""
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
                if device_lost(device):
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
        tflops_share=tflops / ceilings[dtype_name(plan.dtype)],
        gbps=gbps,
        gbps_share=gbps / ceilings["copy"],
    )
