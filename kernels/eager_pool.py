"""Pooling of keys and values in the eager backend, and its gradient.

Each row of sub-windows is one product of its tokens, which are read where they lie, with a sparse
matrix of weights. Most of that matrix is zeros, and yet the product takes a fifth of the time of a
sum over positions. Backward to the tokens there is nothing to sum, and a product of every token's
weight and cell is faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.geometry import FocalGeometry
from kernels.reference import pad_to_windows

__all__ = ["add_pool_gradient", "pool"]


def pool(x: Tensor, weight: Tensor, geometry: FocalGeometry) -> Tensor:
    """`[batch, rows, cols, heads, dim]`: the weighted sum over each sub-window of a map.

    Args:
        x: `[batch, height, width, heads, dim]`.
        weight: `[subwindow_size, subwindow_size]`.
        geometry: For padding and shift.
    """
    side = len(weight)
    x = _whole_windows(x, geometry)
    batch, rows, cols, heads, dim = x.shape
    tokens = _tokens(x, side)
    pooled = _matrix(weight.to(x.dtype), cols // side).expand(len(tokens), -1, -1) @ tokens
    return pooled.view(batch, rows // side, cols // side, heads, dim)


def add_pool_gradient(
    grad_x: Tensor, grad: Tensor, x: Tensor, weight: Tensor, geometry: FocalGeometry
) -> Tensor:
    """Add the gradient of the map in place; give that of the weights, in the dtype of ``grad``.

    Args:
        grad_x: `[batch, height, width, heads, dim]`.
        grad: `[batch, rows, cols, heads, dim]`.
        x: The map that was pooled.
        weight: `[subwindow_size, subwindow_size]`.
        geometry: As in `pool`.
    """
    side = len(weight)
    x = _whole_windows(x, geometry)
    batch, rows, cols, heads, dim = x.shape
    cells = grad.reshape(batch * (rows // side), cols // side, heads * dim)
    cell = cells.view(batch, rows // side, 1, cols // side, 1, heads * dim)
    factor = weight.to(grad.dtype)[:, None, :, None]
    if x.shape == grad_x.shape and not geometry.shift:
        subwindows = grad_x.flatten(3).unflatten(2, (-1, side)).unflatten(1, (-1, side))
        subwindows.addcmul_(cell, factor)
    else:
        height, width = grad_x.shape[1:3]
        added = (cell * factor).reshape(x.shape)
        added = added.roll((geometry.shift, geometry.shift), dims=(1, 2))
        grad_x += added[:, :height, :width]
    every_pair = cells.to(x.dtype) @ _tokens(x, side).mT  # [windows rows, cells, tokens]
    pairs = every_pair.sum(dim=0, dtype=grad.dtype).view(cols // side, side, cols // side, side)
    return pairs.diagonal(dim1=0, dim2=2).sum(-1)


def _whole_windows(x: Tensor, geometry: FocalGeometry) -> Tensor:
    """The map as its windows lie: padded and rolled where need be."""
    if geometry.padded_size(*x.shape[1:3]) != tuple(x.shape[1:3]):
        x = pad_to_windows(x, geometry)
    if geometry.shift:
        x = x.roll((-geometry.shift, -geometry.shift), dims=(1, 2))
    return x


def _tokens(x: Tensor, side: int) -> Tensor:
    """`[batch · rows of sub-windows, tokens, channels]`, a view where channels are contiguous."""
    batch, rows, cols, heads, dim = x.shape
    return x.flatten(3).reshape(batch * (rows // side), side * cols, heads * dim)


def _matrix(weight: Tensor, cells: int) -> Tensor:
    """`[cells, tokens of a row of sub-windows]`, zero but where a token is in the cell."""
    own = torch.eye(cells, dtype=weight.dtype, device=weight.device)[:, None, :, None]
    return (own * weight[:, None, :]).reshape(cells, -1)
