"""Not-a-number stops, distillation and the profiler."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from runs import TINY, trainer
from safetensors.torch import load_file, save_file

from conf import ConfigError, compose
from conf.schema import DistillationConfig
from data import build
from training import checkpoint
from training.distillation import Teacher
from training.loop import Trainer

OPTIONS = (
    *TINY,
    "trainer.epochs=1",
    "trainer.batch_size=8",
    "trainer.limit_train_batches=8",
    "trainer.limit_val_batches=1",
)
train = trainer(OPTIONS)


def test_a_batch_whose_loss_is_not_finite_is_saved_as_the_model_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Trainer._micro_batch

    def watch(self: Trainer, batches: object, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = original(self, batches, position)  # type: ignore[arg-type]
        seen.append(batch)
        if position == 5:  # the second half of step 3: with weights so large the loss is not finite
            for parameter in self.model.parameters():
                parameter.data.fill_(1e30)
        return batch

    monkeypatch.setattr(Trainer, "_micro_batch", watch)
    options = ("trainer.accumulate=2", "trainer.mixup=0.8", "trainer.log_every=4")
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 3; its batch is in (.*);"):
        train(tmp_path / "run", *options)
    saved = load_file(tmp_path / "run" / "bad_batch_step_3_rank_0.safetensors")
    assert torch.equal(saved["images"], seen[5][0])
    assert torch.equal(saved["targets"], seen[5][1])


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._optimizer_step

    def spoil(self: Trainer, batches: object) -> torch.Tensor | None:
        norm = original(self, batches)  # type: ignore[arg-type]
        if self.step == 3:  # after the loss of step 4
            next(self.model.parameters()).data.view(-1)[0] = float("nan")
        return norm

    monkeypatch.setattr(Trainer, "_optimizer_step", spoil)
    with pytest.raises(FloatingPointError, match="a weight is not finite at step 4; its batch is"):
        train(tmp_path / "run", "trainer.checkpoint_every=1")
    assert checkpoint.load(tmp_path / "run" / "last.ckpt")["step"] == 3
    assert (tmp_path / "run" / "bad_batch_step_4_rank_0.safetensors").is_file()


def teacher_file(path: Path, *, classes: int = 10) -> Path:
    torch.manual_seed(1)
    save_file(timm.create_model("test_resnet", num_classes=classes).state_dict(), path)
    return path


def test_the_distillation_loss_is_the_weighted_sum_of_labels_and_softened_predictions(
    tmp_path: Path,
) -> None:
    config = DistillationConfig(
        teacher="test_resnet",
        weights=str(teacher_file(tmp_path / "teacher.safetensors")),
        temperature=3.0,
        alpha=0.3,
    )
    teacher = Teacher(config, build(compose(*OPTIONS).data))
    images, logits = torch.randn(4, 3, 28, 28), torch.randn(4, 10, requires_grad=True)
    label_loss = torch.tensor(2.0)
    with torch.no_grad():
        wanted = torch.softmax(teacher.model(images).double() / 3, 1)
    given = torch.log_softmax(logits.double() / 3, 1)
    divergence = F.kl_div(given, wanted, reduction="batchmean")
    loss = teacher.loss(logits, teacher(images), label_loss)
    assert loss.item() == pytest.approx(0.7 * 2 + 0.3 * 9 * divergence.item(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert all(not parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.model.training


def test_a_run_learns_from_a_teacher_and_keeps_it_out_of_its_checkpoints(tmp_path: Path) -> None:
    file = teacher_file(tmp_path / "teacher.safetensors")
    taught = ("distillation.teacher=test_resnet", f"distillation.weights={file}")
    train(tmp_path / "plain")
    train(tmp_path / "none", *taught, "distillation.alpha=0")
    train(tmp_path / "taught", *taught, "distillation.alpha=0.9")
    plain, none, other = (
        checkpoint.load(tmp_path / name / "last.ckpt") for name in ("plain", "none", "taught")
    )
    assert plain["model"].keys() == other["model"].keys()
    name = "head.fc.weight"
    assert torch.equal(plain["model"][name], none["model"][name])
    assert not torch.equal(plain["model"][name], other["model"][name])


def test_the_best_checkpoint_of_a_run_can_be_the_teacher(tmp_path: Path) -> None:
    train(tmp_path / "run")
    names = ("depths=[1,1]", "num_heads=[1,2]", "region_sizes=[5,3]")
    options = [f"+distillation.kwargs.{name}" for name in names]
    file = f"distillation.weights={tmp_path / 'run' / 'best.ckpt'}"
    train(tmp_path / "taught", "distillation.teacher=focal_micro", file, *options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distillation.teacher=test_resnet"], r"distillation\.weights must be set if and only if"),
        (["distillation.alpha=1.5"], r"distillation\.alpha must lie between 0 and 1, got 1\.5"),
        (["distillation.temperature=0"], r"distillation\.temperature must be positive, got 0"),
        (["trainer.profile=0"], r"trainer\.profile must be positive, got 0"),
        (["trainer.profile=6"], r"trainer\.profile must leave 3 of the run's 8 .* got 6"),
        (
            ["distillation.teacher=none_such", "distillation.weights=x.pth"],
            r"distillation\.teacher=none_such cannot be built",
        ),
        (
            ["distillation.teacher=test_resnet", "distillation.weights=nowhere.pth"],
            r"distillation\.weights=nowhere\.pth",
        ),
        (
            ["finetune=a.pth", "resume=b.ckpt"],
            "finetune must be unset when resume is set to a file",
        ),
        (["eval_only=true", "resume=auto"], "resume must name a folder or a file when eval_only"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    file = teacher_file(tmp_path / "teacher.safetensors", classes=7)
    with pytest.raises(ConfigError, match=r"(?s)distillation\.weights=.*size mismatch"):
        train(tmp_path / "run", "distillation.teacher=test_resnet", f"distillation.weights={file}")


def test_the_profiler_writes_a_chrome_trace_of_the_steps_asked_for_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "plain")
    train(tmp_path / "traced", "trainer.profile=2")
    path = tmp_path / "traced" / "trace.json"
    assert f"trace of 2 steps in {path}" in capsys.readouterr().out
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert any("addmm" in name or "linear" in name for name in names)
    one, other = (checkpoint.load(tmp_path / name / "last.ckpt") for name in ("plain", "traced"))
    assert torch.equal(one["model"]["head.fc.weight"], other["model"]["head.fc.weight"])
