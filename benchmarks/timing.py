"""What measurements share: where they were made, interleaved timing, the file they end in."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["Timing", "environment", "environment_line", "interleave", "peak_memory", "write_json"]

FLUSH_BYTES = 256 * 2**20  # several times the last cache of any GPU
FLUSHES = 16  # a millisecond or more, in which the host gets ahead of the GPU


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds of one function.

    Args:
        milliseconds: From start to end on the device (wall clock on a CPU).
        host_milliseconds: Until the call returned. Where it is the longer of the two, a loop of
            such calls runs at the host's pace.
        runs: Rounds that were timed.
    """

    milliseconds: float
    host_milliseconds: float
    runs: int


def environment(device: torch.device) -> dict[str, str]:
    """Device, driver, versions and date: what a figure must be read with."""
    found = {
        "device": _device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        found["capability"] = f"sm_{properties.major}{properties.minor}"
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = _driver()
    else:
        found["threads"] = str(torch.get_num_threads())
    return found


def environment_line(found: Mapping[str, str]) -> str:
    """`environment` as one line of a report."""
    rest = ", ".join(f"{name} {value}" for name, value in found.items() if name != "device")
    return f"{found['device']}; {rest}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split("\n")[0].strip()


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 50,
) -> dict[str, Timing]:
    """Time functions in turns, so that a change of the machine's clock meets all of them alike.

    Args:
        functions: What to time; each has run at least once (compiled, memory allocated).
        device: Where they run. On a GPU the caches are flushed before each run.
        seconds: Time to spend on all of them together, as far as ``min_rounds`` allows.
        min_rounds: Rounds at least.
        max_rounds: Rounds at most.

    Returns:
        Medians, by name.
    """
    timer = _cuda_run if device.type == "cuda" else _cpu_run
    flush = torch.empty(
        FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device
    )
    device_times: dict[str, list[float]] = {name: [] for name in functions}
    host_times: dict[str, list[float]] = {name: [] for name in functions}
    start, rounds = time.perf_counter(), 0
    while rounds < max_rounds and (rounds < min_rounds or time.perf_counter() - start < seconds):
        for name, function in functions.items():
            on_device, on_host = timer(function, flush)
            device_times[name].append(on_device)
            host_times[name].append(on_host)
        rounds += 1
    return {
        name: Timing(
            statistics.median(device_times[name]), statistics.median(host_times[name]), rounds
        )
        for name in functions
    }


def _cuda_run(function: Callable[[], Any], flush: torch.Tensor) -> tuple[float, float]:
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for _ in range(FLUSHES):  # once empties the caches; the others hide the host's launches
        flush.zero_()
    before.record()
    host = time.perf_counter()
    function()
    host = time.perf_counter() - host
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after), host * 1e3


def _cpu_run(function: Callable[[], Any], flush: torch.Tensor) -> tuple[float, float]:
    start = time.perf_counter()
    function()
    elapsed = (time.perf_counter() - start) * 1e3
    return elapsed, elapsed


def peak_memory(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes that one run allocates beyond what is allocated already; None, and no run, on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def write_json(path: Path, content: Any) -> None:
    """Save ``content`` as indented JSON, making the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
