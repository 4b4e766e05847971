"""The Triton backend as registered operators: fakes for tracing, autograd, FLOP counts.

`custom_op` rather than `triton_op`: it traces, compiles and passes `opcheck` under the interpreter
on a CPU as well (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backward import launch_backward
from kernels.coarse import PooledMap, Pooling
from kernels.flops import backward_flops, forward_flops
from kernels.forward import launch_forward
from kernels.geometry import FocalGeometry, decode_geometry, encode_geometry
from kernels.launch import Problem, device_target, pools_inline, stats_shape, sum_dtype
from kernels.maps import apart, as_given
from kernels.pooling import PoolProblem, launch_pool, launch_pool_backward
from kernels.tiles import Pool

__all__ = ["INTERPRETED", "focal_attention"]

SMALLEST_SCALE = 2.0**-16
# Triton decides at decoration whether a kernel is compiled or interpreted.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def focal_attention(
    maps: Sequence[Tensor],
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
    query, key, value = apart(maps)
    if scale < SMALLEST_SCALE:  # the kernels divide the bias by it
        query, scale = query * scale, 1.0
        maps = (query, key, value)
    ready = [n for n, entry in enumerate(pooling, start=1) if isinstance(entry, PooledMap)]
    tensors = (bias, *_pools(key, pooling), *_ready_maps(query, pooling))
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (*maps, *tensors))
    code = encode_geometry(geometry)
    settings = (code, ready, scale, list(map_size), dropout_p, dropout_seed)
    if keep and not torch.compiler.is_compiling():
        return _EagerAttention.apply(len(maps), *maps, *tensors, *settings, keep)[0]
    return _attention(list(maps), *tensors, *settings, keep)[0]


def _pools(key: Tensor, pooling: Sequence[Pooling | PooledMap]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of the levels that are pooled here, and their offsets `[levels · heads, head_dim]`.

    Weights are end to end; those of a single level stay `[sub, sub]`.
    """
    entries = [entry for entry in pooling if isinstance(entry, Pooling)]
    sides = ([entry.key_offset for entry in entries], [entry.value_offset for entry in entries])
    missing = any(x is None for side in sides for x in side)
    zeros = key.new_zeros(key.shape[3:]) if missing else key  # [heads, head_dim]
    rows = ([zeros if x is None else x for x in side] for side in sides)
    key_offsets, value_offsets = (_joined(side, key.new_empty, key.shape[4]) for side in rows)
    weights = [entry.weight for entry in entries]
    if len(weights) > 1:
        weights = [weight.flatten() for weight in weights]
    return _joined(weights, key.new_empty), key_offsets, value_offsets


def _joined(parts: list[Tensor], new_empty: Callable[..., Tensor], *sizes: int) -> Tensor:
    """Parts end to end; a single one, as the released models have, as it is."""
    if not parts:
        return new_empty(0, *sizes)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _parts(joined: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """What `_joined` made one."""
    return (joined,) if len(sizes) == 1 else joined.split(sizes)


def _ready_maps(query: Tensor, pooling: Sequence[Pooling | PooledMap]) -> tuple[Tensor, Tensor]:
    """Keys and values of the levels that come pooled, `[batch, cells, heads, head_dim]`."""
    entries = [entry for entry in pooling if isinstance(entry, PooledMap)]
    if not entries:
        return _no_cells(query), _no_cells(query)
    keys = torch.cat([entry.key.flatten(1, 2) for entry in entries], dim=1)
    return keys, torch.cat([entry.value.flatten(1, 2) for entry in entries], dim=1)


def _no_cells(query: Tensor) -> Tensor:
    """Packed coarse maps without a cell."""
    return query.new_empty(query.shape[0], 0, *query.shape[3:])


def _rows(x: Tensor) -> Tensor:
    """A map whose last axis is contiguous, as the kernels read it; any other layout is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _problem(
    query: Tensor,
    geometry: FocalGeometry,
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    *,
    inline: bool = False,
) -> Problem:
    rows, cols = map_size
    target = device_target(query.device)
    settings = (scale, (rows, cols), dropout_p, target, inline)
    return Problem(geometry, tuple(query.shape), query.dtype, *settings)


# -- the operator ---------------------------------------------------------------------------------


def _levels_but(ready: Sequence[int], geometry: FocalGeometry) -> list[int]:
    """The coarse levels that are pooled here."""
    return [level for level in range(1, len(geometry.levels)) if level not in ready]


def _cells(levels: Sequence[int], geometry: FocalGeometry, like: Tensor) -> list[slice]:
    """Where packed coarse maps hold some levels."""
    starts = geometry.coarse_starts(*like.shape[1:3])
    return [slice(starts[level - 1], starts[level]) for level in levels]


def _weight_sizes(levels: Sequence[int], geometry: FocalGeometry) -> list[int]:
    """Numbers of each level's pooling weight."""
    return [geometry.levels[level].subwindow_size ** 2 for level in levels]


@torch.library.custom_op("focal::attention", mutates_args=())
def _attention(
    maps: Sequence[Tensor],
    bias: Tensor,
    weights: Tensor,
    key_offsets: Tensor,
    value_offsets: Tensor,
    ready_keys: Tensor,
    ready_values: Tensor,
    geometry_code: Sequence[int],
    ready: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what backward needs: statistics and packed coarse maps, empty if not kept."""
    query, key, value = (_rows(x) for x in apart(maps))
    geometry = decode_geometry(geometry_code)
    levels = _levels_but(ready, geometry)
    each = [query.shape[3]] * len(levels)
    parts = (
        _parts(weights, _weight_sizes(levels, geometry)),
        _parts(key_offsets, each),
        _parts(value_offsets, each),
    )
    pools = [Pool(*(x.contiguous() for x in part)) for part in zip(*parts, strict=True)]
    settings = (geometry, scale, map_size, dropout_p)
    with torch.cuda.device_of(query):
        # Chosen here and not while tracing: the choice must not tie a graph to a size.
        if pools and not ready and not keep and pools_inline(geometry, query.shape):
            problem, none = _problem(query, *settings, inline=True), _no_cells(query)
            out, _ = launch_forward(
                query, key, value, bias, (none, none), tuple(pools), dropout_seed, problem
            )
            return out, *_nothing(query)
        problem, coarse = _problem(query, *settings), _new_coarse(query, geometry)
        for level, pool in zip(levels, pools, strict=True):
            pooled = PoolProblem(geometry, problem.query_shape, key.dtype, problem.target, level)
            launch_pool(key, value, pool, coarse, pooled)
        if ready:
            places = _cells(ready, geometry, query)
            sizes = [place.stop - place.start for place in places]
            for packed, cells in zip(coarse, (ready_keys, ready_values), strict=True):
                for place, part in zip(places, cells.split(sizes, dim=1), strict=True):
                    packed[:, place] = part
        out, stats = launch_forward(query, key, value, bias, coarse, (), dropout_seed, problem)
        return (out, stats, *coarse) if keep else (out, *_nothing(query))


def _new_coarse(query: Tensor, geometry: FocalGeometry) -> tuple[Tensor, Tensor]:
    """Empty packed maps of coarse keys and values, `[batch, coarse_cells, heads, head_dim]`."""
    count = geometry.coarse_starts(*query.shape[1:3])[-1]
    shape = (query.shape[0], count, *query.shape[3:])
    return query.new_empty(shape), query.new_empty(shape)


def _nothing(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In place of what is kept for backward."""
    return query.new_empty(0), query.new_empty(0), query.new_empty(0)


@_attention.register_fake
def _(maps, bias, weights, k_offsets, v_offsets, r_keys, r_values, code, ready, *rest):
    keep = rest[-1]
    query, _, _ = apart(maps)
    out = query.new_empty(query.shape)
    if not keep:
        return out, *_nothing(query)
    geometry = decode_geometry(code)
    stats = query.new_empty(stats_shape(geometry, query.shape), dtype=sum_dtype(query.dtype))
    return out, stats, *_new_coarse(query, geometry)


@torch.library.custom_op("focal::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor,
    weights: Tensor,
    out: Tensor,
    stats: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    geometry_code: Sequence[int],
    ready: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value side by side, bias, weights and packed coarse maps."""
    geometry, coarse = decode_geometry(geometry_code), (coarse_key, coarse_value)
    grad_out, query, key, value = (_rows(x) for x in (grad_out, *apart(maps)))
    problem = _problem(query, geometry, scale, map_size, dropout_p)
    with torch.cuda.device_of(query):
        grad_maps, grad_bias, grad_coarse = launch_backward(
            grad_out, query, key, value, bias, out, stats, coarse, dropout_seed, problem
        )
        grads = grad_maps[:, :, :, 1], grad_maps[:, :, :, 2]
        levels = _levels_but(ready, geometry)
        grad_weights = []
        parts = _parts(weights, _weight_sizes(levels, geometry))
        for level, weight in zip(levels, parts, strict=True):
            pooled = PoolProblem(geometry, problem.query_shape, key.dtype, problem.target, level)
            grad = launch_pool_backward(key, value, weight.contiguous(), grad_coarse, grads, pooled)
            grad_weights.append(grad)
    joined = _joined(grad_weights, weights.new_empty)
    return grad_maps, grad_bias, joined.view(weights.shape), *grad_coarse


@_attention_backward.register_fake
def _(grad_out, maps, bias, weights, out, stats, coarse_key, coarse_value, *settings):
    query, _, _ = apart(maps)
    grad_maps = query.new_empty(*query.shape[:3], 3, *query.shape[3:])
    inputs = (bias, weights, coarse_key, coarse_value)
    return grad_maps, *(x.new_empty(x.shape) for x in inputs)


def _setup_attention(ctx, inputs, output) -> None:
    maps, bias, weights, k_offsets, v_offsets, *_ = inputs
    *settings, seed, ctx.keep = inputs[7:]
    ctx.num_maps = len(maps)
    ctx.save_for_backward(*maps, bias, weights, *output, seed)
    ctx.settings, ctx.offset_dtypes = settings, (k_offsets.dtype, v_offsets.dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward_attention(ctx, grad_out, *_):
    geometry, ready = decode_geometry(ctx.settings[0]), ctx.settings[1]
    # An empty list the registration takes for one of tensors, and expects as many gradients.
    none: tuple[Any, ...] = (None, None if ready else [], *(None,) * 5)
    if grad_out is None:
        return [None] * ctx.num_maps, *(None,) * 6, *none
    if not ctx.keep:
        raise RuntimeError("focal::attention was called with keep=False: it has no gradient")
    *tensors, seed = ctx.saved_tensors
    maps, tensors = tensors[: ctx.num_maps], tensors[ctx.num_maps :]
    grad_maps, grad_bias, grad_weights, *grad_coarse = _attention_backward(
        grad_out, maps, *tensors, *ctx.settings, seed
    )
    grad_offsets: list[Tensor | None] = [None, None]
    grad_ready: list[Tensor | None] = [None, None]
    if len(ready) < len(geometry.levels) - 1:  # an offset is added to every cell of every image
        places = _cells(_levels_but(ready, geometry), geometry, grad_out)
        grad_offsets = [
            _joined([_sum_cells(grad[:, x]) for x in places], grad.new_empty).to(dtype)
            for grad, dtype in zip(grad_coarse, ctx.offset_dtypes, strict=True)
        ]
    if ready:
        places = _cells(ready, geometry, grad_out)
        grad_ready = [torch.cat([grad[:, x] for x in places], dim=1) for grad in grad_coarse]
    grads_as_given = as_given(grad_maps, ctx.num_maps)
    return grads_as_given, grad_bias, grad_weights, *grad_offsets, *grad_ready, *none


def _sum_cells(grad: Tensor) -> Tensor:
    """`[batch, cells, heads, head_dim]` to `[heads, head_dim]`."""
    return grad.sum(dim=(0, 1), dtype=sum_dtype(grad.dtype))


_attention.register_autograd(_backward_attention, setup_context=_setup_attention)


class _EagerAttention(torch.autograd.Function):
    """The operator and its registered gradient, without the registry's wrapper.

    That looks each argument up in the schema at every call (docs/decisions.md). Of tensors in a
    list such a function would not make gradients: the first argument is the number of maps.
    """

    @staticmethod
    def forward(ctx, num_maps, *flat):
        inputs = list(flat[:num_maps]), *flat[num_maps:]
        output = _attention(*inputs)
        _setup_attention(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        of_maps, *others = _backward_attention(ctx, *grads)
        return None, *of_maps, *others[:6], *(None,) * 7


@register_flop_formula(torch.ops.focal.attention)
def _(maps, bias, weights, k_offsets, v_offsets, r_keys, r_values, code, *_, **__):
    return forward_flops(maps[0], code)


@register_flop_formula(torch.ops.focal.attention_backward)
def _(d_out, maps, bias, weights, out, stats, c_key, c_value, code, *_, **__):
    return backward_flops(maps[0], code)
