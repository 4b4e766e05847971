"""All work that needs a GPU, in one report: benchmarks/reports/gpu.md, and gpu.json beside it.

    make test-gpu bench-gpu                             # under 9 minutes, the tests included
    python -m benchmarks.gpu_report tests               # one half
    python -m benchmarks.gpu_report benchmarks --minutes 20
    python -m benchmarks.gpu_report check               # the same on a CPU, at tiny sizes

Every part is a process of its own with a time limit. One that fails, hangs or lacks a package says
so in the report and takes nothing from the others; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import site
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_report import markdown, markdown_table
from benchmarks.timing import environment, environment_line, write_json

ROOT = Path(__file__).parent.parent
WORK = Path("outputs/gpu")  # logs and results of the parts
REPORT = Path("benchmarks/reports/gpu.md")
TEST_MINUTES, ALL_MINUTES = 3.3, 8.4
TEST_WORKERS = 12  # compiling takes most of the time, on the CPU; nothing is timed there
TAIL_LINES = 60
KERNEL_PACKAGES = ("torch", "triton", "einops", "rich")


@dataclass(frozen=True)
class Part:
    """A command, the packages that it needs, and its share of the time that is left."""

    name: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...] = KERNEL_PACKAGES
    share: float = 1.0
    takes_minutes: bool = False  # it has --minutes, and ends by itself in time


@dataclass(frozen=True)
class Result:
    """What became of a part."""

    name: str
    command: str
    status: str  # "passed", "failed" or "timed out"
    seconds: float
    ended: float  # seconds since the epoch
    output: str  # its last lines


def gpu_test_files() -> list[str]:
    """Only these are collected: the others may import what a bare machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "mark.gpu" in path.read_text()]


def test_part(workers: int) -> Part:
    """The tests marked ``gpu``."""
    shown = ("-q", "--tb=short", "--show-capture=no")  # the compiler logs pages
    options = ("-m", "gpu", "-n", str(workers), *shown, "-p", "no:cacheprovider")
    packages = (*KERNEL_PACKAGES, "pytest", "xdist", "hypothesis")
    return Part("tests", ("pytest", *options, *gpu_test_files()), packages)


def benchmark_parts(device: str) -> list[Part]:
    """The measurements, the most important first."""
    folder = work_folder(device)
    here = ("--device", device, "--output", str(folder))
    saved = ("--device", device, "--json", str(folder / "throughput.json"))
    if device == "cuda":
        # Large enough that in plain eager mode the GPU and not its host is what is measured.
        timed = ("--dtype", "autocast", "--seconds", "5")
        models: tuple[str, ...] = ("--batch", "256", *timed)
        trial = ("--kernels", "forward", "--dtypes", "bfloat16")
    else:
        one = ("--models", "focal_tiny", "--baseline", "focal_tiny", "--runs", "forward")
        models = (*one, "--batch", "1", "--seconds", "0.1", "--min-rounds", "1", "--no-memory")
        trial = ("--kernels", "forward", "--dtypes", "float32")
    packages = (*KERNEL_PACKAGES, "timm")
    parts = [
        Part("attention", ("benchmarks.attention", *here), share=0.4, takes_minutes=True),
        Part("throughput", ("benchmarks.throughput", *saved, *models), packages, share=0.5),
        Part("tune", ("benchmarks.tune", "--dry-run", *here, *trial), takes_minutes=True),
    ]
    if device == "cuda":  # a CPU would compile for minutes
        # The paper's batch on each of eight GPUs, where the host is what plain execution waits for.
        pair = ("--models", "focal_tiny", "swin_tiny_patch4_window7_224", "--batch", "128")
        common = ("benchmarks.throughput", "--device", device, *pair, *timed, "--no-memory")
        parts[2:2] = [
            Part("batch 128", (*common,), packages, share=0.5),
            Part("compiled", (*common, "--runs", "train", "--compile"), packages, share=0.7),
            Part(
                "CUDA graphs",
                (*common, "--runs", "train", "--compile", "reduce-overhead"),
                packages,
                share=0.8,
            ),
        ]
    return parts


def work_folder(device: str) -> Path:
    """Where the parts leave their results."""
    return WORK if device == "cuda" else WORK.with_name("gpu-check")


def run_part(part: Part, seconds: float, folder: Path, variables: Mapping[str, str]) -> Result:
    """Run a part for at most ``seconds``; its result is saved in ``folder`` as well."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = list(part.arguments)
    if part.takes_minutes:  # it ends before it is ended
        arguments += ["--minutes", f"{0.9 * seconds / 60:.2f}"]
    command = [sys.executable, "-m", *arguments]
    start, log = time.monotonic(), folder / f"{part.name}.log"
    missing = [name for name in part.packages if importlib.util.find_spec(name) is None]
    if missing:
        status = "failed"
        log.write_text(f'missing packages: {", ".join(missing)}; pip install -e ".[dev]"\n')
    else:
        with log.open("w") as file:
            status = _run(command, seconds, file, {**os.environ, "COLUMNS": "160", **variables})
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    elapsed, text = time.monotonic() - start, without_folders("\n".join(lines))
    shown = shlex.join(["python", *command[1:]])
    result = Result(part.name, shown, status, elapsed, time.time(), text)
    write_json(folder / f"{part.name}-result.json", asdict(result))
    print(f"{part.name}: {status} after {elapsed:.0f} s", flush=True)
    return result


def without_folders(text: str) -> str:
    """Paths of this checkout and of installed packages, without what is this machine's alone."""
    for folder in (ROOT, *site.getsitepackages()):
        text = text.replace(f"{folder}/", "")
    return text


def _run(command: Sequence[str], seconds: float, log: Any, variables: Mapping[str, str]) -> str:
    # A session of its own, so that workers and compilers end with it.
    process = subprocess.Popen(
        command, stdout=log, stderr=log, cwd=ROOT, env=dict(variables), start_new_session=True
    )
    try:
        return "passed" if process.wait(timeout=max(seconds, 1.0)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _load(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _date(result: Result) -> str:
    return datetime.fromtimestamp(result.ended, UTC).strftime("%Y-%m-%d %H:%M UTC")


def minutes_left(folder: Path) -> float:
    """For the benchmarks: what the tests left of the time for both, if they have just run."""
    tests = _load(folder / "tests-result.json")
    just_ran = tests is not None and time.time() - tests["ended"] < 60
    return ALL_MINUTES - (tests["seconds"] / 60 if just_ran else 0.0)


def write_report(path: Path, folder: Path, found: Mapping[str, str]) -> list[Result]:
    """Put what the parts left in ``folder`` into one report; returns their results."""
    names = ["tests", *(part.name for part in benchmark_parts("cuda"))]
    saved = [_load(folder / f"{name}-result.json") for name in names]
    results = [Result(**content) for content in saved if content]
    attention = _load(folder / "attention.json")
    outcome = [
        (result.name, result.status, f"{result.seconds:.0f}", _date(result), f"`{result.command}`")
        for result in results
    ]
    sections = [
        "# Report of a GPU run",
        environment_line(found),
        markdown_table(("part", "outcome", "seconds", "ended", "command"), outcome),
    ]
    for result in results:
        sections.append(f"## {result.name}")
        if result.name == "attention" and attention:
            sections.append(markdown(attention))
        if result.name != "attention" or result.status != "passed":
            sections.append(f"```\n{result.output}\n```")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sections) + "\n")
    content = {
        "environment": found,
        "parts": [asdict(result) for result in results],
        "attention": attention,
        "throughput": _load(folder / "throughput.json"),
        "tune": _load(folder / "tune.json"),
    }
    write_json(path.with_suffix(".json"), content)
    return results


def run(parts: Sequence[Part], minutes: float, device: str, variables: Mapping[str, str]) -> None:
    """Run parts one after the other, each with its share of the time that is left."""
    folder = work_folder(device)
    for part in parts:  # nothing of an earlier run may pass for this one's
        for name in (f"{part.name}.json", f"{part.name}-result.json"):
            (folder / name).unlink(missing_ok=True)
    end = time.monotonic() + 60 * minutes
    for part in parts:
        run_part(part, part.share * (end - time.monotonic()), folder, variables)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["tests", "benchmarks", "check"])
    parser.add_argument("--minutes", type=float, help="default: under 9 for all")
    parser.add_argument(
        "--defer", action="store_true", help="tests: leave failures to the report of the benchmarks"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    if arguments.what == "check":
        found = environment(torch.device("cpu"))
        variables = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        run([test_part(0), *benchmark_parts("cpu")], arguments.minutes or 8.0, "cpu", variables)
        report = work_folder("cpu") / REPORT.name
        results = write_report(report, work_folder("cpu"), found)
    elif not torch.cuda.is_available():
        sys.exit("no GPU found; `make bench-gpu-check` runs the same on a CPU, at tiny sizes")
    else:
        found = environment(torch.device("cuda"))
        tests = arguments.what == "tests"
        parts = (
            [test_part(min(TEST_WORKERS, os.cpu_count() or 1))]
            if tests
            else benchmark_parts("cuda")
        )
        default = TEST_MINUTES if tests else minutes_left(work_folder("cuda"))
        minutes = arguments.minutes or default
        run(parts, minutes, "cuda", {"TRITON_INTERPRET": "0"})
        report = REPORT
        results = write_report(report, work_folder("cuda"), found)
    print(f"report: {report}")
    failed = [result.name for result in results if result.status != "passed"]
    if failed and not arguments.defer:
        sys.exit(f"not passed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
