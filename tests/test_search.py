"""The search, with a stand-in for `train.py` that leaves the same files at once."""

import csv
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

import conf
import search
from conf import ConfigError
from conf.search_space import read_search

SPACE: dict[str, Any] = {
    "name": "tried",
    "arguments": ["model=focal_micro", "trainer.epochs=2"],
    "trials": 4,
    "space": {
        "optimizer.base_lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "trainer.batch_size": {"choices": [16, 32]},
        "model.mlp_ratio": {"low": 2, "high": 4},
    },
}

# Its metric is a function of the rate, unless `values.json` beside the trial's folder has another.
# A file there with Python in it is run between the epochs: it says what happens to a trial.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

given = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder = Path(given["hydra.run.dir"].strip("'"))
lines = folder / "metrics.jsonl"
begun = len(lines.read_text().splitlines()) if lines.exists() else 0
value = 100 - abs(float(given["optimizer.base_lr"]) - 1e-3) * 1000
values = folder.parent / "values.json"
if values.exists():
    value = json.loads(values.read_text()).get(folder.name, value)
(folder / "given.json").write_text(json.dumps(given))
for epoch in range(begun + 1, 3):
    line = {"kind": "epoch", "step": epoch, "epoch": epoch, "val_top1": value}
    with open(lines, "a") as file:
        file.write(json.dumps(line) + chr(10))
    happens = folder.parent / "happens.py"
    if happens.exists() and epoch == 1:
        exec(happens.read_text())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The search's folder; `happens.py` and `values.json` in it say what happens to a trial."""
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(search, "TRAIN", tmp_path / "train.py")
    monkeypatch.setattr(search, "POLL_SECONDS", 0.02)
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def run(folder: Path, *words: str, **settings: Any) -> None:
    file = folder.parent / "space.yaml"
    file.write_text(yaml.safe_dump(SPACE | settings))
    search.main([str(file), "--output", str(folder), *words])


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").open()))


def test_the_best_of_all_trials_is_told_with_its_command(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    run(folder)
    trials = table(folder)
    best = max(trials, key=lambda trial: float(trial["val_top1"]))
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    assert [trial["epochs"] for trial in trials] == ["2"] * 4
    assert len({trial["optimizer.base_lr"] for trial in trials}) == 4
    assert {trial["trainer.batch_size"] for trial in trials} <= {"16", "32"}
    assert {trial["model.mlp_ratio"] for trial in trials} <= {"2", "3", "4"}
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("python train.py"))
    assert "model=focal_micro trainer.epochs=2" in command
    assert f" optimizer.base_lr={best['optimizer.base_lr']}" in command
    assert (folder / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_search_goes_on_with_more_trials_alone(folder: Path) -> None:
    run(folder, "--trials", "2")
    before = table(folder)
    run(folder, "--trials", "3")
    after = table(folder)
    assert after[:2] == before
    assert len(after) == 3
    assert len({trial["optimizer.base_lr"] for trial in after}) == 3


def test_a_trial_that_was_cut_off_goes_on_in_its_folder_with_its_values(folder: Path) -> None:
    happens = folder / "happens.py"
    happens.write_text("os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)")
    with pytest.raises(SystemExit) as stopped:
        run(folder)
    assert stopped.value.code == 143
    given = (folder / "trial_000/given.json").read_text()
    happens.unlink()
    run(folder)
    ends = table(folder)
    assert {trial["state"] for trial in ends} == {"complete"}
    assert len(ends) == 4
    assert ends[0]["folder"] == "trial_000"
    assert ends[0]["epochs"] == "2"
    assert (folder / "trial_000/given.json").read_text() == given


def test_a_trial_that_fails_is_told_and_the_search_goes_on(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    (folder / "happens.py").write_text(
        textwrap.dedent("""
            if folder.name == "trial_001":
                sys.exit("error: the training loss is nan")
        """)
    )
    run(folder)
    trials = table(folder)
    assert [trial["state"] for trial in trials] == ["complete", "fail", "complete", "complete"]
    assert trials[1]["fault"] == "error: the training loss is nan"
    out = capsys.readouterr().out
    assert "failed: error: the training loss is nan" in out
    assert "3 trials to the end, 0 ended early, 1 failed" in out


def test_a_search_of_which_every_trial_fails_fails(folder: Path) -> None:
    (folder / "happens.py").write_text("sys.exit(3)")
    with pytest.raises(SystemExit, match="no trial ran to its end"):
        run(folder)
    with pytest.raises(SystemExit, match="no trial ran to its end"):
        run(folder)  # done, it does not begin anew
    assert [trial["fault"] for trial in table(folder)] == ["exit code 3"] * 4


def test_a_trial_behind_the_median_ends_early(folder: Path) -> None:
    # A first trial with a fine metric, then one that is behind and would not end by itself.
    (folder / "values.json").write_text(json.dumps({"trial_001": -900.0}))
    (folder / "happens.py").write_text('if folder.name != "trial_000": time.sleep(60)')
    run(folder, pruning={"startup_trials": 1, "warmup_epochs": 0}, trials=2)
    trials = table(folder)
    assert [trial["state"] for trial in trials] == ["complete", "pruned"]
    assert (trials[1]["epochs"], float(trials[1]["val_top1"])) == ("1", -900.0)


def test_a_metric_that_runs_do_not_have_is_told(folder: Path) -> None:
    with pytest.raises(SystemExit, match="no trial ran to its end"):
        run(folder, metric="val_topp", trials=1)
    assert "val_topp" in table(folder)[0]["fault"]


def test_a_folder_of_another_search_or_at_work_is_refused(folder: Path) -> None:
    run(folder, "--trials", "1")
    with pytest.raises(SystemExit, match="must be a new folder for a search with other arguments"):
        run(folder, "trainer.epochs=3")
    with (
        FileLock(folder / ".lock"),
        pytest.raises(SystemExit, match="in which no other search is at work"),
    ):
        run(folder)
    with pytest.raises(SystemExit, match="--trials must be positive, got 0"):
        run(folder, "--trials", "0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trials": 0}, "trials must be positive, got 0"),
        ({"direction": "up"}, "direction must be one of maximize, minimize, got 'up'"),
        ({"space": {}}, "space must name a setting"),
        ({"trails": 3}, "trails"),
        ({"space": {"trainer.seed": {"low": 3, "high": 1}}}, "must have low below high"),
        ({"space": {"trainer.seed": {"low": 3}}}, "choices, or numbers low and high"),
        ({"space": {"trainer.seed": {"choices": []}}}, "choices, or low and high"),
        ({"space": {"trainer.seed": {"low": 0, "high": 1, "log": True}}}, "a positive low"),
        ({"space": {"trainer.seed": {"low": 0, "high": 4, "step": 0}}}, "a positive step"),
        ({"space": {"trainer.seeds": {"low": 0, "high": 4}}}, "trainer.seeds=0: .*seeds"),
        ({"space": {"optimizer.base_lr": {"low": -1, "high": 1}}}, "base_lr must be positive"),
        ({"space": {"model.pool": {"choices": ["fc"], "low": 1}}}, "choices, or low and high"),
    ],
)
def test_a_mistake_in_the_file_is_told_before_any_trial(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    file = tmp_path / "space.yaml"
    file.write_text(yaml.safe_dump(SPACE | change))
    with pytest.raises(ConfigError, match=message):
        read_search(file, [])


@pytest.mark.parametrize("name", sorted(os.listdir(Path(conf.__file__).parent / "search")))
def test_every_search_of_the_project_can_be_run(name: str) -> None:
    config = read_search(Path(conf.__file__).parent / "search" / name, [])
    assert config.name == Path(name).stem
