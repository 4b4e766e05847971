"""The oracle: focal attention in its slowest, clearest form.

An explicit list of keys per window, one softmax over all of them, autograd for every gradient. Any
float dtype, any device. Memory grows with ``windows × keys``: for tests and small maps only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from kernels.coarse import PooledMap, Pooling
from kernels.dropout import keep_mask, row_index
from kernels.geometry import FocalGeometry, index_tables
from kernels.maps import apart

__all__ = ["focal_attention", "pool_map"]


def focal_attention(
    maps: Sequence[Tensor],
    bias: Tensor,
    *,
    geometry: FocalGeometry,
    pooling: Sequence[Pooling | PooledMap],
    scale: float,
    map_size: tuple[int, int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """See `kernels.focal_attention`; arguments are taken as already checked."""
    query, key, value = apart(maps)
    height, width = query.shape[1:3]
    query_index, key_index, seam = index_tables(geometry, height, width, map_size, query.device)
    query, key, value = (pad_to_windows(x, geometry) for x in (query, key, value))

    flat_query = rearrange(query, "b row col head dim -> b (row col) head dim")
    window_query = flat_query[:, query_index]  # [batch, window, query, head, dim]
    window_key = _gather_keys(key, pooling, geometry, key_index, "key")
    window_value = _gather_keys(value, pooling, geometry, key_index, "value")

    score = scale * einsum(
        window_query, window_key, "b win query head dim, b win key head dim -> b win head query key"
    )
    excluded = (key_index < 0)[:, None, :].repeat(1, geometry.num_queries, 1)
    excluded[:, :, geometry.window_key_slots().to(seam.device)] |= seam
    score = (score + bias.to(score.dtype)).masked_fill(excluded[:, None], -torch.inf)
    # A query without any key, by the geometry or by -inf in the bias, attends nothing: its weights
    # are zero, not NaN.
    no_key = (score == -torch.inf).all(dim=-1, keepdim=True)
    weight = score.masked_fill(no_key, 0.0).softmax(dim=-1).masked_fill(no_key, 0.0)
    if dropout_p > 0.0:
        weight = weight * _keep(dropout_seed, dropout_p, weight) / (1.0 - dropout_p)

    window_out = einsum(
        weight, window_value, "b win head query key, b win key head dim -> b win query head dim"
    )
    window_out = rearrange(window_out, "b win query head dim -> b (win query) head dim")
    out = torch.empty_like(flat_query).index_copy(1, query_index.flatten(), window_out)
    return out.view_as(query)[:, :height, :width]


def _keep(dropout_seed: Tensor | None, dropout_p: float, weight: Tensor) -> Tensor:
    """The dropout mask of `[batch, window, head, query, key]` weights."""
    if dropout_seed is None:
        raise ValueError("dropout needs a seed")
    batch, windows, heads, queries, keys = weight.shape
    images, window = (torch.arange(n, device=weight.device) for n in (batch, windows))
    row = row_index(images, window, windows, heads)
    return keep_mask(dropout_seed, dropout_p, row, queries, keys)


def _gather_keys(
    x: Tensor,
    pooling: Sequence[Pooling | PooledMap],
    geometry: FocalGeometry,
    key_index: Tensor,
    which: str,
) -> Tensor:
    """`[batch, window, key, head, dim]`: what each window attends, zeros where there is no key."""
    gathered = []
    indices = key_index.split(geometry.keys_per_level, dim=1)
    for level, index in enumerate(indices):
        source = x if level == 0 else coarse_map(x, pooling[level - 1], geometry, level, which)
        flat = rearrange(source, "b row col head dim -> b (row col) head dim")
        found = flat[:, index.clamp(min=0)]
        gathered.append(found.masked_fill((index < 0)[:, :, None, None], 0.0))
    return torch.cat(gathered, dim=2)


def coarse_map(
    x: Tensor, pooling: Pooling | PooledMap, geometry: FocalGeometry, level: int, which: str
) -> Tensor:
    """`[batch, rows, cols, head, dim]`: the pooled map of one level, of keys or of values."""
    if isinstance(pooling, PooledMap):
        return getattr(pooling, which)
    rolled = x.roll((-geometry.shift, -geometry.shift), dims=(1, 2))
    return pool_map(rolled, pooling.weight, getattr(pooling, f"{which}_offset"))


def pool_map(x: Tensor, weight: Tensor, offset: Tensor | None) -> Tensor:
    """Weighted sum over each sub-window of `[batch, height, width, head, dim]`, plus an offset."""
    side = weight.shape[0]
    cells = rearrange(x, "b (row i) (col j) head dim -> b row col i j head dim", i=side, j=side)
    pooled = einsum(cells, weight.to(x.dtype), "b row col i j head dim, i j -> b row col head dim")
    return pooled if offset is None else pooled + offset.to(x.dtype)


def pad_to_windows(x: Tensor, geometry: FocalGeometry) -> Tensor:
    """Zero-pad `[batch, height, width, head, dim]` right and bottom to whole windows."""
    height, width = x.shape[1:3]
    rows, cols = geometry.padded_size(height, width)
    return F.pad(x, (0, 0, 0, 0, 0, cols - width, 0, rows - height))
