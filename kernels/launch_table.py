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


# (kernel, head_dim rounded up, bytes per element, target) -> Tile; a target is "sm_90", "gfx942" or
# "any", which serves where none is named. Larger heads and wider types take smaller tiles, so that
# two tiles of keys and values, the scores and the sums fit in the registers of four warps.
TABLE: dict[tuple[str, int, int, str], Tile] = {
    ("forward", 16, 2, "any"): Tile(64, 32, 4, 2),
    ("forward", 32, 2, "any"): Tile(64, 32, 4, 2),
    ("forward", 64, 2, "any"): Tile(64, 32, 4, 2),
    ("forward", 128, 2, "any"): Tile(64, 32, 8, 1),
    ("forward", 16, 4, "any"): Tile(64, 32, 4, 1),
    ("forward", 32, 4, "any"): Tile(64, 32, 4, 1),
    ("forward", 64, 4, "any"): Tile(32, 32, 4, 1),
    ("forward", 128, 4, "any"): Tile(32, 16, 4, 1),
    ("query_gradient", 16, 2, "any"): Tile(64, 32, 4, 2),
    ("query_gradient", 32, 2, "any"): Tile(64, 32, 4, 2),
    ("query_gradient", 64, 2, "any"): Tile(64, 32, 4, 2),
    ("query_gradient", 128, 2, "any"): Tile(64, 32, 8, 1),
    ("query_gradient", 16, 4, "any"): Tile(64, 32, 4, 1),
    ("query_gradient", 32, 4, "any"): Tile(64, 32, 4, 1),
    ("query_gradient", 64, 4, "any"): Tile(32, 32, 4, 1),
    ("query_gradient", 128, 4, "any"): Tile(32, 16, 4, 1),
    ("bias_gradient", 16, 2, "any"): Tile(64, 32, 4, 2),
    ("bias_gradient", 32, 2, "any"): Tile(64, 32, 4, 2),
    ("bias_gradient", 64, 2, "any"): Tile(64, 32, 4, 2),
    ("bias_gradient", 128, 2, "any"): Tile(64, 32, 8, 1),
    ("bias_gradient", 16, 4, "any"): Tile(64, 32, 4, 1),
    ("bias_gradient", 32, 4, "any"): Tile(64, 32, 4, 1),
    ("bias_gradient", 64, 4, "any"): Tile(32, 32, 4, 1),
    ("bias_gradient", 128, 4, "any"): Tile(32, 16, 4, 1),
    ("key_gradient", 16, 2, "any"): Tile(32, 64, 4, 2),
    ("key_gradient", 32, 2, "any"): Tile(32, 64, 4, 2),
    ("key_gradient", 64, 2, "any"): Tile(32, 64, 4, 2),
    ("key_gradient", 128, 2, "any"): Tile(32, 64, 8, 1),
    ("key_gradient", 16, 4, "any"): Tile(32, 64, 4, 1),
    ("key_gradient", 32, 4, "any"): Tile(32, 64, 4, 1),
    ("key_gradient", 64, 4, "any"): Tile(32, 32, 4, 1),
    ("key_gradient", 128, 4, "any"): Tile(32, 32, 4, 1),
}
