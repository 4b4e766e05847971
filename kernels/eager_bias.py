"""The bias of whole bands in the eager backend, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import torch
from torch import Tensor

from kernels.eager_plan import Band, Plan, in_runs
from kernels.eager_shared import with_missing

__all__ = ["BandBias", "BiasGradient"]


class BandBias:
    """The bias of each band, as scores take it; bands that are alike share one.

    Args:
        plan: Bands and columns.
        bias: `[heads, window_size², num_keys]`.
    """

    def __init__(self, plan: Plan, bias: Tensor) -> None:
        self._keys = plan.keys
        self._queries = bias.shape[1]
        self._windowed = in_runs(bias, plan.keys.windowed)
        self._shared = with_missing(in_runs(bias, plan.keys.shared), -torch.inf)
        # A bias of -inf excludes a pair as well, and may leave a query without any key.
        self._excludes = bool(torch.isneginf(bias).any())
        self._dense: dict[tuple[int, int, int, int], tuple[Tensor, Tensor | None]] = {}

    def of(self, band: Band, images: int) -> tuple[Tensor, Tensor | None]:
        """The bias of so many images, and which queries have no key, if any.

        Returns:
            `[images · windows · heads, queries, columns]`, -inf where there is no key. And bool
            `[images · windows · heads, queries, 1]`, or None.
        """
        # Inner bands share one.
        kind = images, band.num_windows, id(band.mask), id(band.pairs)
        if kind not in self._dense:
            bias = self._make(band).flatten(0, 1)
            if images > 1:
                bias = bias.repeat(images, 1, 1)
            look = self._excludes or band.no_key
            self._dense[kind] = bias, torch.isneginf(bias).all(-1, keepdim=True) if look else None
        return self._dense[kind]

    def _make(self, band: Band) -> Tensor:
        """`[windows, heads, queries, columns]`."""
        keys, like = self._keys, self._windowed
        windowed = keys.num_windowed
        queries = self._queries if band.pairs is None else band.pairs.pair.shape[1]
        dense = like.new_empty(band.num_windows, len(like), queries, keys.num_columns)
        if band.mask is not None:
            torch.add(like, band.mask.to(like.dtype), out=dense[..., :windowed])
        elif windowed:
            dense[..., :windowed] = like
        if band.pairs is not None:
            dense[..., windowed : keys.num_keys] = band.pairs.spread(self._shared)
        dense[..., keys.num_keys :] = -torch.inf
        return dense


class BiasGradient:
    """Sums the gradients of scores into that of the bias.

    Args:
        plan: Bands and columns.
        bias: `[heads, window_size², num_keys]`.
        dtype: Of the sums.
    """

    def __init__(self, plan: Plan, bias: Tensor, dtype: torch.dtype) -> None:
        self._keys = plan.keys
        self._sum = bias.new_zeros(bias.shape, dtype=dtype)
        # A sum for each thread, of the windows that it computed and has in its cache.
        most = plan.images * max((band.num_windows for band in plan.bands), default=1)
        self._parts = min(torch.get_num_threads(), most) if bias.device.type == "cpu" else 1
        shape = (self._parts, *bias.shape[:2], plan.keys.num_columns)
        self._windowed = bias.new_zeros(shape, dtype=dtype)
        self._shared: dict[int, tuple[Band, Tensor]] = {}

    def add(self, band: Band, grad: Tensor) -> None:
        """Add a step's `[images · windows · heads, queries, columns]`."""
        keys, dtype = self._keys, self._sum.dtype
        grad = grad.unflatten(0, (-1, band.num_windows, len(self._sum)))
        windowed = keys.num_windowed
        if windowed:  # of all columns: a sum of whole rows is faster
            parts = gcd(grad.shape[0] * grad.shape[1], self._parts)
            of_parts = grad.flatten(0, 1).unflatten(0, (parts, -1))
            self._windowed[:parts] += of_parts.sum(dim=1, dtype=dtype)
        if band.pairs is not None:
            part = grad[..., windowed : keys.num_keys]
            part = part[0] if len(part) == 1 else part.sum(dim=0, dtype=dtype)
            if id(band) in self._shared:
                self._shared[id(band)][1].add_(part)
            else:
                self._shared[id(band)] = band, part.to(dtype, copy=True)

    def total(self) -> Tensor:
        """`[heads, window_size², num_keys]`."""
        self._add(self._windowed.sum(dim=0), self._keys.windowed)
        for band, grad in self._shared.values():
            assert band.pairs is not None
            collected = band.pairs.collect(grad)
            self._add(collected.unflatten(1, (self._sum.shape[1], -1)), self._keys.shared)
        return self._sum

    def _add(self, columns: Tensor, runs: Sequence[slice]) -> None:
        """Add columns, of which the first are these runs of keys."""
        start = 0
        for run in runs:
            stop = start + run.stop - run.start
            self._sum[..., run] += columns[..., start:stop]
            start = stop
