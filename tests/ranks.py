"""Runs a function in several processes that find each other as those of torchrun and srun do.

The processes are forked from the test's own, which has imported everything already.
"""

import faulthandler
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import MODEL

from conf import compose
from training import run
from training.records import Records

FOCAL = (*MODEL, "model.drop_path_rate=0")
TINY = (
    "data=synthetic",
    "data.img_size=28",
    "data.num_classes=10",
    "data.train_size=64",
    "data.val_size=37",
    "logger=none",
    "optimizer=sgd",
    "optimizer.base_lr=0.05",
    "schedule.warmup_epochs=0",
    "trainer.epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.eval_batch_size=6",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)

TIMEOUT = float(os.environ.get("RANKS_TIMEOUT", "120"))  # seconds
Environment = Callable[[int, int, int], dict[str, str]]  # of a rank, their count and a port


def train(folder: Path, *overrides: str, model: tuple[str, ...] = FOCAL) -> dict[str, float]:
    """Run the tiny configuration with `overrides` in `folder`."""
    folder.mkdir(exist_ok=True, parents=True)
    return run(compose(*model, *TINY, *overrides), folder)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells process `rank` of `count` on one machine."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def srun_environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What SLURM tells task `rank` of `count` on one machine."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(count),
        "SLURM_NTASKS_PER_NODE": str(count),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _process(
    rank: int, variables: dict[str, str], results: Any, function: Callable[[], Any]
) -> None:
    torch.set_num_threads(1)  # the pool of threads did not survive the fork
    os.environ.update(variables)
    faulthandler.dump_traceback_later(TIMEOUT - 5, exit=True)  # says where a process hangs
    Records.draw = lambda self: None  # type: ignore[method-assign]  # half of a run's time
    try:
        results.put((rank, function(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def in_processes(
    count: int, function: Callable[[], Any], environment: Environment = torchrun_environment
) -> list[Any]:
    """What `function` returns in each of `count` processes.

    Raises:
        AssertionError: It failed in one of them, or they hang.
    """
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    port = _free_port()
    processes = [
        context.Process(
            target=_process, args=(rank, environment(rank, count, port), results, function)
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    try:
        found = {}
        for _ in processes:
            rank, value, error = results.get(timeout=TIMEOUT)
            assert error is None, f"process {rank}: {error}"  # the others may wait for it
            found[rank] = value
        return [found[rank] for rank in range(count)]
    finally:
        for process in processes:
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
