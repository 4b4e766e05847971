"""The bias of shared keys in the eager backend: spread over whole maps, and collected from them.

Where every window takes a whole map as its keys (`kernels.eager_plan`), the bias of a pair has
to stand where its key lies, and -inf where the two do not attend each other. Both directions are
one gather through a table that depends on sizes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SharedPairs", "shared_pairs", "with_missing"]


@dataclass(frozen=True)
class SharedPairs:
    """Pairs of a band's queries with shared keys.

    Attributes:
        pair: int64 `[windows, queries, cells]`: the place of each in the bias of shared levels,
            `[window_size² · keys]`, or that size where the two do not attend each other.
        place: int64 `[tables, window_size² · keys]`: the inverse, into `[windows · queries ·
            cells]`, or that size where a pair does not exist. A table for each window of the map.
    """

    pair: Tensor
    place: Tensor

    def to(self, device: torch.device) -> SharedPairs:
        """On ``device``."""
        return SharedPairs(self.pair.to(device), self.place.to(device))

    def spread(self, bias: Tensor) -> Tensor:
        """`[windows, heads, queries, cells]` from the bias of shared levels.

        Args:
            bias: `[heads, window_size² · keys + 1]`, from `with_missing`.
        """
        found = bias.gather(1, self.pair.flatten().expand(len(bias), -1))
        return found.unflatten(1, self.pair.shape).transpose(0, 1)

    def collect(self, grad: Tensor) -> Tensor:
        """The gradient of the bias that `spread` was given, `[heads, window_size² · keys]`.

        Args:
            grad: `[windows, heads, queries, cells]`.
        """
        padded = with_missing(grad.transpose(0, 1), 0.0)
        found = padded.gather(1, self.place.flatten().expand(len(padded), -1))
        return found.unflatten(1, self.place.shape).sum(dim=1)


def with_missing(source: Tensor, missing: float) -> Tensor:
    """``source.flatten(1)``, with ``missing`` one past the end of every row."""
    size = source[0].numel()
    padded = source.new_empty(len(source), size + 1)
    padded[:, :size].view(source.shape).copy_(source)
    padded[:, size] = missing
    return padded


def shared_pairs(
    keys: Tensor,
    excluded: Tensor,
    levels: Sequence[tuple[int, int]],
    num_queries: int,
    *,
    tokens: Tensor | None,
) -> SharedPairs:
    """The tables of some windows.

    Args:
        keys: int64 `[windows, keys]`: the cell of each key in its level's map.
        excluded: bool `[windows, 1 or queries, keys]`: pairs that do not attend each other.
        levels: Keys and cells of each shared level.
        num_queries: Queries of a window.
        tokens: int64 `[windows, queries]`, a permutation: the token that each query is, where all
            windows are taken as one, in the order of tokens; None to keep windows apart.
    """
    num_windows, num_keys = keys.shape
    starts = [0]
    for _, cells in levels:
        starts.append(starts[-1] + cells)
    offset = torch.cat(
        [torch.full((count,), start) for (count, _), start in zip(levels, starts[:-1], strict=True)]
    )
    pairs = num_queries * num_keys
    query = torch.arange(num_queries)[:, None]
    # One column more takes what is not there.
    pair = torch.full((num_windows, num_queries, starts[-1] + 1), pairs)
    column = (keys + offset)[:, None].where(~excluded, starts[-1]).expand(-1, num_queries, -1)
    pair.scatter_(2, column, (query * num_keys + torch.arange(num_keys)).expand_as(column))
    pair = pair[..., :-1].contiguous()

    row = torch.arange(num_windows * num_queries).view(num_windows, num_queries)
    if tokens is not None:
        row = tokens
        pair = torch.empty_like(pair.flatten(0, 1)).index_copy_(
            0, tokens.flatten(), pair.flatten(0, 1)
        )[None]
    place = row[..., None] * starts[-1] + column
    place = place.where(column < starts[-1], num_windows * num_queries * starts[-1])
    return SharedPairs(pair, place.flatten(1))
