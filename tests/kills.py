"""Kills a small run again and again, and finishes it: `python tests/kills.py FOLDER SEED`.

Each life is a fork of this process, so that a life costs no imports. Every other life kills itself
in the midst of a save, the rest are ended from outside at a random moment, a few steps on: the run
has more steps than they make, on a fast machine too. FOLDER/killed then holds the run, FOLDER/whole
the same run never stopped, and a JSON report is printed.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from runs import TINY

from conf import compose
from training import checkpoint, run
from training.reporting import Reporter

KILLS = 24
OPTIONS = (
    *TINY,
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.1",
    "optimizer.base_lr=5e-3",
    "optimizer.layer_decay=0.8",
    "schedule.warmup_epochs=1",
    "trainer.epochs=8",
    "trainer.batch_size=4",
    "trainer.accumulate=2",
    "trainer.limit_train_batches=28",
    "trainer.eval_batch_size=25",
    "trainer.limit_val_batches=2",
    "trainer.mixup=0.8",
    "trainer.cutmix=1.0",
    "trainer.ema_decay=0.9",
    "trainer.log_every=5",
    "trainer.checkpoint_every=2",
    "resume=auto",
)
# Of one save: what is called on what, at most how often.
OPERATIONS: dict[str, tuple[Any, int]] = {
    "write": (checkpoint._Writer, 1200),
    "fsync": (os, 2),
    "replace": (os, 2),
    "unlink": (Path, 1),
}
Arm = Callable[[], None]


def live(folder: Path, arm: Arm) -> int:
    """Start one life of the run in `folder`; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        arm()
        run(compose(*OPTIONS), folder)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def before(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Call `action` before each call of `owner.name`."""
    original = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        action()
        return original(*args, **options)

    setattr(owner, name, call)


def die_while_saving(choice: random.Random) -> Arm:
    """A life that kills itself before a random file operation of its first or second save."""
    save = choice.randint(1, 2)
    target = choice.choice(list(OPERATIONS))
    owner, most = OPERATIONS[target]
    call = choice.randint(1, most)

    def arm() -> None:
        saves = calls = 0

        def begin() -> None:
            nonlocal saves, calls
            saves, calls = saves + 1, 0

        def strike() -> None:
            nonlocal calls
            calls += 1
            if saves >= save and calls >= call:
                os.kill(os.getpid(), signal.SIGKILL)

        before(checkpoint, "save", begin)
        before(owner, target, strike)

    return arm


def outside(folder: Path, choice: random.Random) -> tuple[int, str]:
    """A life that is ended at a random moment after some steps; returns how it ended."""
    kind = choice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    steps = choice.randint(1, 3)
    ready, tell = os.pipe()

    def arm() -> None:
        before(Reporter, "advance", lambda: os.write(tell, b"."))

    process = live(folder, arm)
    os.close(tell)
    for _ in range(steps):
        os.read(ready, 1)  # empty if the life ended before
    time.sleep(choice.uniform(0, 0.05))
    os.kill(process, kind)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    os.close(ready)
    return code, kind.name


def main(folder: Path, seed: int) -> dict[str, Any]:
    """Run, kill, finish."""
    torch.set_num_threads(1)
    choice = random.Random(seed)
    for name in ("whole", "killed"):
        (folder / name).mkdir(parents=True)
    os.waitpid(live(folder / "whole", lambda: None), 0)
    ends: list[tuple[str, int]] = []
    wandb_ids: set[str] = set()
    while len(ends) < KILLS:
        if len(ends) % 2:
            code, name = outside(folder / "killed", choice)
        else:
            process = live(folder / "killed", die_while_saving(choice))
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            name = "SAVING"
        if (folder / "killed" / "last.ckpt").exists():
            wandb_ids.add(checkpoint.load(folder / "killed" / "last.ckpt")["wandb_id"])
        ends.append((name, code))
    last = os.waitstatus_to_exitcode(os.waitpid(live(folder / "killed", lambda: None), 0)[1])
    return {"ends": ends, "last": last, "wandb_ids": sorted(wandb_ids)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
