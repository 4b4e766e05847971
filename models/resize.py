"""Parameters that belong to a window, region or map size, resampled for another one.

Paper: for detection the regions grow and the bias tables are resized bilinearly (arXiv 2107.00641,
appendix; recalled). Origin: written from that sentence. What differs: the ring is resized too, by
sampling the whole fine region, of which it is the outer part.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from models.bias import relative_index
from models.layers import resize_map

__all__ = ["resize_parameter"]


def resize_parameter(
    name: str, tensor: Tensor, shape: torch.Size, window: Tensor | None
) -> Tensor | None:
    """``tensor`` for a model whose parameter ``name`` has ``shape``.

    Args:
        name: One of our parameter names.
        tensor: The parameter as saved.
        shape: The shape to come to.
        window: The window table of the same block as saved, which completes a ring; None if there
            is none.

    Returns:
        The resampled parameter, or None where it differs by more than a window, region or map size.
    """
    if tensor.dim() != len(shape):
        return None
    x = tensor if tensor.dtype == torch.float64 else tensor.float()
    if name == "pos_embed" and tensor.shape[3] == shape[3]:
        return resize_map(x, shape[1], shape[2])
    if ".attn.pools." in name and name.endswith("weight"):
        return _resize_pool(x, shape)
    if ".attn.bias." not in name or tensor.shape[0] != shape[0]:
        return None
    if name.endswith(".ring"):
        return None if window is None else _resize_ring(x, window.to(x), shape)
    side = isqrt(x.shape[1])
    if side**2 != x.shape[1]:
        return None
    return _resample(x.unflatten(1, (side, side)), isqrt(shape[1])).flatten(1)


def _resample(planes: Tensor, side: int) -> Tensor:
    """`[n, side, side]` planes to another side, bilinearly."""
    return F.interpolate(planes[None], (side, side), mode="bilinear", align_corners=False)[0]


def _resize_pool(weight: Tensor, shape: torch.Size) -> Tensor | None:
    """Pooling weights of another sub-window, scaled so that their sum keeps its meaning."""
    if weight.shape[:-2] != shape[:-2]:
        return None
    planes = _resample(weight.reshape(-1, *weight.shape[-2:]), shape[-1]).view(shape)
    return planes * (weight.shape[-1] / shape[-1]) ** 2


def _resize_ring(ring: Tensor, window_table: Tensor, shape: torch.Size) -> Tensor | None:
    """A ring for another window or expansion: fill in the window, resample, take the ring out."""
    heads = ring.shape[0]
    old_window, old_region = _ring_sides(ring.shape)
    window, region = _ring_sides(shape)
    if window_table.shape != (heads, (2 * old_window - 1) ** 2):
        return None
    inner = _inner(old_window, old_region)
    fine = ring.new_empty(heads, old_window**2, old_region**2)
    fine[:, :, ~inner] = ring
    fine[:, :, inner] = window_table[:, relative_index(old_window, old_window)]
    # Keys first, then queries: a bilinear resampling of four axes, two at a time.
    fine = _resample(fine.view(-1, old_region, old_region), region)
    fine = fine.view(heads, old_window, old_window, region**2).permute(0, 3, 1, 2)
    fine = _resample(fine.reshape(-1, old_window, old_window), window)
    fine = fine.view(heads, region**2, window**2).transpose(1, 2)
    return fine[:, :, ~_inner(window, region)]


def _ring_sides(shape: torch.Size) -> tuple[int, int]:
    """Sides of the window and of the region of a ring `[heads, window², cells]`."""
    return isqrt(shape[1]), isqrt(shape[1] + shape[2])


def _inner(window: int, region: int) -> Tensor:
    """bool `[region²]`: cells that lie in the window."""
    inner = torch.zeros(region, region, dtype=torch.bool)
    margin = (region - window) // 2
    inner[margin : margin + window, margin : margin + window] = True
    return inner.flatten()
