"""How the eager backend walks through a map: its levels, its windows in bands, images in steps.

Index arithmetic that depends on sizes alone, made once per size and kept. Queries are taken window
by window, in *bands*, rectangles of windows whose scores fit a budget, so that what one step
touches stays in the cache.

Where a region all but covers a level's map, the level is *shared*: every window takes the whole map
as its keys, and pairs that do not attend each other get a bias of -inf (`kernels.eager_shared`).
Nothing is gathered key by key then, and gradients of keys are plain sums. Where all levels are
shared, the map itself is the only "window": its queries are one large product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod

import torch
from torch import Tensor

from kernels.eager_shared import SharedPairs, shared_pairs
from kernels.eager_windows import Patches, key_windows, query_windows, whole_map
from kernels.geometry import FocalGeometry

__all__ = ["Band", "Plan", "in_runs", "make_plan", "most_scores"]

_TYPICAL_HEAD_DIM = 32
# A level is shared while that costs at most so many times the keys.
_SHARED_EXCESS = 4 / 3
# Keys are padded to a multiple of this: products and softmax are faster on whole vectors.
_KEY_UNIT = 8


@dataclass(frozen=True)
class Band:
    """A rectangle of windows, and which of its keys take no part."""

    rows: range
    cols: range
    mask: Tensor | None  # float32 0 or -inf, broadcasts to [windows, 1, queries, windowed keys]
    pairs: SharedPairs | None  # of keys that windows share
    no_key: bool  # whether a query is left without any key

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return len(self.rows), len(self.cols)

    @property
    def num_windows(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]

    def window_numbers(self, win_cols: int, device: torch.device) -> Tensor:
        """int64: the number of each window in a map that is ``win_cols`` windows wide."""
        row, col = (torch.tensor(side, device=device) for side in (self.rows, self.cols))
        return (row[:, None] * win_cols + col).flatten()


@dataclass(frozen=True)
class KeyLayout:
    """The columns of scores: windowed keys, then shared ones, then padding.

    `windowed` and `shared` are the runs that these keys are in canonical order.
    """

    windowed: tuple[slice, ...]
    shared: tuple[slice, ...]
    num_shared: int  # columns, cells of the maps

    @property
    def num_columns(self) -> int:
        """All of them."""
        return -(-self.num_keys // _KEY_UNIT) * _KEY_UNIT

    @property
    def num_keys(self) -> int:
        """Without the padding."""
        return self.num_windowed + self.num_shared

    @property
    def num_windowed(self) -> int:
        """Those that differ from window to window."""
        return sum(run.stop - run.start for run in self.windowed)


@dataclass(frozen=True)
class Plan:
    """How maps of one size are worked through."""

    queries: Patches
    levels: tuple[Patches, ...]  # in the order of the columns
    order: tuple[int, ...]  # the level that each of them is
    keys: KeyLayout
    bands: tuple[Band, ...]
    images: int  # in a step
    loaded: int  # images unrolled at a time, a multiple of it

    def loads(self, batch: int) -> Iterator[slice]:
        """The images that are unrolled together."""
        return _slices(batch, self.loaded)

    def steps(self, loaded: slice) -> Iterator[tuple[Band, slice]]:
        """Bands, and which of the loaded images go with them."""
        for images in _slices(loaded.stop - loaded.start, self.images):
            for band in self.bands:
                yield band, images

    def num_scores(self, band: Band) -> int:
        """Scores of a band, for an image and head."""
        return band.num_windows * self.queries.size * self.keys.num_columns


def _slices(count: int, step: int) -> Iterator[slice]:
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def make_plan(
    geometry: FocalGeometry,
    size: tuple[int, int],
    map_size: tuple[int, int],
    num_heads: int,
    device: torch.device,
    budget: int,
    *,
    share: bool = True,
) -> Plan:
    """Lay out windows and steps.

    Args:
        geometry: Window, levels, boundary and shift.
        size: Rows and columns of the map as stored.
        map_size: Rows and columns that are real.
        num_heads: Heads.
        device: Where masks are put.
        budget: Scores of one step; a step holds one window at least.
        share: Allow shared levels; without them columns are in canonical order.
    """
    keys = geometry.key_index(*size, map_size=map_size)
    grids = [geometry.map_cells(level, *size) for level in range(len(geometry.levels))]
    ends = list(accumulate(geometry.keys_per_level))
    runs = [slice(stop - n, stop) for stop, n in zip(ends, geometry.keys_per_level, strict=True)]
    shared = [
        share and _sharing_pays(keys[:, run], prod(grid))
        for run, grid in zip(runs, grids, strict=True)
    ]
    whole = all(shared) and geometry.padded_size(*size) == tuple(size)
    shared[0] = whole
    order = sorted(range(len(shared)), key=lambda level: shared[level])  # windowed levels first
    layout = KeyLayout(
        _merged([runs[level] for level in order if not shared[level]]),
        _merged([runs[level] for level in order if shared[level]]),
        sum(prod(grids[level]) for level in order if shared[level]),
    )
    excluded = (keys < 0)[:, None]  # [windows, 1 or queries, keys in canonical order]
    if geometry.shift:
        excluded = excluded.repeat(1, geometry.num_queries, 1)
        excluded[:, :, geometry.window_key_slots()] |= geometry.seam_mask(*size)

    count = (1, 1) if whole else geometry.num_windows(*size)
    queries = whole_map(size, count) if whole else query_windows(geometry, size)
    levels = [
        whole_map(grids[level], count)
        if shared[level]
        else key_windows(geometry, level, size, map_size)
        for level in order
    ]

    scores = num_heads * queries.size * layout.num_columns  # of a window
    fit = max(1, budget // scores)
    bands: list[Band] = []
    # Windows one above the other: products and copies deal them out to threads in the same order,
    # so that a thread finds in its own cache what it wrote, and has rows of the maps for itself.
    for cols in _split(count[1], max(1, fit // count[0])):
        for rows in _split(count[0], fit):
            numbers = (torch.tensor(rows)[:, None] * count[1] + torch.tensor(cols)).flatten()
            if whole:  # the only window stands for all of them
                numbers = torch.arange(len(keys))
            hidden = excluded[numbers]
            pairs = None
            if layout.num_shared:
                pairs = shared_pairs(
                    in_runs(keys[numbers], layout.shared),
                    in_runs(hidden, layout.shared),
                    [
                        (geometry.keys_per_level[level], prod(grids[level]))
                        for level in order
                        if shared[level]
                    ],
                    geometry.num_queries,
                    tokens=geometry.query_index(*size) if whole else None,
                ).to(device)
            no_key = bool(hidden.all(dim=-1).any())
            mask = _mask(in_runs(hidden, layout.windowed)[:, None], device, bands)
            bands.append(Band(rows, cols, mask, pairs, no_key))
    images = max(1, fit // prod(count))
    # Unrolled keys are to stay in the cache as well, beside the scores.
    unrolled = levels[0].num_rows * levels[0].num_cols * num_heads * _TYPICAL_HEAD_DIM
    loaded = images * max(1, budget // (unrolled * images))
    return Plan(queries, tuple(levels), tuple(order), layout, tuple(bands), images, loaded)


def in_runs(x: Tensor, runs: Sequence[slice]) -> Tensor:
    """What lies in these runs of the last dimension; a view of a single one."""
    if len(runs) == 1:
        return x[..., runs[0]]
    return torch.cat([x[..., :0], *(x[..., run] for run in runs)], dim=-1)


def _merged(runs: Sequence[slice]) -> tuple[slice, ...]:
    """Runs that follow one another as one."""
    merged: list[slice] = []
    for run in runs:
        if merged and merged[-1].stop == run.start:
            run = slice(merged.pop().start, run.stop)
        merged.append(run)
    return tuple(merged)


def most_scores(geometry: FocalGeometry, height: int, width: int) -> int:
    """An upper bound, for an image and head, of the scores that steps compute.

    A plan would tell the number, but is made of numbers: here sizes may be a compiler's symbols.
    """
    rows, cols = geometry.num_windows(height, width)
    columns = sum(int(_SHARED_EXCESS * keys) for keys in geometry.keys_per_level) + _KEY_UNIT
    return rows * cols * geometry.num_queries * columns


def _sharing_pays(keys: Tensor, cells: int) -> bool:
    """Whether all cells can be keys of every window.

    Args:
        keys: int64 `[windows, keys]`: cells of a level, -1 for none.
        cells: Cells of the level's map.
    """
    if cells > _SHARED_EXCESS * keys.shape[1]:
        return False
    attended = torch.zeros(len(keys), cells + 1, dtype=torch.int64)
    attended.scatter_add_(1, keys.where(keys >= 0, cells), torch.ones_like(keys))
    # A window that attends a cell twice has two biases for it; a cell of padding alone, which no
    # window attends, may hold anything.
    return bool(attended[:, :cells].max() <= 1) and bool(attended[:, :cells].any(dim=0).all())


def _mask(excluded: Tensor, device: torch.device, earlier: list[Band]) -> Tensor | None:
    """0 or -inf, or None for zeros alone; that of an earlier band where it is the same."""
    if not excluded.any():
        return None
    mask = torch.zeros(excluded.shape, device=device)
    mask.masked_fill_(excluded.to(device), -torch.inf)
    for band in earlier:
        if band.mask is not None and torch.equal(band.mask, mask):
            return band.mask
    return mask


def _split(count: int, largest: int) -> list[range]:
    """Near-equal parts of ``range(count)``, none longer than ``largest``."""
    parts = -(-count // largest)
    ends = [count * part // parts for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]
