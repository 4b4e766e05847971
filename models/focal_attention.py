"""Focal self-attention as a module: projections, bias tables and pooling around the operator.

Paper: arXiv 2107.00641, section 3.2, equations 1 and 2. Origin: written from the paper; parameters
convert from the released code without loss (`models.checkpoint`). What differs: pooling happens
after the projection, with which it commutes, so the coarse levels need no second projection; a ring
cell that the released code attends twice is attended once with the two biases' logaddexp; nothing
here depends on the size of the map.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import FocalGeometry, PooledMap, Pooling, focal_attention_qkvpacked
from models.bias import FocalBias
from models.layers import Linear

__all__ = ["POOLS", "FocalAttention"]

POOLS = ("fc", "mean", "max", "conv")


class FcPool(nn.Module):
    """Pooling by one learned weight per position of a sub-window and one bias (equation 1).

    Both are shared by all channels.

    Args:
        subwindow_size: Side of a sub-window.
    """

    def __init__(self, subwindow_size: int) -> None:
        super().__init__()
        # Training starts from the mean of the sub-window.
        self.weight = nn.Parameter(
            torch.full((subwindow_size, subwindow_size), 1.0 / subwindow_size**2)
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def projected(self, row_sums: Tensor, bias: Tensor | None, num_heads: int) -> Pooling:
        """Pooling of keys and values already projected.

        A pooled feature is ``Σ wᵢ xᵢ + β``. Projected by ``W x + b`` it is ``Σ wᵢ (W xᵢ + b)`` plus
        ``(1 − Σ wᵢ) b + β W 1``, the offset.

        Args:
            row_sums: `[2 * dim]`, ``W 1`` of the projection to key and value.
            bias: `[2 * dim]`, or None.
            num_heads: Heads.
        """
        offset = self.bias * row_sums
        if bias is not None:
            offset = offset + (1.0 - self.weight.sum()) * bias
        key_offset, value_offset = offset.view(2, num_heads, -1).unbind(0)
        return Pooling(self.weight, key_offset, value_offset)


class FocalAttention(nn.Module):
    """Multi-head focal self-attention over an NHWC map of any size.

    The map is zero-padded right and bottom to whole windows before the projection, and cropped
    after the attention.

    Args:
        dim: Channels.
        num_heads: Heads; divides ``dim``.
        geometry: Window, levels, boundary and shift.
        pool: How sub-windows become keys: ``"fc"`` (learned, as released), ``"mean"``, ``"max"`` or
            ``"conv"`` (learned per channel). The latter two pool features, then project them.
        qkv_bias: Give the projection to query, key and value a bias.
        attn_drop: Dropout of attention weights in training.
        proj_drop: Dropout after the output projection.
        backend: A backend of `kernels.focal_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        geometry: FocalGeometry,
        *,
        pool: str = "fc",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.geometry = geometry
        self.pool = pool
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.bias = FocalBias(geometry, num_heads)
        self.subwindow_sizes = tuple(level.subwindow_size for level in geometry.levels[1:])
        self.pools = nn.ModuleList()
        if pool == "fc":
            self.pools.extend(FcPool(side) for side in self.subwindow_sizes)
        elif pool == "conv":
            self.pools.extend(_depthwise_mean(dim, side) for side in self.subwindow_sizes)
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: `[batch, height, width, dim]`, normalised.

        Returns:
            `[batch, height, width, dim]`.
        """
        batch, height, width, _ = x.shape
        rows, cols = self.geometry.padded_size(height, width)
        if (rows, cols) != (height, width):
            # Columns at the end of each row of `width · dim` numbers, and rows.
            x = F.pad(x.flatten(2), (0, (cols - width) * self.dim, 0, rows - height))
        tokens = x.reshape(batch, rows * cols, self.dim)  # three dimensions: see `models.blocks`
        qkv = self.qkv(tokens).view(batch, rows, cols, 3, self.num_heads, self.head_dim)
        out = focal_attention_qkvpacked(
            qkv,
            self.bias(),
            geometry=self.geometry,
            pooling=self._pooling(tokens.view(batch, rows, cols, self.dim)),
            map_size=(height, width),
            dropout_p=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        out = out[:, :height, :width].reshape(batch, height * width, self.dim)
        return self.proj_drop(self.proj(out)).view(batch, height, width, self.dim)

    def _pooling(self, x: Tensor) -> list[Pooling | PooledMap]:
        """One entry per coarse level, from the padded features `[batch, rows, cols, dim]`."""
        bias = None if self.qkv.bias is None else self.qkv.bias[self.dim :]
        if self.pool == "fc":
            # Of all rows, for the gradient of a part of them would be written into a map of zeros.
            row_sums = self.qkv.weight.sum(dim=1)[self.dim :]
            return [
                cast(FcPool, pool).projected(row_sums, bias, self.num_heads) for pool in self.pools
            ]
        weight = self.qkv.weight[self.dim :]  # [2 * dim, dim], the keys' rows and the values'
        if self.pool == "mean":
            return [
                Pooling(weight.new_full((side, side), 1.0 / side**2))
                for side in self.subwindow_sizes
            ]
        shift = self.geometry.shift
        if shift:
            x = x.roll((-shift, -shift), dims=(1, 2))
        planes = x.permute(0, 3, 1, 2)  # [batch, dim, rows, cols]
        if self.pool == "max":
            pooled = [F.max_pool2d(planes, side) for side in self.subwindow_sizes]
        else:
            pooled = [pool(planes) for pool in self.pools]
        return [self._projected(planes, weight, bias) for planes in pooled]

    def _projected(self, planes: Tensor, weight: Tensor, bias: Tensor | None) -> PooledMap:
        """Keys and values of pooled features `[batch, dim, rows, cols]`."""
        projected = F.linear(planes.permute(0, 2, 3, 1), weight, bias)
        key, value = projected.unflatten(3, (2, self.num_heads, self.head_dim)).unbind(3)
        return PooledMap(key, value)


def _depthwise_mean(dim: int, subwindow_size: int) -> nn.Conv2d:
    """A depthwise convolution over sub-windows that starts from their mean."""
    conv = nn.Conv2d(dim, dim, subwindow_size, stride=subwindow_size, groups=dim)
    nn.init.constant_(conv.weight, 1.0 / subwindow_size**2)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def init_linear(module: nn.Module) -> None:
    """The released initialisation of linear layers; for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
