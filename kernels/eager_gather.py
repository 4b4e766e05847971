"""How the eager backend reads the windows of maps into products, and adds gradients back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from kernels.eager_plan import Band
from kernels.eager_windows import Patches

__all__ = ["Gathered", "Scratch"]


class Scratch:
    """Tensors that steps use again and again: fresh memory costs a page fault per 4 KiB."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """An uninitialised tensor; what an earlier one of that name held is lost."""
        size = prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size)
        return flat[:size].view(shape)


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
        self._sizes = [patch.size for patch in patches]
        self._windows: list[Tensor] = []

    def load(self, images: slice) -> None:
        """Take up images to be read."""
        self._windows = []
        for source, patch, buffer in self._levels:
            part = None if buffer is None else buffer[:, : images.stop - images.start]
            self._windows.append(patch.windows(patch.unroll(source[:, images], part)))

    def read(
        self, band: Band, images: slice, out: Scratch, name: str, size: int | None = None
    ) -> Tensor:
        """`[sides, images · windows · heads, size, dim]`, the levels one after another, then zeros.

        Args:
            band: Windows.
            images: Which of those that were taken up.
            out: Where the memory comes from.
            name: Its name there.
            size: Tokens of a window; None for no more than there are.
        """
        windows = [band.of(x[:, images]) for x in self._windows]
        *outer, _, _, dim = windows[0].shape
        count = sum(self._sizes)
        gathered = out(name, *outer, count if size is None else size, dim)
        start = 0
        for squares, tokens in zip(windows, self._sizes, strict=True):
            part = gathered.narrow(-2, start, tokens)
            part.unflatten(-2, squares.shape[-3:-1]).copy_(squares)
            start += tokens
        if size is not None and size > count:
            gathered[..., count:, :].zero_()
        return gathered.flatten(1, 4)

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
            self._windows.append(patch.windows(unrolled))

    def add(self, band: Band, images: slice, tokens: Tensor) -> None:
        """Add `[sides, images · windows · heads, tokens, dim]`: the transpose of `read`."""
        windows = [band.of(x[:, images]) for x in self._windows]
        parts = tokens.unflatten(1, windows[0].shape[1:5])
        start = 0
        for (_, patch, _), view in zip(self._levels, windows, strict=True):
            part = parts.narrow(-2, start, patch.size)
            patch.add_windows(part.unflatten(-2, patch.square), view)
            start += patch.size

    def finish_sum(self, images: slice) -> None:
        """Put the sums of these images into the maps."""
        for target, patch, buffer in self._levels:
            if buffer is not None:
                part = buffer[:, : images.stop - images.start]
                patch.roll_up(part, target[:, images])
