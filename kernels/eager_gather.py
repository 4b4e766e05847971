"""How the eager backend reads the windows of maps into products, and adds gradients back.

A step does little enough that the views it takes would count: those into memory that steps share
are cut once for all steps that are alike, and those into maps are one `as_strided` each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from math import prod

from torch import Tensor

from kernels.eager_plan import Band, Plan
from kernels.eager_windows import Patches, Windows

__all__ = ["Gathered", "Packed", "Workspace", "Workspaces"]


class Packed:
    """The tokens of a step's windows as products take them, the levels one after another.

    Args:
        tokens: `[sides, images, win_rows, win_cols, heads, size, dim]`; between products, memory of
            other sides may lie.
        patches: The levels. What they leave of ``size`` is padding.

    Attributes:
        sides: Of each side, `[images · windows · heads, size, dim]`.
        transposed: Of each side, `[images · windows · heads, dim, size]`.
        squares: Of each level, `[sides, images, win_rows, win_cols, heads, rows, cols, dim]`.
        padding: `[sides, images, win_rows, win_cols, heads, padding, dim]`, or None.
    """

    def __init__(self, tokens: Tensor, patches: Sequence[Patches]) -> None:
        self._patches = patches
        self.sides = tokens.flatten(1, 4).unbind(0)
        self.transposed = [side.mT for side in self.sides]
        ends = list(accumulate(patch.size for patch in patches))
        self.squares = [
            tokens[..., end - patch.size : end, :].unflatten(-2, patch.square)
            for patch, end in zip(patches, ends, strict=True)
        ]
        self.padding = tokens[..., ends[-1] :, :] if ends[-1] < tokens.shape[-2] else None

    @cached_property
    def apart(self) -> list[list[tuple[slice, slice, Tensor]]]:
        """Of each level, the squares in parts that do not overlap, with their rows and columns."""
        return [
            [
                (rows, cols, squares[:, :, rows, cols])
                for rows, cols in patch.apart(*squares.shape[2:4])
            ]
            for patch, squares in zip(self._patches, self.squares, strict=True)
        ]


class Workspace:
    """Memory of steps that are alike; each overwrites what the one before left.

    Args:
        plan: Windows.
        like: `[batch, height, width, heads, dim]`.
        flat: Memory by name, which workspaces share; filled here.
        images: In a step.
        band_shape: Rows and columns of windows in a step.
    """

    def __init__(
        self,
        plan: Plan,
        like: Tensor,
        flat: dict[str, Tensor],
        images: int,
        band_shape: tuple[int, int],
    ) -> None:
        self._plan = plan
        self._like = like
        self._flat = flat
        self._products = (images, *band_shape, like.shape[3])
        queries = plan.queries.size
        self.score_shape = (prod(self._products), queries, plan.keys.num_columns)

    @cached_property
    def query(self) -> Packed:
        """One side; `[products, queries, dim]`."""
        return self._packed("query", 1, [self._plan.queries])

    @cached_property
    def grad_out(self) -> Packed:
        """Like `query`."""
        return self._packed("gradient of the output", 1, [self._plan.queries])

    @cached_property
    def key_value(self) -> Packed:
        """Two sides; `[products, columns, dim]`."""
        columns = self._plan.keys.num_columns
        return self._packed("key and value", 2, self._plan.levels, columns)

    @cached_property
    def grad_key_value(self) -> Packed:
        """Like `key_value`, but each side in one piece, for products that are written there."""
        columns = self._plan.keys.num_columns
        shape = (2, *self._products, columns, self._like.shape[4])
        tokens = self._tensor("gradient of key and value", shape)
        return Packed(tokens, self._plan.levels)

    @cached_property
    def weights(self) -> Tensor:
        """`[products, queries, columns]`."""
        return self._tensor("weights", self.score_shape)

    @cached_property
    def grad_weights(self) -> Tensor:
        """`[products, queries, columns]`."""
        return self._tensor("gradient of the weights", self.score_shape)

    def _packed(
        self, name: str, sides: int, patches: Sequence[Patches], size: int | None = None
    ) -> Packed:
        size = patches[0].size if size is None else size
        # The sides of a product lie together: one copy then fills both, and threads, which share it
        # by halves of memory, each fill the products that they compute.
        shape = (*self._products, sides, size, self._like.shape[4])
        return Packed(self._tensor(name, shape).movedim(4, 0), patches)

    def _tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        # Fresh memory costs a page fault per 4 KiB.
        size = prod(shape)
        if name not in self._flat or self._flat[name].numel() < size:
            self._flat[name] = self._like.new_empty(size)
        return self._flat[name][:size].view(shape)


class Workspaces:
    """A workspace for each kind of step.

    Args:
        plan: Windows.
        like: `[batch, height, width, heads, dim]`.
    """

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self._plan = plan
        self._like = like
        self._flat: dict[str, Tensor] = {}
        self._found: dict[tuple[int, int, int], Workspace] = {}

    def of(self, band: Band, images: slice) -> Workspace:
        """Steps of as many images and windows have the same."""
        count = images.stop - images.start
        kind = count, *band.shape
        if kind not in self._found:
            self._found[kind] = Workspace(self._plan, self._like, self._flat, count, band.shape)
        return self._found[kind]


class Gathered:
    """Maps unrolled for some images at a time, then read or added to window by window.

    Args:
        maps: One per level, `[sides, batch, height, width, heads, dim]`. Keys and values are two
            sides of one map.
        patches: How each level is unrolled.
        images: Images unrolled at a time.
    """

    def __init__(self, maps: Sequence[Tensor], patches: Sequence[Patches], images: int) -> None:
        self._levels = [
            (x, patch, None if patch.is_view else patch.new_unrolled(x, images))
            for x, patch in zip(maps, patches, strict=True)
        ]
        self._windows: list[Windows] = []

    def load(self, images: slice) -> None:
        """Take up images to be read."""
        self._windows = []
        for source, patch, buffer in self._levels:
            part = None if buffer is None else buffer[:, : images.stop - images.start]
            self._windows.append(Windows(patch.unroll(source[:, images], part), patch))

    def read(self, band: Band, images: slice, into: Packed) -> Packed:
        """Fill ``into``, its padding with zeros.

        Args:
            band: Windows.
            images: Which of those that were taken up.
            into: As many images and windows.
        """
        for windows, squares in zip(self._windows, into.squares, strict=True):
            squares.copy_(windows.of(images, band.rows, band.cols))
        if into.padding is not None:
            into.padding.zero_()
        return into

    def start_sum(self, images: slice) -> None:
        """Take up images to be added to; what the maps hold there is lost."""
        self._windows = []
        for target, patch, buffer in self._levels:
            if buffer is None:
                unrolled = patch.unroll(target[:, images], None)
            else:
                unrolled = buffer[:, : images.stop - images.start]
            if patch.overlap:  # otherwise each place is stored, not added to
                unrolled.zero_()
            self._windows.append(Windows(unrolled, patch))

    def add(self, band: Band, images: slice, packed: Packed) -> None:
        """Add the windows: the transpose of `read`."""
        rows, cols = band.rows, band.cols
        levels = zip(self._levels, self._windows, packed.squares, strict=True)
        for level, ((target, patch, _), windows, squares) in enumerate(levels):
            if not patch.overlap:
                windows.of(images, rows, cols).copy_(squares)
            elif patch.shared:
                total = squares.sum(dim=(2, 3), keepdim=True, dtype=target.dtype)
                windows.of(images, rows[:1], cols[:1]).add_(total)
            else:
                for some_rows, some_cols, part in packed.apart[level]:
                    windows.of(images, rows[some_rows], cols[some_cols]).add_(part)

    def finish_sum(self, images: slice) -> None:
        """Put the sums of these images into the maps."""
        for target, patch, buffer in self._levels:
            if buffer is not None:
                part = buffer[:, : images.stop - images.start]
                patch.roll_up(part, target[:, images])
