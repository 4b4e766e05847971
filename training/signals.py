"""What stops a run from outside: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, a cluster's warning.

The first signal is remembered; the loop looks at safe places, saves and ends. Ctrl-C after that has
the system's own effect, at once: a process that is killed leaves whole files (`training.saving`).
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SHOW_CURSOR = "\x1b[?25h"  # the progress bar hides it, and a killed process cannot show it again


class RunStopped(SystemExit):
    """A signal ended the run after saving.

    Args:
        number: The signal. The exit code is 128 + it.
        first: False for processes other than the first, whose code is 0: their parent takes any
            other for a crash and kills the run.
    """

    def __init__(self, number: int | None, *, first: bool = True) -> None:
        assert number is not None
        super().__init__(128 + number if first else 0)
        self.number = number


class StopSignals:
    """Remembers the first of the signals that arrives while it is entered as a context."""

    def __init__(self) -> None:
        self.received: int | None = None  # by this process
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self.received is not None:
            return
        self.received = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        text = f"{signal.Signals(number).name}: saving after this step; Ctrl-C stops at once\n"
        # Not by way of a stream: the signal may have come in the midst of its writing.
        os.write(2, ((SHOW_CURSOR if sys.stderr.isatty() else "") + text).encode())


class WorkerShield:
    """Lets loading processes outlive signals that are sent to the whole group of processes.

    The run still needs their batches to end its step. Given to a `DataLoader` as `worker_init_fn`.
    """

    def __init__(self) -> None:
        self._over = multiprocessing.Event()

    def __call__(self, worker: int) -> None:
        """Set the handlers of loading process `worker`."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if self._over.is_set():
            os._exit(0)

    def lift(self) -> None:
        """The run needs no batch any more: its end terminates the processes and waits for them."""
        self._over.set()


def requeue(*, resume: str | None) -> str | None:
    """Put this SLURM job back into its queue; returns what to tell the user, None outside SLURM.

    Args:
        resume: The run's `resume` setting. The job will run the same command again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    if resume != "auto":
        return f"warning: job {job} is not requeued: without resume=auto it would begin a new run"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"warning: scontrol cannot requeue job {job}: {error.stderr.strip()}"
    except OSError as error:
        return f"warning: scontrol cannot requeue job {job}: {error}"
    return f"job {job} is requeued"
