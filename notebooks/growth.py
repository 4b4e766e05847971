"""How far a query sees for the keys that it takes: focal attention beside standard attention.

Paper: arXiv 2107.00641, section 3.1 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from kernels import FocalGeometry, FocalLevel
from notebooks.figures import BLACK, LEVEL_COLOURS, RED

__all__ = ["Point", "clipped_field", "draw_growth", "focal_growth", "standard_growth"]


@dataclass(frozen=True)
class Point:
    """One geometry on the way.

    Args:
        keys: Keys of a query.
        field: Side of the square that it sees, in tokens.
        level: The level that grew last.
    """

    keys: int
    field: int
    level: int = 0


def focal_growth(geometry: FocalGeometry, map_side: int | None = None) -> list[Point]:
    """Grow the regions from the window to their full size, one level after the other.

    Args:
        geometry: What they grow to.
        map_side: Side of the map, beyond which there is nothing to see; None for no end.

    Returns:
        The steps that see further than the one before, and the whole geometry.
    """
    points: list[Point] = []
    for index, level in enumerate(geometry.levels):
        finer = geometry.levels[:index]
        for region in range(geometry.cells(index), level.region_size + 1, 2):
            grown = (*finer, FocalLevel(level.subwindow_size, region))
            part = FocalGeometry(geometry.window_size, grown)
            field = clipped_field(part, map_side)
            whole = part.levels == geometry.levels
            if whole or not points or field > points[-1].field:
                points.append(Point(part.num_keys, field, index))
    return points


def standard_growth(smallest: int, largest: int) -> list[Point]:
    """Attention to every token of a square."""
    squares = [FocalGeometry(side, (FocalLevel(1, side),)) for side in range(smallest, largest + 1)]
    return [Point(square.num_keys, square.receptive_field) for square in squares]


def clipped_field(geometry: FocalGeometry, map_side: int | None) -> int:
    """The receptive field on a map that may be smaller."""
    field = geometry.receptive_field
    return field if map_side is None else min(field, map_side)


def draw_growth(axes: Axes, focal: Sequence[Point], standard: Sequence[Point]) -> None:
    """Tokens seen against keys; each level of focal attention in its colour."""
    axes.plot(
        [point.keys for point in standard],
        [point.field**2 for point in standard],
        color=BLACK,
        linestyle="--",
        label="standard attention",
    )
    for level in sorted({point.level for point in focal}):
        line = [point for point in focal if point.level == level]
        first = focal.index(line[0])
        line = [*focal[max(first - 1, 0) : first], *line]  # from where the level before ended
        axes.plot(
            [point.keys for point in line],
            [point.field**2 for point in line],
            color=LEVEL_COLOURS[level],
            marker="o",
            markersize=4,
            label=f"focal attention, level {level} grows",
            zorder=3 - level / 10,
        )
    end = focal[-1]
    axes.annotate(
        f"{end.keys} keys see\n{end.field}² tokens",
        (end.keys, end.field**2),
        (8, -12),
        textcoords="offset points",
        fontsize=8,
        color=RED,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
    )
    axes.set_yscale("log")
    sides = [2**power for power in range(2, 8)]
    axes.set_yticks([side**2 for side in sides], [f"{side}²" for side in sides])
    axes.minorticks_off()
    axes.set(xlabel="keys per query", ylabel="receptive field (tokens)")
