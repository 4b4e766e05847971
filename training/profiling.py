"""A trace of some optimiser steps, for chrome://tracing or https://ui.perfetto.dev."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FILE = "trace.json"
# The first steps allocate, compile and fill caches; one more warms up the profiler itself.
SKIPPED, WARMUP = 2, 1


class StepProfiler:
    """Traces `steps` optimiser steps once and writes them to `trace.json`.

    Args:
        steps: Steps to trace, after three that are not.
        folder: Where to write.
        tell: Called with a line about the file when it is written.
    """

    def __init__(self, steps: int, folder: Path, tell: Callable[[str], None]) -> None:
        self.steps = steps
        self.path = folder / FILE
        self.tell = tell
        self.written = False
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=SKIPPED, warmup=WARMUP, active=steps, repeat=1),
            on_trace_ready=self._write,
        )

    def _write(self, profiler: profile) -> None:
        profiler.export_chrome_trace(str(self.path))
        self.written = True
        self.tell(f"trace of {self.steps} steps in {self.path}; https://ui.perfetto.dev opens it")

    def __enter__(self) -> "StepProfiler":
        self.profiler.start()
        return self

    def step(self) -> None:
        """An optimiser step is done."""
        if not self.written:
            self.profiler.step()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.profiler.stop()  # writes what there is of an unfinished trace
