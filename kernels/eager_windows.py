"""Where the eager backend finds windows in a map, and how it walks through them.

Index arithmetic that depends on sizes alone, made once per size and kept. A level is read in one of
two ways:

- *windowed*: windows overlap, so the map is first *unrolled*: its borders are attached by copying
  them once, and then the square that each window attends is a strided view, with neither an index
  nor a mask;
- *shared*: where a region all but covers the map, every window takes the whole map as its keys,
  and pairs that do not attend each other get a bias of -inf (`kernels.eager_shared`). Nothing is
  gathered key by key then, and gradients of keys are plain sums.

Queries are taken window by window, in *bands*, rectangles of windows whose scores fit a budget, so
that what one step touches stays in the cache. Where all levels are shared, the map itself is the
only "window": its queries are one large product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from kernels.eager_shared import SharedPairs, shared_pairs
from kernels.geometry import FocalGeometry

__all__ = ["Band", "Patches", "Plan", "make_plan"]

_TYPICAL_HEAD_DIM = 32
# A level is shared while that costs at most so many times the keys.
_SHARED_EXCESS = 4 / 3
# Keys are padded to a multiple of this: products and softmax are faster on whole vectors.
_KEY_UNIT = 8
_WHOLE = (slice(None),) * 4
_Runs = tuple[tuple[int, int, int], ...]  # (start when unrolled, start in the source, length)


@dataclass(frozen=True)
class Patches:
    """How a map is unrolled, and the overlapping squares that its windows are then.

    Maps are `[sides, images, height, width, heads, dim]`, unrolled ones `[sides, images, heads,
    num_rows, num_cols, dim]`: a row of a square is one run of memory.
    """

    rows: _Runs
    cols: _Runs
    num_rows: int
    num_cols: int
    steps: tuple[int, int]  # between windows
    square: tuple[int, int]  # rows and columns that a window takes
    count: tuple[int, int]  # rows and columns of windows

    @property
    def size(self) -> int:
        """Tokens of a window."""
        return prod(self.square)

    @property
    def is_view(self) -> bool:
        """Whether unrolling is no more than a slice: no border, no padding, no excluded key."""
        whole = ((0, self.num_rows), (0, self.num_cols))
        return whole == tuple(
            (runs[0][0], runs[0][2]) if len(runs) == 1 else None for runs in (self.rows, self.cols)
        )

    @property
    def shared(self) -> bool:
        """Whether several windows all take the whole map."""
        return self.steps == (0, 0) and self.count != (1, 1)

    @property
    def overlap(self) -> bool:
        """Whether windows share tokens."""
        return self.count != (1, 1) and self.steps != self.square

    def new_unrolled(self, like: Tensor, images: int) -> Tensor:
        """Zeros: padding and excluded keys are never written, and stay so."""
        sides, _, _, _, heads, dim = like.shape
        return like.new_zeros(sides, images, heads, self.num_rows, self.num_cols, dim)

    def unroll(self, source: Tensor, buffer: Tensor | None) -> Tensor:
        """The unrolled map: ``buffer`` filled, or a view of the source if that needs no buffer."""
        if buffer is None:
            return next(self._pieces(source))[0]
        for piece, place in self._pieces(source):
            _at(buffer, place).copy_(piece)
        return buffer

    def roll_up(self, unrolled: Tensor, into: Tensor) -> None:
        """Sum what `unroll` spread back into a map, whatever it held: the transpose."""
        pieces = list(self._pieces(into))
        whole = [piece.numel() == into.numel() for piece, _ in pieces]
        if True in whole:  # the map itself, between its borders
            piece, place = pieces.pop(whole.index(True))
            piece.copy_(_at(unrolled, place))
        else:
            into.zero_()
        for piece, place in pieces:
            piece += _at(unrolled, place)

    def _pieces(self, source: Tensor) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
        """Parts of the source `[sides, images, heads, rows, cols, dim]`, and where they go."""
        source = source.permute(0, 1, 4, 2, 3, 5)
        for place_row, row, height in self.rows:
            for place_col, col, width in self.cols:
                place = slice(place_row, place_row + height), slice(place_col, place_col + width)
                yield _at(source, (slice(row, row + height), slice(col, col + width))), place

    def windows(self, unrolled: Tensor) -> Tensor:
        """Overlapping view `[sides, images, win_rows, win_cols, heads, rows, cols, dim]`."""
        sides, images, heads, _, _, dim = unrolled.shape
        side, image, head, row, col, channel = unrolled.stride()
        return unrolled.as_strided(
            (sides, images, *self.count, heads, *self.square, dim),
            (side, image, row * self.steps[0], col * self.steps[1], head, row, col, channel),
        )

    def add_windows(self, squares: Tensor, windows: Tensor) -> None:
        """Add squares to the view that `windows` gives, or store them where none overlap."""
        if not self.overlap:
            windows.copy_(squares)
            return
        if self.shared:
            windows[:, :, 0, 0].add_(squares.sum(dim=(2, 3), dtype=windows.dtype))
            return
        # Windows `passes` apart do not overlap, so each of these sums writes a place once.
        passes = [-(-side // step) for side, step in zip(self.square, self.steps, strict=True)]
        for row in range(min(passes[0], windows.shape[2])):
            for col in range(min(passes[1], windows.shape[3])):
                apart = slice(row, None, passes[0]), slice(col, None, passes[1])
                where = (..., *apart, *_WHOLE)
                windows[where].add_(squares[where])


def _at(x: Tensor, place: tuple[slice, slice]) -> Tensor:
    return x[..., place[0], place[1], :]


@dataclass(frozen=True)
class Band:
    """A rectangle of windows, and which of its keys take no part."""

    rows: slice
    cols: slice
    mask: Tensor | None  # float32 0 or -inf, broadcasts to [windows, 1, queries, windowed keys]
    pairs: SharedPairs | None  # of keys that windows share
    no_key: bool  # whether a query is left without any key

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of windows."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def num_windows(self) -> int:
        """How many."""
        return self.shape[0] * self.shape[1]

    def of(self, windows: Tensor) -> Tensor:
        """This band's part of `[sides, images, win_rows, win_cols, ...]`."""
        return windows[:, :, self.rows, self.cols]

    def window_numbers(self, win_cols: int, device: torch.device) -> Tensor:
        """int64: the number of each window in a map that is ``win_cols`` windows wide."""
        row = torch.arange(self.rows.start, self.rows.stop, device=device)
        col = torch.arange(self.cols.start, self.cols.stop, device=device)
        return (row[:, None] * win_cols + col).flatten()


@dataclass(frozen=True)
class KeyLayout:
    """The columns of scores: windowed keys, then shared ones, then padding.

    `windowed` and `shared` are the places of these keys in canonical order, int64.
    """

    windowed: Tensor
    shared: Tensor
    num_shared: int  # columns, cells of the maps

    @property
    def num_columns(self) -> int:
        """All of them."""
        return -(-self.num_keys // _KEY_UNIT) * _KEY_UNIT

    @property
    def num_keys(self) -> int:
        """Without the padding."""
        return len(self.windowed) + self.num_shared


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
    slots = list(torch.arange(geometry.num_keys).split(geometry.keys_per_level))
    shared = [
        share and _sharing_pays(keys[:, slot], prod(grid))
        for slot, grid in zip(slots, grids, strict=True)
    ]
    whole_map = all(shared) and geometry.padded_size(*size) == tuple(size)
    if not whole_map:
        shared[0] = False
    order = sorted(range(len(shared)), key=lambda level: shared[level])  # windowed levels first
    layout = KeyLayout(
        torch.cat([slots[level] for level in order if not shared[level]] or [slots[0][:0]]),
        torch.cat([slots[level] for level in order if shared[level]] or [slots[0][:0]]),
        sum(prod(grids[level]) for level in order if shared[level]),
    )
    seam = geometry.seam_mask(*size) if geometry.shift else None
    excluded = (keys < 0)[:, None]  # [windows, 1 or queries, keys in canonical order]
    if seam is not None:
        excluded = excluded.repeat(1, geometry.num_queries, 1)
        excluded[:, :, geometry.window_key_slots()] |= seam

    window = (geometry.window_size, geometry.window_size)
    count = (1, 1) if whole_map else geometry.num_windows(*size)
    if whole_map:
        queries = _whole(size, count)
    else:
        lines = [
            [(place + geometry.shift) % side for place in range(side)]
            for side in geometry.padded_size(*size)
        ]
        queries = _patches(_stored(lines, size), window, window, count)
    levels = [
        _whole(grids[level], count) if shared[level] else _windowed(geometry, level, size, map_size)
        for level in order
    ]

    scores = num_heads * queries.size * layout.num_columns  # of a window
    fit = max(1, budget // scores)
    bands: list[Band] = []
    for rows in _split(count[0], max(1, fit // count[1])):
        for cols in _split(count[1], fit):
            numbers = torch.arange(prod(count)).view(count)[rows, cols].flatten()
            if whole_map:  # the only window stands for all of them
                numbers = torch.arange(len(keys))
            hidden = excluded[numbers]
            pairs = None
            if layout.num_shared:
                pairs = shared_pairs(
                    keys[numbers][:, layout.shared],
                    hidden[:, :, layout.shared],
                    [(len(slots[level]), prod(grids[level])) for level in order if shared[level]],
                    geometry.num_queries,
                    tokens=geometry.query_index(*size) if whole_map else None,
                ).to(device)
            no_key = bool(hidden.all(dim=-1).any())
            mask = _mask(hidden[:, None, :, layout.windowed], device, bands)
            bands.append(Band(rows, cols, mask, pairs, no_key))
    images = max(1, fit // prod(count))
    # Unrolled keys are to stay in the cache as well, beside the scores.
    unrolled = levels[0].num_rows * levels[0].num_cols * num_heads * _TYPICAL_HEAD_DIM
    loaded = images * max(1, budget // (unrolled * images))
    layout = KeyLayout(layout.windowed.to(device), layout.shared.to(device), layout.num_shared)
    return Plan(queries, tuple(levels), tuple(order), layout, tuple(bands), images, loaded)


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


def _whole(size: tuple[int, int], count: tuple[int, int]) -> Patches:
    """The map as it is, for every window."""
    rows, cols = size
    return Patches(((0, 0, rows),), ((0, 0, cols),), rows, cols, (0, 0), (rows, cols), count)


def _windowed(
    geometry: FocalGeometry, level: int, size: tuple[int, int], map_size: tuple[int, int]
) -> Patches:
    cells, region = geometry.cells(level), geometry.levels[level].region_size
    lines = [
        _unrolled_line(geometry.axis_index(level, side, real), cells)
        for side, real in zip(geometry.padded_size(*size), map_size, strict=True)
    ]
    if level == 0:
        lines = _stored(lines, size)
    return _patches(lines, (cells, cells), (region, region), geometry.num_windows(*size))


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


def _split(count: int, largest: int) -> list[slice]:
    """Near-equal slices of ``range(count)``, none longer than ``largest``."""
    parts = -(-count // largest)
    ends = [count * part // parts for part in range(parts + 1)]
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _stored(lines: list[list[int]], size: tuple[int, int]) -> list[list[int]]:
    """Coordinates beyond the map's storage, which are zero padding, become -1."""
    return [
        [place if place < side else -1 for place in line]
        for line, side in zip(lines, size, strict=True)
    ]


def _unrolled_line(axis: Tensor, cells: int) -> list[int]:
    """Coordinates along one unrolled axis, from those of its overlapping windows."""
    windows, region = axis.shape
    line = [-1] * ((windows - 1) * cells + region)
    for index, row in enumerate(axis.tolist()):
        line[index * cells : index * cells + region] = row
    return line


def _patches(
    lines: list[list[int]], steps: tuple[int, int], square: tuple[int, int], count: tuple[int, int]
) -> Patches:
    rows, cols = lines
    return Patches(_runs(rows), _runs(cols), len(rows), len(cols), steps, square, count)


def _runs(line: list[int]) -> _Runs:
    """Runs of consecutive source coordinates in an unrolled axis."""
    runs: list[tuple[int, int, int]] = []
    for place, source in enumerate(line):
        if source < 0:
            continue
        if runs:
            start, first, length = runs[-1]
            if start + length == place and first + length == source:
                runs[-1] = (start, first, length + 1)
                continue
        runs.append((place, source, 1))
    return tuple(runs)
