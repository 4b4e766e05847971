"""The backends against the oracle on random calls: any geometry, border, stride, dtype, size.

    python -m benchmarks.fuzz --cases 2000 --seed 1         # every backend that can run here
    python -m benchmarks.fuzz --minutes 10 --backends triton
    python -m benchmarks.fuzz --replay "Call(case=Case(...), ...)"

Hypothesis draws the calls and shrinks the first one that fails; it is printed in a form that
``--replay`` takes, and the command exits with 1. At the end it prints how many calls ran.

In float64 the output and every gradient must be the oracle's within 1e-10. In lower precision the
error against the oracle in float64 is measured in units of the plain error: that of the oracle in
the same precision, or of the oracle in float64 with one rounding per operation, whichever is
larger (a plain result may be exact by luck). One call may exceed the unit by chance, all the more
the fewer numbers a tensor has; over a whole run the root mean square may be 2 at most.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():  # Triton reads it when the kernels are decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.fuzz_calls import DTYPES, Call, calls, gradient_of, leaves_of, run_call
from benchmarks.interpreter import patch_once_per_launch
from benchmarks.operator_cases import Case, Tensors
from kernels import focal_attention, resolve_backend

__all__ = ["BACKENDS", "Call", "Fuzzer", "MismatchError", "calls", "main"]

BACKENDS: dict[str, Callable[..., Tensor]] = {
    name: partial(focal_attention, backend=name) for name in ("eager", "triton")
}
TOLERANCE = 1e-10  # of float64, absolute and relative
LIMIT = 2.0  # of the root mean square error in lower precision, in plain errors
ENOUGH = 50  # calls after which the root mean square is held to its limit
NOISE_DRAWS = 3
CHUNK = 50  # calls that hypothesis draws in one go
NO_LIMIT = 10**9


class MismatchError(AssertionError):
    """A backend whose output or gradient is not the oracle's."""


_oracle = partial(run_call, partial(focal_attention, backend="reference"), plain=True)


class _RoundingNoise(TorchDispatchMode):
    """float64 arithmetic, each result off by what rounding to ``dtype`` may do, at random.

    Sums are kept in float32 at least, and each product of a sum adds its own rounding: what is left
    after products cancel is as uncertain as they are. So are gradients of scores, the difference of
    two sums over products of the same size (`numel` tells which ones they came from).
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        info = torch.finfo(dtype)
        self.eps, self.tiny = info.eps, info.smallest_normal * info.eps
        self.sum_eps = min(info.eps, torch.finfo(torch.float32).eps)
        self.seed = seed
        self.product_sizes: dict[int, float] = {}

    def __enter__(self) -> _RoundingNoise:
        self.generators: dict[torch.device, torch.Generator] = {}
        return super().__enter__()

    def _noise(self, like: Tensor) -> Tensor:
        if like.device not in self.generators:
            generator = torch.Generator(like.device).manual_seed(self.seed)
            self.generators[like.device] = generator
        generator = self.generators[like.device]
        options = {"device": like.device, "dtype": like.dtype}
        return torch.rand(like.shape, generator=generator, **options) - 0.5  # type: ignore[call-overload]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, aten = func(*args, **(kwargs or {})), torch.ops.aten
        packet = func.overloadpacket
        if not isinstance(result, Tensor) or result.dtype != torch.float64:
            return result
        if packet in (aten.mm, aten.bmm):
            size = args[0].abs() @ args[1].abs()
            self.product_sizes[size.numel()] = size.max().item() if size.numel() else 0.0
            result = result + self.sum_eps * size * self._noise(result)
        elif packet is aten.sum:
            size = func(args[0].abs(), *args[1:], **(kwargs or {}))
            result = result + self.sum_eps * size * self._noise(result)
        elif packet is aten._softmax_backward_data:
            grad, weight, dim = args[:3]
            size = weight * (grad.abs() + (grad * weight).abs().sum(dim, keepdim=True))
            result = result + self.eps * size * self._noise(result)
            product = 2 * self.product_sizes.get(grad.numel(), 0.0)
            result = result + self.sum_eps * product * weight * self._noise(result)
        elif packet not in (aten.add, aten.sub, aten.mul, aten.div, aten._softmax):
            return result
        return result * (1 + self.eps * self._noise(result)) + self.tiny * self._noise(result)


def _errors(results: Sequence[Tensors], expected: Tensors) -> dict[str, float]:
    """Root mean square over entries and ``results``, by tensor."""
    means = {}
    for name, tensor in expected.items():
        squares = [(result[name].double() - tensor).square().mean() for result in results]
        means[name] = torch.stack(squares).mean().sqrt().item() if tensor.numel() else 0.0
    return means


def _kind(name: str) -> str:
    """The name of a tensor without its level."""
    return name.rstrip("0123456789").rstrip("_")


def _chance(numbers: int) -> float:
    """How many plain errors the error of a tensor of so many numbers may reach in one call."""
    return LIMIT * (2 + 10 / math.sqrt(numbers))


# -- running many ---------------------------------------------------------------------------------


@dataclass
class Fuzzer:
    """Runs calls, counts them, and gathers errors over all of them.

    Args:
        backends: Keys of `BACKENDS`.
        device: Where the tensors live.
    """

    backends: Sequence[str]
    device: str = "cpu"
    counts: Counter = field(default_factory=Counter)
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)
    ratios: dict[tuple[str, str, str], list[float]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def usable(self, dtype: str) -> list[str]:
        """The backends that can run on ``dtype`` here; the others are noted with the reason."""
        found = []
        for name in self.backends:
            try:
                resolve_backend(name, torch.device(self.device), DTYPES[dtype])
            except ValueError as error:
                self.skipped[name, dtype] = str(error)
            else:
                found.append(name)
        return found

    def check(self, call: Call) -> None:
        """Run one call on every backend.

        Raises:
            MismatchError: A result is not the oracle's.
        """
        leaves, gradient = leaves_of(call, self.device), gradient_of(call, self.device)
        exact = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
        expected = _oracle(call, exact, gradient.double())
        for name, tensor in expected.items():
            if not tensor.isfinite().all():
                raise MismatchError(f"the oracle's {name} is not finite")
        units = None
        for backend in self.usable(call.dtype):
            got = run_call(BACKENDS[backend], call, leaves, gradient, plain=False)
            if call.dtype == "float64":
                self._check_exact(backend, got, expected)
            else:
                units = units or self._plain_errors(call, leaves, exact, gradient, expected)
                self._check_rounded(backend, call.dtype, got, expected, units)
            self.counts[backend, call.dtype] += 1

    def _check_exact(self, backend: str, got: Tensors, expected: Tensors) -> None:
        for name, tensor in expected.items():
            difference = (got[name] - tensor).abs()
            if not (difference <= TOLERANCE * (1 + tensor.abs())).all():
                raise MismatchError(
                    f"{backend} in float64: {name} is off by {difference.max().item():.3g}, "
                    f"allowed {TOLERANCE:g}"
                )

    def _plain_errors(
        self, call: Call, leaves: Tensors, exact: Tensors, gradient: Tensor, expected: Tensors
    ) -> dict[str, float]:
        plain = _errors([_oracle(call, leaves, gradient)], expected)
        noisy = []
        for draw in range(NOISE_DRAWS):
            with _RoundingNoise(DTYPES[call.dtype], call.seed + draw):
                noisy.append(_oracle(call, exact, gradient.double()))
        rounded = _errors(noisy, expected)
        return {name: max(plain[name], rounded[name]) for name in expected}

    def _check_rounded(
        self, backend: str, dtype: str, got: Tensors, expected: Tensors, units: dict[str, float]
    ) -> None:
        errors = _errors([got], expected)
        for name, tensor in expected.items():
            if not math.isfinite(units[name]):
                continue  # the plain result overflows: nothing is promised
            wanted = DTYPES[dtype] if name == "out" else None
            if wanted and got[name].dtype != wanted:
                raise MismatchError(f"{backend}: {name} is {got[name].dtype}, expected {wanted}")
            if units[name] == 0.0:
                if errors[name] != 0.0:
                    raise MismatchError(f"{backend} in {dtype}: {name} should be exact")
                continue
            ratio = errors[name] / units[name]
            allowed = _chance(tensor.numel())
            if not ratio <= allowed:
                raise MismatchError(
                    f"{backend} in {dtype}: the error of {name} is {ratio:.3g} plain errors, "
                    f"allowed {allowed:.3g}"
                )
            self.ratios[backend, dtype, _kind(name)].append(ratio)

    def root_mean_squares(self) -> dict[tuple[str, str, str], float]:
        """Errors over all calls in plain errors, by backend, dtype and kind of tensor."""
        return {
            key: math.sqrt(sum(x * x for x in ratios) / len(ratios))
            for key, ratios in self.ratios.items()
        }

    def imprecise(self) -> dict[tuple[str, str, str], float]:
        """Those of `root_mean_squares` beyond the limit."""
        return {
            key: ratio
            for key, ratio in self.root_mean_squares().items()
            if ratio > LIMIT and len(self.ratios[key]) >= ENOUGH
        }

    def run(self, count: int, seed: int, seconds: float = math.inf, dtypes=tuple(DTYPES)) -> None:
        """Draw and check ``count`` calls, or as many as ``seconds`` allow.

        Raises:
            MismatchError: A call failed; its notes hold the smallest one found that fails.
        """
        end, done, chunk = time.monotonic() + seconds, 0, 0
        while done < count and time.monotonic() < end:
            size = min(CHUNK, count - done)
            self._run_chunk(size, seed + 1_000_003 * chunk, end, dtypes)
            done, chunk = done + size, chunk + 1

    def _run_chunk(self, size: int, seed: int, end: float, dtypes: Sequence[str]) -> None:
        last: list[Call] = []

        @with_seed(seed)
        @settings(
            max_examples=size,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(calls(dtypes))
        def check(call: Call) -> None:
            if time.monotonic() > end and not last:
                return
            try:
                self.check(call)
            except Exception:
                last[:] = [call]  # hypothesis ends with the smallest one
                raise

        try:
            check()
        except Exception as error:
            error.add_note(f"reproduce: python -m benchmarks.fuzz --replay {str(last[0])!r}")
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, help="calls to draw; 1000, or no limit with --minutes")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), default=tuple(BACKENDS))
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--replay", help="check this one call, as a failure printed it")
    options = parser.parse_args(argv)
    fuzzer, started = Fuzzer(options.backends, options.device), time.monotonic()
    limit = options.cases or (NO_LIMIT if math.isfinite(options.minutes) else 1000)
    failed = False
    try:
        if options.replay:
            names: dict[str, Any] = {"Call": Call, "Case": Case}
            fuzzer.check(eval(options.replay, {"__builtins__": {}}, names))
        else:
            fuzzer.run(limit, options.seed, 60 * options.minutes, options.dtypes)
    except Exception as error:
        print(f"FAILED (seed {options.seed}): {type(error).__name__}: {error}")
        print(*getattr(error, "__notes__", ()), sep="\n")
        failed = True
    _report(fuzzer, time.monotonic() - started)
    return int(failed or bool(fuzzer.imprecise()))


def _report(fuzzer: Fuzzer, seconds: float) -> None:
    print(f"{sum(fuzzer.counts.values())} checks in {seconds:.0f} s on {fuzzer.device}")
    for (backend, dtype), count in sorted(fuzzer.counts.items()):
        print(f"  {backend:8} {dtype:9} {count:6} calls, output and every gradient")
    for (backend, dtype), reason in sorted(fuzzer.skipped.items()):
        print(f"  {backend:8} {dtype:9} skipped: {reason}")
    if fuzzer.ratios:
        print("error in plain errors, root mean square over the calls:")
    for (backend, dtype, kind), ratio in sorted(fuzzer.root_mean_squares().items()):
        calls, worst = len(fuzzer.ratios[backend, dtype, kind]), "TOO LARGE"
        mark = worst if (backend, dtype, kind) in fuzzer.imprecise() else ""
        print(f"  {backend:8} {dtype:9} {kind:14} {ratio:6.2f} ({calls}) {mark}".rstrip())


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_once_per_launch()
    sys.exit(main())
