"""Floating-point operations of the operators, for `torch.utils.flop_counter.FlopCounterMode`.

A multiply-add counts as two operations, as everywhere in PyTorch's counter; papers count it once.
Products alone count, over every key of a region, beyond the edge or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kernels.geometry import decode_geometry

__all__ = ["backward_flops", "forward_flops"]


def _product(query_shape: Sequence[int], geometry_code: Sequence[int]) -> int:
    """Operations of one product over all pairs of queries and keys.

    The shape may be that of a map that holds query, key and value (`kernels.maps`).
    """
    batch, height, width, *_, heads, head_dim = query_shape
    geometry = decode_geometry(geometry_code)
    windows = math.prod(geometry.num_windows(height, width))
    return 2 * batch * windows * heads * geometry.num_queries * geometry.num_keys * head_dim


def forward_flops(query_shape: Sequence[int], geometry_code: Sequence[int]) -> int:
    """``q kᵀ`` and ``P v``."""
    return 2 * _product(query_shape, geometry_code)


def backward_flops(query_shape: Sequence[int], geometry_code: Sequence[int]) -> int:
    """``q kᵀ`` again, ``dO vᵀ``, ``dS k``, ``dSᵀ q`` and ``Pᵀ dO``."""
    return 5 * _product(query_shape, geometry_code)
