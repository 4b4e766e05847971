"""The Triton backend as registered operators: fakes for tracing, autograd, FLOP counts.

`custom_op` rather than `triton_op`: it traces, compiles and passes `opcheck` under the interpreter
on a CPU as well (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.backward import launch_backward
from kernels.coarse import PooledMap, Pooling
from kernels.flops import backward_flops, forward_flops
from kernels.forward import launch_forward
from kernels.geometry import FocalGeometry, decode_geometry, encode_geometry
from kernels.launch import Problem, pools_inline, sum_dtype
from kernels.pooling import PoolProblem, launch_pool, launch_pool_backward
from kernels.tiles import Pool

__all__ = ["INTERPRETED", "focal_attention"]

SMALLEST_SCALE = 2.0**-16
# Triton decides at decoration whether a kernel is compiled or interpreted.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


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
    if scale < SMALLEST_SCALE:  # the kernels divide the bias by it
        query, scale = query * scale, 1.0
    code = encode_geometry(geometry)
    settings = (code, scale, list(map_size), dropout_p, dropout_seed)
    entries = [entry for entry in pooling if isinstance(entry, Pooling)]
    if entries and len(entries) == len(pooling):
        weights, key_offsets, value_offsets = _pool_lists(key, entries)
        tensors = (query, key, value, bias, *weights, *key_offsets, *value_offsets)
        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            pools = (weights, key_offsets, value_offsets)
            return _pooling_attention(query, key, value, bias, *pools, *settings)
    pooled = []
    for level, entry in enumerate(pooling, start=1):
        if isinstance(entry, PooledMap):
            pooled.append((entry.key.flatten(1, 2), entry.value.flatten(1, 2)))
        else:
            pooled.append(
                _pool(key, value, entry.weight, entry.key_offset, entry.value_offset, code, level)
            )
    out, _ = _attention(query, key, value, bias, *_packed(query, pooled), *settings)
    return out


def _pool_lists(key: Tensor, pooling: Sequence[Pooling]) -> tuple[list[Tensor], ...]:
    """Weights, key offsets and value offsets of every level; zeros for no offset."""
    zero = key.new_zeros(key.shape[3:])
    return (
        [entry.weight for entry in pooling],
        [zero if entry.key_offset is None else entry.key_offset for entry in pooling],
        [zero if entry.value_offset is None else entry.value_offset for entry in pooling],
    )


def _packed(query: Tensor, pooled: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Coarse keys and values of all levels, `[batch, coarse_cells, heads, head_dim]`."""
    if len(pooled) == 1:
        return pooled[0][0].contiguous(), pooled[0][1].contiguous()
    none = _no_cells(query)
    keys, values = ([maps[side] for maps in pooled] for side in (0, 1))
    return torch.cat([none, *keys], dim=1), torch.cat([none, *values], dim=1)


def _no_cells(query: Tensor) -> Tensor:
    """Packed coarse maps without a cell."""
    return query.new_empty(query.shape[0], 0, *query.shape[3:])


def _rows(x: Tensor) -> Tensor:
    """A map whose last axis is contiguous, as the kernels read it; any other layout is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _problem(
    query: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    pools: tuple[Pool, ...] = (),
) -> Problem:
    return Problem(
        geometry=decode_geometry(code),
        query_shape=tuple(query.shape),
        dtype=query.dtype,
        coarse_key=coarse_key,
        coarse_value=coarse_value,
        scale=scale,
        map_size=(map_size[0], map_size[1]),
        dropout_p=dropout_p,
        dropout_seed=seed,
        pools=pools,
    )


# -- pooling --------------------------------------------------------------------------------------


@torch.library.custom_op("focal::pool", mutates_args=())
def _pool(
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    key_offset: Tensor | None,
    value_offset: Tensor | None,
    geometry_code: Sequence[int],
    level: int,
) -> tuple[Tensor, Tensor]:
    key, value = _rows(key), _rows(value)
    problem = PoolProblem(decode_geometry(geometry_code), tuple(key.shape), key.dtype, level)
    with torch.cuda.device_of(key):
        return launch_pool(key, value, weight, key_offset, value_offset, problem)


@_pool.register_fake
def _(key, value, weight, key_offset, value_offset, geometry_code, level):
    batch, height, width, heads, head_dim = key.shape
    rows, cols = decode_geometry(geometry_code).map_cells(level, height, width)
    shape = (batch, rows * cols, heads, head_dim)
    return key.new_empty(shape), key.new_empty(shape)


@torch.library.custom_op("focal::pool_backward", mutates_args=())
def _pool_backward(
    grad_key: Tensor,
    grad_value: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    geometry_code: Sequence[int],
    level: int,
) -> tuple[Tensor, Tensor, Tensor]:
    key, value = _rows(key), _rows(value)
    problem = PoolProblem(decode_geometry(geometry_code), tuple(key.shape), key.dtype, level)
    grads = grad_key.contiguous(), grad_value.contiguous()
    with torch.cuda.device_of(key):
        return launch_pool_backward(*grads, key, value, weight, problem)


@_pool_backward.register_fake
def _(grad_key, grad_value, key, value, weight, geometry_code, level):
    maps = key.new_empty(key.shape), value.new_empty(value.shape)
    return (*maps, weight.new_empty(weight.shape))


def _setup_pool(ctx, inputs, output) -> None:
    key, value, weight, key_offset, value_offset, code, level = inputs
    ctx.save_for_backward(key, value, weight)
    ctx.settings = (code, level)
    ctx.offset_dtypes = [None if x is None else x.dtype for x in (key_offset, value_offset)]


def _backward_pool(ctx, grad_key, grad_value):
    d_key, d_value, d_weight = _pool_backward(
        grad_key, grad_value, *ctx.saved_tensors, *ctx.settings
    )
    # An offset is added to every cell of every image.
    d_offsets = [
        None if dtype is None else grad.sum(dim=(0, 1), dtype=sum_dtype(grad.dtype)).to(dtype)
        for grad, dtype in zip((grad_key, grad_value), ctx.offset_dtypes, strict=True)
    ]
    return d_key, d_value, d_weight, *d_offsets, None, None


_pool.register_autograd(_backward_pool, setup_context=_setup_pool)


# -- attention ------------------------------------------------------------------------------------


@torch.library.custom_op("focal::attention", mutates_args=())
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    settings = (geometry_code, scale, map_size, dropout_p, dropout_seed)
    problem = _problem(query, coarse_key, coarse_value, *settings)
    with torch.cuda.device_of(query):
        return launch_forward(_rows(query), _rows(key), _rows(value), bias, problem)


@torch.library.custom_op("focal::pooling_attention", mutates_args=())
def _pooling_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    weights: Sequence[Tensor],
    key_offsets: Sequence[Tensor],
    value_offsets: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> Tensor:
    """Pooling and attention without a gradient, whose backward would want the coarse maps."""
    query, key, value = (_rows(x) for x in (query, key, value))
    geometry = decode_geometry(geometry_code)
    pools = tuple(
        Pool(*(x.contiguous() for x in level))
        for level in zip(weights, key_offsets, value_offsets, strict=True)
    )
    with torch.cuda.device_of(query):
        # Chosen here and not while tracing: the choice must not tie a graph to a size.
        if pools_inline(geometry, query.shape):
            coarse = (_no_cells(query), _no_cells(query))
        else:
            pooled = [
                launch_pool(
                    key, value, *pool, PoolProblem(geometry, tuple(key.shape), key.dtype, level)
                )
                for level, pool in enumerate(pools, start=1)
            ]
            coarse, pools = _packed(query, pooled), ()
        settings = (geometry_code, scale, map_size, dropout_p, dropout_seed, pools)
        problem = _problem(query, coarse[0], coarse[1], *settings)
        return launch_forward(query, key, value, bias, problem)[0]


@_pooling_attention.register_fake
def _(query, *rest):
    return query.new_empty(query.shape)


@_attention.register_fake
def _(query, key, value, bias, coarse_key, coarse_value, *settings):
    problem = _problem(query, coarse_key, coarse_value, *settings)
    return query.new_empty(query.shape), problem.new_stats(query)


@torch.library.custom_op("focal::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    coarse_key: Tensor,
    coarse_value: Tensor,
    out: Tensor,
    stats: Tensor,
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    settings = (geometry_code, scale, map_size, dropout_p, dropout_seed)
    problem = _problem(query, coarse_key, coarse_value, *settings)
    grad_out, query, key, value = (_rows(x) for x in (grad_out, query, key, value))
    with torch.cuda.device_of(query):
        return launch_backward(grad_out, query, key, value, bias, out, stats, problem)


@_attention_backward.register_fake
def _(grad_out, query, key, value, bias, coarse_key, coarse_value, *rest):
    inputs = (query, key, value, bias, coarse_key, coarse_value)
    return tuple(x.new_empty(x.shape) for x in inputs)


def _setup_attention(ctx, inputs, output) -> None:
    *tensors, code, scale, map_size, dropout_p, seed = inputs
    ctx.save_for_backward(*tensors, *output, seed)
    ctx.settings = (code, scale, map_size, dropout_p)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward_attention(ctx, grad_out, _grad_stats):
    if grad_out is None:
        return (None,) * 11
    *tensors, seed = ctx.saved_tensors
    return *_attention_backward(grad_out, *tensors, *ctx.settings, seed), *(None,) * 5


_attention.register_autograd(_backward_attention, setup_context=_setup_attention)


@register_flop_formula(torch.ops.focal.attention)
def _(query, key, value, bias, coarse_key, coarse_value, code, *settings, out_shape):
    return forward_flops(query, code)


@register_flop_formula(torch.ops.focal.pooling_attention)
def _(query, key, value, bias, weights, k_offsets, v_offsets, code, *settings, out_shape):
    return forward_flops(query, code)


@register_flop_formula(torch.ops.focal.attention_backward)
def _(d_out, query, key, value, bias, coarse_key, coarse_value, out, stats, code, *rest, out_shape):
    return backward_flops(query, code)
