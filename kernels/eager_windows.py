"""Where the eager backend finds windows in a map, and how it walks through them.

Index arithmetic that depends on sizes alone, made once per size and kept. Windows overlap, so a map
is first *unrolled*: its borders are attached by copying them once, and then the square that each
window attends is a strided view, with neither an index nor a mask. Windows are taken in *bands*,
rectangles of them whose scores fit a budget, so that what one step touches stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.geometry import FocalGeometry

__all__ = ["Band", "Patches", "Plan", "make_plan"]

_TYPICAL_HEAD_DIM = 32
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
    cells: int  # stride between windows
    region: int  # side of a window's square

    @property
    def is_view(self) -> bool:
        """Whether unrolling is no more than a slice: no border, no padding, no excluded key."""
        whole = ((0, self.num_rows), (0, self.num_cols))
        return whole == tuple(
            (runs[0][0], runs[0][2]) if len(runs) == 1 else None for runs in (self.rows, self.cols)
        )

    @property
    def overlap(self) -> bool:
        """Whether windows share tokens."""
        return self.region != self.cells

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
        """Overlapping view `[sides, images, win_rows, win_cols, heads, region, region, dim]`."""
        squares = unrolled.unfold(3, self.region, self.cells).unfold(4, self.region, self.cells)
        return squares.permute(0, 1, 3, 4, 2, 6, 7, 5)

    def add_windows(self, squares: Tensor, windows: Tensor) -> None:
        """Add squares to the view that `windows` gives, or store them where none overlap."""
        if not self.overlap:
            windows.copy_(squares)
            return
        # Windows `passes` apart do not overlap, so each of these sums writes a place once.
        passes = -(-self.region // self.cells)
        for row in range(min(passes, windows.shape[2])):
            for col in range(min(passes, windows.shape[3])):
                apart = (..., slice(row, None, passes), slice(col, None, passes), *_WHOLE)
                windows[apart].add_(squares[apart])


def _at(x: Tensor, place: tuple[slice, slice]) -> Tensor:
    return x[..., place[0], place[1], :]


@dataclass(frozen=True)
class Band:
    """A rectangle of windows, and which of its keys take no part."""

    rows: slice
    cols: slice
    mask: Tensor | None  # float32 0 or -inf, broadcasts to [windows, 1, queries, keys]
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

    def dense_bias(self, bias: Tensor) -> Tensor:
        """`[windows · heads, queries, keys]`, -inf where there is no key; shared by the images."""
        if self.mask is None:
            return bias.repeat(self.num_windows, 1, 1)
        return (bias + self.mask.to(bias.dtype)).flatten(0, 1)


@dataclass(frozen=True)
class Plan:
    """How maps of one size are worked through."""

    queries: Patches
    levels: tuple[Patches, ...]
    bands: tuple[Band, ...]
    images: int  # in a step
    loaded: int  # images unrolled at a time, a multiple of it
    num_windows: tuple[int, int]  # rows and columns of them in a map

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
) -> Plan:
    """Lay out windows and steps.

    Args:
        geometry: Window, levels, boundary and shift.
        size: Rows and columns of the map as stored.
        map_size: Rows and columns that are real.
        num_heads: Heads.
        device: Where masks are put.
        budget: Scores of one step; a step holds one window at least.
    """
    window, padded = geometry.window_size, geometry.padded_size(*size)
    query_lines = [[(place + geometry.shift) % side for place in range(side)] for side in padded]
    queries = _patches(_stored(query_lines, size), window, window)
    levels, excluded = [], []
    for level, spec in enumerate(geometry.levels):
        axes = [
            geometry.axis_index(level, side, real)
            for side, real in zip(padded, map_size, strict=True)
        ]
        cells = geometry.cells(level)
        lines = [_unrolled_line(axis, cells) for axis in axes]
        levels.append(
            _patches(_stored(lines, size) if level == 0 else lines, cells, spec.region_size)
        )
        no_row, no_col = (axis < 0 for axis in axes)
        outside = no_row[:, None, :, None] | no_col[None, :, None, :]
        excluded.append(outside.flatten(2))
    mask = torch.cat(excluded, dim=2)[:, :, None, :]  # [win_rows, win_cols, 1, keys]
    if geometry.shift:
        mask = mask.repeat(1, 1, geometry.num_queries, 1)
        seam = geometry.seam_mask(*size).view(*mask.shape[:3], -1)
        mask[..., geometry.window_key_slots()] |= seam

    win_rows, win_cols = mask.shape[:2]
    fit = max(1, budget // (num_heads * geometry.num_queries * geometry.num_keys))  # windows
    bands: list[Band] = []
    for rows in _split(win_rows, max(1, fit // win_cols)):
        for cols in _split(win_cols, fit):
            part = mask[rows, cols].flatten(0, 1)[:, None]
            bands.append(_band(rows, cols, part, device, bands))
    images = max(1, fit // (win_rows * win_cols))
    # Unrolled keys are to stay in the cache as well, beside the scores.
    unrolled = levels[0].num_rows * levels[0].num_cols * num_heads * _TYPICAL_HEAD_DIM
    loaded = images * max(1, budget // (unrolled * images))
    return Plan(queries, tuple(levels), tuple(bands), images, loaded, (win_rows, win_cols))


def _band(
    rows: slice, cols: slice, excluded: Tensor, device: torch.device, earlier: list[Band]
) -> Band:
    """A band; it shares its masks with an earlier one that has the same, as inner bands do."""
    if not excluded.any():
        return Band(rows, cols, None, no_key=False)
    mask = torch.zeros(excluded.shape, device=device)
    mask.masked_fill_(excluded.to(device), -torch.inf)
    for band in earlier:
        if band.mask is not None and torch.equal(band.mask, mask):
            return Band(rows, cols, band.mask, band.no_key)
    return Band(rows, cols, mask, no_key=bool(excluded.all(dim=-1).any()))


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


def _patches(lines: list[list[int]], cells: int, region: int) -> Patches:
    rows, cols = lines
    return Patches(_runs(rows), _runs(cols), len(rows), len(cols), cells, region)


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
