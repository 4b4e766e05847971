"""How a backward pass is cut into launches, programs and a workspace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from kernels.launch import Problem, Strides, cut_evenly
from kernels.launch_table import Tile
from kernels.tiles import Level

__all__ = ["GradientPlan"]

# Of the gradients' workspace. The second-level cache would hold 32 MiB, but launches that small
# leave a large GPU half empty and take longer to make than to run (docs/decisions.md).
WORKSPACE_BYTES = 2**28
# Of the gradient launches of a round: four waves of a large GPU. Fewer leave a long last wave, more
# sum the bias in more parts.
GRADIENT_PROGRAMS = 1024
LONGEST_AXIS = 2**16 - 1  # programs along the second and third axis of a grid


@dataclass(frozen=True)
class GradientLevel:
    """How the gradients of one level are cut into programs."""

    level: Level
    tiles: int
    first_tile: int  # among the key tiles of all levels
    start: int  # first cell in the packed maps
    cells: int  # of the level on the padded map


class GradientPlan:
    """How a backward pass is cut into launches and programs.

    Args:
        problem: The call.
        tile: Its launch configuration.
        maps: Strides of query, key, value and other maps that the kernels read or write.
    """

    def __init__(self, problem: Problem, tile: Tile, maps: Sequence[Strides]) -> None:
        self.problem, self.tile = problem, tile
        geometry, (height, width) = problem.geometry, problem.query_shape[1:3]
        cuts = [cut_evenly(keys, tile.block_n) for keys in geometry.keys_per_level]
        self.shape = problem.shape(cuts, tile.block_m, maps)
        self.levels: list[GradientLevel] = []
        first_tile = start = 0
        for index, level in enumerate(self.shape.levels):
            tiles = level.full // level.block
            cells = math.prod(geometry.map_cells(index, height, width))
            self.levels.append(GradientLevel(level, tiles, first_tile, start, cells))
            first_tile += tiles
            start += cells if index else 0
        self.num_tiles = first_tile

    @property
    def query_blocks(self) -> int:
        """Query tiles of a window."""
        return self.shape.m_pad // self.tile.block_m

    @cached_property
    def images(self) -> int:
        """Images whose parts the workspace holds at a time."""
        problem, shape = self.problem, self.shape
        widest = max(level.width for level in shape.levels)
        rows = self.num_tiles * shape.m_pad + 2 * self.query_blocks * widest
        per_window = problem.query_shape[3] * rows * shape.block_d * problem.dtype.itemsize
        fit = WORKSPACE_BYTES // (problem.num_windows * per_window)
        return max(1, min(fit, problem.query_shape[0], LONGEST_AXIS))

    @cached_property
    def groups(self) -> int:
        """Groups of windows, each summed by one program."""
        programs = self.num_tiles * self.query_blocks * self.problem.query_shape[3]
        items = self.images * self.problem.num_windows
        return min(items, -(-GRADIENT_PROGRAMS // programs))

    def workspace(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Empty parts of query, key and value gradients; see `kernels.backward`."""
        shape, heads = self.shape, self.problem.query_shape[3]
        items = self.images * self.problem.num_windows
        widest = max(level.width for level in shape.levels)
        keys = (items, heads, self.query_blocks, widest, shape.block_d)
        queries = (items, heads, self.num_tiles, shape.m_pad, shape.block_d)
        return like.new_empty(queries), like.new_empty(keys), like.new_empty(keys)

    def chunks(self) -> Iterator[range]:
        """Images of each round of launches."""
        batch = self.problem.query_shape[0]
        for start in range(0, batch, self.images):
            yield range(start, min(start + self.images, batch))
