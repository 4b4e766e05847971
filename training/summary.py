"""Parameters, FLOPs and memory of a model by stage, counted on shapes alone before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from conf.schema import AdamWConfig, Config
from data import ImageData
from training.model import COMPUTE_DTYPES

STEM, HEAD, WHOLE = "stem", "head", "model"


@dataclass
class Part:
    """What a part of a model has and costs.

    Attributes:
        name: A stage's module, or what comes before the first or after the last one.
        parameters: Their number.
        flops: Of a forward pass over the batch; a multiply-add is two.
        kept: Bytes that this pass keeps for backward.
    """

    name: str
    parameters: int = 0
    flops: int = 0
    kept: int = 0


class _Counter:
    """Counts into the part that is being computed."""

    def __init__(self, parts: list[Part], own: set[int]) -> None:
        self.parts = {part.name: part for part in parts}
        self.current = parts[0]
        self.flops = FlopCounterMode(display=False)
        self._own = own  # storages of parameters and buffers
        self._seen: dict[int, Tensor] = {}  # by storage; a tensor held keeps its key unique
        self._counted = 0

    def enter(self, name: str) -> None:
        """What comes from here on belongs to the part `name`."""
        total = self.flops.get_total_flops()
        self.current.flops += total - self._counted
        self._counted = total
        self.current = self.parts[name]

    def save(self, tensor: Tensor) -> Tensor:
        """Autograd keeps `tensor`."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._seen:
            self._seen[storage._cdata] = tensor
            self.current.kept += storage.nbytes()
        return tensor


def stage_names(model: nn.Module) -> list[str]:
    """The modules with parameters that timm's `feature_info` calls stages; none without it."""
    infos: Any = getattr(model, "feature_info", None)
    names = [info.get("module") for info in infos] if isinstance(infos, list) else []
    modules = dict(model.named_modules())
    names = [name for name in names if name in modules]
    return [name for name in names if any(True for _ in modules[name].parameters())]


def summarize(
    model: nn.Module,
    batch_shape: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> list[Part]:
    """Count a forward pass of training by stage, without computing it.

    Products alone count as FLOPs, as in PyTorch's counter. What is kept for backward is what
    autograd saves, each storage once, in the part that saves it first.

    Args:
        model: In training mode, not compiled and not wrapped; it stays as it is.
        batch_shape: `[batch, channels, height, width]`.
        device: Where the model will run, which decides how attention is done.
        dtype: What products are computed in; below float32 by autocast.

    Returns:
        The stem, the stages and the head; the whole model where timm names no stages.
    """
    stages = stage_names(model)
    parts = [Part(name) for name in ([STEM, *stages, HEAD] if stages else [WHOLE])]
    _count_parameters(model, parts, stages)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        tensors: dict[int, Any] = {id(value): _fake(value, device) for value in _tensors(model)}
        counter = _Counter(parts, {value.untyped_storage()._cdata for value in tensors.values()})
        fake = deepcopy(model, tensors)  # with these in the place of its own
        for stage in stages:
            fake.get_submodule(stage).register_forward_pre_hook(
                lambda *_, name=stage: counter.enter(name)
            )
        if stages:
            fake.get_submodule(stages[-1]).register_forward_hook(lambda *_: counter.enter(HEAD))
        stack.enter_context(saved_tensors_hooks(counter.save, lambda tensor: tensor))
        stack.enter_context(torch.autocast(device.type, dtype, enabled=dtype != torch.float32))
        stack.enter_context(counter.flops)
        fake(torch.empty(*batch_shape, device=device))
        counter.enter(parts[-1].name)
    return parts


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _fake(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor without values of the same kind, shape and strides on `device`."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _count_parameters(model: nn.Module, parts: list[Part], stages: list[str]) -> None:
    """Give every parameter to its stage, or the one before it, or to the stem or the head."""
    by_name = {part.name: part for part in parts}
    place = parts[0]
    for name, parameter in model.named_parameters():
        owner = next((stage for stage in stages if name.startswith(f"{stage}.")), None)
        if owner is not None:
            place = by_name[owner]
        elif stages and place.name == stages[-1]:
            place = parts[-1]
        place.parameters += parameter.numel()


def summary(
    config: Config, model: nn.Module, data: ImageData, *, device: torch.device, precision: str
) -> Table | str:
    """What a run prints of its model: a table, or a line that says why there is none.

    Args:
        config: The run's configuration.
        model: The model, not yet compiled or wrapped.
        data: What it is trained on.
        device: Where it will run.
        precision: Fabric's name of the precision.
    """
    settings = config.trainer
    shape = (settings.batch_size, data.in_chans, data.img_size, data.img_size)
    model.train(not settings.freeze_backbone)
    try:
        parts = summarize(model, shape, device=device, dtype=COMPUTE_DTYPES[precision])
    except Exception as error:  # as a forward pass that looks at values: the model trains anyhow
        return f"no table of {config.model.name} by stage: {type(error).__name__}: {error}"
    table = Table(title=config.model.name, title_justify="left", caption_justify="left")
    table.caption = (
        f"beside it {_fixed(config, model) / 2**20:.1f} MiB of weights, gradients, optimiser state"
    )
    table.add_column("part")
    for column in (
        "parameters",
        "multiply-adds an image",
        f"kept for backward, {settings.batch_size} images",
    ):
        table.add_column(column, justify="right")
    whole = Part("all")
    for part in parts:
        whole.parameters += part.parameters
        whole.flops += part.flops
        whole.kept += part.kept
    for part in (*parts, whole):
        table.add_row(
            part.name,
            f"{part.parameters / 1e6:.2f} M",
            f"{part.flops / 2 / settings.batch_size / 1e9:.2f} G",
            f"{part.kept / 2**20:.1f} MiB",
            end_section=part is parts[-1],
        )
    return table


def _fixed(config: Config, model: nn.Module) -> int:
    """Bytes of one process that do not depend on the batch, without sharding."""
    trained = sum(value.nbytes for value in model.parameters() if value.requires_grad)
    weights = sum(value.nbytes for value in _tensors(model))
    states = 2 if isinstance(config.optimizer, AdamWConfig) else 1
    averages = 0 if config.trainer.ema_decay is None else 1
    return weights * (1 + averages) + trained * (1 + states)
