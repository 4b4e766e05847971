"""Where the eager backend finds the windows of a map.

A level is read in one of two ways:

- *windowed*: windows overlap, so the map is first *unrolled*: its borders are attached by copying
  them once, and then the square that each window attends is a strided view, with neither an index
  nor a mask;
- *shared*: every window takes the whole map as it is (`kernels.eager_plan` says when).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from torch import Tensor

from kernels.geometry import FocalGeometry

__all__ = ["Patches", "Windows", "key_windows", "query_windows", "whole_map"]

_Runs = tuple[tuple[int, int, int], ...]  # (start when unrolled, start in the source, length)


@dataclass(frozen=True)
class Patches:
    """How a map is unrolled, and the overlapping squares that its windows are then.

    Maps are `[sides, images, height, width, heads, dim]`, unrolled ones `[sides, images, heads,
    num_rows, num_cols, dim]`: a row of a square is one run of memory, and rows lie apart, so that
    threads which share the windows of a column share hardly any of it.
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
        zeros = like.new_zeros(images, self.num_rows, sides, heads, self.num_cols, dim)
        return zeros.permute(2, 0, 3, 1, 4, 5)

    def unroll(self, source: Tensor, buffer: Tensor | None) -> Tensor:
        """The unrolled map: ``buffer`` filled, or a view of the source if that needs no buffer."""
        if buffer is None:
            return next(self._pieces(source))[0]
        for piece, place in self._pieces(source):
            _at(buffer, *place).copy_(piece)
        for echo, original in self._echoes(buffer):
            echo.copy_(original)
        return buffer

    def roll_up(self, unrolled: Tensor, into: Tensor) -> None:
        """Sum what `unroll` spread back into a map, whatever it held: the transpose.

        The unrolled map is used up.
        """
        for echo, original in reversed(self._echoes(unrolled)):
            original += echo
        pieces = list(self._pieces(into))
        whole = [piece.numel() == into.numel() for piece, _ in pieces]
        if True in whole:  # the map itself, between its borders
            piece, place = pieces.pop(whole.index(True))
            piece.copy_(_at(unrolled, *place))
        else:
            into.zero_()
        for piece, place in pieces:
            piece += _at(unrolled, *place)

    def _pieces(self, source: Tensor) -> Iterator[tuple[Tensor, tuple[slice, slice]]]:
        """Parts of the source `[sides, images, heads, rows, cols, dim]`, and where they go."""
        source = source.permute(0, 1, 4, 2, 3, 5)
        for place_row, row, height in _originals(self.rows)[0]:
            for place_col, col, width in _originals(self.cols)[0]:
                place = slice(place_row, place_row + height), slice(place_col, place_col + width)
                yield _at(source, slice(row, row + height), slice(col, col + width)), place

    def _echoes(self, unrolled: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Columns, then rows, that repeat others of an unrolled map, and those that they repeat."""
        everything = slice(None)
        cols, rows = (_originals(runs)[1] for runs in (self.cols, self.rows))
        return [
            (
                _at(unrolled, everything, slice(place, place + width)),
                _at(unrolled, everything, slice(start, start + width)),
            )
            for place, start, width in cols
        ] + [
            (
                _at(unrolled, slice(place, place + height), everything),
                _at(unrolled, slice(start, start + height), everything),
            )
            for place, start, height in rows
        ]

    def apart(self, rows: int, cols: int) -> Iterator[tuple[slice, slice]]:
        """Parts of ``rows × cols`` windows that do not overlap, unless all take the whole map."""
        if self.steps == (0, 0):
            return
        # Windows so many apart share nothing.
        passes = [-(-side // step) for side, step in zip(self.square, self.steps, strict=True)]
        for row in range(min(passes[0], rows)):
            for col in range(min(passes[1], cols)):
                yield slice(row, None, passes[0]), slice(col, None, passes[1])


class Windows:
    """An unrolled map, seen window by window.

    Each view is one `as_strided`: slices, one after another, would take longer than the small
    copies that they are for.

    Args:
        unrolled: `[sides, images, heads, num_rows, num_cols, dim]`.
        patches: How it was unrolled.
    """

    def __init__(self, unrolled: Tensor, patches: Patches) -> None:
        sides, _, heads, _, _, dim = unrolled.shape
        side, image, head, row, col, channel = unrolled.stride()
        self._map = unrolled
        self._sides = sides
        self._window = (heads, *patches.square, dim)
        self._starts = (image, row * patches.steps[0], col * patches.steps[1])
        self._strides = side, (head, row, col, channel)
        self._offset = unrolled.storage_offset()

    def of(self, images: slice, rows: range, cols: range) -> Tensor:
        """View `[sides, images, win_rows, win_cols, heads, rows, cols, dim]`; it may overlap."""
        image, row, col = self._starts
        side, window = self._strides
        start = images.start * image + rows.start * row + cols.start * col
        return self._map.as_strided(
            (self._sides, images.stop - images.start, len(rows), len(cols), *self._window),
            (side, image, row * rows.step, col * cols.step, *window),
            self._offset + start,
        )


def _at(x: Tensor, rows: slice, cols: slice) -> Tensor:
    return x[..., rows, cols, :]


@lru_cache(maxsize=256)
def _originals(runs: _Runs) -> tuple[_Runs, _Runs]:
    """Runs that are taken from the source, and those that repeat a part of the longest of them.

    The latter are `(start, start of the part, length)` when unrolled: under "wrap" the borders, of
    which there are many and which would be read from afar.
    """
    start, first, length = max(runs, key=lambda run: run[2])
    repeats = [
        place != start and first <= source and source + count <= first + length
        for place, source, count in runs
    ]
    return (
        tuple(run for run, repeat in zip(runs, repeats, strict=True) if not repeat),
        tuple(
            (place, start + source - first, count)
            for (place, source, count), repeat in zip(runs, repeats, strict=True)
            if repeat
        ),
    )


def whole_map(size: tuple[int, int], count: tuple[int, int]) -> Patches:
    """The map as it is, for every window."""
    rows, cols = size
    return Patches(((0, 0, rows),), ((0, 0, cols),), rows, cols, (0, 0), (rows, cols), count)


def key_windows(
    geometry: FocalGeometry, level: int, size: tuple[int, int], map_size: tuple[int, int]
) -> Patches:
    """The squares of keys that windows attend at a level of a map ``size`` large as stored."""
    cells, region = geometry.cells(level), geometry.levels[level].region_size
    lines = [
        _unrolled_line(geometry.axis_index(level, side, real), cells)
        for side, real in zip(geometry.padded_size(*size), map_size, strict=True)
    ]
    if level == 0:
        lines = _stored(lines, size)
    return _patches(lines, (cells, cells), (region, region), geometry.num_windows(*size))


def query_windows(geometry: FocalGeometry, size: tuple[int, int]) -> Patches:
    """The windows themselves in a map ``size`` large as stored."""
    window = (geometry.window_size, geometry.window_size)
    lines = [
        [(place + geometry.shift) % side for place in range(side)]
        for side in geometry.padded_size(*size)
    ]
    return _patches(_stored(lines, size), window, window, geometry.num_windows(*size))


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
