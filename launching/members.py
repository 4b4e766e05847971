"""A member of a sweep as the command of a single run.

A process that Fabric starts for a run repeats the command line; inside a sweep it would repeat the
sweep. And a process that has used one GPU cannot move to another. So a member is run as a command
of its own, `python train.py` with the member's arguments and folder, and the launcher's process
waits for it.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from conf.arguments import key_of, quoted
from conf.schema import ConfigError, TrainerConfig
from launching.places import Places, hold, plan, visible_gpus

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
BASIC = "basic"
SHARING = ("joblib", "submitit_local")  # launchers that leave dividing the machine to the jobs
CONSOLE = "console.log"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Arguments of the sweep and not of its members.
_SWEEP = (
    "hydra.launcher",
    "hydra/launcher",
    "hydra.sweep",
    "hydra/sweep",
    "hydra.mode",
    "hydra.run",
)


class MemberError(RuntimeError):
    """A run of a sweep failed; the message names its folder."""


def member_command(hydra_config: Any, run_dir: Path) -> list[str]:
    """The command that runs one member of a sweep, from Hydra's own configuration of it."""
    folders = [
        argument
        for source in hydra_config.runtime.config_sources
        if source.provider == "command-line"
        for argument in ("--config-dir", source.path)
    ]
    hydra = [item for item in hydra_config.overrides.hydra if not key_of(item).startswith(_SWEEP)]
    own = ["hydra.mode=RUN", f"hydra.run.dir={quoted(run_dir)}"]
    return [sys.executable, str(TRAIN), *folders, *hydra_config.overrides.task, *hydra, *own]


def run_member(settings: TrainerConfig, hydra_config: Any, run_dir: Path) -> None:
    """Run one member of a sweep and wait for it.

    Args:
        settings: The member's trainer settings.
        hydra_config: Hydra's own configuration of the member.
        run_dir: The member's folder.

    Raises:
        ConfigError: The member's devices cannot be had, or the sweep was started several times.
        MemberError: The run failed; the other members go on.
        SystemExit: The run was stopped by a signal, which ends the sweep.
    """
    launcher = hydra_config.runtime.choices["hydra/launcher"]
    _refuse_copies(launcher)
    environment = dict(os.environ)
    with ExitStack() as stack:
        if launcher in SHARING:
            places = _places(settings, hydra_config.launcher)
            held = stack.enter_context(hold(places))
            environment.setdefault("OMP_NUM_THREADS", str(places.threads))
            if places.gpus:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(held)
        output = None
        if launcher != BASIC:  # several at once: each has a file of its own
            output = stack.enter_context(open(run_dir / CONSOLE, "ab"))
        code = _wait(member_command(hydra_config, run_dir), environment, output)
    if code < 0 or code - 128 in _SIGNALS:
        raise SystemExit(128 - code if code < 0 else code)
    if code:
        where = f"; see {run_dir / CONSOLE}" if output is not None else ""
        raise MemberError(f"the run in {run_dir} failed with exit code {code}{where}")


def _refuse_copies(launcher: str) -> None:
    """A sweep is started once; its members may have several processes."""
    environ = os.environ
    slurm = int(environ.get("SLURM_NTASKS", "1")) > 1 and launcher != "submitit_slurm"
    if slurm or int(environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep must be started once, not by torchrun or several tasks of srun; for runs of "
            "several processes set trainer.devices"
        )


def _places(settings: TrainerConfig, launcher: Any) -> Places:
    cores = len(os.sched_getaffinity(0))
    if "n_jobs" in launcher:  # joblib
        jobs = launcher.n_jobs if launcher.n_jobs > 0 else cores + 1 + launcher.n_jobs
    else:  # submitit starts all jobs at once
        jobs = cores // (launcher.cpus_per_task or 1)
    gpus = visible_gpus(settings.accelerator)
    return plan(settings, jobs=max(1, jobs), gpus=gpus, cores=cores)


def _wait(command: Sequence[str], environment: dict[str, str], output: Any) -> int:
    """Run `command`, pass on signals meant for it, and give its exit code."""
    # A group of its own: a signal to the launcher's group would reach it twice, by way of us too.
    process = subprocess.Popen(
        command, env=environment, stdout=output, stderr=output, process_group=0
    )
    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for number in _SIGNALS:
            before[number] = signal.signal(number, lambda given, _: process.send_signal(given))
    try:
        return process.wait()
    finally:
        if process.poll() is None:  # the launcher ends the job
            process.terminate()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
