"""Where a block looks: its attention weights, laid out over the tokens of the map.

Paper: arXiv 2107.00641, section 3.2, equation 2. Origin: written from the paper. The weights are
not computed again here: attention is linear in the values, so its derivative by a value *is* the
weight of that key. Every geometry, border, shift and bias is thereby the operator's own.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

from kernels import PooledMap, Pooling, focal_attention
from models.blocks import FocalBlock
from models.focal_attention import FocalAttention
from models.focal_transformer import FocalTransformer

__all__ = ["attention_map", "block_attention"]


def attention_map(
    model: FocalTransformer,
    image: Tensor,
    *,
    stage: int = -1,
    block: int = -1,
    query: tuple[int, int] | None = None,
) -> Tensor:
    """How much of a block's attention goes to each token.

    Args:
        model: The model, in evaluation mode.
        image: `[1, in_chans, height, width]`, as the model wants it.
        stage: Which stage; negative counts from the last.
        block: Which of its blocks; negative counts from the last.
        query: Row and column of the token that attends; None for the mean over all tokens.

    Returns:
        `[heads, rows, cols]` over the stage's map, padded to whole windows; every head's weights
        sum to 1. The weight of a pooled key is spread evenly over its sub-window.

    Raises:
        IndexError: The model has no such stage or block.
        ValueError: ``image`` is no batch of one, or ``query`` lies outside the map.
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image must be [1, channels, height, width], got {list(image.shape)}")
    attention = cast(FocalBlock, model.stages[stage].blocks[block]).attn
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.enable_grad():  # without, a CPU would take the block apart
            model.forward_features(image)
    finally:
        hook.remove()
    return block_attention(attention, seen[0].detach(), query=query)


@torch.enable_grad()
def block_attention(
    attention: FocalAttention, x: Tensor, *, query: tuple[int, int] | None = None
) -> Tensor:
    """How much of the attention of one module goes to each token of its input.

    Args:
        attention: The module.
        x: `[1, height, width, dim]`, its input.
        query: As in `attention_map`.

    Returns:
        As `attention_map`.

    Raises:
        ValueError: ``query`` lies outside the map.
    """
    height, width = x.shape[1:3]
    if query is not None and not (0 <= query[0] < height and 0 <= query[1] < width):
        raise ValueError(f"query must lie in the map of {height} by {width} tokens, got {query}")
    geometry = attention.geometry
    rows, cols = geometry.padded_size(height, width)
    x = F.pad(x, (0, 0, 0, cols - width, 0, rows - height))
    qkv = attention.qkv(x).unflatten(3, (3, attention.num_heads, attention.head_dim))
    queries, keys, _ = qkv.detach().unbind(3)
    # One channel of the values would do; the operator wants as many as the keys have.
    values = torch.zeros_like(keys, requires_grad=True)
    pooled = [
        PooledMap(
            _pooled_keys(keys, pooling, geometry.shift).detach(),
            values.new_zeros(
                1, *geometry.map_cells(level, rows, cols), *keys.shape[3:]
            ).requires_grad_(),
        )
        for level, pooling in enumerate(attention._pooling(x), start=1)
    ]
    out = focal_attention(
        queries,
        keys,
        values,
        attention.bias().detach(),
        geometry=geometry,
        pooling=pooled,
        map_size=(height, width),
        backend="reference",
    )
    chosen = out[0, :height, :width, :, 0]  # [height, width, heads], of one channel
    total = chosen.mean(dim=(0, 1)).sum() if query is None else chosen[query].sum()
    fine, *coarse = torch.autograd.grad(total, [values, *(level.value for level in pooled)])
    weights = fine[0, ..., 0]  # [rows, cols, heads]
    for level, cells in zip(geometry.levels[1:], coarse, strict=True):
        side = level.subwindow_size
        spread = repeat(cells[0, ..., 0] / side**2, "r c h -> (r i) (c j) h", i=side, j=side)
        weights = weights + spread.roll((geometry.shift,) * 2, dims=(0, 1))
    return rearrange(weights, "rows cols heads -> heads rows cols").detach()


def _pooled_keys(keys: Tensor, pooling: Pooling | PooledMap, shift: int) -> Tensor:
    """`[1, rows, cols, heads, head_dim]`: the keys of one coarse level."""
    if isinstance(pooling, PooledMap):
        return pooling.key
    side = pooling.weight.shape[0]
    cells = rearrange(
        keys.roll((-shift, -shift), dims=(1, 2)),
        "b (row i) (col j) head dim -> b row col i j head dim",
        i=side,
        j=side,
    )
    pooled = einsum(cells, pooling.weight, "b row col i j head dim, i j -> b row col head dim")
    return pooled if pooling.key_offset is None else pooled + pooling.key_offset
