"""Focal attention in plain PyTorch, made for speed on a CPU: the default backend there.

The same sum as the oracle, but the working set stays in the cache: windows are taken in bands of
window rows and images a few at a time, the keys of a band are copied once into a small buffer that
already has its borders, windows read that buffer through an overlapping strided view, and backward
computes the scores again. Only query, key, value and the coarse maps are saved. Sums run in a fixed
order, so results do not change from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.coarse import PooledMap, Pooling
from kernels.dropout import keep_mask, row_index
from kernels.flops import backward_flops, forward_flops
from kernels.geometry import FocalGeometry, decode_geometry, encode_geometry
from kernels.reference import coarse_map, pad_to_windows

__all__ = ["focal_attention"]

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")

# Scores of one step, in elements: 4 MiB in float32 stays in the second- and third-level caches.
SCORES_PER_STEP = {"cpu": 2**20, "other": 2**26}


def focal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    geometry: FocalGeometry,
    pooling: Sequence[Pooling | PooledMap],
    scale: float,
    map_size: tuple[int, int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """See `kernels.focal_attention`; arguments are taken as already checked."""
    with torch.autocast(query.device.type, enabled=False):  # pooled in the dtype of the maps
        coarse_keys, coarse_values = (
            [
                coarse_map(pad_to_windows(x, geometry), entry, geometry, level, which)
                for level, entry in enumerate(pooling, start=1)
            ]
            for x, which in ((key, "key"), (value, "value"))
        )
    return _attention(
        query,
        key,
        value,
        bias,
        coarse_keys,
        coarse_values,
        encode_geometry(geometry),
        scale,
        list(map_size),
        dropout_p,
        dropout_seed,
    )


@dataclass(frozen=True)
class _Patch:
    """Where one level of a band of windows lies in its source, and how its windows overlap."""

    rows: tuple[tuple[int, int, int], ...]  # (start in the buffer, start in the source, length)
    cols: tuple[tuple[int, int, int], ...]
    num_rows: int
    num_cols: int
    cells: int  # stride between windows
    region: int  # side of a window's square

    def windows(self, buffer: Tensor) -> Tensor:
        """Overlapping view `[images, win_rows, win_cols, heads, region, region, dim]`."""
        images, heads, _, _, dim = buffer.shape
        s_image, s_head, s_row, s_col, s_dim = buffer.stride()
        win_rows = (self.num_rows - self.region) // self.cells + 1
        win_cols = (self.num_cols - self.region) // self.cells + 1
        return buffer.as_strided(
            (images, win_rows, win_cols, heads, self.region, self.region, dim),
            (s_image, s_row * self.cells, s_col * self.cells, s_head, s_row, s_col, s_dim),
        )

    @property
    def covered(self) -> bool:
        """Whether the source fills the whole buffer: no padding, no excluded key."""
        rows, cols = (sum(length for _, _, length in runs) for runs in (self.rows, self.cols))
        return rows == self.num_rows and cols == self.num_cols

    def disjoint_windows(self, source: Tensor) -> Tensor | None:
        """`windows` as a view of the source itself, where they are whole and do not overlap."""
        if self.region != self.cells or len(self.rows) + len(self.cols) > 2 or not self.covered:
            return None
        (_, row, height), (_, col, width) = self.rows[0], self.cols[0]
        part = source[:, row : row + height, col : col + width]
        parts = part.unflatten(2, (-1, self.region)).unflatten(1, (-1, self.region))
        return parts.permute(0, 1, 3, 5, 2, 4, 6)

    def buffer(self, like: Tensor, *, zeros: bool) -> Tensor:
        """`[images, heads, num_rows, num_cols, dim]`, one token or cell of the band per place."""
        shape = (like.shape[0], like.shape[3], self.num_rows, self.num_cols, like.shape[4])
        return like.new_zeros(shape) if zeros else like.new_empty(shape)

    def _pieces(self, source: Tensor, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        source = source.permute(0, 3, 1, 2, 4)
        for b_row, s_row, height in self.rows:
            for b_col, s_col, width in self.cols:
                yield (
                    source[:, :, s_row : s_row + height, s_col : s_col + width],
                    buffer[:, :, b_row : b_row + height, b_col : b_col + width],
                )

    def gather(self, source: Tensor, out: Tensor) -> None:
        """Copy `[images, height, width, heads, dim]` into ``out``, each window's square in turn.

        Args:
            source: The map.
            out: `[images, win_rows, win_cols, heads, region², dim]`, may be a view.
        """
        squares = out.unflatten(-2, (self.region, self.region))
        windows = self.disjoint_windows(source)
        if windows is None:
            # Padding and excluded keys are zeros.
            buffer = self.buffer(source, zeros=not self.covered)
            for piece, place in self._pieces(source, buffer):
                place.copy_(piece)
            windows = self.windows(buffer)
        squares.copy_(windows)

    def fold(self, windows: Tensor, into: Tensor) -> None:
        """Add what `gather` spread back into the map: the transpose of `gather`."""
        squares = windows.unflatten(-2, (self.region, self.region))
        target = self.disjoint_windows(into)
        if target is not None:
            target += squares
            return
        buffer = self.buffer(into, zeros=True)
        view = self.windows(buffer)
        # Windows `passes` apart do not overlap, so each of these sums writes a place once.
        passes = -(-self.region // self.cells)
        for row in range(passes):
            for col in range(passes):
                view[:, row::passes, col::passes] += squares[:, row::passes, col::passes]
        for place, piece in self._pieces(into, buffer):
            place += piece


@dataclass(frozen=True)
class _Band:
    """Window rows `[first, last)` of a map: its queries, its keys level by level, its mask."""

    first: int
    last: int
    win_cols: int
    queries: _Patch
    levels: tuple[_Patch, ...]
    excluded: Tensor | None  # bool, broadcasts to [windows, 1, queries, keys]
    no_key: Tensor | None  # bool [windows, 1, queries, 1]

    @property
    def num_windows(self) -> int:
        return (self.last - self.first) * self.win_cols

    def bias(self, bias: Tensor) -> Tensor:
        """`[windows · heads, queries, keys]`, -inf where there is no key; shared by the images."""
        full = bias.expand(self.num_windows, -1, -1, -1)
        if self.excluded is not None:
            full = full.masked_fill(self.excluded, -torch.inf)
        return full.flatten(0, 1)


@lru_cache(maxsize=256)
def _bands(
    geometry: FocalGeometry,
    height: int,
    width: int,
    map_size: tuple[int, int],
    num_heads: int,
    device: torch.device,
) -> tuple[_Band, ...]:
    win_rows, win_cols = geometry.num_windows(height, width)
    per_row = win_cols * num_heads * geometry.num_queries * geometry.num_keys
    step = max(1, min(win_rows, _budget(device) // per_row))
    starts = range(0, win_rows, step)
    return tuple(
        _make_band(geometry, (height, width), map_size, first, min(first + step, win_rows), device)
        for first in starts
    )


def _budget(device: torch.device) -> int:
    return SCORES_PER_STEP["cpu" if device.type == "cpu" else "other"]


def _make_band(
    geometry: FocalGeometry,
    size: tuple[int, int],
    map_size: tuple[int, int],
    first: int,
    last: int,
    device: torch.device,
) -> _Band:
    padded = geometry.padded_size(*size)
    window, shift = geometry.window_size, geometry.shift
    win_cols = padded[1] // window

    def tokens(axis: int, start: int, stop: int) -> list[int]:
        side = padded[axis]
        source = [(r + shift) % side for r in range(start * window, stop * window)]
        return [s if s < size[axis] else -1 for s in source]

    query_rows, query_cols = tokens(0, first, last), tokens(1, 0, win_cols)
    queries = _Patch(
        _runs(query_rows), _runs(query_cols), len(query_rows), len(query_cols), window, window
    )
    patches, excluded = [], []
    for level, spec in enumerate(geometry.levels):
        cells, region = geometry.cells(level), spec.region_size
        axes = [
            geometry.axis_index(level, side, real)
            for side, real in zip(padded, map_size, strict=True)
        ]
        axes[0] = axes[0][first:last]
        lines = [_unroll(axis, cells) for axis in axes]
        if level == 0:  # tokens beyond the map's storage are zero padding
            lines = [
                [s if s < side else -1 for s in line]
                for line, side in zip(lines, size, strict=True)
            ]
        patches.append(
            _Patch(_runs(lines[0]), _runs(lines[1]), len(lines[0]), len(lines[1]), cells, region)
        )
        no_row, no_col = (axis < 0 for axis in axes)
        outside = no_row[:, None, :, None] | no_col[None, :, None, :]
        excluded.append(outside.flatten(2).flatten(0, 1))
    mask = torch.cat(excluded, dim=1)[:, None, None, :]  # [windows, 1, 1, keys]
    if shift:
        mask = mask.repeat(1, 1, geometry.num_queries, 1)
        seam = geometry.seam_mask(*size)[first * win_cols : last * win_cols]
        mask[:, 0, :, geometry.window_key_slots()] |= seam
    no_key = mask.all(dim=-1, keepdim=True)
    return _Band(
        first,
        last,
        win_cols,
        queries,
        tuple(patches),
        mask.to(device) if mask.any() else None,
        no_key.to(device) if no_key.any() else None,
    )


def _unroll(axis: Tensor, cells: int) -> list[int]:
    """Coordinates of a whole band along one axis, from those of its overlapping windows."""
    windows, region = axis.shape
    line = [-1] * ((windows - 1) * cells + region)
    for index, row in enumerate(axis.tolist()):
        line[index * cells : index * cells + region] = row
    return line


def _runs(line: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Runs of consecutive source coordinates: (start in ``line``, first coordinate, length)."""
    runs: list[tuple[int, int, int]] = []
    for place, source in enumerate(line):
        if source < 0:
            continue
        if runs:
            start, first, length = runs[-1]
            if start + length == place and first + length == source:
                runs[-1] = (start, first, length + 1)
                continue
        runs.append((place, source, 1))
    return tuple(runs)


class _Step:
    """One band of one group of images: gathered queries, keys and values, and their scores."""

    def __init__(
        self,
        band: _Band,
        images: slice,
        query: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        bias: Tensor,
        geometry: FocalGeometry,
    ) -> None:
        self.band, self.images, self.bias, self.geometry = band, images, bias, geometry
        self.query = self._gather([query], (band.queries,))
        self.key = self._gather(keys, band.levels)
        self.value = self._gather(values, band.levels)

    def _gather(self, maps: Sequence[Tensor], patches: Sequence[_Patch]) -> Tensor:
        """`[images, windows · heads, tokens, dim]` of this step."""
        count = len(range(*self.images.indices(maps[0].shape[0])))
        heads, dim = maps[0].shape[-2:]
        sizes = [patch.region**2 for patch in patches]
        out = maps[0].new_empty(
            count, self.band.last - self.band.first, self.band.win_cols, heads, sum(sizes), dim
        )
        for source, patch, part in zip(maps, patches, out.split(sizes, dim=-2), strict=True):
            patch.gather(source[self.images], part)
        return out.flatten(1, 3)

    def fold(self, windows: Tensor, maps: Sequence[Tensor], patches: Sequence[_Patch]) -> None:
        """Add `[images, windows · heads, tokens, dim]` back into maps."""
        heads = maps[0].shape[-2]
        spread = windows.unflatten(1, (-1, self.band.win_cols, heads))
        parts = spread.split([patch.region**2 for patch in patches], dim=-2)
        for part, patch, target in zip(parts, patches, maps, strict=True):
            patch.fold(part, target[self.images])

    def weights(self, scale: float) -> Tensor:
        """Attention weights before dropout, `[images, windows · heads, queries, keys]`."""
        score = (self.query * scale) @ self.key.mT
        score += self.bias
        weight = torch.softmax(score, dim=-1, out=score)
        return self.clear_no_key(weight)

    def clear_no_key(self, x: Tensor) -> Tensor:
        """Zero, in place, the rows of queries that are left without any key."""
        if self.band.no_key is not None:
            heads = x.shape[1] // self.band.num_windows
            x.unflatten(1, (self.band.num_windows, heads)).masked_fill_(self.band.no_key, 0.0)
        return x

    def keep(self, seed: Tensor, dropout_p: float, num_windows: int, heads: int) -> Tensor:
        """Dropout factor on the weights: 0 or ``1 / (1 − p)``."""
        device = self.query.device
        images = torch.arange(*self.images.indices(self.images.stop), device=device)
        first = self.band.first * self.band.win_cols
        window = torch.arange(first, first + self.band.num_windows, device=device)
        row = row_index(images, window, num_windows, heads).flatten(1)
        kept = keep_mask(seed, dropout_p, row, self.geometry.num_queries, self.geometry.num_keys)
        return kept.to(self.query.dtype) / (1.0 - dropout_p)


def _steps(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    bias: Tensor,
    geometry: FocalGeometry,
    map_size: tuple[int, int],
) -> Iterator[_Step]:
    batch, height, width, heads, _ = query.shape
    bias = bias.to(query.dtype)
    for band in _bands(geometry, height, width, map_size, heads, query.device):
        band_bias = band.bias(bias)
        scores = band.num_windows * heads * geometry.num_queries * geometry.num_keys
        count = max(1, _budget(query.device) // scores)
        for start in range(0, batch, count):
            images = slice(start, min(start + count, batch))
            yield _Step(band, images, query, keys, values, band_bias, geometry)


def _in_given_dtype(function: Callable[_Inputs, _Result]) -> Callable[_Inputs, _Result]:
    """Run without autocast: the products take the dtype of the maps, in forward as in backward."""

    @wraps(function)
    def run(*args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Result:
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return run


@torch.library.custom_op("focal::eager_attention", mutates_args=())
@_in_given_dtype
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    coarse_keys: Sequence[Tensor],
    coarse_values: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    geometry = decode_geometry(geometry_code)
    keys, values = [key, *coarse_keys], [value, *coarse_values]
    heads, num_windows = query.shape[3], _count_windows(geometry, query)
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for step in _steps(query, keys, values, bias, geometry, (map_size[0], map_size[1])):
        if dropout_seed is not None and dropout_p > 0.0:
            weight = step.weights(scale)
            weight *= step.keep(dropout_seed, dropout_p, num_windows, heads)
            windows = weight @ step.value
        else:
            windows = F.scaled_dot_product_attention(
                step.query, step.key, step.value, step.bias[None], scale=scale
            )
            windows = step.clear_no_key(windows)
        step.fold(windows, [out], (step.band.queries,))
    return out


def _count_windows(geometry: FocalGeometry, query: Tensor) -> int:
    rows, cols = geometry.num_windows(query.shape[1], query.shape[2])
    return rows * cols


@_attention.register_fake
def _(query, key, value, bias, coarse_keys, coarse_values, *settings):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.custom_op("focal::eager_attention_backward", mutates_args=())
@_in_given_dtype
def _attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    coarse_keys: Sequence[Tensor],
    coarse_values: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    geometry = decode_geometry(geometry_code)
    keys, values = [key, *coarse_keys], [value, *coarse_values]
    heads, num_windows = query.shape[3], _count_windows(geometry, query)
    low_precision = query.dtype in (torch.float16, torch.bfloat16)
    sum_dtype = torch.float32 if low_precision else query.dtype
    grad_query = _zeros(query, query.dtype)
    grad_keys = [_zeros(x, sum_dtype) for x in keys]
    grad_values = [_zeros(x, sum_dtype) for x in values]
    grad_bias = torch.zeros_like(bias, dtype=sum_dtype)
    for step in _steps(query, keys, values, bias, geometry, (map_size[0], map_size[1])):
        queries = (step.band.queries,)
        d_out = step._gather([grad_out], queries)
        weight = step.weights(scale)
        d_weight = d_out @ step.value.mT
        if dropout_seed is not None and dropout_p > 0.0:
            keep = step.keep(dropout_seed, dropout_p, num_windows, heads)
            d_weight *= keep
            step.fold((weight * keep).mT @ d_out, grad_values, step.band.levels)
        else:
            step.fold(weight.mT @ d_out, grad_values, step.band.levels)
        # Not from the output, which is rounded: gradients of scores sum to zero over the keys.
        delta = (weight * d_weight).sum(dim=-1, keepdim=True)
        d_score = d_weight.sub_(delta).mul_(weight)
        step.fold((d_score @ step.key).mul_(scale), [grad_query], queries)
        step.fold((d_score.mT @ step.query).mul_(scale), grad_keys, step.band.levels)
        per_head = d_score.unflatten(1, (step.band.num_windows, heads))
        grad_bias += per_head.sum(dim=(0, 1), dtype=sum_dtype)
    grads = [grad_query, *grad_keys, *grad_values]
    return [grad.to(query.dtype) for grad in grads] + [grad_bias.to(bias.dtype)]


def _zeros(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@_attention_backward.register_fake
def _(grad_out, query, key, value, bias, coarse_keys, coarse_values, *settings):
    maps = [query, key, *coarse_keys, value, *coarse_values]
    return [*(_zeros(x, x.dtype) for x in maps), torch.empty_like(bias)]


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, bias, coarse_keys, coarse_values, *settings, seed = inputs
    ctx.num_coarse = len(coarse_keys)
    ctx.settings = settings
    ctx.save_for_backward(query, key, value, bias, *coarse_keys, *coarse_values, seed)


def _backward(ctx, grad_out):
    query, key, value, bias, *rest, seed = ctx.saved_tensors
    count = ctx.num_coarse
    grads = _attention_backward(
        grad_out, query, key, value, bias, rest[:count], rest[count:], *ctx.settings, seed
    )
    grad_query, *maps, grad_bias = grads
    grad_key, *grad_coarse_keys = maps[: count + 1]
    grad_value, *grad_coarse_values = maps[count + 1 :]
    none = (None,) * (len(ctx.settings) + 1)
    coarse = (grad_coarse_keys, grad_coarse_values)
    return (grad_query, grad_key, grad_value, grad_bias, *coarse, *none)


_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.focal.eager_attention)
def _(query, key, value, bias, coarse_keys, coarse_values, code, *settings, out_shape):
    return forward_flops(query, code)


@register_flop_formula(torch.ops.focal.eager_attention_backward)
def _(d_out, query, key, value, bias, coarse_keys, coarse_values, code, *settings, out_shape):
    return backward_flops(query, code)
