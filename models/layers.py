"""Convolutional embeddings and the MLP of the Focal Transformer.

Paper: Focal Self-attention for Local-Global Interactions in Vision Transformers (NeurIPS 2021,
arXiv 2107.00641), section 3.1. Origin: written from the paper; the MLP's parameters are named as
timm's. What differs: feature maps stay NHWC between blocks and any input size is
accepted, where the released code takes one size alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

__all__ = ["ConvEmbed", "Linear", "Mlp", "part_size", "runs_eagerly_on_cpu"]

# What one part of a batch should hold in its widest map, in elements: 4 MiB in float32. And rows
# enough for a matrix product to be efficient.
PART_SIZE = 2**20
PART_ROWS = 512

# With AVX-512 oneDNN is 10 to 20 % faster in float32, at the shapes of these models, than the BLAS
# that `torch.nn.functional.linear` takes; without, it is as fast or slower.
_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    else None
)


def part_size(rows: int, width: int, *, unit: int = 1, size: int = PART_SIZE) -> int:
    """Rows to take at a time so that a map of that width stays in the cache.

    A map of a whole batch does not: written and read once it costs memory traffic, and as a fresh
    allocation a page fault per 4 KiB, which on a CPU can take as long as the product that fills it.

    Args:
        rows: All rows.
        width: Elements of a row.
        unit: Rows that stay together.
        size: Elements that a part may have.
    """
    largest = max(size // width, PART_ROWS) // unit * unit
    count = -(-rows // max(largest, unit))
    return max(-(-rows // (count * unit)) * unit, unit) if rows else unit


def _onednn(x: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's product, where that is to be taken."""
    return _ONEDNN_LINEAR if x.dtype == weight.dtype == torch.float32 else None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, without a gradient; ``weight`` may be transposed.

    ``out``, of the result's shape, may take the result: the BLAS writes there, oneDNN to memory of
    its own.
    """
    onednn = _onednn(x, weight)
    if onednn is not None:
        return onednn(x, weight, bias, "none", [], "")
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


if _ONEDNN_LINEAR is not None:

    @register_flop_formula(_ONEDNN_LINEAR)
    def _(x_shape: Sequence[int], weight_shape: Sequence[int], *rest: Any, **shapes: Any) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


@torch.library.custom_op("focal::cpu_linear", mutates_args=())
def _opaque_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`_product` for a compiler, which knows oneDNN's for constant weights alone."""
    return _product(x, weight, bias)


@_opaque_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _linear_gradients(
    ctx: Any, grad: Tensor, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias, as far as they are wanted."""
    x, weight = ctx.saved_tensors
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    return (
        product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None,
        rows.t() @ inputs if ctx.needs_input_grad[1] else None,
        rows.sum(dim=0) if ctx.needs_input_grad[2] else None,
    )


_opaque_product.register_autograd(
    partial(_linear_gradients, product=_opaque_product), setup_context=_save_linear
)


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether to work in parts: a compiler plans memory itself, a GPU wants large products."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class ConvEmbed(nn.Module):
    """A strided convolution and a LayerNorm: the patch embedding, and each stage's downsampling.

    Without ``overlap`` the patches tile the map, and rows or columns at the right and bottom that
    do not fill a patch are left out, as in the released code (a 7×7 map becomes 3×3). With
    ``overlap`` (the released "conv embedding") the kernel is ``2 * stride - 1`` and the padding
    ``stride // 2``: 7×7 stride 4 for the image, 3×3 stride 2 between stages.

    Args:
        in_chans: Channels in.
        out_chans: Channels out.
        stride: Side of a patch.
        overlap: Let neighbouring patches overlap.
        norm: Follow the convolution by a LayerNorm.
        channels_last: The input is NHWC, not NCHW. The output is NHWC in both cases.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        *,
        stride: int,
        overlap: bool = False,
        norm: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        kernel, padding = (2 * stride - 1, stride // 2) if overlap else (stride, 0)
        self.proj = nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(out_chans) if norm else nn.Identity()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns made from ``height × width``; 0 where the map is too small."""
        kernel, stride, padding = (
            int(x[0]) for x in (self.proj.kernel_size, self.proj.stride, self.proj.padding)
        )
        rows, cols = (
            max((x + 2 * int(padding) - kernel) // stride + 1, 0) for x in (height, width)
        )
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: `[batch, height, width, in_chans]`, or `[batch, in_chans, height, width]`.

        Returns:
            `[batch, rows, cols, out_chans]`.

        Raises:
            ValueError: The map is smaller than one patch.
        """
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        else:  # the output's layout is the input's, and NHWC is wanted
            x = x.contiguous(memory_format=torch.channels_last)
        height, width = x.shape[2:]
        if 0 in self.output_size(height, width):
            raise ValueError(
                f"the input must be large enough for every stage: a {height} by {width} map does "
                f"not hold one patch of side {self.proj.stride[0]}"
            )
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def _is_exact(x: Tensor) -> bool:
    """Whether sums over parts are as good as one sum: they are not in 16 bits."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """A linear layer that uses the fastest product a CPU has."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if x.device.type != "cpu" or not _is_exact(x) or torch.compiler.is_exporting():
            return super().forward(x)  # an exported graph has operators that others know
        if torch.compiler.is_compiling():
            return _opaque_product(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _LinearFunction.apply(x, self.weight, self.bias)
        return _product(x, self.weight, self.bias)


class _LinearFunction(torch.autograd.Function):
    """`_product` with a gradient, whose product with the weights is `_product` as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _linear_gradients(ctx, grad, _product)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, computed a few tokens at a time on a CPU.

    There the hidden map, the widest of the model, never exists as a whole without a gradient; with
    one, its values before the activation are kept and those after it are computed again.

    Args:
        dim: Channels in and out.
        hidden_dim: Channels between.
        drop: Dropout after either layer.
    """

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = Linear(hidden_dim, dim)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to the same shape."""
        drops = self.training and self.drop1.p > 0.0
        if x.device.type != "cpu" or torch.compiler.is_exporting() or drops:
            return self._whole(x)
        direct = _is_exact(x) and _is_plain(self.fc1) and _is_plain(self.fc2)
        tokens = x.flatten(0, -2)
        if torch.compiler.is_compiling():
            if not direct:
                return self._whole(x)
            tensors = (tokens, *self._weights())
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            return _opaque_mlp(*tensors, keep)[0].view(x.shape)
        if torch.is_grad_enabled():
            if not direct:
                return self._whole(x)
            return _PartwiseMlp.apply(tokens, *self._weights()).view(x.shape)
        size = part_size(len(tokens), self.fc1.out_features)
        if direct:
            return _mlp(tokens, self._weights(), size, keep=False)[0].view(x.shape)
        return torch.cat([self._whole(part) for part in tokens.split(size)]).view(x.shape)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias

    def _whole(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weights: not replaced, not watched by hooks."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks)
    return type(layer) is Linear and not any(hooks) and not layer._backward_pre_hooks


class _PartwiseMlp(torch.autograd.Function):
    """`_mlp` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.size = part_size(len(x), len(weights[0]))
        out, hidden = _mlp(x, weights, ctx.size, keep=True)
        ctx.save_for_backward(x, weights[0], weights[2], *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight1, weight2, *hidden = ctx.saved_tensors
        return _mlp_gradients(grad, x, weight1, weight2, hidden, ctx.size)


def _mlp(
    x: Tensor, weights: Sequence[Tensor], size: int, *, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """``gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂`` for `[tokens, dim]`, ``size`` tokens at a time.

    Returns:
        `[tokens, dim]`, and each part's values before the activation, `[part, hidden]`; without
        ``keep`` none. A piece for each part: the system's allocator takes what is larger than 32
        MiB from the kernel each time, which clears every page of it.
    """
    weight1, bias1, weight2, bias2 = weights
    out, hidden = torch.empty_like(x), []
    memory = x.new_empty(size, len(weight1))  # in the cache after the first part
    for part, result in zip(x.split(size), out.split(size), strict=True):
        active = memory[: len(part)]
        if keep:
            hidden.append(_product(part, weight1, bias1))
            torch.ops.aten.gelu.out(hidden[-1], out=active)
        else:
            active = _activated_product(part, weight1, bias1, active)
        _put(_product(active, weight2, bias2, result), result)
    return out, hidden


def _activated_product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``gelu(x Wᵀ + b)``; ``out`` as for `_product`."""
    onednn = _onednn(x, weight)
    if onednn is not None:  # the activation of a number while it is in a register
        return onednn(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu.out(_product(x, weight, bias, out), out=out)


def _put(product: Tensor, into: Tensor) -> None:
    """Copy a product to where it belongs, unless it was written there."""
    if product is not into:
        into.copy_(product)


def _mlp_gradients(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    hidden: Sequence[Tensor],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of input, weights and biases, from what `_mlp` kept."""
    grad_x = torch.empty_like(x)
    grad1, grad2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
    sum1 = weight1.new_zeros(len(weight1))
    memory = x.new_empty(2, size, len(weight1))
    parts = (tensor.split(size) for tensor in (x, grad, grad_x))
    for part, part_grad, result, before in zip(*parts, hidden, strict=True):
        active, wide = memory[:, : len(part)]
        torch.ops.aten.gelu.out(before, out=active)
        grad2.addmm_(part_grad.t(), active)
        grad_hidden = _product(part_grad, weight2.t(), None, wide)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, before, grad_input=grad_hidden)
        grad1.addmm_(grad_hidden.t(), part)
        sum1 += grad_hidden.sum(0)
        _put(_product(grad_hidden, weight1.t(), None, result), result)
    return grad_x, grad1, sum1, grad2, grad.sum(0)


@torch.library.custom_op("focal::cpu_mlp", mutates_args=())
def _opaque_mlp(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """`_mlp` for a compiler."""
    weights, size = (weight1, bias1, weight2, bias2), part_size(len(x), len(weight1))
    out, hidden = _mlp(x, weights, size, keep=keep)
    return out, torch.cat(hidden) if keep else x.new_empty(0, len(weight1))


@_opaque_mlp.register_fake
def _(x: Tensor, weight1: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, keep = rest
    return torch.empty_like(x), x.new_empty(x.shape[0] if keep else 0, weight1.shape[0])


@torch.library.custom_op("focal::cpu_mlp_backward", mutates_args=())
def _opaque_mlp_backward(
    grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size = part_size(len(x), len(weight1))
    return _mlp_gradients(grad, x, weight1, weight2, hidden.split(size), size)


@_opaque_mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, weight1: Tensor, weight2: Tensor, hidden: Tensor) -> tuple:
    biases = (x.new_empty(weight.shape[0]) for weight in (weight1, weight2))
    weights = (torch.empty_like(weight) for weight in (weight1, weight2))
    (grad1, grad2), (sum1, sum2) = weights, biases
    return torch.empty_like(x), grad1, sum1, grad2, sum2


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight1, _, weight2, _, ctx.keep = inputs
    ctx.save_for_backward(x, weight1, weight2, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_mlp(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    if not ctx.keep:
        raise RuntimeError("focal::cpu_mlp was called with keep=False: it has no gradient")
    return *_opaque_mlp_backward(grad, *ctx.saved_tensors), None


_opaque_mlp.register_autograd(_backward_mlp, setup_context=_save_mlp)


def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """`[1, rows, cols, channels]` resampled to ``height × width`` (absolute positions)."""
    if x.shape[1:3] == (height, width):
        return x
    resized = F.interpolate(
        x.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)
