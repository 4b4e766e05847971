"""The report of an evaluation-only run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training_run import OPTIONS

from conf import compose
from training import run
from training.evaluation import EvaluationReport


def report_of(probabilities: list[list[float]], labels: list[int]) -> dict[str, Any]:
    """The details of a report that saw these, in two batches."""
    names = tuple("abc"[: len(probabilities[0])])
    report = EvaluationReport(names, torch.device("cpu"))
    logits, targets = torch.tensor(probabilities).log(), torch.tensor(labels)
    for part in (slice(0, 1), slice(1, None)):
        report.update(torch.tensor(0.5), logits[part], targets[part])
    return report.details()


def test_the_figures_of_each_class_by_hand():
    details = report_of(
        [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]], [0, 1, 0, 0]
    )
    assert details["top1"] == pytest.approx(75.0)
    a, b, c = details["classes"]
    assert (a["name"], a["images"], a["accuracy"]) == ("a", 3, pytest.approx(200 / 3))
    assert a["precision"] == 100.0
    assert (b["images"], b["accuracy"], b["precision"]) == (1, 100.0, 50.0)
    assert (c["images"], c["accuracy"], c["precision"]) == (0, None, None)


def test_the_calibration_error_is_that_of_its_bins():
    # Two images at 0.65 confidence, one of them right, and two at 0.95, both right.
    sure, unsure = [0.95, 0.05], [0.65, 0.35]
    details = report_of([unsure, unsure, sure, sure], [0, 1, 0, 0])
    assert details["ece"] == pytest.approx(100 * (0.5 * 0.15 + 0.5 * 0.05), abs=1e-4)
    filled = [entry for entry in details["bins"] if entry["images"]]
    assert [entry["images"] for entry in filled] == [2, 2]
    assert [entry["accuracy"] for entry in filled] == [50.0, 100.0]
    by_hand = sum(
        entry["images"] / 4 * abs(entry["accuracy"] - entry["confidence"]) for entry in filled
    )
    assert details["ece"] == pytest.approx(by_hand, abs=1e-4)


def test_an_evaluation_only_run_writes_its_report(tmp_path: Path, capsys) -> None:
    (tmp_path / "run").mkdir()
    trained = run(compose(*OPTIONS, "trainer.epochs=1"), tmp_path / "run")
    (tmp_path / "again").mkdir()
    again = compose(*OPTIONS, "eval_only=true", f"resume={tmp_path / 'run' / 'best.ckpt'}")
    result = run(again, tmp_path / "again")
    details = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert details["top1"] == result["top1"] == trained["top1"]
    assert details["top5"] == trained["top5"]
    assert [entry["name"] for entry in details["classes"]] == [str(n) for n in range(10)]
    assert sum(entry["images"] for entry in details["classes"]) == 100
    assert sum(entry["images"] for entry in details["bins"]) == 100
    assert (tmp_path / "again/reliability.png").read_bytes().startswith(b"\x89PNG")
    assert "calibration error" in capsys.readouterr().out
