"""Fully sharded data parallelism: every process keeps a part of each parameter.

PyTorch's `fully_shard` makes parameters `DTensor`s cut along their first dimension; the parameters
of one block at a time are gathered for its forward and backward. What is read from a checkpoint or
written to `best.ckpt` is whole: `full` and `placed` go from one form to the other.
"""

from typing import Any

import torch
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_model(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard `model` in place over all processes of `mesh`.

    Blocks are gathered one at a time: what a `Sequential` or `ModuleList` repeats, if it has
    several layers, as in Focal Transformers, Swin, ViT and ResNet.
    """
    flat = init_device_mesh(mesh.device_type, (mesh.size(),))
    for module in reversed(list(model.modules())):  # inner ones first
        if isinstance(module, nn.Sequential | nn.ModuleList):
            children = list(module)
            if len({type(child) for child in children}) == 1 and _has_layers(children[0]):
                for child in children:
                    fully_shard(child, mesh=flat)
    fully_shard(model, mesh=flat)
    return model


def _has_layers(module: nn.Module) -> bool:
    return sum(isinstance(part, nn.Linear | nn.Conv2d) for part in module.modules()) > 1


def fsdp_strategy() -> ModelParallelStrategy:
    """Fabric's strategy that shards what it sets up."""
    return ModelParallelStrategy(shard_model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was applied to `model`."""
    return isinstance(model, FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of `tensor`; all of it where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of a state dictionary; all processes must call it."""
    return {
        name: value.full_tensor().cpu() if isinstance(value, DTensor) else value
        for name, value in state.items()
    }


def placed(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The whole tensor `value`, which every process has, sharded as `target` is."""
    if not isinstance(target, DTensor):
        return value
    mesh = target.device_mesh
    # Each process takes its part of its own copy: nothing is sent.
    return distribute_tensor(
        value.to(mesh.device_type), mesh, target.placements, src_data_rank=None
    )


def load_model(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """`model.load_state_dict` with whole tensors, sharded or not."""
    target = model.state_dict()
    model.load_state_dict(
        {
            name: placed(value, target[name]) if name in target else value
            for name, value in state.items()
        }
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` with whole tensors, sharded or not."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    states = {
        index: {
            name: placed(value, parameters[index])
            if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first, as DDP does: running means of BatchNorm."""
    for buffer in model.buffers():
        torch.distributed.broadcast(buffer, 0)
