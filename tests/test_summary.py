"""The table of parameters, multiply-adds and memory by stage."""

from io import StringIO
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  registers the variants
from conf import compose
from data import build
from models.layers import Mlp
from training import run
from training.model import build_model
from training.summary import Part, summarize, summary

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "img_size": 56,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "region_sizes": (5, 3),
    "num_classes": 10,
}


class Staged(nn.Module):
    """Two stages, and linear layers before, between and after them, described as timm does."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"module": "act"}, {"module": "stages.0"}, {"module": "stages.2"}]
        self.embed = nn.Linear(4, 8)
        self.act = nn.Identity()
        self.stages = nn.Sequential(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
            nn.Linear(8, 8, bias=False),
            nn.Sequential(nn.Linear(8, 6), nn.ReLU()),
        )
        self.fc = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stages(self.act(self.embed(x.flatten(1)))))


def whole(parts: list[Part]) -> Part:
    return Part(
        "all", *(sum(getattr(p, k) for p in parts) for k in ("parameters", "flops", "kept"))
    )


def test_every_figure_by_hand():
    parts = summarize(Staged(), (2, 4, 1, 1), device=CPU)
    # A linear layer keeps its input, a ReLU its output, which is the next layer's input: once.
    assert parts == [
        Part("stem", 4 * 8 + 8, 2 * 2 * 4 * 8, 4 * 2 * 4),
        Part("stages.0", 8 * 8 + 8 + 8 * 8, 2 * 2 * (8 * 8 + 8 * 8), 4 * 2 * (8 + 8)),
        Part("stages.2", 8 * 6 + 6, 2 * 2 * 8 * 6, 4 * 2 * (8 + 6)),
        Part("head", 6 * 3, 2 * 2 * 6 * 3, 0),
    ]


def test_a_model_without_known_stages_is_one_part():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert summarize(model, (5, 4, 1, 1), device=CPU) == [Part("model", 15, 2 * 5 * 4 * 3, 80)]


def test_layers_that_compute_in_parts_are_counted_as_the_products_they_are():
    with FlopCounterMode(display=False) as counter:
        Mlp(8, 16)(torch.randn(3, 5, 8, requires_grad=True))
    assert counter.get_total_flops() == 2 * 2 * 15 * 8 * 16


@pytest.mark.parametrize("name", ["focal_micro", "resnet18"])
def test_the_model_stays_as_it_is(name: str):
    model = timm.create_model(name, **(SMALL if name == "focal_micro" else {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = summarize(model, (2, 3, 56, 56), device=CPU)
    assert whole(parts).parameters == sum(value.numel() for value in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model(torch.zeros(2, 3, 56, 56)).isfinite().all()


def test_checkpointing_and_16_bits_keep_less_and_compute_the_same():
    plain, saving, half = (
        whole(
            summarize(
                timm.create_model("focal_micro", **SMALL, grad_checkpointing=checkpointing),
                (2, 3, 56, 56),
                device=CPU,
                dtype=dtype,
            )
        )
        for checkpointing, dtype in (
            (False, torch.float32),
            (True, torch.float32),
            (False, torch.bfloat16),
        )
    )
    assert plain.flops == saving.flops == half.flops > 0
    assert saving.kept < plain.kept / 2
    assert half.kept < plain.kept


def test_what_is_kept_on_a_gpu_is_counted_without_one():
    model = timm.create_model("focal_micro", **SMALL)
    on_cpu, on_gpu = (
        whole(summarize(model, (2, 3, 56, 56), device=torch.device(kind)))
        for kind in ("cpu", "cuda")
    )
    assert on_gpu.flops == on_cpu.flops
    assert on_gpu.kept != on_cpu.kept  # there the MLP keeps its activations


def test_a_model_that_looks_at_values_gets_a_line_instead():
    class Looks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1) * float(x.sum()))

    config = compose("model=focal_micro", "data=synthetic", "data.img_size=8")
    text = summary(config, Looks(192, 10), build(config.data), device=CPU, precision="32-true")
    assert isinstance(text, str)
    assert text.startswith("no table of focal_micro by stage: ")


def test_the_table_tells_multiply_adds_and_what_does_not_depend_on_the_batch():
    options = ("model=timm", "model.name=resnet18", "data=synthetic", "data.img_size=224")
    config = compose(*options, "trainer.batch_size=2", "trainer.ema_decay=0.9")
    data = build(config.data)
    model = build_model(config.model, data, seed=0)
    console = Console(width=120, file=StringIO(), record=True)
    console.print(summary(config, model, data, device=CPU, precision="32-true"), markup=False)
    text = console.export_text()
    assert "11.69 M" in text  # torchvision's and timm's tables: 11.69 M, 1.8 G
    assert "1.81 G" in text
    # Weights, their average, gradients and AdamW's two moments: 5 · 11.69 M · 4 bytes.
    assert "beside it 223." in text


def test_a_run_shows_it_before_the_first_step(tmp_path, capsys):
    options = ("model=focal_micro", "model.depths=[1,1]", "model.num_heads=[1,2]")
    options += ("model.region_sizes=[5,3]", "data.img_size=28", "logger=none")
    options += ("trainer.epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1")
    options += ("schedule.warmup_epochs=0", "trainer.accelerator=cpu")
    run(compose(*options), tmp_path)
    text = capsys.readouterr().out
    assert text.index("results in") < text.index("layers.1") < text.index("step 1/1")
