"""Whole models: images per second and peak memory, Focal-T against models of its size.

    python -m benchmarks.throughput                                 # batch 8, 224², float32
    python -m benchmarks.throughput --resolutions 224 448 896 --batch 2 --models focal_tiny
    python -m benchmarks.throughput --dtype autocast --compile --json throughput.json
    python -m benchmarks.throughput --models focal_tiny focal_tiny:default --baseline focal_tiny
    python -m benchmarks.throughput --device cuda --compile reduce-overhead

First every Focal model is checked: its logits and gradients on a small image, in the dtype that is
timed and not compiled, against the reference backend in float64. Then models take turns, and the
table gives medians over the rounds. A forward pass is in evaluation mode without gradients. A
training step is the forward pass, the loss (cross-entropy) and the backward pass, without an
optimiser. Each model is made for the resolution where it takes one. ``NAME:MODE`` is a model
compiled in a mode of `torch.compile`, whatever ``--compile`` says of the others. Ratios are to
``--baseline``: a speed above 1 is faster, a memory above 1 is more. The last column is the time
over that at the resolution before.

Peak memory is what a run allocates beyond the model's start: on a GPU by PyTorch's own count, on a
CPU as the peak resident size of a fresh process per model (three steps) less its size after the
imports, so parameters and input are part of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import models  # noqa: F401 - registers the Focal models with timm
from benchmarks.timing import environment, environment_line, interleave, peak_memory, write_json

MODELS = ("focal_tiny", "swin_tiny_patch4_window7_224", "deit_small_patch16_224", "resnet50")
BASELINE = "swin_tiny_patch4_window7_224"
PASSES = ("forward", "train")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile
# Largest error of logits and of gradients, over the largest one there is: some 20 layers of
# roundings, and the sums of a gradient.
TOLERANCES = {
    "float64": (1e-10, 1e-9),
    "float32": (1e-4, 1e-3),
    "bfloat16": (0.1, 0.3),
    "autocast": (0.1, 0.3),
}
CHECK_SIZE = (64, 96)
SEED = 0


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison share."""

    batch: int
    resolution: int
    dtype: str  # of TOLERANCES; "autocast" is bfloat16 autocast over float32 parameters
    compile_mode: str | None  # None: plain eager execution
    device: str

    @property
    def tensor_dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    def callable(self, model: nn.Module) -> Callable[..., Any]:
        """The model as it is called: compiled, or itself."""
        if self.compile_mode is None:
            return model
        return torch.compile(model, fullgraph=True, mode=self.compile_mode)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.dtype == "autocast")


@dataclass(frozen=True)
class Row:
    """One model, one pass, one setting."""

    model: str
    run: str
    batch: int
    resolution: int
    dtype: str
    compile_mode: str | None
    milliseconds: float
    images_per_second: float
    speed_ratio: float | None  # to the baseline
    rounds: int
    memory_mib: float | None
    memory_ratio: float | None
    scaling: float | None  # time over that of the resolution before


def contender(name: str, setting: Setting) -> tuple[str, Setting]:
    """The model of a ``NAME`` or ``NAME:MODE``, and how it is run."""
    model, _, mode = name.rpartition(":")
    if not model or mode not in COMPILE_MODES:  # names of models elsewhere have a colon too
        return name, setting
    return model, replace(setting, compile_mode=mode)


def prepare(name: str, run: str, setting: Setting) -> Callable[[], Any]:
    """What is timed of a `contender`."""
    model, setting = contender(name, setting)
    return RUNS[run](create(model, setting), setting)


def create(name: str, setting: Setting, **options: Any) -> nn.Module:
    """A model with random weights, made for the resolution if it takes one."""
    torch.manual_seed(SEED)
    try:
        model = timm.create_model(name, img_size=setting.resolution, **options)
    except TypeError:
        model = timm.create_model(name, **options)
    return model.to(setting.device, setting.tensor_dtype)


def forward_pass(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """One batch through the model, without gradients."""
    images = _images(setting)
    model.eval()
    call = setting.callable(model)

    def run() -> Tensor:
        with torch.no_grad(), setting.autocast():
            return call(images)

    return run


def train_step(model: nn.Module, setting: Setting) -> Callable[[], Any]:
    """Forward, loss and backward on one batch."""
    images = _images(setting)
    labels = torch.arange(setting.batch, device=setting.device)
    model.train()
    call = setting.callable(model)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        with setting.autocast():
            loss = F.cross_entropy(call(images).float(), labels)
        loss.backward()

    return run


RUNS = {"forward": forward_pass, "train": train_step}


def _images(setting: Setting) -> Tensor:
    torch.manual_seed(SEED)
    images = torch.randn(setting.batch, 3, setting.resolution, setting.resolution)
    return images.to(setting.device, setting.tensor_dtype)


def check(name: str, setting: Setting) -> tuple[float, float]:
    """Errors of a Focal model's logits and gradients, over their largest values.

    Args:
        name: A model that takes ``attention_backend``.
        setting: Its dtype and device; the image is small.

    Raises:
        ArithmeticError: One of them is out of tolerance.
    """
    torch.manual_seed(SEED)
    images = torch.randn(1, 3, *CHECK_SIZE)
    exact = timm.create_model(name, attention_backend="reference").double().eval()
    tested = timm.create_model(name).to(setting.device, setting.tensor_dtype).eval()
    # The reference has the rounded weights: their rounding is no error of the computation.
    exact.load_state_dict(tested.state_dict())
    with torch.no_grad(), setting.autocast():
        without_gradient = tested(images.to(setting.device, setting.tensor_dtype))
    with setting.autocast():
        logits = tested(images.to(setting.device, setting.tensor_dtype))
    expected = exact(images.to(setting.tensor_dtype).double())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * weights).sum().backward()
    (logits * weights.to(setting.device, logits.dtype)).sum().backward()
    logit_error = max(_error(x, expected) for x in (logits, without_gradient))
    pairs = zip(tested.parameters(), exact.parameters(), strict=True)
    grads = [(cast(Tensor, x.grad), cast(Tensor, y.grad)) for x, y in pairs]
    largest = max(y.abs().max().item() for _, y in grads)
    gradient_error = max((x.cpu().double() - y).abs().max().item() for x, y in grads) / largest
    for what, error, limit in zip(
        ("logits", "gradients"),
        (logit_error, gradient_error),
        TOLERANCES[setting.dtype],
        strict=True,
    ):
        if not error <= limit:
            raise ArithmeticError(f"{name}: relative error of {what} {error:.1e} above {limit}")
    return logit_error, gradient_error


def _error(got: Tensor, expected: Tensor) -> float:
    return ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()


def measure(
    names: Sequence[str], run: str, setting: Setting, *, seconds: float, min_rounds: int
) -> dict[str, tuple[float, int]]:
    """Median milliseconds and rounds of each model, in turns."""
    functions = {name: prepare(name, run, setting) for name in names}
    for function in functions.values():
        for _ in range(2):  # compilation, memory
            function()
    device = torch.device(setting.device)
    timings = interleave(functions, device, seconds=seconds, min_rounds=min_rounds)
    return {name: (timing.milliseconds, timing.runs) for name, timing in timings.items()}


def memory(name: str, run: str, setting: Setting) -> float:
    """Peak memory in MiB; see the head of this file."""
    if torch.device(setting.device).type != "cpu":
        function = prepare(name, run, setting)
        function()
        return (peak_memory(function, torch.device(setting.device)) or 0) / 2**20
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_resident, name, run, setting, torch.get_num_threads()).result()


def _resident(name: str, run: str, setting: Setting, threads: int) -> float:
    torch.set_num_threads(threads)
    before = _peak_kib()
    function = prepare(name, run, setting)
    for _ in range(3):
        function()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    """Peak resident size of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` also counts what the process was before it became Python
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


def compare(
    names: Sequence[str],
    runs: Sequence[str],
    settings: Sequence[Setting],
    *,
    baseline: str,
    seconds: float,
    min_rounds: int,
    with_memory: bool,
    progress: Callable[[str], None],
) -> list[Row]:
    """Every model in every run and setting."""
    rows: list[Row] = []
    before: dict[tuple[str, str], float] = {}
    for setting in settings:
        for run in runs:
            progress(f"{run}, {setting.resolution}²")
            times = measure(names, run, setting, seconds=seconds, min_rounds=min_rounds)
            held = {name: memory(name, run, setting) for name in names} if with_memory else {}
            for name, (time, rounds) in times.items():
                base_time, base_held = times.get(baseline), held.get(baseline)
                rows.append(
                    Row(
                        name,
                        run,
                        setting.batch,
                        setting.resolution,
                        setting.dtype,
                        contender(name, setting)[1].compile_mode,
                        time,
                        setting.batch / time * 1e3,
                        base_time[0] / time if base_time else None,
                        rounds,
                        held.get(name),
                        held[name] / base_held if base_held else None,
                        time / before[name, run] if (name, run) in before else None,
                    )
                )
                before[name, run] = time
    return rows


def table(rows: Sequence[Row], title: str) -> Table:
    """Rows for reading."""
    result = Table(title=title)
    for heading in ("run", "pixels", "model"):
        result.add_column(heading, no_wrap=True)
    for heading in ("img/s", "ms", "speed", "MiB", "memory", "scaling"):
        result.add_column(heading, justify="right")

    def text(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in rows:
        result.add_row(
            row.run,
            f"{row.resolution}²",
            row.model,
            f"{row.images_per_second:.1f}",
            f"{row.milliseconds:.0f}",
            text(row.speed_ratio, ".2f"),
            text(row.memory_mib, ".0f"),
            text(row.memory_ratio, ".2f"),
            text(row.scaling, ".2f"),
        )
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    positive = partial(_positive, int)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help="names known to timm, or NAME:MODE"
    )
    parser.add_argument("--baseline", default=BASELINE, help="the model that ratios are to")
    parser.add_argument("--runs", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--resolutions", nargs="+", type=positive, default=[224])
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=COMPILE_MODES,
        help="torch.compile, one full graph, in this mode (reduce-overhead: CUDA graphs)",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive, help="of PyTorch, on a CPU")
    parser.add_argument("--seconds", type=partial(_positive, float), default=30.0)
    parser.add_argument("--min-rounds", type=positive, default=7)
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("--json", type=Path, help="save the rows to this file")
    return parser.parse_args(arguments)


def _positive(kind: type, text: str) -> Any:
    value = kind(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 110)  # in a file, whole rows
    progress = Console(stderr=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    settings = [
        Setting(options.batch, size, options.dtype, options.compile, options.device)
        for size in options.resolutions
    ]
    plain = dict.fromkeys(contender(name, settings[0])[0] for name in options.models)
    errors = {name: check(name, settings[0]) for name in plain if name.startswith("focal_")}
    for name, (logits, gradients) in errors.items():
        console.print(f"{name} is correct: error of logits {logits:.1e}, gradients {gradients:.1e}")
    rows = compare(
        options.models,
        options.runs,
        settings,
        baseline=options.baseline,
        seconds=options.seconds,
        min_rounds=options.min_rounds,
        with_memory=not options.no_memory,
        progress=progress.print,
    )
    where = environment(torch.device(options.device)) | {"timm": timm.__version__}
    compiled = f", compiled ({options.compile})" if options.compile else ""
    kind = f"{options.dtype}{compiled}, batch {options.batch}"
    console.print(table(rows, kind))
    console.print(environment_line(where))
    if options.json:
        content = {"environment": where, "errors": errors, "rows": [asdict(row) for row in rows]}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
