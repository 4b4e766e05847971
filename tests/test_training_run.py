"""Whole runs of a tiny Focal Transformer, in this process."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision.amp import MixedPrecision
from runs import SETTINGS, TINY, assert_same, trainer

from conf import ConfigError, compose
from data import build
from training import checkpoint, run
from training.console import RunConsole
from training.loop import Trainer
from training.model import build_model
from training.reporting import Reporter
from training.run import resolve_precision
from training.saving import restore

OPTIONS = (
    *TINY,
    "data.num_workers=0",
    "trainer.epochs=2",
    "trainer.batch_size=16",
    "trainer.eval_batch_size=50",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "trainer.log_every=2",
)
train = trainer(OPTIONS)


def lines(folder: Path) -> list[dict]:
    """The records, without what depends on the clock and the process."""
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(text) for text in texts]
    measured = {"images_per_second", "peak_memory_bytes"}
    return [{k: v for k, v in record.items() if k not in measured} for record in records]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def test_a_run_leaves_its_configuration_metrics_curves_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    result = train(folder)
    names = {path.name for path in folder.iterdir()}
    checkpoints = {"last.ckpt", "last.1.ckpt", "best.ckpt"}
    assert names == {"config.yaml", "metrics.jsonl", "curves.png", ".lock"} | checkpoints
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["depths"] == [1, 1]
    assert saved["name"] == "focal_micro"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    records = lines(folder)
    assert [record["step"] for record in records if record["kind"] == "train"] == [
        2,
        4,
        6,
        8,
        10,
        12,
    ]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert result["top1"] == max(record["val_top1"] for record in epochs)
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    for part in ("focal_micro", "digits", "CPU (", "32-true", "eager attention", str(folder)):
        assert part in first
    for part in ("loss", "acc", "img/s", "left", "epoch 2/2", "best.ckpt"):
        assert part in printed


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    more = ("trainer.limit_train_batches=40", "optimizer.base_lr=5e-3", "trainer.log_every=10")
    train(tmp_path / "run", *more)
    losses = [record["loss"] for record in lines(tmp_path / "run") if record["kind"] == "train"]
    assert losses[0] == pytest.approx(math.log(10), abs=0.1)
    assert losses[-1] < losses[0] - 0.15


# Everything that has a state: drop path, mixup, a moving average, accumulation, momentum.
STATEFUL = (
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.1",
    "trainer.mixup=0.8",
    "trainer.cutmix=1.0",
    "trainer.ema_decay=0.9",
    "trainer.accumulate=2",
    "trainer.limit_train_batches=10",
    "optimizer.base_lr=5e-3",
)


class KilledError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("steps", [5, 8], ids=["after an epoch", "inside an epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    options = (*STATEFUL, "trainer.checkpoint_every=4" if steps == 8 else "trainer.seed=0")
    train(tmp_path / "whole", *options)

    begun = Reporter.advance

    def die(self: Reporter, images: int) -> None:
        begun(self, images)
        if self.console.step == steps + 1:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "advance", die)
        with pytest.raises(KilledError):
            train(tmp_path / "cut", *options)
    train(tmp_path / "resumed", *options, f"resume={tmp_path / 'cut' / 'last.ckpt'}")

    whole = checkpoint.load(tmp_path / "whole" / "last.ckpt")
    resumed = checkpoint.load(tmp_path / "resumed" / "last.ckpt")
    assert_same(resumed["model"], whole["model"])
    assert_same(resumed["ema"], whole["ema"])
    assert resumed["best"] == whole["best"]
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    assert_same(
        weights(tmp_path / "resumed" / "best.ckpt"), weights(tmp_path / "whole" / "best.ckpt")
    )


def test_runs_with_one_seed_are_equal_and_with_two_differ(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(name))
        train(tmp_path / name, *STATEFUL, f"trainer.seed={seed}")
    assert_same(weights(tmp_path / "a/last.ckpt"), weights(tmp_path / "b/last.ckpt"))
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert lines(tmp_path / "a") != lines(tmp_path / "c")


def test_accumulated_batches_equal_one_large_batch(tmp_path: Path) -> None:
    plain = ("optimizer=sgd", "optimizer.base_lr=0.05", "trainer.clip_grad=0.5")
    train(tmp_path / "large", *plain)
    small = ("trainer.batch_size=8", "trainer.accumulate=2", "trainer.limit_train_batches=12")
    train(tmp_path / "small", *plain, *small)
    large, small_weights = (weights(tmp_path / name / "last.ckpt") for name in ("large", "small"))
    for name, value in large.items():
        torch.testing.assert_close(small_weights[name], value, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_clipped_once_per_optimiser_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clipped = []
    original = Fabric.clip_gradients

    def count(*args: object, **options: object) -> object:
        clipped.append(options["max_norm"])
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Fabric, "clip_gradients", count)
    train(tmp_path / "run", "trainer.accumulate=3", "trainer.clip_grad=0.7")
    assert clipped == [0.7] * 4  # two epochs of six micro-batches


def test_the_best_epoch_is_kept_and_the_last_is_evaluated_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([40.0, 70.0, 60.0, 70.0])
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: {"loss": 1.0, "top1": next(scores), "top5": 90.0}
    )
    result = train(tmp_path / "run", "trainer.epochs=4")
    best, last = (checkpoint.load(tmp_path / "run" / f"{name}.ckpt") for name in ("best", "last"))
    assert result == {"loss": 1.0, "top1": 70.0, "top5": 90.0, "epoch": 2}
    assert (best["epoch"], last["epoch"]) == (2, 4)
    assert best["best"] == last["best"] == result


def test_evaluation_is_skipped_between_the_epochs_asked_for_but_never_at_the_end(
    tmp_path: Path,
) -> None:
    train(tmp_path / "run", "trainer.epochs=3", "trainer.eval_every=2")
    epochs = [record for record in lines(tmp_path / "run") if record["kind"] == "epoch"]
    assert ["val_top1" in record for record in epochs] == [False, True, True]


@pytest.mark.parametrize("file", ["best.ckpt", "last.ckpt"])
def test_evaluation_only_gives_the_figures_of_the_run(tmp_path: Path, file: str) -> None:
    train(tmp_path / "run", "trainer.ema_decay=0.5")
    epoch = checkpoint.load(tmp_path / "run" / file)["epoch"]
    again = ("eval_only=true", f"resume={tmp_path / 'run' / file}", "trainer.ema_decay=0.5")
    result = train(tmp_path / "evaluation", *again)
    expected = [line for line in lines(tmp_path / "run") if line["kind"] == "epoch"][epoch - 1]
    assert result["loss"] == pytest.approx(expected["val_loss"], rel=1e-6)
    assert result["top1"] == expected["val_top1"]
    assert not (tmp_path / "evaluation" / "last.ckpt").exists()


def test_fine_tuning_starts_from_the_weights_and_drops_a_classifier_of_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run")
    still = ("optimizer=sgd", "optimizer.base_lr=1e-30", "schedule=constant")
    other = ("data=synthetic", "data.num_classes=7", "data.train_size=100", "data.val_size=10")
    file = tmp_path / "run" / "best.ckpt"
    train(tmp_path / "tuned", *still, *other, f"finetune={file}")
    before, after = weights(file), weights(tmp_path / "tuned" / "last.ckpt")
    assert after["head.fc.weight"].shape[0] == 7
    body = {name for name in before if not name.startswith("head.fc")}
    assert_same({name: before[name] for name in body}, {name: after[name] for name in body})
    assert "head.fc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.window_size=5"], "model.window_size: None → 5"),
        (["trainer.epochs=1"], "trainer.epochs must exceed the 1 epochs"),
        (["trainer.ema_decay=0.9"], "trainer.ema_decay must be set if and only if"),
    ],
)
def test_resuming_with_other_settings_is_refused_with_the_difference(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    train(tmp_path / "run", "trainer.epochs=1")
    resume = f"resume={tmp_path / 'run' / 'last.ckpt'}"
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "again", *overrides, resume)
    assert list((tmp_path / "again").iterdir()) == []


def test_training_does_not_continue_from_weights_alone(tmp_path: Path) -> None:
    train(tmp_path / "run", "trainer.epochs=1")
    with pytest.raises(ConfigError, match=r"resume must name a last\.ckpt"):
        train(tmp_path / "again", f"resume={tmp_path / 'run' / 'best.ckpt'}")


def test_a_folder_that_holds_a_run_is_not_written_to(tmp_path: Path) -> None:
    train(tmp_path / "run", "trainer.epochs=1")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(compose(*OPTIONS), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.batch_size=2000"], "must not exceed the 1437 training images, got 2000"),
        (["model.num_heads=[1,3]"], "model focal_micro cannot be built: .*num_heads"),
        (
            # Neither the CPU nor Triton's interpreter can.
            ["model.attention_backend=triton", "trainer.precision=bf16-mixed"],
            r"model\.attention_backend: .*cannot run here",
        ),
        (["trainer.accelerator=cuda"], r"trainer\.accelerator=cuda .* cannot be had here"),
        (["trainer.precision=16-mixed"], r"trainer\.precision must be .* on a CPU"),
        (["finetune=nowhere.pth"], r"finetune: .*nowhere\.pth"),
        (["resume=nowhere.ckpt"], r"resume must name .*cannot read nowhere\.ckpt: no such file"),
    ],
)
def test_a_setting_that_does_not_suit_is_named_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    if "cuda" in overrides[0] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", *overrides)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the training loss is (nan|inf) at step"):
        train(tmp_path / "run", "optimizer=sgd", "optimizer.base_lr=1e30", "trainer.clip_grad=null")


@pytest.mark.parametrize("override", ["precision=bf16-mixed", "channels_last=true"])
def test_a_run_in_another_format_stays_close_to_the_plain_one(
    tmp_path: Path, override: str
) -> None:
    expected = train(tmp_path / "plain")["loss"]
    assert train(tmp_path / "other", f"trainer.{override}")["loss"] == pytest.approx(
        expected, rel=0.02
    )


def scaled_trainer(scale: float, *overrides: str) -> Trainer:
    """What Fabric makes for 16-mixed on a GPU, here with a scaler for the CPU."""
    config = compose(*OPTIONS, "trainer.clip_grad=1.0", *overrides)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=4)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    data = build(config.data)
    return Trainer(config, fabric=fabric, model=build_model(config.model, data, seed=0), data=data)


def test_a_loss_scaler_clips_after_unscaling_and_continues_with_its_scale(tmp_path: Path) -> None:
    first = scaled_trainer(2.0**10, "trainer.epochs=1")
    result = first.fit(tmp_path, Reporter(RunConsole(epochs=1, enabled=False), None))
    assert math.isfinite(result["loss"])
    content = checkpoint.load(tmp_path / "last.ckpt")
    assert content["scaler"]["scale"] == 2.0**11  # after four of six steps
    second = scaled_trainer(1.0)
    restore(second, content)
    assert second.fabric.strategy.precision.state_dict() == content["scaler"]


@pytest.mark.parametrize(
    ("able", "expected"), [({"avx512_bf16": True}, "bf16-mixed"), ({"avx2": True}, "32-true")]
)
def test_automatic_precision_is_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    settings = compose("trainer.precision=auto", "trainer.accelerator=cpu").trainer
    assert resolve_precision(settings) == expected
    asked = compose("trainer.precision=16-mixed").trainer
    assert resolve_precision(asked) == "16-mixed"


def test_any_timm_model_trains_as_a_baseline(tmp_path: Path) -> None:
    limits = ("trainer.epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1")
    config = compose(*SETTINGS, *limits, "model=timm", "model.name=test_resnet")
    (tmp_path / "run").mkdir()
    assert run(config, tmp_path / "run")["epoch"] == 1


def test_weights_and_biases_keeps_an_offline_run_in_the_run_folder_and_continues_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "run", "logger=wandb", "trainer.epochs=1")
    train(tmp_path / "run", "logger=wandb", f"resume={tmp_path / 'run'}")
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(parts) == 2
    assert len({part.name for part in parts}) == 1  # the id
    assert "wandb: " not in "".join(capfd.readouterr())
