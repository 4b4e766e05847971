"""Memory for the attention weights that the eager backend keeps for backward.

They lie step after step in a few pieces, which the C library hands out again at the next call; a
piece for each step would be many small ones, one for a call so large that its memory is fresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from kernels.eager_plan import Plan

__all__ = ["Kept", "piece_sizes"]

# Weights of a piece: 16 MiB in float32. What is larger than 32 MiB the C library takes from the
# kernel anew each time, which clears every page of it.
KEPT_TOGETHER = 2**22


def piece_sizes(plan: Plan, batch: int, heads: int) -> list[int] | None:
    """Numbers in each piece, for the weights of all steps in order; None for none."""
    sizes: list[int] = []
    for loaded in plan.loads(batch):
        for band, images in plan.steps(loaded):
            size = (images.stop - images.start) * heads * plan.num_scores(band)
            if sizes and sizes[-1] + size <= KEPT_TOGETHER:
                sizes[-1] += size
            else:
                sizes.append(size)
    # None rather than an empty list, which the operator's registration takes for one of tensors.
    return sizes or None


class Kept:
    """Hands out the pieces, one step's weights after another's.

    Args:
        memory: The pieces, of `piece_sizes` numbers or more.
    """

    def __init__(self, memory: Sequence[Tensor]) -> None:
        self._memory = iter(memory)
        self._rest: Tensor | None = None

    def next(self, shape: Sequence[int]) -> Tensor:
        """The next step's."""
        size = prod(shape)
        if self._rest is None or len(self._rest) < size:
            self._rest = next(self._memory)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken.view(shape)
