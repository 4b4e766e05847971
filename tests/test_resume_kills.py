"""A run that is killed again and again ends as one that never was, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY

from training import checkpoint

ENDS = ("SAVING", "SIGKILL", "SIGTERM", "SIGINT")
ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    *TINY,
    "model.drop_path_rate=0.2",
    "data.num_workers=1",
    "trainer.epochs=3",
    "trainer.batch_size=4",
    "trainer.accumulate=2",
    "trainer.limit_train_batches=40",
    "trainer.limit_val_batches=2",
    "trainer.ema_decay=0.9",
    "trainer.log_every=5",
    "trainer.checkpoint_every=3",
)


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    kept.pop("TRITON_INTERPRET", None)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def lines(folder: Path) -> list[dict]:
    """The records, without what depends on the clock and the process."""
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in texts]
    measured = {"images_per_second", "peak_memory_bytes"}
    return [{k: v for k, v in record.items() if k not in measured} for record in records]


def assert_equal(a: Any, b: Any, where: str = "") -> None:
    """Equal containers of bit-identical tensors."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    else:
        assert a == b, where


def assert_same_run(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    for name in ("last.ckpt", "best.ckpt"):
        a, b = checkpoint.load(one / name), checkpoint.load(other / name)
        for content in (a, b):
            content.pop("config")  # how it was resumed
            content.pop("wandb_id", None)
        assert_equal(a, b, name)


def test_a_run_killed_24_times_while_saving_and_otherwise_equals_one_never_stopped(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kills.py"), str(tmp_path / "runs"), "0"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    log = (tmp_path / "runs" / "killed" / "log.txt").read_text()
    ends = {name: {code for kind, code in report["ends"] if kind == name} for name in ENDS}
    assert len(report["ends"]) == 24
    assert report["last"] == 0, log
    assert ends["SAVING"] == ends["SIGKILL"] == {-signal.SIGKILL}, log
    assert ends["SIGTERM"] == {143}, log
    assert ends["SIGINT"] == {130}, log
    assert len(report["wandb_ids"]) == 1
    assert_same_run(tmp_path / "runs" / "killed", tmp_path / "runs" / "whole")


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, as a shell gives to a command
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process prints up to `text`."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    pytest.fail(f"{text!r} is not in what was printed:\n{printed}")


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    printed, _ = process.communicate(timeout=300)
    return process.returncode, printed


def test_a_process_that_is_killed_is_continued_by_naming_its_folder(tmp_path: Path) -> None:
    whole = begin(tmp_path, *OPTIONS, "hydra.run.dir=whole")
    assert finish(whole)[0] == 0

    first = begin(tmp_path, *OPTIONS, "hydra.run.dir=cut")
    read_until(first, "step 15/")
    first.kill()
    assert finish(first)[0] == -signal.SIGKILL

    second = begin(tmp_path, "resume=cut")  # the other arguments are those of the run
    printed = read_until(second, "step 35/")
    assert "continuing cut/last.ckpt at step" in printed
    os.killpg(second.pid, signal.SIGTERM)  # loading processes get it too, as on a cluster
    code, printed = finish(second)
    assert code == 143, printed
    assert "to continue: resume=cut" in printed

    third = begin(tmp_path, "resume=cut", "trainer.log_every=5")
    code, printed = finish(third)
    assert code == 0, printed
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert not list(tmp_path.glob("cut/*.tmp"))
    assert not (tmp_path / "outputs").exists()


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(tmp_path: Path) -> None:
    """The first one comes in an accumulated step of seconds, which the second does not wait for."""
    slow = (
        *OPTIONS,
        "trainer.accumulate=20",
        "trainer.batch_size=64",
        "trainer.checkpoint_every=null",
    )
    process = begin(tmp_path, *slow, "data.num_workers=0", "hydra.run.dir=run")
    read_until(process, "results in")
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    read_until(process, "Ctrl-C stops at once")
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    code, _ = finish(process)
    assert code == -signal.SIGINT  # a shell reports 130
    assert time.monotonic() - began < 2
    assert not (tmp_path / "run" / "last.ckpt").exists()
