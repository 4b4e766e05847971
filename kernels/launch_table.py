"""Tile sizes and launch options of the attention kernels: what a tuner measured or a person chose.

Plain data: `benchmarks.tune` rewrites the table, and nothing searches at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ANY_TARGET", "TABLE", "Tile"]

ANY_TARGET = "any"


@dataclass(frozen=True)
class Tile:
    """One launch configuration.

    Args:
        block_m: Queries of a tile.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Stages of the compiler's software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (kernel, head_dim rounded up, bytes per element, target) -> Tile; a kernel is "forward" or
# "gradient", a target "sm_90", "gfx942", or "any", which serves where none is named. Larger heads
# and wider types take smaller tiles, so that keys, values, scores and sums fit in the registers.
TABLE: dict[tuple[str, int, int, str], Tile] = {
    ("forward", 16, 2, "any"): Tile(64, 128, 4, 1),
    ("forward", 32, 2, "any"): Tile(64, 128, 4, 1),
    ("forward", 64, 2, "any"): Tile(64, 32, 4, 1),
    ("forward", 128, 2, "any"): Tile(32, 32, 4, 1),
    ("forward", 16, 4, "any"): Tile(32, 16, 4, 1),
    ("forward", 32, 4, "any"): Tile(32, 16, 4, 1),
    ("forward", 32, 4, "sm_80"): Tile(16, 16, 4, 1),
    ("forward", 64, 4, "any"): Tile(16, 16, 4, 1),
    ("forward", 128, 4, "any"): Tile(16, 16, 8, 1),
    ("forward", 32, 2, "gfx942"): Tile(64, 128, 2, 1),
    ("forward", 32, 2, "gfx950"): Tile(64, 128, 2, 1),
    ("gradient", 16, 2, "any"): Tile(64, 64, 4, 1),
    ("gradient", 32, 2, "any"): Tile(64, 64, 4, 1),
    # By hand, from times of the whole backward at stages 1 to 4 on an NVIDIA H200, bfloat16.
    ("gradient", 32, 2, "sm_90"): Tile(64, 64, 4, 2),
    ("gradient", 32, 2, "gfx942"): Tile(64, 32, 2, 1),
    ("gradient", 32, 2, "gfx950"): Tile(64, 32, 2, 1),
    ("gradient", 64, 2, "any"): Tile(64, 32, 4, 1),
    ("gradient", 128, 2, "any"): Tile(32, 32, 4, 1),
    ("gradient", 16, 4, "any"): Tile(32, 16, 4, 1),
    ("gradient", 32, 4, "any"): Tile(32, 16, 4, 1),
    ("gradient", 64, 4, "any"): Tile(16, 16, 4, 1),
    ("gradient", 128, 4, "any"): Tile(16, 16, 8, 1),
}
