"""The keys of a window, drawn on the map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from kernels import FocalGeometry
from notebooks.figures import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY

__all__ = ["draw_level", "legend_entries"]

KINDS = {
    "window": ("key in the window", BLUE),
    "ring": ("key around the window", SKY),
    "wrapped": ("key from the opposite side", ORANGE),
    "parted": ("key beyond the seam, masked", GREY),
    "pooled": ("pooled key (sub-window)", GREEN),
}


def legend_entries() -> list[Patch]:
    """Handles that explain the colours of `draw_level`."""
    keys = [Patch(facecolor=colour, alpha=0.75, label=text) for text, colour in KINDS.values()]
    return [*keys, Patch(facecolor=PURPLE, alpha=0.25, label="padding")]


def draw_level(
    axes: Axes,
    geometry: FocalGeometry,
    size: tuple[int, int],
    window: tuple[int, int],
    level: int,
    query: tuple[int, int] | None = None,
) -> int:
    """Draw the keys of one level.

    Args:
        axes: Where.
        geometry: Windows, levels, border and shift.
        size: Rows and columns of the map.
        window: Row and column of the window, counted in windows of the rolled map.
        level: Which level.
        query: Row and column, inside the window, of the query; None for the one in the middle.

    Returns:
        How many keys the query has at this level.

    Raises:
        ValueError: There is no such window or query.
    """
    rows, cols = geometry.num_windows(*size)
    if not (0 <= window[0] < rows and 0 <= window[1] < cols):
        raise ValueError(f"window must lie in the {rows} by {cols} windows, got {window}")
    query = query or (geometry.window_size // 2,) * 2
    if not all(0 <= place < geometry.window_size for place in query):
        raise ValueError(f"query must lie in a window of {geometry.window_size}, got {query}")
    number = window[0] * cols + window[1]
    height, width = geometry.padded_size(*size)
    token = query[0] * geometry.window_size + query[1]
    index = geometry.key_index(*size)[number].split(geometry.keys_per_level)[level]
    kinds = _fine_kinds(geometry, size, number, token, index) if level == 0 else None
    if kinds is None:
        for cell in index[index >= 0].tolist():
            _draw_cell(axes, geometry, (height, width), level, cell)
        count = int((index >= 0).sum())
    else:
        for kind, places in kinds.items():
            for place in places.tolist():
                _square(axes, divmod(place, width), 1, KINDS[kind][1])
        count = sum(len(places) for kind, places in kinds.items() if kind != "parted")
    queries = geometry.query_index(*size)[number]
    _outline(axes, queries, width)
    row, col = divmod(int(queries[token]), width)
    axes.plot(col + 0.5, row + 0.5, "o", color="white", markeredgecolor=BLACK, markersize=4)
    _draw_frame(axes, size, (height, width), geometry)
    return count


def _fine_kinds(
    geometry: FocalGeometry, size: tuple[int, int], number: int, token: int, index: Tensor
) -> dict[str, Tensor]:
    """Flat index of the fine keys in the padded map, by kind."""
    # Under the other border the keys beyond the edge are none.
    masked = replace(geometry, boundary="mask").key_index(*geometry.padded_size(*size))
    slots = geometry.window_key_slots()
    parted = geometry.seam_mask(*size)[number, token]
    in_window = torch.zeros(len(index), dtype=torch.bool)
    in_window[slots] = True
    is_parted = torch.zeros(len(index), dtype=torch.bool)
    is_parted[slots] = parted
    beyond = masked[number, : len(index)] < 0
    exists = index >= 0
    chosen = {
        "window": in_window & ~is_parted & exists,
        "ring": ~in_window & ~beyond & exists,
        "wrapped": beyond & exists,
        "parted": is_parted & exists,
    }
    return {kind: index[which] for kind, which in chosen.items()}


def _draw_cell(
    axes: Axes, geometry: FocalGeometry, padded: tuple[int, int], level: int, cell: int
) -> None:
    """A pooled cell; under a shift it may lie on two sides of the map."""
    side = geometry.levels[level].subwindow_size
    place = divmod(cell, padded[1] // side)
    row, col = (
        (part * side + geometry.shift) % extent for part, extent in zip(place, padded, strict=True)
    )
    for top in _copies(row, side, padded[0]):
        for left in _copies(col, side, padded[1]):
            _square(axes, (top, left), side, KINDS["pooled"][1])


def _copies(start: int, side: int, extent: int) -> Iterator[int]:
    yield start
    if start + side > extent:
        yield start - extent


def _square(axes: Axes, corner: tuple[int, int], side: int, colour: str) -> None:
    gap = 0.06 * side**0.5
    patch = Rectangle(
        (corner[1] + gap, corner[0] + gap),
        side - 2 * gap,
        side - 2 * gap,
        facecolor=colour,
        alpha=0.75,
        linewidth=0,
    )
    axes.add_patch(patch)


def _outline(axes: Axes, queries: Tensor, width: int) -> None:
    """A line around the window, which a shift may cut into parts on different sides."""
    tokens = {divmod(place, width) for place in queries.tolist()}
    for row, col in tokens:
        edges = {
            (row - 1, col): ((col, col + 1), (row, row)),
            (row + 1, col): ((col, col + 1), (row + 1, row + 1)),
            (row, col - 1): ((col, col), (row, row + 1)),
            (row, col + 1): ((col + 1, col + 1), (row, row + 1)),
        }
        for neighbour, line in edges.items():
            if neighbour not in tokens:
                axes.plot(*line, color=BLACK, linewidth=1.6, solid_capstyle="butt", clip_on=False)


def _draw_frame(
    axes: Axes, size: tuple[int, int], padded: tuple[int, int], geometry: FocalGeometry
) -> None:
    """The map's tokens as a faint grid, and the padding around it."""
    (rows, cols), (height, width) = size, padded
    below, right = ((0, rows), width, height - rows), ((cols, 0), width - cols, rows)
    for corner, across, down in (below, right):
        if across and down:
            padding = Rectangle(corner, across, down, facecolor=PURPLE, alpha=0.25, linewidth=0)
            axes.add_patch(padding)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    axes.set_xticks(range(0, width + 1, geometry.window_size))
    axes.set_yticks(range(0, height + 1, geometry.window_size))
    axes.set_xticks(range(width + 1), minor=True)
    axes.set_yticks(range(height + 1), minor=True)
    axes.grid(which="minor", color="#DDDDDD", linewidth=0.4, alpha=1)
    axes.grid(which="major", visible=False)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.spines[["top", "right"]].set_visible(True)
