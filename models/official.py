"""Names and layouts of the released code's parameters, turned into ours.

Origin: the parameter names and shapes of the released Focal Transformer checkpoints (paper: arXiv
2107.00641). What differs is the layout alone; the function stays the same, and so do gradients:
every step here is differentiable.

The released ring around a window is made of four copies of the map, rolled by ``e = expand_size``
along each diagonal; of each copy the slots that fall outside the window are keys. For
``e <= window / 2`` the copies cover the ring, and some cells twice (12 of 120 for window 7, e = 3).
Two equal keys with biases a and b weigh ``exp(a) + exp(b)``, as one key with ``logaddexp(a, b)``
does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor

__all__ = ["fold_ring", "rename_official"]

# Index tables and masks that the released code saves; they hold nothing learned.
BUFFERS = ("relative_position_index", "attn_mask", "valid_ind_rolled")

_RENAMED = (
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"^absolute_pos_embed$", "pos_embed"),
    (r"\.attn\.relative_position_bias_table$", ".attn.bias.window"),
    (r"\.attn\.relative_position_bias_table_to_neighbors$", ".attn.bias.ring"),
    (r"\.attn\.relative_position_bias_table_to_windows\.", ".attn.bias.coarse."),
    (r"\.pool_layers\.", ".attn.pools."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)


def rename_official(
    state_dict: Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A released state dict under our names and layouts.

    Args:
        state_dict: Released names to tensors; saved index buffers are left out.
        grid: Rows and columns of the map that absolute positions are for; square if None.

    Raises:
        ValueError: A ring or a pooling that has no exact counterpart here.
    """
    return {
        _rename(name): _relayout(name, tensor, state_dict, grid)
        for name, tensor in state_dict.items()
        if not any(buffer in name for buffer in BUFFERS)
    }


def _rename(name: str) -> str:
    # A stage begins with its downsampling here, and ends with the next one's in the released code.
    name = re.sub(
        r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name
    )
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _relayout(
    name: str,
    tensor: Tensor,
    state_dict: Mapping[str, Tensor],
    grid: tuple[int, int] | None,
) -> Tensor:
    if name.endswith("relative_position_bias_table"):
        return tensor.t()
    if name.endswith("relative_position_bias_table_to_neighbors"):
        return fold_ring(tensor, name)
    if ".pool_layers." in name and name.endswith("weight") and tensor.dim() == 2:
        side = isqrt(tensor.shape[1])
        _check_subwindow(name, side, state_dict)
        return tensor.view(side, side)
    if name == "absolute_pos_embed":
        side = isqrt(tensor.shape[1])
        rows, cols = grid if grid and grid[0] * grid[1] == tensor.shape[1] else (side, side)
        return tensor.view(1, rows, cols, -1)
    return tensor


def _check_subwindow(name: str, side: int, state_dict: Mapping[str, Tensor]) -> None:
    table = state_dict.get(f"{name.split('.pool_layers.')[0]}.attn.relative_position_bias_table")
    if table is None:
        return
    window = (isqrt(table.shape[0]) + 1) // 2
    if window % side:
        raise ValueError(
            f"{name}: the sub-window ({side}) must divide the window ({window}): the released code "
            "trims the map for such a level, which has no exact counterpart here"
        )


def fold_ring(table: Tensor, name: str = "ring table") -> Tensor:
    """The released ring table with doubled cells folded by logaddexp.

    Args:
        table: `[1, heads, window², entries]`, the four rolled copies one after the other.
        name: The parameter, for messages.

    Returns:
        `[heads, window², region² − window²]`, ring cells row-major.

    Raises:
        ValueError: The number of entries fits no ``expand_size``, or one beyond half the window.
    """
    queries, entries = table.shape[2:]
    window = isqrt(queries)
    kept = queries - entries // 4
    expand = window - isqrt(max(kept, 0))
    if window**2 != queries or entries != 4 * (queries - (window - expand) ** 2):
        raise ValueError(
            f"{name} must have 4 (window² - (window - expand_size)²) entries per query, "
            f"got shape {list(table.shape)}"
        )
    if 2 * expand > window:
        raise ValueError(
            f"{name}: expand_size must be at most half the window, beyond that the released ring "
            f"has holes; got expand_size {expand}, window {window}"
        )
    sources = _ring_sources(window, expand).to(table.device)
    # One entry of −inf stands in where a cell has fewer sources than the most doubled one.
    padded = torch.cat([table[0], table.new_full((*table.shape[1:3], 1), -torch.inf)], dim=-1)
    return padded[:, :, sources].logsumexp(dim=-1)


@lru_cache(maxsize=16)
def _ring_sources(window: int, expand: int) -> Tensor:
    """int64 `[cells, most sources]`: entries of each ring cell, padded with their number."""
    region = window + 2 * expand
    entries: dict[int, list[int]] = {}
    count = 0
    for roll_row, roll_col in (
        (-expand, -expand),
        (-expand, expand),
        (expand, -expand),
        (expand, expand),
    ):
        for slot in range(window**2):
            row, col = slot // window - roll_row, slot % window - roll_col
            if 0 <= row < window and 0 <= col < window:
                continue
            entries.setdefault((row + expand) * region + col + expand, []).append(count)
            count += 1
    most = max(map(len, entries.values()))
    return torch.tensor(
        [found + [count] * (most - len(found)) for _, found in sorted(entries.items())]
    )
