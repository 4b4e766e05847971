"""Query, key and value as an operator takes them: three maps, or one that holds all three.

A projection makes the three side by side. Given as one, their gradient is one as well, and neither
autograd nor a compiler's graph copies three gradients together again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["apart", "as_given"]

_SIDE = 3  # the axis along which a single map holds the three


def apart(maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, each `[batch, height, width, heads, head_dim]`.

    Args:
        maps: These three, or one `[batch, height, width, 3, heads, head_dim]`, of which views are
            given.
    """
    query, key, value = maps[0].unbind(_SIDE) if len(maps) == 1 else maps
    return query, key, value


def as_given(packed: Tensor, count: int) -> list[Tensor]:
    """A gradient `[batch, height, width, 3, heads, head_dim]` as one map, or as three views."""
    return [packed] if count == 1 else list(packed.unbind(_SIDE))
