"""Places for the jobs of a sweep that share a machine: one or more GPUs, or a share of the cores.

A place is a lock file in the system's folder for temporary files, one folder for each user, so that
the jobs of two sweeps exclude each other too. The system opens the lock of a process that dies.
"""

import logging
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from conf.schema import ConfigError, TrainerConfig

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """What the jobs of a sweep share.

    Attributes:
        names: One for each GPU, or for each job that may run on the CPU at once.
        per_job: How many of them a job takes.
        threads: Threads of each process of a job.
        gpus: Whether the names are those of GPUs.
    """

    names: tuple[str, ...]
    per_job: int
    threads: int
    gpus: bool


def visible_gpus(accelerator: str) -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` has them."""
    if accelerator == "cpu":
        return ()
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(count)]
    return tuple(name.strip() for name in names[:count])


def plan(settings: TrainerConfig, *, jobs: int, gpus: Sequence[str], cores: int) -> Places:
    """Divide a machine among jobs.

    Args:
        settings: Of the job: `devices` counts its processes, each of which takes a GPU or, on a
            CPU, as many threads as the others; "auto" is one.
        jobs: How many jobs run at once on the CPU.
        gpus: Names of the GPUs; empty for work on the CPU.
        cores: Of the machine.

    Raises:
        ConfigError: `devices` names single devices, or more than there are.
    """
    if settings.devices != "auto" and not settings.devices.isdigit():
        raise ConfigError(
            'trainer.devices must be a number or "auto" in a sweep whose jobs share a machine and '
            f"take what is free, got {settings.devices!r}"
        )
    processes = 1 if settings.devices == "auto" else int(settings.devices)
    if not gpus:
        names = tuple(f"cpu{index}" for index in range(jobs))
        return Places(names, 1, max(1, cores // (jobs * processes)), gpus=False)
    if processes > len(gpus):
        raise ConfigError(
            f"trainer.devices must not exceed the {len(gpus)} GPUs of this machine, got {processes}"
        )
    return Places(tuple(gpus), processes, max(1, cores // len(gpus)), gpus=True)


def _lock_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"focal-places-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@contextmanager
def hold(places: Places) -> Iterator[tuple[str, ...]]:
    """Wait for as many places as a job takes and keep them inside the block; gives their names."""
    folder = _lock_folder()
    locks = {name: FileLock(folder / f"{name.replace('/', '_')}.lock") for name in places.names}
    held: list[str] = []
    told = False
    while len(held) < places.per_job:
        for name in held:  # all or none: two jobs that wait for each other's would wait forever
            locks[name].release()
        held = [name for name in locks if _acquire(locks[name])]
        for name in held[places.per_job :]:
            locks[name].release()
        held = held[: places.per_job]
        if len(held) < places.per_job:
            if not told:
                what = "GPUs" if places.gpus else "places on the CPU"
                _logger.info("waiting: other jobs hold the %s %s", what, ", ".join(locks))
                told = True
            time.sleep(random.uniform(0.2, 0.6))
    try:
        yield tuple(held)
    finally:
        for name in held:
            locks[name].release()


def _acquire(lock: FileLock) -> bool:
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True
