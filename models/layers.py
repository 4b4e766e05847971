"""Convolutional embeddings, the MLP, and what both are made of.

Paper: Focal Self-attention for Local-Global Interactions in Vision Transformers (NeurIPS 2021,
arXiv 2107.00641), section 3.1. Origin: written from the paper; the MLP's parameters are named as
timm's. What differs: feature maps stay NHWC between blocks and any input size is
accepted, where the released code takes one size alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.opaque import opaque_layer_norm, opaque_linear, opaque_mlp
from models.products import linear_gradients, mlp, mlp_gradients, part_size, product

__all__ = ["ConvEmbed", "LayerNorm", "Linear", "Mlp", "resize_map", "runs_eagerly_on_cpu"]


def runs_eagerly_on_cpu(x: Tensor) -> bool:
    """Whether to work in parts: a compiler plans memory itself, a GPU wants large products."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _is_exact(x: Tensor) -> bool:
    """Whether sums over parts are as good as one sum: they are not in 16 bits."""
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


class LayerNorm(nn.LayerNorm):
    """A LayerNorm that a compiler for a CPU leaves to PyTorch's own code."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` to the same shape."""
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])  # of four dimensions a compiler would take it for NCHW
        if x.device.type == "cpu" and _is_exact(x):
            rows = opaque_layer_norm(rows, self.weight, self.bias, self.eps)
        else:
            rows = super().forward(rows)
        return rows.view(x.shape)


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
        self.norm = LayerNorm(out_chans) if norm else nn.Identity()

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
        x = self.proj(x)
        size = x.shape[2:]
        # In three dimensions: a compiler takes what has four for NCHW, and lays it out anew.
        return self.norm(x.flatten(2).mT).unflatten(1, size)


class Linear(nn.Linear):
    """A linear layer that uses the fastest product a CPU has."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if x.device.type != "cpu" or not _is_exact(x) or torch.compiler.is_exporting():
            return super().forward(x)  # an exported graph has operators that others know
        if torch.compiler.is_compiling():
            return opaque_linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _LinearFunction.apply(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


class _LinearFunction(torch.autograd.Function):
    """`product` with a gradient, whose product with the weights is `product` as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return linear_gradients(grad, x, weight, ctx.needs_input_grad)


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
            weights = self._weights()
            tensors = (tokens, *weights)
            keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            return opaque_mlp(tokens, weights, keep=keep).view(x.shape)
        if torch.is_grad_enabled():
            if not direct:
                return self._whole(x)
            return _PartwiseMlp.apply(tokens, *self._weights()).view(x.shape)
        size = part_size(len(tokens), self.fc1.out_features)
        if direct:
            return mlp(tokens, self._weights(), size, keep=False)[0].view(x.shape)
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
    """`mlp` with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.size = part_size(len(x), len(weights[0]))
        out, hidden = mlp(x, weights, ctx.size, keep=True)
        ctx.save_for_backward(x, weights[0], weights[2], *hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight1, weight2, *hidden = ctx.saved_tensors
        return mlp_gradients(grad, x, weight1, weight2, hidden, ctx.size)


def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """`[1, rows, cols, channels]` resampled to ``height × width`` (absolute positions)."""
    if x.shape[1:3] == (height, width):
        return x
    resized = F.interpolate(
        x.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)
