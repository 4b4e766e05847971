"""Precision, memory format, compilation, checkpointing and averaging: that they are at work."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SETTINGS, TINY, assert_same, trainer
from torch import Tensor, nn

from conf import ConfigError, compose
from data import build
from training import checkpoint
from training.loop import Trainer
from training.model import build_model
from training.summary import summarize

OPTIONS = (
    *TINY,
    "trainer.epochs=1",
    "trainer.batch_size=8",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
)
train = trainer(OPTIONS)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """The images and the logits of every forward pass of a run."""
    calls: list[tuple[Tensor, Tensor]] = []

    def watched(*arguments: Any, **options: Any) -> nn.Module:
        model = build_model(*arguments, **options)
        model.register_forward_hook(lambda _, images, logits: calls.append((images[0], logits)))
        return model

    monkeypatch.setattr(import_module("training.run"), "build_model", watched)
    return calls


@pytest.mark.parametrize("override", ["32-true", "bf16-mixed"])
def test_products_are_computed_in_the_precision_asked_for(
    tmp_path: Path, seen: list[tuple[Tensor, Tensor]], override: str
) -> None:
    train(tmp_path / "run", f"trainer.precision={override}")
    training, evaluation = seen[1][1], seen[-1][1]  # the first call is the summary's
    expected = torch.bfloat16 if override == "bf16-mixed" else torch.float32
    assert training.dtype == evaluation.dtype == expected
    weights = checkpoint.load(tmp_path / "run" / "last.ckpt")["model"].values()
    assert {value.dtype for value in weights if value.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("override", [True, False])
def test_images_have_the_memory_format_asked_for(
    tmp_path: Path, seen: list[tuple[Tensor, Tensor]], override: bool
) -> None:
    train(tmp_path / "run", f"trainer.channels_last={override}")
    images = seen[1][0]
    assert images.is_contiguous(memory_format=torch.channels_last) == override


def test_training_and_evaluation_run_the_compiled_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(torch.is_grad_enabled())
        return graph.forward  # as the default one, without minutes of a C++ compiler

    original = nn.Module.compile
    modes = []

    def compile_with_backend(self: nn.Module, *, mode: str) -> None:
        modes.append(mode)
        original(self, backend=backend)

    monkeypatch.setattr(nn.Module, "compile", compile_with_backend)
    model = ("model.depths=[1]", "model.num_heads=[1]", "model.region_sizes=[5]")
    plain = train(tmp_path / "plain", *model)
    assert not graphs
    options = ("trainer.compile=true", "trainer.compile_mode=reduce-overhead")
    compiled = train(tmp_path / "compiled", *model, *options)
    assert modes == ["reduce-overhead"]
    assert sorted(graphs) == [False, True]  # the whole model as one graph, in either mode
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    states = (checkpoint.load(tmp_path / n / "last.ckpt")["model"] for n in ("plain", "compiled"))
    assert next(states).keys() == next(states).keys()


@pytest.mark.parametrize(
    "model", [("model=focal_micro",), ("model=swin_tiny", "+model.kwargs.depths=[1,1,1,1]")]
)
def test_checkpointing_keeps_less_for_backward(model: tuple[str, ...]) -> None:
    kept = []
    for checkpointing in (False, True):
        options = (
            *SETTINGS,
            *model,
            "data.img_size=56",
            f"model.grad_checkpointing={checkpointing}",
        )
        config = compose(*options)
        built = build_model(config.model, build(config.data), seed=0)
        parts = summarize(built, (2, 3, 56, 56), device=torch.device("cpu"))
        kept.append(sum(part.kept for part in parts))
    assert kept[1] < kept[0] / 2


def test_a_model_without_checkpointing_says_so() -> None:
    config = compose("model=timm", "model.name=dla46x_c", "model.grad_checkpointing=true")
    with pytest.raises(ConfigError, match="dla46x_c cannot be built: gradient checkpointing"):
        build_model(config.model, build(config.data), seed=0)


def test_the_moving_average_is_that_of_the_weights_after_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average: dict[str, Tensor] = {}
    original = Trainer._optimizer_step

    def step(self: Trainer, batches: Any) -> Tensor | None:
        if not average:
            average.update({k: v.clone() for k, v in self.model.named_parameters()})
        norm = original(self, batches)
        for name, value in self.model.named_parameters():
            average[name] = 0.7 * average[name] + 0.3 * value.detach()
        return norm

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    train(tmp_path / "run", "trainer.ema_decay=0.7", "optimizer.base_lr=1e-2")
    last = checkpoint.load(tmp_path / "run" / "last.ckpt")
    for name, value in average.items():
        torch.testing.assert_close(last["ema"][name], value)
        assert not torch.equal(last["model"][name], value)
    assert_same(checkpoint.load(tmp_path / "run" / "best.ckpt")["model"], last["ema"])
