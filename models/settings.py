"""A model's settings, checked, and the `FocalGeometry` of each stage they lead to.

Paper: arXiv 2107.00641, section 3.2 (window, focal window and focal region sizes). Origin: the
short form reproduces the rules of the released code; the full form is the paper's own notation.
What
differs: settings that do not fit together are errors that name the stage, where the released code
trims the map or changes a setting silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.layers import to_2tuple

from kernels import FocalGeometry, FocalLevel
from models.layers import ConvEmbed

__all__ = ["DEFAULT_REGION_SIZES", "Levels", "PerStage", "per_stage", "stage_geometries"]

PerStage = int | Sequence[int]
Levels = Sequence[Sequence[FocalLevel | Sequence[int]]]

DEFAULT_REGION_SIZES = (7, 5, 3, 1)
_DEFAULT_FOCAL_LEVELS = 2
_DEFAULT_EXPAND_SIZE = 3


def per_stage(name: str, value: PerStage, num_stages: int, *, smallest: int = 1) -> tuple[int, ...]:
    """One integer per stage from an integer, or from a sequence of one integer per stage.

    Args:
        name: The setting, for messages.
        value: What the user gave.
        num_stages: Stages of the model.
        smallest: Least value allowed.

    Raises:
        TypeError: A value is no integer.
        ValueError: A wrong number of values, or one below ``smallest``.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * num_stages
    for item in values:
        if isinstance(item, bool) or not isinstance(item, int):
            raise TypeError(f"{name} must be an integer or one per stage, got {value!r}")
    if len(values) != num_stages:
        raise ValueError(
            f"{name} must be one value or one per stage ({num_stages} stages), got {list(values)}"
        )
    if min(values) < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}")
    return values


def stage_geometries(
    map_sizes: Sequence[tuple[int, int]],
    *,
    window_size: PerStage,
    focal_levels: PerStage | None,
    expand_size: PerStage | None,
    region_sizes: PerStage | None,
    levels: Levels | None,
    boundary: str,
    shift: bool,
) -> list[tuple[FocalGeometry, FocalGeometry]]:
    """Geometry of even and of odd blocks, for each stage.

    Args:
        map_sizes: Rows and columns of each stage's map at the model's ``img_size``.
        window_size: Side of a window.
        focal_levels: Short form: number of levels L, 1 for fine keys alone (default 2).
        expand_size: Short form: fine tokens attended on each side of the window (default 3).
        region_sizes: Short form: region of the first coarse level (default 7, 5, 3, 1).
        levels: Full form: for each stage, its levels or ``(subwindow_size, region_size)`` pairs.
        boundary: As in `FocalGeometry`.
        shift: Shift odd blocks by half a window.

    Returns:
        A pair per stage; both members are the same where nothing is shifted: without ``shift``, and
        where one window spans the map.

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: Settings that do not fit together.
    """
    num_stages = len(map_sizes)
    windows = per_stage("window_size", window_size, num_stages)
    if levels is None:
        stages = _short_form(map_sizes, windows, focal_levels, expand_size, region_sizes)
    else:
        short = {
            "focal_levels": focal_levels,
            "expand_size": expand_size,
            "region_sizes": region_sizes,
        }
        given = [name for name, value in short.items() if value is not None]
        if given:
            raise ValueError(
                f"levels says all that {', '.join(given)} would: give one or the other, got both"
            )
        if not isinstance(levels, Sequence) or len(levels) != num_stages:
            raise ValueError(
                f"levels must list the levels of each of the {num_stages} stages, got {levels!r}"
            )
        for stage_levels in levels:
            if not isinstance(stage_levels, Sequence):
                raise TypeError(f"levels must hold a list of levels per stage, got {levels!r}")
        # FocalGeometry takes pairs for levels and checks them.
        stages = [
            (window, cast(tuple[FocalLevel, ...], tuple(stage_levels)))
            for window, stage_levels in zip(windows, levels, strict=True)
        ]

    pairs = []
    for stage, ((window, stage_levels), map_size) in enumerate(zip(stages, map_sizes, strict=True)):
        step = window // 2 if shift and min(map_size) > window else 0
        try:
            even = FocalGeometry(window, stage_levels, boundary)
            odd = FocalGeometry(window, stage_levels, boundary, step) if step else even
        except (TypeError, ValueError) as error:
            where = f"stage {stage + 1} (map {map_size[0]} by {map_size[1]})"
            raise type(error)(f"{where}: {error}") from error
        pairs.append((even, odd))
    return pairs


def _short_form(
    map_sizes: Sequence[tuple[int, int]],
    windows: tuple[int, ...],
    focal_levels: PerStage | None,
    expand_size: PerStage | None,
    region_sizes: PerStage | None,
) -> list[tuple[int, tuple[FocalLevel, ...]]]:
    """Window and levels of each stage by the released code's rules."""
    num_stages = len(map_sizes)
    if region_sizes is None:
        region_sizes = DEFAULT_REGION_SIZES[:num_stages]
    if focal_levels is None:
        focal_levels = _DEFAULT_FOCAL_LEVELS
    if expand_size is None:
        expand_size = _DEFAULT_EXPAND_SIZE
    counts = per_stage("focal_levels", focal_levels, num_stages)
    expands = per_stage("expand_size", expand_size, num_stages, smallest=0)
    regions = per_stage("region_sizes", region_sizes, num_stages)
    stages = []
    for map_size, window, count, expand, region in zip(
        map_sizes, windows, counts, expands, regions, strict=True
    ):
        if min(map_size) <= window:  # the window spans the map: nothing fine is left around it
            window, expand = min(map_size), 0
        stage_levels = [FocalLevel(1, window + 2 * expand)]
        for doubling in range(count - 1):
            subwindow = window >> doubling
            if subwindow < 1:
                raise ValueError(
                    f"focal_levels must leave every level a sub-window of at least 1 token: window "
                    f"{window} allows {doubling + 1} levels, got {count}"
                )
            stage_levels.append(FocalLevel(subwindow, region + 2**doubling - 1))
        stages.append((window, tuple(stage_levels)))
    return stages


def check_widths(
    embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Depths, heads and channels per stage, checked."""
    depths, num_heads = tuple(depths), tuple(num_heads)
    if not depths or min(depths) < 1:
        raise ValueError(f"depths must hold at least one positive number, got {depths}")
    if len(num_heads) != len(depths):
        raise ValueError(
            f"num_heads must hold one value per stage ({len(depths)} stages), got {num_heads}"
        )
    if embed_dim < 1:
        raise ValueError(f"embed_dim must be positive, got {embed_dim}")
    dims = tuple(embed_dim * 2**stage for stage in range(len(depths)))
    for dim, heads in zip(dims, num_heads, strict=True):
        if heads < 1 or dim % heads:
            raise ValueError(
                f"num_heads must divide the channels of each stage, {dims}, got {num_heads}"
            )
    return depths, num_heads, dims


def check_settings(
    *,
    positive: dict[str, float],
    rates: dict[str, float],
    choices: dict[str, tuple[str, tuple[str, ...]]],
) -> None:
    for name, value in positive.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    for name, value in rates.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {value}")
    for name, (choice, allowed) in choices.items():
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {choice!r}")


def map_sizes_of(
    img_size: int | Sequence[int], embeddings: Sequence[ConvEmbed]
) -> tuple[tuple[int, int], ...]:
    """Rows and columns of each stage's map for an image of ``img_size``."""
    size = to_2tuple(img_size)
    if len(size) != 2:
        raise ValueError(f"img_size must be one number or (height, width), got {img_size!r}")
    height, width = size
    sizes: list[tuple[int, int]] = []
    for embedding in embeddings:
        height, width = embedding.output_size(height, width)
        if 0 in (height, width):
            raise ValueError(
                f"img_size must leave every stage a map: stage {len(sizes) + 1} of "
                f"{len(embeddings)} has none, got {img_size!r}"
            )
        sizes.append((height, width))
    return tuple(sizes)
