"""The most memory that a run has needed."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): set the peak of the resident set to its present size


def reset_peak_memory(device: torch.device) -> None:
    """Begin to measure: a sweep's runs share one process, and each has its own peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux: the peak is that of the process so far
            _CLEAR.write_text(_RESET_PEAK)


def peak_memory_bytes(device: torch.device) -> int:
    """Allocated on a GPU; on a CPU the resident set of this process, with its libraries."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
