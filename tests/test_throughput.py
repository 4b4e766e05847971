"""The throughput benchmark on tiny images: what it reports, and that it checks first."""

import json

import pytest
import torch

from benchmarks import throughput
from benchmarks.throughput import Setting

SMALL = ["--batch", "1", "--seconds", "0.01", "--min-rounds", "1", "--no-memory"]
TINY = Setting(1, 64, "float32", None, "cpu")


def run(capsys, *arguments: str) -> str:
    throughput.main([*SMALL, *arguments])
    return capsys.readouterr().out


def test_table_and_file_hold_every_model_run_and_size(tmp_path, capsys):
    path = tmp_path / "rows.json"
    out = run(
        capsys, "--models", "focal_tiny", "resnet18", "--baseline", "resnet18",
        "--resolutions", "64", "96", "--json", str(path),
    )  # fmt: skip
    assert "focal_tiny is correct" in out
    content = json.loads(path.read_text())
    assert content["environment"]["torch"] == torch.__version__
    rows = content["rows"]
    assert {(row["model"], row["run"], row["resolution"]) for row in rows} == {
        (model, kind, size)
        for model in ("focal_tiny", "resnet18")
        for kind in ("forward", "train")
        for size in (64, 96)
    }
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1e3 / row["milliseconds"])
        assert (row["scaling"] is None) == (row["resolution"] == 64)
        if row["model"] == "resnet18":
            assert row["speed_ratio"] == 1.0


def test_ratios_stay_empty_without_the_baseline(tmp_path, capsys):
    path = tmp_path / "rows.json"
    run(capsys, "--models", "resnet18", "--runs", "forward", "--resolutions", "32",
        "--json", str(path))  # fmt: skip
    (row,) = json.loads(path.read_text())["rows"]
    assert row["speed_ratio"] is None
    assert row["memory_ratio"] is None


@pytest.mark.parametrize("dtype", throughput.TOLERANCES)
def test_the_model_is_correct_in_every_dtype(dtype):
    logits, gradients = throughput.check("focal_tiny", Setting(1, 64, dtype, None, "cpu"))
    assert 0 < logits < 1
    assert 0 < gradients < 1


def test_a_wrong_model_is_not_timed(monkeypatch, capsys):
    monkeypatch.setitem(throughput.TOLERANCES, "float32", (1e-12, 1e-12))
    with pytest.raises(ArithmeticError, match="relative error of logits"):
        run(capsys, "--models", "focal_tiny", "--resolutions", "64")
    assert capsys.readouterr().out == ""


def test_a_training_step_gives_every_parameter_a_gradient():
    model = throughput.create("focal_tiny", TINY)
    throughput.train_step(model, TINY)()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_memory_on_a_cpu_is_that_of_a_fresh_process():
    # The parameters alone take 45 MiB.
    assert 45 < throughput.memory("resnet18", "forward", TINY) < 2000


@pytest.mark.parametrize("option", ["--batch", "--seconds", "--resolutions"])
def test_sizes_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        throughput.parse([option, "0"])
    assert "must be positive" in capsys.readouterr().err


def test_a_model_takes_turns_with_itself_compiled(monkeypatch, tmp_path, capsys):
    modes: list[str] = []

    def compiled(model, *, fullgraph, mode):
        modes.append(mode)
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    path = tmp_path / "rows.json"
    run(
        capsys, "--models", "resnet18", "resnet18:default", "--baseline", "resnet18",
        "--resolutions", "32", "--runs", "forward", "--json", str(path),
    )  # fmt: skip
    plain, other = json.loads(path.read_text())["rows"]
    assert modes == ["default"]
    assert (plain["model"], plain["compile_mode"]) == ("resnet18", None)
    assert (other["model"], other["compile_mode"]) == ("resnet18:default", "default")
    assert other["speed_ratio"] > 0


def test_a_colon_may_belong_to_the_name():
    assert throughput.contender("hf-hub:timm/resnet18", TINY) == ("hf-hub:timm/resnet18", TINY)
    name, setting = throughput.contender("hf-hub:timm/resnet18:max-autotune", TINY)
    assert (name, setting.compile_mode) == ("hf-hub:timm/resnet18", "max-autotune")
