"""The learned bias of focal attention: three kinds of tables, assembled into one dense bias.

Paper: arXiv 2107.00641, section 3.2, equation 2. Origin: written from the paper and the layout of
the released parameters. What differs: the ring around the window has one value per query and
distinct cell (120 for window 7 and 3 tokens on each side), where the released code lists 132 with
12 cells twice; every table has its heads first.
"""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from kernels import FocalGeometry

__all__ = ["FocalBias", "relative_index"]


def relative_index(window_size: int, region_size: int) -> Tensor:
    """Where the relative table of a level holds each query-key pair.

    Args:
        window_size: Side of the window.
        region_size: Side of the region, in cells.

    Returns:
        int64 `[window_size², region_size²]`: indices into ``(window_size + region_size - 1)²``
        entries.
    """
    side = window_size + region_size - 1
    step = torch.arange(window_size)[:, None] - torch.arange(region_size) + region_size - 1
    index = step[:, None, :, None] * side + step[None, :, None, :]  # [qi, qj, ki, kj]
    return index.reshape(window_size**2, region_size**2)


class FocalBias(nn.Module):
    """Bias of every query-key pair of a window.

    Tables, all zero-weight-decay by `FocalTransformer.no_weight_decay`:

    - ``window`` `[heads, (2·window − 1)²]`: pairs inside the window, by relative position;
    - ``ring`` `[heads, window², region² − window²]`: fine keys around the window (only where
      level 0 reaches beyond it);
    - ``coarse.{k}`` `[heads, (window + region − 1)²]`: each coarse level, by the offset of the
      query in its window and of the key in its region.

    Args:
        geometry: Window and levels.
        num_heads: Heads.
    """

    index: Tensor

    def __init__(self, geometry: FocalGeometry, num_heads: int) -> None:
        super().__init__()
        window = geometry.window_size
        regions = [level.region_size for level in geometry.levels]
        ring_cells = regions[0] ** 2 - window**2
        self.num_heads = num_heads
        self.dense_shape = (num_heads, geometry.num_queries, geometry.num_keys)
        self.window = nn.Parameter(torch.empty(num_heads, (2 * window - 1) ** 2))
        self.ring = (
            nn.Parameter(torch.empty(num_heads, window**2, ring_cells)) if ring_cells else None
        )
        self.coarse = nn.ParameterList(
            nn.Parameter(torch.empty(num_heads, (window + region - 1) ** 2))
            for region in regions[1:]
        )
        # One gather from all tables, laid end to end, makes the dense bias in canonical key order.
        self.register_buffer("index", _dense_index(geometry).flatten(), persistent=False)
        for table in self.parameters():
            trunc_normal_(table, std=0.02)

    def forward(self) -> Tensor:
        """`[heads, window_size², num_keys]`, keys in canonical order."""
        ring = [] if self.ring is None else [self.ring.flatten(1)]
        coarse = [self.coarse[level] for level in range(len(self.coarse))]  # as compilers trace it
        tables = [self.window, *ring, *coarse]
        return torch.cat(tables, dim=1).index_select(1, self.index).view(self.dense_shape)


def _dense_index(geometry: FocalGeometry) -> Tensor:
    """`[window_size², num_keys]`: each pair's entry in the tables laid end to end."""
    window, levels = geometry.window_size, geometry.levels
    queries, fine_keys = geometry.num_queries, levels[0].region_size ** 2
    in_window = torch.zeros(fine_keys, dtype=torch.bool)
    in_window[geometry.window_key_slots()] = True
    start = (2 * window - 1) ** 2
    ring = fine_keys - queries
    fine = torch.empty(queries, fine_keys, dtype=torch.int64)
    fine[:, in_window] = relative_index(window, window)
    fine[:, ~in_window] = start + torch.arange(queries * ring).view(queries, ring)
    start += queries * ring
    blocks = [fine]
    for level in levels[1:]:
        blocks.append(start + relative_index(window, level.region_size))
        start += (window + level.region_size - 1) ** 2
    return torch.cat(blocks, dim=1)
