"""Index arithmetic of focal attention: levels, regions, borders, key order, receptive field.

Section 3.2 of the paper (Yang et al., "Focal Self-attention for Local-Global Interactions in Vision
Transformers", NeurIPS 2021, arXiv 2107.00641) cuts a feature map into square windows whose queries
share one set of keys, gathered at several granularities. This file says which keys those are. It
holds no parameter and touches no feature, so the kernels, the oracle, the model, the tests and the
plots all take their facts from here.

Coordinates. A map of ``height × width`` tokens is first padded right and bottom to a multiple of
the window, then read rolled by ``(-shift, -shift)``: row ``r`` of the rolled map is row
``(r + shift) % padded_height`` of the padded map. Windows, regions and pooled cells live in the
rolled map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BOUNDARIES = ("wrap", "mask")

__all__ = ["BOUNDARIES", "FocalGeometry", "FocalLevel"]


@dataclass(frozen=True)
class FocalLevel:
    """One granularity of focal attention (paper, section 3.2: s_w and s_r).

    Args:
        subwindow_size: Side, in tokens, of the square that is pooled into one key; 1 at level 0.
        region_size: Side of the attended square, counted in pooled cells.
    """

    subwindow_size: int
    region_size: int

    def __post_init__(self) -> None:
        for name in ("subwindow_size", "region_size"):
            _check_positive_int(name, getattr(self, name))


@dataclass(frozen=True)
class FocalGeometry:
    """Which keys a window attends, level by level.

    Keys come in canonical order: level after level, each region row-major.

    Args:
        window_size: Side, in tokens, of the square of queries that share one set of keys (s_p).
        levels: `FocalLevel`s, or ``(subwindow_size, region_size)`` pairs, finest first. The first
            one is made of the tokens themselves, so its ``subwindow_size`` is 1.
        boundary: What a fine key beyond the edge is. ``"wrap"``: the token on the opposite side, as
            in the released code. ``"mask"``: no key. Coarse keys beyond the edge are never keys.
        shift: Tokens by which the map is rolled up and left before it is cut into windows;
            in-window pairs from different sides of the seam are masked.

    Raises:
        TypeError: A size is no integer, or a level is neither a `FocalLevel` nor a pair.
        ValueError: A size breaks the rule ``region_size - window_size / subwindow_size`` even and
            not negative, or ``boundary`` or ``shift`` is out of range.
    """

    window_size: int
    levels: tuple[FocalLevel, ...]
    boundary: str = "wrap"
    shift: int = 0

    def __post_init__(self) -> None:
        _check_positive_int("window_size", self.window_size)
        levels = tuple(_as_level(level) for level in self.levels)
        object.__setattr__(self, "levels", levels)
        if not levels:
            raise ValueError("levels must hold at least the finest level, got none")
        if levels[0].subwindow_size != 1:
            raise ValueError(
                "levels[0] is made of the tokens themselves: its subwindow_size must be 1, "
                f"got {levels[0].subwindow_size}"
            )
        for index, level in enumerate(levels):
            self._check_level(index, level)
        if self.boundary not in BOUNDARIES:
            raise ValueError(f"boundary must be one of {BOUNDARIES}, got {self.boundary!r}")
        if isinstance(self.shift, bool) or not isinstance(self.shift, int):
            raise TypeError(f"shift must be an integer, got {self.shift!r}")
        if not 0 <= self.shift < self.window_size:
            raise ValueError(
                f"shift must lie in [0, window_size={self.window_size}), got {self.shift}"
            )

    def _check_level(self, index: int, level: FocalLevel) -> None:
        window, sub, region = self.window_size, level.subwindow_size, level.region_size
        sizes = f"window_size={window}, subwindow_size={sub}, region_size={region}"
        if window % sub:
            raise ValueError(
                f"levels[{index}]: window_size / subwindow_size must be a whole number, got {sizes}"
            )
        spare = region - window // sub
        if spare < 0 or spare % 2:
            raise ValueError(
                f"levels[{index}]: region_size - window_size / subwindow_size must be even and not "
                f"negative, so that the region is centred on the window, got {sizes}"
            )

    # -- sizes of a level ---------------------------------------------------------------------

    def cells(self, level: int) -> int:
        """Pooled cells along one side of a window at ``level``."""
        return self.window_size // self.levels[level].subwindow_size

    def margin(self, level: int) -> int:
        """Cells that the region reaches beyond the window on each side at ``level``."""
        return (self.levels[level].region_size - self.cells(level)) // 2

    @property
    def keys_per_level(self) -> tuple[int, ...]:
        """Keys of a window at each level, those beyond the edge included."""
        return tuple(level.region_size**2 for level in self.levels)

    @property
    def num_keys(self) -> int:
        """Keys of a window over all levels, those beyond the edge included."""
        return sum(self.keys_per_level)

    @property
    def num_queries(self) -> int:
        """Queries of a window."""
        return self.window_size**2

    @property
    def receptive_field(self) -> int:
        """Side, in tokens, of the largest square that a window attends."""
        return max(level.subwindow_size * level.region_size for level in self.levels)

    # -- sizes of a map -----------------------------------------------------------------------

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """``(height, width)`` rounded up to multiples of the window."""
        window = self.window_size
        return -(-height // window) * window, -(-width // window) * window

    def num_windows(self, height: int, width: int) -> tuple[int, int]:
        """Windows along each axis of a padded ``height × width`` map."""
        return -(-height // self.window_size), -(-width // self.window_size)

    def map_cells(self, level: int, height: int, width: int) -> tuple[int, int]:
        """Cells along each axis of the padded map, pooled for ``level``."""
        rows, cols = self.num_windows(height, width)
        return rows * self.cells(level), cols * self.cells(level)

    def coarse_starts(self, height: int, width: int) -> list[int]:
        """First cell of each coarse level in packed maps, and at the end the number of cells."""
        levels = range(1, len(self.levels))
        counts = (math.prod(self.map_cells(level, height, width)) for level in levels)
        return list(itertools.accumulate(counts, initial=0))

    # -- indices ------------------------------------------------------------------------------

    def query_index(self, height: int, width: int) -> Tensor:
        """Flat index, in the padded map, of the queries of each window.

        Returns:
            int64 `[num_windows, window_size²]`, windows and queries row-major. Entry
            ``r * padded_width + c`` is the token in row ``r``, column ``c``.
        """
        padded = self.padded_size(height, width)
        rows, cols = (
            torch.arange(side).add(self.shift).remainder(side).view(-1, self.window_size)
            for side in padded
        )
        return _outer_index(rows, cols, padded[1])

    def key_index(
        self, height: int, width: int, *, map_size: tuple[int, int] | None = None
    ) -> Tensor:
        """Where each key of each window is found.

        Args:
            height: Rows of the map.
            width: Columns of the map.
            map_size: Rows and columns that hold real tokens, where the map was padded beforehand;
                ``(height, width)`` if None. It matters under ``boundary="mask"`` alone.

        Returns:
            int64 `[num_windows, num_keys]`, windows row-major, keys in canonical order. At level 0
            an entry is a flat index into the padded map (the roll of ``shift`` undone), at a coarse
            level a flat index into that level's ``map_cells`` grid, and -1 where there is no key.
        """
        real = map_size or (height, width)
        blocks = []
        for level in range(len(self.levels)):
            rows, cols = (
                self.axis_index(level, side, real_side)
                for side, real_side in zip(self.padded_size(height, width), real, strict=True)
            )
            # At level 0 a cell is a token, so map_cells is the padded map's size there.
            blocks.append(_outer_index(rows, cols, self.map_cells(level, height, width)[1]))
        return torch.cat(blocks, dim=1)

    def axis_index(self, level: int, side: int, real_side: int) -> Tensor:
        """Coordinates of the keys of one level along one axis; `key_index` is their product.

        Args:
            level: Index into ``levels``.
            side: Padded side of the map along the axis, in tokens.
            real_side: Tokens of it that are real.

        Returns:
            int64 `[windows, region_size]`: a row or column of the padded map (level 0) or of the
            level's grid of cells, -1 where there is no key.
        """
        sub, region = self.levels[level].subwindow_size, self.levels[level].region_size
        origin = torch.arange(side // self.window_size) * self.cells(level) - self.margin(level)
        cell = origin[:, None] + torch.arange(region)  # in the rolled map, in cells
        grid_side = side // sub
        inside = (cell >= 0) & (cell < grid_side)
        if level == 0:
            source = (cell + self.shift).remainder(side)
            if self.boundary == "mask":
                source = source.where(inside & (source < real_side), -1)
            return source
        if self.boundary == "mask":  # a cell that holds padding alone is no key either
            first = (cell * sub + self.shift).remainder(side)
            inside = inside & ((first < real_side) | (first + sub > side))
        return cell.where(inside, -1)

    def window_key_slots(self) -> Tensor:
        """Positions, in canonical order, of the keys that lie in the window itself.

        Returns:
            int64 `[window_size²]`, row-major over the window.
        """
        side = torch.arange(self.window_size) + self.margin(0)
        return (side[:, None] * self.levels[0].region_size + side).flatten()

    def seam_mask(self, height: int, width: int) -> Tensor:
        """In-window pairs that the roll of ``shift`` brought together from two sides of the map.

        Returns:
            bool `[num_windows, window_size², window_size²]` (query, key), true where the pair takes
            no part, as in Swin.
        """
        sides = []
        for side in self.padded_size(height, width):
            sides.append((torch.arange(side) >= side - self.shift).view(-1, self.window_size))
        group = _outer_index(sides[0].long(), sides[1].long(), 2)
        return group[:, :, None] != group[:, None, :]


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be positive, got {value}")


def _as_level(level: FocalLevel | Sequence[int]) -> FocalLevel:
    if isinstance(level, FocalLevel):
        return level
    if isinstance(level, Sequence) and not isinstance(level, str) and len(level) == 2:
        return FocalLevel(*level)
    raise TypeError(
        f"a level must be a FocalLevel or a pair (subwindow_size, region_size), got {level!r}"
    )


def _outer_index(rows: Tensor, cols: Tensor, stride: int) -> Tensor:
    """Row-major product of `[row_windows, m]` and `[col_windows, n]` coordinates; -1 spreads."""
    row = rows[:, None, :, None]
    col = cols[None, :, None, :]
    index = (row * stride + col).where((row >= 0) & (col >= 0), -1)
    return index.reshape(rows.shape[0] * cols.shape[0], -1)


def index_tables(
    geometry: FocalGeometry,
    height: int,
    width: int,
    map_size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """`query_index`, `key_index` and `seam_mask` on ``device``."""
    return (
        geometry.query_index(height, width).to(device),
        geometry.key_index(height, width, map_size=map_size).to(device),
        geometry.seam_mask(height, width).to(device),
    )


def encode_geometry(geometry: FocalGeometry) -> list[int]:
    """A geometry as plain integers, the only form that a registered operator can take."""
    sizes = [n for level in geometry.levels for n in (level.subwindow_size, level.region_size)]
    return [geometry.window_size, geometry.shift, BOUNDARIES.index(geometry.boundary), *sizes]


def decode_geometry(code: Sequence[int]) -> FocalGeometry:
    """The geometry that `encode_geometry` wrote."""
    return _decode(tuple(int(number) for number in code))


@lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> FocalGeometry:
    window, shift, boundary, *sizes = code
    levels = tuple(FocalLevel(*pair) for pair in zip(sizes[::2], sizes[1::2], strict=True))
    return FocalGeometry(window, levels, BOUNDARIES[boundary], shift)
