"""How a coarse level gets its keys: pooled on the fly, or ready-made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["PooledMap", "Pooling"]


@dataclass(frozen=True)
class Pooling:
    """A coarse level pooled on the fly: ``Σ weight_i · key_i + key_offset`` over a sub-window.

    Pooling commutes with a linear projection, so pooling the features first (paper, equation 1) and
    projecting them is the same as this sum over keys already projected, with the offset
    ``(1 − Σ weight)·b_k + β·W_k·1`` for a projection ``W_k x + b_k`` and a pooling bias ``β``.

    Args:
        weight: `[subwindow_size, subwindow_size]`, one weight per position, shared by all channels.
        key_offset: `[heads, head_dim]` added to every pooled key, or None for zero.
        value_offset: the same for values.
    """

    weight: Tensor
    key_offset: Tensor | None = None
    value_offset: Tensor | None = None


@dataclass(frozen=True)
class PooledMap:
    """A coarse level whose keys and values the caller made, for pooling that is no weighted sum.

    Args:
        key: `[batch, rows, cols, heads, head_dim]`, one entry per cell of the padded map rolled by
            ``(-shift, -shift)``: ``geometry.map_cells(level, height, width)`` rows and columns.
        value: the same for values.
    """

    key: Tensor
    value: Tensor
