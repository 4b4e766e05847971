"""Stopping by a signal and continuing in the same folder."""

import os
import signal
from pathlib import Path

import pytest
import torch
from runs import TINY, trainer

from conf import ConfigError, expand_resume
from training import RunStopped, checkpoint
from training.loop import Trainer
from training.reporting import Reporter

OPTIONS = (
    *TINY,
    "trainer.epochs=2",
    "trainer.batch_size=8",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=3",
    "trainer.log_every=1",
    "resume=auto",
)
train = trainer(OPTIONS)


def signal_at(patch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal when `step` is done."""
    original = Reporter.advance

    def advance(self: Reporter, images: int) -> None:
        original(self, images)
        if self.console.step == step:
            os.kill(os.getpid(), number)

    patch.setattr(Reporter, "advance", advance)


def assert_same_end(one: Path, other: Path) -> None:
    a, b = (checkpoint.load(folder / "last.ckpt") for folder in (one, other))
    assert a["epoch"] == b["epoch"]
    assert a["lines"] == b["lines"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)]
)
def test_a_signal_ends_the_step_saves_and_exits_with_its_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(number)
    signal_at(monkeypatch, 3, number)
    with pytest.raises(RunStopped) as stop:
        train(tmp_path / "run")
    assert stop.value.code == code
    assert checkpoint.load(tmp_path / "run" / "last.ckpt")["step"] == 3
    assert signal.getsignal(number) == before
    captured = capfd.readouterr()
    assert "saving after this step; Ctrl-C stops at once" in captured.err
    assert f"to continue: resume={tmp_path / 'run'}" in captured.out


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole")
    original = Trainer.evaluate

    def evaluate(self: Trainer) -> dict[str, float] | None:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", evaluate)
        with pytest.raises(RunStopped):
            train(tmp_path / "run")
    content = checkpoint.load(tmp_path / "run" / "last.ckpt")
    assert (content["epoch"], content["step"]) == (0, 4)
    train(tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def fake_scontrol(folder: Path, script: str) -> None:
    folder.mkdir()
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)


def test_a_clusters_warning_saves_and_puts_the_job_back_into_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_scontrol(tmp_path / "bin", f'echo "$@" >> {tmp_path}/asked')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        signal_at(patch, 2, signal.SIGUSR1)
        with pytest.raises(RunStopped):
            train(tmp_path / "run")
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "job 4711 is requeued" in capsys.readouterr().out
    train(tmp_path / "run")  # as the cluster starts it again
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("resume", "message"),
    [("auto", "scontrol cannot requeue job 4711: no such job"), ("null", "is not requeued: with")],
)
def test_a_job_that_is_not_requeued_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    resume: str,
    message: str,
) -> None:
    fake_scontrol(tmp_path / "bin", "echo no such job >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    signal_at(monkeypatch, 2, signal.SIGUSR1)
    with pytest.raises(RunStopped):
        train(tmp_path / "run", f"resume={resume}")
    assert message in capsys.readouterr().out


def test_a_finished_run_is_not_run_again_by_automatic_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tmp_path / "run")
    before = (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns
    assert train(tmp_path / "run") == result
    assert "is finished: 2 epochs" in capsys.readouterr().out
    assert (tmp_path / "run" / "last.ckpt").stat().st_mtime_ns == before


def saved_arguments(folder: Path, *arguments: str) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    text = "".join(f"- {argument}\n" for argument in arguments)
    (folder / ".hydra" / "overrides.yaml").write_text(text)
    return folder


def test_continuing_takes_the_arguments_of_the_run_and_those_given_now_win(tmp_path: Path) -> None:
    run_dir = saved_arguments(tmp_path / "run", "model=focal_micro", "trainer.epochs=3", "name=a")
    given = [f"resume={run_dir}", "trainer.epochs=5"]
    expanded = expand_resume(given)
    assert expanded == ["model=focal_micro", "name=a", *given, f"hydra.run.dir='{run_dir}'"]
    assert expand_resume(expanded) == expanded  # a second process of the run gets them again
    file = [f"resume={run_dir}/best.ckpt", "eval_only=true"]
    assert expand_resume(file) == ["model=focal_micro", "trainer.epochs=3", "name=a", *file]


def test_automatic_resume_needs_a_folder_that_stays_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir must be set with resume=auto"):
        expand_resume(["resume=auto"])
    given = ["resume=auto", "hydra.run.dir=runs/a"]
    assert expand_resume(given) == given
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert expand_resume(["resume=auto"])[1] == "hydra.run.dir=outputs/${name}/job_4711"


def test_arguments_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    run_dir = saved_arguments(tmp_path / "run")
    (run_dir / ".hydra" / "overrides.yaml").write_text("- a\n  b: [")
    with pytest.raises(ConfigError, match=r"resume: cannot read .*overrides\.yaml"):
        expand_resume([f"resume={run_dir}"])
    with pytest.raises(ConfigError, match="resume must name a checkpoint file in a multirun"):
        expand_resume(["-m", f"resume={run_dir}"])
