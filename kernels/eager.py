"""Focal attention in plain PyTorch, made for speed on a CPU: the default backend there.

The same sum as the oracle, but the working set stays in the cache: windows are taken in bands of
window columns and images a few at a time, the keys of a band are copied once into a small buffer
that already has its borders, and windows read that buffer through an overlapping strided view. Each
thread keeps to windows of its own. Sums run in a fixed order, so results do not change from run to
run with the same number of threads.

A training step keeps its attention weights: to compute them again takes longer than to read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from kernels.coarse import PooledMap, Pooling
from kernels.dropout import keep_mask, row_index
from kernels.eager_bias import BandBias, BiasGradient
from kernels.eager_gather import Gathered, Workspace, Workspaces
from kernels.eager_kept import Kept, piece_sizes
from kernels.eager_plan import Band, Plan, make_plan, most_scores
from kernels.eager_pool import add_pool_gradient, pool
from kernels.flops import backward_flops, forward_flops
from kernels.frames import with_room_for_frames
from kernels.geometry import FocalGeometry, decode_geometry, encode_geometry
from kernels.maps import apart, as_given
from kernels.processor import abilities

__all__ = ["focal_attention"]

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")


def _scores_per_cpu_step() -> int:
    """1.25 times a core's second-level cache in float32, of 1 MiB at least: calls cost as well."""
    return 5 * max(abilities().get("l2_cache_size", 0), 2**20) // 16


# Scores of one step, in elements.
SCORES_PER_STEP = {"cpu": _scores_per_cpu_step(), "other": 2**26}


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
    query, _, _ = apart(maps)
    size = geometry.padded_size(*query.shape[1:3])
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (*maps, bias))
    # While a model is compiled an operator looks at sizes: there they are numbers or symbols for
    # certain. In a graph for export, which others read, it would be one operator more.
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    attend = torch.ops.focal.eager_attention_in_graph if compiling else _attend
    return attend(
        list(maps),
        bias,
        [_given(entry, "key", query, size) for entry in pooling],
        [_given(entry, "value", query, size) for entry in pooling],
        [_weight(entry, query) for entry in pooling],
        encode_geometry(geometry),
        scale,
        list(map_size),
        dropout_p,
        trains,
        dropout_seed,
    )


def _attend(
    maps: Sequence[Tensor],
    bias: Tensor,
    coarse_keys: Sequence[Tensor],
    coarse_values: Sequence[Tensor],
    pool_weights: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    trains: bool,
    dropout_seed: Tensor | None,
) -> Tensor:
    kept_sizes = None
    if trains:
        query, _, _ = apart(maps)
        kept_sizes = _kept_sizes(query, decode_geometry(geometry_code), map_size, dropout_p)
    levels = (coarse_keys, coarse_values, pool_weights)
    settings = (geometry_code, scale, map_size, dropout_p, kept_sizes, dropout_seed)
    return _attention(maps, bias, *levels, *settings)[0]


torch.library.define(
    "focal::eager_attention_in_graph",
    "(Tensor[] maps, Tensor bias, Tensor[] coarse_keys, Tensor[] coarse_values, "
    "Tensor[] pool_weights, int[] geometry_code, float scale, SymInt[] map_size, "
    "float dropout_p, bool trains, Tensor? dropout_seed) -> Tensor",
)
torch.library.impl("focal::eager_attention_in_graph", "CompositeImplicitAutograd", _attend)


def _given(entry: Pooling | PooledMap, which: str, query: Tensor, size: tuple[int, int]) -> Tensor:
    """`[batch, rows, cols, heads, dim]`: coarse keys or values but for what is pooled from maps."""
    if isinstance(entry, PooledMap):
        return getattr(entry, which)
    batch, _, _, heads, dim = query.shape
    side = entry.weight.shape[0]
    offset = getattr(entry, f"{which}_offset")
    offset = query.new_zeros(()) if offset is None else offset.to(query.dtype)
    return offset.expand(batch, size[0] // side, size[1] // side, heads, dim)


def _weight(entry: Pooling | PooledMap, query: Tensor) -> Tensor:
    """Weights of pooling; none for a level that is given as a whole."""
    return query.new_empty(0, 0) if isinstance(entry, PooledMap) else entry.weight


@lru_cache(maxsize=256)
def _bands(
    geometry: FocalGeometry,
    size: tuple[int, int],
    map_size: tuple[int, int],
    num_heads: int,
    device: torch.device,
    share: bool,
) -> Plan:
    budget = SCORES_PER_STEP["cpu" if device.type == "cpu" else "other"]
    return make_plan(geometry, size, map_size, num_heads, device, budget, share=share)


@dataclass(frozen=True)
class _Step:
    """One band of a few images. Products run over `images · windows · heads`."""

    band: Band
    images: slice  # of those loaded
    work: Workspace

    def weights(self, biases: BandBias, scale: float, out: Tensor) -> Tensor:
        """Attention weights before dropout, into ``out``; zeros without any key.

        Args:
            biases: Of all bands.
            scale: Factor of the products.
            out: `[products, queries, keys]`.
        """
        bias, no_key = biases.of(self.band, self.images.stop - self.images.start)
        query, key = self.work.query.sides[0], self.work.key_value.transposed[0]
        torch.baddbmm(bias, query, key, alpha=scale, out=out)
        torch.softmax(out, dim=-1, out=out)
        if no_key is not None:
            out.masked_fill_(no_key, 0.0)
        return out


class _Reader:
    """What steps read."""

    def __init__(self, plan: Plan, query: Tensor, key_values: Sequence[Tensor]) -> None:
        self._plan = plan
        self._queries = Gathered([query[None]], [plan.queries], plan.loaded)
        self._keys = Gathered([key_values[i] for i in plan.order], plan.levels, plan.loaded)
        self._workspaces = Workspaces(plan, query)

    def steps(self, loaded: slice) -> Iterator[_Step]:
        """Gather these images of the batch, band by band; each step overwrites the one before."""
        self._queries.load(loaded)
        self._keys.load(loaded)
        for band, images in self._plan.steps(loaded):
            work = self._workspaces.of(band, images)
            self._queries.read(band, images, work.query)
            self._keys.read(band, images, work.key_value)
            yield _Step(band, images, work)


@dataclass(frozen=True)
class _Dropout:
    """Dropout of weights, step by step."""

    probability: float
    seed: Tensor
    plan: Plan
    num_heads: int

    def factor(self, step: _Step, loaded: slice, weight: Tensor) -> Tensor:
        """0 or ``1 / (1 − p)`` for each of a step's weights; 1 for padding, whose weight is 0."""
        start, stop = (loaded.start + x for x in (step.images.start, step.images.stop))
        images = torch.arange(start, stop, device=weight.device)
        win_rows, win_cols = self.plan.queries.count
        window = step.band.window_numbers(win_cols, weight.device)
        row = row_index(images, window, win_rows * win_cols, self.num_heads).flatten()
        num_keys = self.plan.keys.num_keys
        kept = keep_mask(self.seed, self.probability, row, weight.shape[1], num_keys)
        factor = torch.ones_like(weight)
        factor[..., :num_keys] = kept.to(weight.dtype) / (1.0 - self.probability)
        return factor


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
@with_room_for_frames
def _attention(
    maps: Sequence[Tensor],
    bias: Tensor,
    coarse_keys: Sequence[Tensor],
    coarse_values: Sequence[Tensor],
    pool_weights: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    kept_sizes: Sequence[int] | None,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    """The output, what `_pooled` made, and memory of these sizes with each step's weights in it.

    Weights are those before dropout.
    """
    query, key, value = apart(maps)
    geometry = decode_geometry(geometry_code)
    plan = _plan(geometry, query, map_size, dropout_p)
    key_value = _side_by_side(key, value)
    coarse = _pooled(key_value, coarse_keys, coarse_values, pool_weights, geometry)
    inputs = _Reader(plan, query, [key_value, *coarse])
    biases = BandBias(plan, bias.to(query.dtype))
    dropout = _dropout(dropout_p, dropout_seed, plan, query.shape[3])
    memory = [query.new_empty(size) for size in kept_sizes or ()]
    kept = Kept(memory)
    out = query.new_empty((1, *query.shape))
    out_windows = Gathered([out], [plan.queries], plan.loaded)
    for loaded in plan.loads(len(query)):
        out_windows.start_sum(loaded)
        for step in inputs.steps(loaded):
            work = step.work
            scores = kept.next(work.score_shape) if memory else work.weights
            weight = step.weights(biases, scale, scores)
            if dropout is not None:
                weight = weight * dropout.factor(step, loaded, weight)
            # The queries are not needed any more: their memory takes the result.
            torch.bmm(weight, work.key_value.sides[1], out=work.query.sides[0])
            out_windows.add(step.band, step.images, work.query)
        out_windows.finish_sum(loaded)
    return [out[0], *coarse, *memory]


def _plan(
    geometry: FocalGeometry, query: Tensor, map_size: Sequence[int], dropout_p: float
) -> Plan:
    _, height, width, heads, _ = query.shape
    real = (map_size[0], map_size[1])
    # Dropout counts the keys of a window in canonical order.
    return _bands(geometry, (height, width), real, heads, query.device, dropout_p == 0.0)


def _kept_sizes(
    query: Tensor, geometry: FocalGeometry, map_size: Sequence[int], dropout_p: float
) -> list[int] | None:
    """Room for the scores of every step, or a bound where sizes are symbols of a compiler."""
    batch, height, width, heads, _ = query.shape
    if any(isinstance(size, torch.SymInt) for size in (*query.shape, *map_size)):
        return [batch * heads * most_scores(geometry, height, width)]
    with _disable_current_modes():  # a plan is made of numbers, of which no graph is to be made
        plan = _plan(geometry, query, map_size, dropout_p)
    return piece_sizes(plan, batch, heads)


def _dropout(
    probability: float, seed: Tensor | None, plan: Plan, num_heads: int
) -> _Dropout | None:
    if seed is None or probability == 0.0:
        return None
    return _Dropout(probability, seed, plan, num_heads)


def _pooled(
    key_value: Tensor,
    coarse_keys: Sequence[Tensor],
    coarse_values: Sequence[Tensor],
    pool_weights: Sequence[Tensor],
    geometry: FocalGeometry,
) -> list[Tensor]:
    """Keys and values of each coarse level as one tensor `[2, batch, rows, cols, heads, dim]`."""
    tokens = _as_heads(key_value)
    levels = []
    for *given, weight in zip(coarse_keys, coarse_values, pool_weights, strict=True):
        coarse = torch.stack(given)
        if len(weight):
            coarse += pool(tokens, weight, geometry).unflatten(3, (2, -1)).movedim(3, 0)
        levels.append(coarse)
    return levels


def _as_heads(sides: Tensor) -> Tensor:
    """`[batch, rows, cols, 2 · heads, dim]` from `[2, batch, rows, cols, heads, dim]`.

    A view where the sides are parts of one projection, and of any that lie next to each other.
    """
    return sides.movedim(0, 3).flatten(3, 4)


def _side_by_side(key: Tensor, value: Tensor) -> Tensor:
    """A view where the two are parts of one projection, else a copy."""
    offset = value.storage_offset() - key.storage_offset()
    shared = key.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    if shared and offset > 0 and key.stride() == value.stride():
        return key.as_strided((2, *key.shape), (offset, *key.stride()))
    return torch.stack((key, value), dim=3).movedim(3, 0)


@_attention.register_fake
def _(maps, bias, coarse_keys, coarse_values, pool_weights, code, *settings):
    *_, kept_sizes, _ = settings
    query, _, _ = apart(maps)
    coarse = [query.new_empty((2, *keys.shape)) for keys in coarse_keys]
    kept = [query.new_empty(size) for size in kept_sizes or ()]
    return [torch.empty_like(query, memory_format=torch.contiguous_format), *coarse, *kept]


@torch.library.custom_op("focal::eager_attention_backward", mutates_args=())
@_in_given_dtype
@with_room_for_frames
def _attention_backward(
    grad_out: Tensor,
    maps: Sequence[Tensor],
    bias: Tensor,
    pool_weights: Sequence[Tensor],
    coarse: Sequence[Tensor],
    memory: Sequence[Tensor],
    geometry_code: Sequence[int],
    scale: float,
    map_size: Sequence[int],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> list[Tensor]:
    query, key, value = apart(maps)
    geometry = decode_geometry(geometry_code)
    plan = _plan(geometry, query, map_size, dropout_p)
    key_values = [_side_by_side(key, value), *coarse]
    inputs = _Reader(plan, query, key_values)
    biases = None if memory else BandBias(plan, bias.to(query.dtype))
    kept = Kept(memory)
    dropout = _dropout(dropout_p, dropout_seed, plan, query.shape[3])
    gradients = Gathered([grad_out[None]], [plan.queries], plan.loaded)

    low_precision = query.dtype in (torch.float16, torch.bfloat16)
    sum_dtype = torch.float32 if low_precision else query.dtype
    # Laid out as the projection to query, key and value is, whose gradient it then is as it stands.
    grad_maps = query.new_empty((*query.shape[:3], 3, *query.shape[3:]), dtype=sum_dtype)
    sides = grad_maps.permute(3, 0, 1, 2, 4, 5)
    grad_key_values = [sides[1:], *(x.new_empty(x.shape, dtype=sum_dtype) for x in key_values[1:])]
    grad_bias = BiasGradient(plan, bias, sum_dtype)
    query_sums = Gathered([sides[:1]], [plan.queries], plan.loaded)
    key_value_sums = Gathered([grad_key_values[i] for i in plan.order], plan.levels, plan.loaded)

    for loaded in plan.loads(len(query)):
        gradients.load(loaded)
        query_sums.start_sum(loaded)
        key_value_sums.start_sum(loaded)
        for step in inputs.steps(loaded):
            where, work = (step.band, step.images), step.work
            gradients.read(*where, work.grad_out)
            (d_out,), (query_part,), (key_part, _), (grad_key, grad_value) = (
                packed.sides
                for packed in (work.grad_out, work.query, work.key_value, work.grad_key_value)
            )
            if biases is None:
                weight = kept.next(work.score_shape)
            else:
                weight = step.weights(biases, scale, work.weights)
            d_weight = torch.bmm(d_out, work.key_value.transposed[1], out=work.grad_weights)
            dropped = weight
            if dropout is not None:
                factor = dropout.factor(step, loaded, weight)
                d_weight *= factor
                dropped = weight * factor
            torch.bmm(dropped.mT, d_out, out=grad_value)
            # Δ comes from the weights, not from the output, which is rounded: gradients of scores
            # sum to zero over the keys.
            d_score = torch._softmax_backward_data(
                d_weight, weight, -1, weight.dtype, grad_input=d_weight
            )
            # The gradient of the output is not needed any more: its memory, still in the cache,
            # takes that of the queries.
            _scaled_product(d_score, key_part, scale, out=d_out)
            query_sums.add(*where, work.grad_out)
            _scaled_product(d_score.mT, query_part, scale, out=grad_key)
            key_value_sums.add(*where, work.grad_key_value)
            grad_bias.add(step.band, d_score)
        query_sums.finish_sum(loaded)
        key_value_sums.finish_sum(loaded)
    tokens, grad_tokens = _as_heads(key_values[0]), grad_maps[:, :, :, 1:].flatten(3, 4)
    grad_weights = []
    for grads, weight in zip(grad_key_values[1:], pool_weights, strict=True):
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype)
        if len(weight):
            cells = _as_heads(grads)
            grad_weight += add_pool_gradient(grad_tokens, cells, tokens, weight, geometry)
        grad_weights.append(grad_weight.to(weight.dtype))
    grad_coarse = [grad.to(query.dtype) for grad in grad_key_values[1:]]
    rest = (*grad_coarse, *grad_weights, grad_bias.total().to(bias.dtype))
    return [grad_maps.to(query.dtype), *rest]


def _scaled_product(left: Tensor, right: Tensor, scale: float, *, out: Tensor) -> Tensor:
    if scale == 0.0:  # the product for bfloat16 would leave the output as it was
        return out.zero_()
    return torch.baddbmm(out, left, right, beta=0.0, alpha=scale, out=out)


@_attention_backward.register_fake
def _(grad_out, maps, bias, weights, coarse, kept, *settings):
    query, _, _ = apart(maps)
    grad_maps = query.new_empty((*query.shape[:3], 3, *query.shape[3:]))
    like = (*coarse, *weights, bias)
    return [grad_maps, *(x.new_empty(x.shape) for x in like)]


def _setup_context(ctx, inputs, output) -> None:
    maps, bias, _, _, weights, *settings, _, seed = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # else zeros are made for all that is kept
    ctx.num_maps, ctx.num_coarse = len(maps), len(weights)
    ctx.settings = settings
    ctx.save_for_backward(bias, seed, *maps, *weights, *kept)


def _backward(ctx, grads_out):
    grad_out, *_ = grads_out
    num_maps, count = ctx.num_maps, ctx.num_coarse
    none = (None,) * (len(ctx.settings) + 2)
    if grad_out is None:
        return ([None] * num_maps, None, *([None] * count,) * 3, *none)
    bias, seed, *rest = ctx.saved_tensors
    maps, rest = rest[:num_maps], rest[num_maps:]
    lists = rest[:count], rest[count : 2 * count], rest[2 * count :]
    grad_maps, *grads, grad_bias = _attention_backward(
        grad_out, maps, bias, *lists, *ctx.settings, seed
    )
    coarse_keys, coarse_values = ([grad[side] for grad in grads[:count]] for side in (0, 1))
    grads_as_given = as_given(grad_maps, num_maps)
    return (grads_as_given, grad_bias, coarse_keys, coarse_values, grads[count:], *none)


_attention.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.focal.eager_attention)
def _(maps, bias, coarse_keys, coarse_values, weights, code, *settings, out_shape):
    return forward_flops(maps[0], code)


@register_flop_formula(torch.ops.focal.eager_attention_backward)
def _(d_out, maps, bias, weights, coarse, kept, code, *settings, out_shape):
    return backward_flops(maps[0], code)
