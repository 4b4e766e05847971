"""Products of linear layers and MLPs on a CPU, by the faster library and in parts for the cache.

None of it knows of gradients: `models.layers` and `models.opaque` do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from kernels.processor import abilities

__all__ = ["linear_gradients", "mlp", "mlp_gradients", "part_size", "product"]

# What one part of a batch should hold in its widest map, in elements: 4 MiB in float32. And rows
# enough for a matrix product to be efficient: each part packs the weights anew.
PART_SIZE = 2**20
PART_ROWS = 1024

# With AVX-512 oneDNN is as fast in float32, at the shapes of these models, as the BLAS that
# `torch.nn.functional.linear` takes, or 10 to 20 % faster (AMD); without, it is as fast or slower.
_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    else None
)


def _blas_is_faster_without_bias() -> bool:
    """PyTorch's BLAS, MKL, has code for AVX-512 on Intel's processors alone.

    There it is faster where no bias is to be added: in gradients of inputs.
    """
    return torch.backends.mkl.is_available() and "Intel" in abilities().get("cpu_name", "")


def _onednn_is_faster_for_weights() -> bool:
    """On AMD's processors PyTorch's BLAS takes vectors of 256 bits.

    Zen 5 computes 512 at once, Zen 4 in two halves, which leaves oneDNN too little ahead for
    products that sum over all tokens. An instruction that Zen 4 lacks tells which it is.
    """
    told = abilities()
    return "AMD" in told.get("cpu_name", "") and told.get("avx512_vp2intersect", False)


_BLAS_WITHOUT_BIAS = _blas_is_faster_without_bias()
_ONEDNN_WEIGHTS = _onednn_is_faster_for_weights()


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


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor] | None:
    """oneDNN's product, where that is to be taken."""
    if not x.dtype == weight.dtype == torch.float32 or (bias is None and _BLAS_WITHOUT_BIAS):
        return None
    return _ONEDNN_LINEAR


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x Wᵀ + b``, without a gradient; ``weight`` may be transposed.

    ``out``, of the result's shape, may take the result: the BLAS writes there, oneDNN to memory of
    its own.
    """
    onednn = _onednn(x, weight, bias)
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


def linear_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of input, weight and bias of a linear layer, as far as they are ``wanted``."""
    rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    return (
        product(grad, weight.t(), None) if wanted[0] else None,
        _weight_gradient(rows, inputs) if wanted[1] else None,
        rows.sum(dim=0) if wanted[2] else None,
    )


def _weight_gradient(grad: Tensor, x: Tensor, total: Tensor | None = None) -> Tensor:
    """``gradᵀ x``, `[out, in]`, of a layer's tokens; added to ``total``, if there is one."""
    onednn = _onednn(grad, x, None) if _ONEDNN_WEIGHTS else None
    if onednn is None or not len(x):  # oneDNN knows no empty sum
        return grad.t() @ x if total is None else total.addmm_(grad.t(), x)
    # It is faster where the result's rows are the longer ones.
    narrow, wide = sorted((grad, x), key=lambda rows: rows.shape[1])
    result = onednn(narrow.t(), wide.t(), None, "none", [], "")
    result = result.t().contiguous() if wide is grad else result
    return result if total is None else total.add_(result)


def mlp(
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
            hidden.append(product(part, weight1, bias1))
            torch.ops.aten.gelu.out(hidden[-1], out=active)
        else:
            active = _activated_product(part, weight1, bias1, active)
        _put(product(active, weight2, bias2, result), result)
    return out, hidden


def _activated_product(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """``gelu(x Wᵀ + b)``; ``out`` as for `product`."""
    onednn = _onednn(x, weight, bias)
    if onednn is not None:  # the activation of a number while it is in a register
        return onednn(x, weight, bias, "gelu", [], "none")
    return torch.ops.aten.gelu.out(product(x, weight, bias, out), out=out)


def _put(result: Tensor, into: Tensor) -> None:
    """Copy a product to where it belongs, unless it was written there."""
    if result is not into:
        into.copy_(result)


def mlp_gradients(
    grad: Tensor,
    x: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    hidden: Sequence[Tensor],
    size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of input, weights and biases, from what `mlp` kept."""
    grad_x = torch.empty_like(x)
    grad1, grad2 = torch.zeros_like(weight1), torch.zeros_like(weight2)
    sum1 = weight1.new_zeros(len(weight1))
    memory = x.new_empty(2, size, len(weight1))
    parts = (tensor.split(size) for tensor in (x, grad, grad_x))
    for part, part_grad, result, before in zip(*parts, hidden, strict=True):
        active, wide = memory[:, : len(part)]
        torch.ops.aten.gelu.out(before, out=active)
        _weight_gradient(part_grad, active, grad2)
        grad_hidden = product(part_grad, weight2.t(), None, wide)
        torch.ops.aten.gelu_backward.grad_input(grad_hidden, before, grad_input=grad_hidden)
        _weight_gradient(grad_hidden, part, grad1)
        sum1 += grad_hidden.sum(0)
        _put(product(grad_hidden, weight1.t(), None, result), result)
    return grad_x, grad1, sum1, grad2, grad.sum(0)
