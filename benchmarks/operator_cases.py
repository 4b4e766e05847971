"""Calls of the operator as plain data, drawn by hypothesis: what the fuzzer and the tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from kernels import FocalGeometry, FocalLevel, PooledMap, Pooling

__all__ = ["Case", "Tensors", "cases", "geometries", "make_pooling", "make_tensors"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of the operator; the ``ready`` coarse levels come as `PooledMap`."""

    name: str
    window: int
    levels: tuple[tuple[int, int], ...]
    height: int
    width: int
    heads: int = 2
    head_dim: int = 4
    batch: int = 2
    boundary: str = "wrap"
    shift: int = 0
    map_size: tuple[int, int] | None = None
    ready: tuple[int, ...] = ()
    offsets: bool = True
    dropout_p: float = 0.0

    @property
    def geometry(self) -> FocalGeometry:
        """Window, levels, boundary and shift."""
        levels = tuple(FocalLevel(*pair) for pair in self.levels)
        return FocalGeometry(self.window, levels, self.boundary, self.shift)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of query, key and value."""
        return (self.batch, self.height, self.width, self.heads, self.head_dim)

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


@st.composite
def geometries(draw: Callable, largest_window: int = 5) -> FocalGeometry:
    """Every geometry with windows up to ``largest_window``, regions up to twice as wide plus 2."""
    window = draw(st.integers(1, largest_window))
    divisors = [sub for sub in range(1, window + 1) if window % sub == 0]
    subs = [1, *draw(st.lists(st.sampled_from(divisors), max_size=3))]
    levels = []
    for sub in subs:
        cells = window // sub
        levels.append(FocalLevel(sub, cells + 2 * draw(st.integers(0, cells // 2 + 1))))
    return FocalGeometry(
        window,
        tuple(levels),
        draw(st.sampled_from(("wrap", "mask"))),
        draw(st.integers(0, window - 1)),
    )


@st.composite
def cases(draw: Callable, largest_window: int = 4, largest_side: int = 9) -> Case:
    """Small calls of the operator over all geometries."""
    geometry = draw(geometries(largest_window))
    height, width = (draw(st.integers(1, largest_side)) for _ in range(2))
    padded = draw(st.booleans())
    coarse = range(1, len(geometry.levels))
    return Case(
        "drawn",
        geometry.window_size,
        tuple((level.subwindow_size, level.region_size) for level in geometry.levels),
        height,
        width,
        heads=draw(st.integers(1, 2)),
        head_dim=draw(st.sampled_from((1, 3))),
        batch=draw(st.integers(1, 2)),
        boundary=geometry.boundary,
        shift=geometry.shift,
        map_size=(draw(st.integers(1, height)), draw(st.integers(1, width))) if padded else None,
        ready=tuple(level for level in coarse if draw(st.booleans())),
        offsets=draw(st.booleans()),
    )


def make_tensors(
    case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0
) -> Tensors:
    """Random tensors of a case, by name, rounded to ``dtype``; leaves that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    geometry = case.geometry

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * deviation
        return x.to(device=device, dtype=dtype).requires_grad_()

    tensors = {name: normal(*case.shape) for name in ("query", "key", "value")}
    tensors["bias"] = normal(case.heads, geometry.num_queries, geometry.num_keys)
    for level, spec in enumerate(geometry.levels[1:], start=1):
        if level in case.ready:
            cells = geometry.map_cells(level, case.height, case.width)
            for which in ("key", "value"):
                shape = (case.batch, *cells, case.heads, case.head_dim)
                tensors[f"coarse_{which}_{level}"] = normal(*shape)
            continue
        side = spec.subwindow_size  # pooled keys of the deviation of single keys
        tensors[f"weight_{level}"] = normal(side, side, deviation=1 / side)
        if case.offsets:
            for which in ("key", "value"):
                tensors[f"{which}_offset_{level}"] = normal(case.heads, case.head_dim)
    return tensors


def make_pooling(case: Case, tensors: Tensors) -> list[Pooling | PooledMap]:
    """The ``pooling`` argument of a case."""
    entries: list[Pooling | PooledMap] = []
    for level in range(1, len(case.levels)):
        if level in case.ready:
            entries.append(
                PooledMap(tensors[f"coarse_key_{level}"], tensors[f"coarse_value_{level}"])
            )
        else:
            entries.append(
                Pooling(
                    tensors[f"weight_{level}"],
                    tensors.get(f"key_offset_{level}"),
                    tensors.get(f"value_offset_{level}"),
                )
            )
    return entries
