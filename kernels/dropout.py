"""The dropout mask of attention weights as a function of a seed and a position.

A counter-based mask needs no memory: forward and backward, and every backend, compute the same bit
from the same seed. `keep_mask` is the definition; `triton_keep` in the kernels repeats it on tiles.
The mixing function is the 32-bit finaliser of MurmurHash3 (public domain), applied twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["draw_seed", "keep_mask", "keep_threshold", "row_index"]

_MASK32 = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from PyTorch's generator of ``device``: int64 `[1]`, never read by the host."""
    return torch.randint(0, 2**31 - 1, (1,), device=device, dtype=torch.int64)


def keep_threshold(dropout_p: float) -> int:
    """A hash of 32 bits keeps its weight where it is at least this number."""
    return min(round(dropout_p * 2**32), 2**32 - 1)


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def keep_mask(
    seed: Tensor, dropout_p: float, row: Tensor, num_queries: int, num_keys: int
) -> Tensor:
    """True where a weight is kept.

    Args:
        seed: int64 `[1]`.
        dropout_p: Probability that a weight is dropped, in [0, 1).
        row: int64, any shape: the number of a (batch, window, head), see `row_index`.
        num_queries: Queries of a window.
        num_keys: Keys of a window.

    Returns:
        bool `[*row.shape, num_queries, num_keys]`; an entry depends on the seed and its own indices
        alone.
    """
    start = _mix((row ^ seed) & _MASK32)[..., None]
    pair = torch.arange(num_queries * num_keys, device=row.device, dtype=torch.int64)
    hashed = _mix((start + pair * 0x9E3779B1) & _MASK32)
    return (hashed >= keep_threshold(dropout_p)).unflatten(-1, (num_queries, num_keys))


def row_index(batch: Tensor, window: Tensor, num_windows: int, num_heads: int) -> Tensor:
    """int64 `[batch, window, head]`: ``(batch · num_windows + window) · num_heads + head``."""
    head = torch.arange(num_heads, device=batch.device)
    return (batch[:, None, None] * num_windows + window[:, None]) * num_heads + head
