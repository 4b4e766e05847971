"""Metrics, optimisation and checkpoint files, each by itself."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn

from conf import ConfigError, compose
from conf.schema import ConstantConfig, CosineConfig
from training import checkpoint
from training.metrics import ClassificationMetrics, cross_entropy
from training.optimization import build_mixup, build_optimizer, build_schedule, learning_rate
from training.records import read_history

CPU = torch.device("cpu")


def test_metrics_count_every_sample_of_uneven_batches_once() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(25, 8, dtype=torch.float64), torch.randint(0, 8, (25,))
    metrics = ClassificationMetrics(8, CPU)
    for part in (slice(0, 16), slice(16, 24), slice(24, 25)):
        loss = cross_entropy(logits[part], labels[part])
        metrics.update(loss, logits[part], labels[part])
    values = metrics.compute()
    for name, k in (("top1", 1), ("top5", 5)):
        expected = top_k_accuracy_score(labels, logits, k=k, labels=np.arange(8))
        assert values[name] == pytest.approx(100 * expected)
    assert values["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


def test_top5_of_three_classes_is_top3() -> None:
    metrics = ClassificationMetrics(3, CPU)
    metrics.update(torch.tensor(1.0), torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))
    assert metrics.compute()["top5"] == 100


def test_metrics_continue_from_their_state() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(20, 8), torch.randint(0, 8, (20,))
    whole, first, second = (ClassificationMetrics(8, CPU) for _ in range(3))
    for metrics, parts in ((whole, (0, 10)), (first, (0,))):
        for start in parts:
            metrics.update(torch.tensor(float(start)), logits[start:][:10], labels[start:][:10])
    second.load_state_dict(first.state_dict())
    second.update(torch.tensor(10.0), logits[10:], labels[10:])
    assert second.compute() == whole.compute()


def test_mixed_targets_are_not_smoothed_twice() -> None:
    logits, labels = torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    smooth = torch.full((4, 6), 0.1 / 6)
    smooth[torch.arange(4), labels] += 0.9
    expected = cross_entropy(logits, labels, 0.1)
    assert torch.allclose(cross_entropy(logits, smooth, 0.1), expected)


def test_the_learning_rate_scales_with_the_global_batch_only_where_asked() -> None:
    assert learning_rate(compose("optimizer.base_lr=1e-3").optimizer, 1024) == 1e-3
    scaled = compose("optimizer.base_lr=5e-4", "optimizer.scale_lr=true").optimizer
    assert learning_rate(scaled, 1024) == pytest.approx(1e-3)


def test_vectors_and_bias_tables_are_not_decayed() -> None:
    config = compose().optimizer
    model = timm.create_model("focal_micro", num_classes=10)
    optimizer = build_optimizer(config, model, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed: set[str] = set()
    free: set[str] = set()
    for group in optimizer.param_groups:
        chosen = decayed if group["weight_decay"] else free
        chosen |= {names[id(parameter)] for parameter in group["params"]}
    assert decayed | free == set(names.values())
    assert "head.fc.weight" in decayed
    assert any(name.endswith(".qkv.weight") for name in decayed)
    assert not any("bias" in name.split(".")[-1] or ".bias." in name for name in decayed)
    assert not any("norm" in name for name in decayed)


def test_layer_decay_gives_earlier_layers_lower_rates() -> None:
    config = compose("optimizer.layer_decay=0.5", "schedule=constant")
    model = timm.create_model("focal_micro", num_classes=10)
    optimizer = build_optimizer(config.optimizer, model, 1e-3)
    schedule = build_schedule(config.schedule, optimizer, epochs=2, steps_per_epoch=5)
    schedule.step_update(3)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = dict(model.named_parameters())
    head = rates[id(parameters["head.fc.weight"])]
    embedding = rates[id(parameters["patch_embed.proj.weight"])]
    assert head == pytest.approx(1e-3)
    assert embedding < head / 4


def rates_of(config: CosineConfig | ConstantConfig) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = build_schedule(config, optimizer, epochs=10, steps_per_epoch=10)
    rates = []
    for step in range(101):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_the_cosine_warms_up_linearly_and_ends_at_its_floor() -> None:
    config = CosineConfig("cosine", warmup_epochs=2, warmup_lr=0.1, min_lr=0.01)
    rates = rates_of(config)
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(0.55)
    assert rates[50] == pytest.approx(0.01 + 0.99 / 2)  # the cosine counts from step 0
    assert rates[20:100] == sorted(rates[20:100], reverse=True)
    assert rates[100] == pytest.approx(0.01)


def test_the_constant_schedule_is_constant_after_its_warm_up() -> None:
    rates = rates_of(ConstantConfig("constant", warmup_epochs=1, warmup_lr=0.0))
    assert rates[5] == pytest.approx(0.5)
    assert set(rates[10:]) == {1.0}


def test_mixup_is_off_by_default_and_mixes_labels_when_on() -> None:
    assert build_mixup(compose().trainer, 10) is None
    mixup = build_mixup(compose("trainer.mixup=0.8", "trainer.label_smoothing=0.1").trainer, 10)
    assert mixup is not None
    _, targets = mixup(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    assert torch.allclose(targets.sum(1), torch.ones(4))


def test_an_interrupted_save_keeps_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"epoch": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_is_on_disk_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        original = getattr(checkpoint.os, name)

        def call(*args: Any, name: str = name, original: Any = original) -> None:
            calls.append(name)
            original(*args)

        monkeypatch.setattr(checkpoint.os, name, call)
    checkpoint.save(tmp_path / "last.ckpt", {"epoch": 1})
    assert calls == ["fsync", "replace", "fsync"]


class Attack:
    """Would write a file if it were unpickled."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.target),))


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    torch.save({"format": checkpoint.FORMAT, "x": Attack(str(target))}, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigError, match=r"cannot read .*bad\.ckpt"):
        checkpoint.load(tmp_path / "bad.ckpt")
    (tmp_path / "worse.ckpt").write_bytes(pickle.dumps(Attack(str(target))))
    with pytest.raises(ConfigError, match=r"cannot read .*worse\.ckpt"):
        checkpoint.load(tmp_path / "worse.ckpt")
    assert not target.exists()


def test_a_missing_or_cut_off_or_foreign_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.ckpt: no such file"):
        checkpoint.load(tmp_path / "none.ckpt")
    checkpoint.save(tmp_path / "cut.ckpt", {"model": {"weight": torch.zeros(1000)}})
    whole = (tmp_path / "cut.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"cannot read .*cut\.ckpt"):
        checkpoint.load(tmp_path / "cut.ckpt")
    torch.save({"model": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match="to start from other weights use finetune"):
        checkpoint.load(tmp_path / "other.ckpt")


def test_configuration_differences_name_the_key_and_both_values() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "d": 3}
    assert checkpoint.differences(old, new) == ["a.c: 2 → 5"]


def test_history_ends_at_the_checkpoint_and_leaves_out_a_cut_off_line(tmp_path: Path) -> None:
    text = '{"kind": "train", "step": 5}\n{"kind": "train", "step": 10}\n{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert [line["step"] for line in read_history(tmp_path, 9)] == [5, 10]
    assert [line["step"] for line in read_history(tmp_path, 1)] == [5]
    assert read_history(tmp_path / "none", 9) == []
