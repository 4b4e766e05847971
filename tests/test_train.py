"""`python train.py` as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import TINY

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = (
    *TINY,
    "optimizer=sgd",
    "optimizer.base_lr=0.05",
    "trainer.epochs=2",
    "trainer.limit_train_batches=4",
    "trainer.checkpoint_every=3",
)


def python_train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_each_run_of_a_sweep_has_a_folder_of_its_own(tmp_path: Path) -> None:
    options = ("trainer.epochs=1", "trainer.limit_train_batches=1", "trainer.checkpoint_every=null")
    done = python_train(tmp_path, "-m", *OPTIONS, *options, "trainer.seed=1,2")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("outputs/focal_micro/*_sweep/*/best.ckpt"))) == 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trainer.batch_size=0", "error: trainer.batch_size must be positive, got 0"),
        ("data=imagefolder", "error: data.root must be set: data.root=VALUE"),
        ("trainer.epoch=1", "Key 'epoch' not in 'TrainerConfig'"),
    ],
)
def test_a_mistake_is_told_in_words_without_a_traceback(
    tmp_path: Path, argument: str, message: str
) -> None:
    done = python_train(tmp_path, argument)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_the_groups_examples_and_settings(tmp_path: Path) -> None:
    done = python_train(tmp_path, "--help", "model=focal_tiny")
    assert done.returncode == 0
    for part in ("Examples", "Groups", "experiment=imagenet/focal_tiny", "name: focal_tiny"):
        assert part in done.stdout
