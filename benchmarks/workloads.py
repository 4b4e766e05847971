"""What the attention benchmark computes: its cases, and the least work that each asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from benchmarks.codegen import RELEASED, Case
from kernels import FocalGeometry, FocalLevel

__all__ = [
    "FORWARD",
    "TRAINING",
    "WORKS",
    "pairs",
    "plain_windows",
    "released_cases",
    "tiny_cases",
    "useful_work",
]

FORWARD, TRAINING = WORKS = ("forward", "forward + backward")


def released_cases(pixels: Sequence[int], images: int) -> list[Case]:
    """Stages 1 to 4 at each image size; ``images`` of 224 pixels or as many tokens."""
    cases = []
    for size in pixels:
        for stage, case in RELEASED.items():
            side = size // 2 ** (stage + 1)
            batch = max(1, images * 224**2 // size**2)
            name = f"{case.name}, {size} px"
            cases.append(replace(case, name=name, height=side, width=side, batch=batch))
    return cases


def plain_windows(pixels: int, images: int) -> list[Case]:
    """Shifted window attention as in Swin: one level, no ring."""
    geometry = FocalGeometry(7, (FocalLevel(1, 7),), shift=3)
    return [
        replace(case, name=case.name.replace("stage", "Swin stage"), geometry=geometry)
        for case in released_cases([pixels], images)
        if case.height > 7
    ]


def tiny_cases() -> list[Case]:
    """Sizes for a CPU: both boundaries, shift, padding, one to three levels."""
    wrapped = FocalGeometry(3, (FocalLevel(1, 5), FocalLevel(3, 3)))
    masked = FocalGeometry(4, (FocalLevel(1, 6), FocalLevel(2, 4)), "mask", 2)
    plain = FocalGeometry(4, (FocalLevel(1, 4),), shift=2)
    return [
        Case("tiny", wrapped, 4, 7, 1, 16, 1),
        Case("tiny, masked and shifted", masked, 5, 7, 1, 16, 2),
        Case("tiny, plain windows", plain, 4, 6, 2, 16, 1),
    ]


@lru_cache(maxsize=64)  # a case has many rows
def pairs(case: Case) -> int:
    """Distinct pairs of a stored query and a key that take part, in one head of one image."""
    geometry, size = case.geometry, (case.height, case.width)
    query_index, key_index = geometry.query_index(*size), geometry.key_index(*size)
    padded_width = geometry.padded_size(*size)[1]
    stored = (query_index // padded_width < size[0]) & (query_index % padded_width < size[1])
    keys = torch.zeros(len(key_index), dtype=torch.int64)
    for index in key_index.split(geometry.keys_per_level, dim=1):
        ordered = index.sort(dim=1).values
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        keys += (first & (ordered >= 0)).sum(1)
    # A pair that a seam parts takes part all the same if the window meets the key around it again.
    in_window = torch.zeros(geometry.keys_per_level[0], dtype=torch.bool)
    in_window[geometry.window_key_slots()] = True
    fine = key_index[:, : len(in_window)]
    inside, around = fine[:, in_window], fine[:, ~in_window]
    parted = (inside >= 0) & ~(inside[:, :, None] == around[:, None, :]).any(2)
    apart = geometry.seam_mask(*size) & stored[:, :, None] & parted[:, None, :]
    return int((stored.sum(1) * keys).sum() - apart.sum())


def useful_work(case: Case, dtype: torch.dtype, work: str) -> tuple[float, float]:
    """Floating-point operations and least bytes; backward has five products where forward has 2."""
    product = 2 * pairs(case) * case.batch * case.heads * case.head_dim
    one_map = case.batch * case.height * case.width * case.heads * case.head_dim * dtype.itemsize
    bias = case.heads * case.geometry.num_queries * case.geometry.num_keys * dtype.itemsize
    if work == FORWARD:
        return 2.0 * product, 4.0 * one_map + bias
    return 7.0 * product, 12.0 * one_map + 3 * bias
