"""Operators that a compiler takes as they are on a CPU, with gradients.

Inductor takes oneDNN for constant weights alone, writes whole hidden maps, and its code for a
LayerNorm and for sums over tokens is slower than PyTorch's own (docs/decisions.md has the times).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.products import linear_gradients, mlp, mlp_gradients, part_size, product

__all__ = ["opaque_layer_norm", "opaque_linear", "opaque_mlp"]


@torch.library.custom_op("focal::cpu_linear", mutates_args=())
def opaque_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` by `product`."""
    return product(x, weight, bias)


@opaque_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


@torch.library.custom_op("focal::cpu_linear_backward", mutates_args=())
def _linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    """Those that are wanted of `linear_gradients`."""
    found = linear_gradients(grad, x, weight, wanted)
    return [gradient for gradient in found if gradient is not None]


@_linear_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [grad.new_empty(shape) for shape, want in zip(shapes, wanted, strict=True) if want]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad)
    found = iter(_linear_gradients(grad, x, weight, wanted))
    return tuple(next(found) if want else None for want in wanted)


opaque_linear.register_autograd(_linear_backward, setup_context=_save_linear)


def _call_mlp(x: Tensor, weight1: Tensor, *rest: Any) -> Tensor:
    *others, keep = rest
    pieces = 0
    if keep:
        rows = x.shape[0]
        symbolic = isinstance(rows, torch.SymInt)
        pieces = 1 if symbolic else max(-(-rows // part_size(rows, weight1.shape[0])), 1)
    return _mlp(x, weight1, *others, pieces)[0]


# The call is a composite operator, which runs as well while a graph is made of it. Only there is it
# known whether a size is a number: how many tensors an operator gives must not follow from symbols.
torch.library.define(
    "focal::cpu_mlp",
    "(Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, bool keep) -> Tensor",
)
torch.library.impl("focal::cpu_mlp", "CompositeImplicitAutograd", _call_mlp)


def opaque_mlp(x: Tensor, weights: Sequence[Tensor], *, keep: bool) -> Tensor:
    """`mlp`; ``keep`` for a gradient."""
    return torch.ops.focal.cpu_mlp(x, *weights, keep)


@torch.library.custom_op("focal::cpu_mlp_pieces", mutates_args=())
def _mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, pieces: int
) -> list[Tensor]:
    """`mlp`, and what it kept in so many pieces: as many as parts, one, or none."""
    weights, size = (weight1, bias1, weight2, bias2), part_size(len(x), len(weight1))
    out, hidden = mlp(x, weights, size, keep=pieces > 0)
    return [out, torch.cat(hidden)] if len(hidden) > pieces else [out, *hidden]


@_mlp.register_fake
def _(x: Tensor, weight1: Tensor, *rest: Any) -> list[Tensor]:
    *_, pieces = rest
    rows, width = x.shape[0], weight1.shape[0]
    counts = [rows] * pieces  # one or none
    if pieces > 1:
        counts = [len(part) for part in x.split(part_size(rows, width))]
    return [torch.empty_like(x), *(x.new_empty(count, width) for count in counts)]


@torch.library.custom_op("focal::cpu_mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, pieces: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = part_size(len(x), len(weight1))
    hidden = pieces[0].split(size) if len(pieces) == 1 else pieces
    return mlp_gradients(grad, x, weight1, weight2, hidden, size)


@_mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, pieces: Sequence[Tensor]) -> tuple:
    biases = (x.new_empty(weight.shape[0]) for weight in (weight1, weight2))
    weights = (torch.empty_like(weight) for weight in (weight1, weight2))
    (grad1, grad2), (sum1, sum2) = weights, biases
    return torch.empty_like(x), grad1, sum1, grad2, sum2


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight1, _, weight2, _, ctx.pieces = inputs
    _, *hidden = output
    ctx.save_for_backward(x, weight1, weight2, *hidden)
    ctx.mark_non_differentiable(*hidden)
    ctx.set_materialize_grads(False)


def _backward_mlp(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad, *_ = grads
    if grad is None:
        return (None,) * 6
    if not ctx.pieces:
        raise RuntimeError("focal::cpu_mlp was called with keep=False: it has no gradient")
    x, weight1, weight2, *hidden = ctx.saved_tensors
    return *_mlp_backward(grad, x, weight1, weight2, hidden), None


_mlp.register_autograd(_backward_mlp, setup_context=_save_mlp)


@torch.library.custom_op("focal::cpu_layer_norm", mutates_args=())
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and the mean and the reciprocal deviation of every row."""
    return torch.native_layer_norm(x, weight.shape, weight, bias, eps)


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    of_rows = (*x.shape[:-1], 1)
    return x.new_empty(x.shape), x.new_empty(of_rows), x.new_empty(of_rows)


@torch.library.custom_op("focal::cpu_layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, deviation: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, mean, deviation, weight, bias, [True] * 3
    )


@_layer_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    *_, weight, bias = rest
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(bias)


def _save_layer_norm(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_layer_norm(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    return *_layer_norm_backward(grad, *ctx.saved_tensors), None


_layer_norm.register_autograd(_backward_layer_norm, setup_context=_save_layer_norm)


def opaque_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension."""
    return _layer_norm(x, weight, bias, eps)[0]
