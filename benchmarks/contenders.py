"""Ways to compute focal attention, each written as well as its library allows.

A contender takes a `Call` once, builds its tables, and gives back a function without arguments that
computes the output; only that function is timed, in forward alone or with its gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.codegen import Case
from kernels import FocalGeometry, Pooling, focal_attention, resolve_backend
from kernels.geometry import index_tables
from kernels.reference import pad_to_windows, pool_map

__all__ = ["CONTENDERS", "OURS", "Call", "Contender", "draw_call"]

OURS = "triton"


@dataclass(frozen=True)
class Call:
    """The tensors of one call: leaves that ask for gradients, and the gradient of the output."""

    case: Case
    leaves: dict[str, Tensor]
    grad_out: Tensor

    @property
    def pooling(self) -> list[Pooling]:
        """The ``pooling`` argument of the operator."""
        count = len(self.case.geometry.levels)
        return [Pooling(self.leaves[f"weight_{level}"]) for level in range(1, count)]

    def images(self, index: Tensor, dtype: torch.dtype) -> Call:
        """The same call for some images of the batch, as fresh leaves of another dtype."""
        leaves = {
            name: (x[index] if x.dim() == 5 else x).detach().to(dtype).requires_grad_()
            for name, x in self.leaves.items()
        }
        case = replace(self.case, batch=len(index))
        return Call(case, leaves, self.grad_out[index].to(dtype))


Forward = Callable[[], Tensor]
Contender = Callable[[Call], Forward]


def draw_call(case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Call:
    """Random tensors of a case, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    geometry = case.geometry

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        x = torch.empty(shape, dtype=dtype, device=device)
        return x.normal_(std=deviation, generator=generator)

    shape = (case.batch, case.height, case.width, case.heads, case.head_dim)
    leaves = {name: normal(*shape) for name in ("query", "key", "value")}
    leaves["bias"] = normal(case.heads, geometry.num_queries, geometry.num_keys)
    for level, spec in enumerate(geometry.levels[1:], start=1):
        side = spec.subwindow_size  # pooled keys of the deviation of single keys
        leaves[f"weight_{level}"] = normal(side, side, deviation=1 / side)
    for x in leaves.values():
        x.requires_grad_()
    return Call(case, leaves, normal(*shape))


def _operator(call: Call, backend: str) -> Forward:
    """Our operator."""
    try:
        resolve_backend(backend, call.grad_out.device, call.grad_out.dtype)
    except ValueError as error:  # not a mistake of the backend
        raise NotImplementedError(str(error)) from error
    names = ("query", "key", "value", "bias")
    tensors = [call.leaves[name] for name in names]
    settings: dict[str, Any] = {"geometry": call.case.geometry, "backend": backend}
    return lambda: focal_attention(*tensors, pooling=call.pooling, **settings)


def _packed(call: Call, name: str) -> Tensor:
    """`[batch, tokens + cells, heads, dim]`: the padded map, then the pooled map of each level."""
    geometry, shift = call.case.geometry, call.case.geometry.shift
    padded = pad_to_windows(call.leaves[name], geometry)
    parts = [padded.flatten(1, 2)]
    if len(geometry.levels) > 1:
        rolled = padded.roll((-shift, -shift), dims=(1, 2)) if shift else padded
        parts += [pool_map(rolled, entry.weight, None).flatten(1, 2) for entry in call.pooling]
    return torch.cat(parts, dim=1)


def _level_starts(case: Case) -> list[int]:
    """Where each level begins in a packed map."""
    starts = [0]
    for level in range(len(case.geometry.levels)):
        starts.append(
            starts[-1] + math.prod(case.geometry.map_cells(level, case.height, case.width))
        )
    return starts[:-1]


def _unwindow(out: Tensor, case: Case, inverse: Tensor) -> Tensor:
    """`[batch, windows, heads, queries, dim]` back into the map, padding cut off."""
    rows, cols = case.geometry.padded_size(case.height, case.width)
    flat = out.transpose(2, 3).flatten(1, 2).index_select(1, inverse)
    return flat.unflatten(1, (rows, cols))[:, : case.height, : case.width]


# -- unfold + SDPA --------------------------------------------------------------------------------


def _unfold_sdpa(call: Call) -> Forward:
    """Gather every window's keys and values, then PyTorch's attention with a dense bias."""
    case, geometry, device = call.case, call.case.geometry, call.grad_out.device
    size = (case.height, case.width)
    query_index, key_index, seam = index_tables(geometry, *size, size, device)
    windows, heads = len(key_index), case.heads
    excluded = (key_index < 0)[:, None, :].repeat(1, geometry.num_queries, 1)
    excluded[:, :, geometry.window_key_slots().to(device)] |= seam
    mask = torch.zeros(excluded.shape, dtype=call.grad_out.dtype, device=device)
    mask = mask.masked_fill_(excluded, -torch.inf)[:, None]
    starts, counts = (
        torch.tensor(x, device=device) for x in (_level_starts(case), geometry.keys_per_level)
    )
    gather = (key_index + starts.repeat_interleave(counts)).where(key_index >= 0, 0).flatten()
    query_order = query_index.flatten()
    inverse = query_order.argsort()

    def fold(x: Tensor, order: Tensor) -> Tensor:
        # Windows beside heads rather than beside images: so the bias broadcasts over the batch.
        found = x.index_select(1, order).unflatten(1, (windows, -1)).transpose(2, 3)
        return found.flatten(1, 2)

    def run() -> Tensor:
        query = fold(pad_to_windows(call.leaves["query"], geometry).flatten(1, 2), query_order)
        key, value = (fold(_packed(call, name), gather) for name in ("key", "value"))
        bias = (call.leaves["bias"] + mask).flatten(0, 1)[None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return _unwindow(out.unflatten(1, (windows, heads)), case, inverse)

    return run


# -- FlexAttention --------------------------------------------------------------------------------

NO_SLOT = 1 << 20  # beyond any key's position, and so is its sum with one


def _axis_slots(geometry: FocalGeometry, side: int, real_side: int, axis: int) -> Tensor:
    """`[windows, cells of all levels + 1]`: a row's (column's) part of a key's position.

    The position of a key in canonical order is the sum of its row's part and its column's, and at
    least `NO_SLOT` where the window does not attend it. The last entry stands for padding.
    """
    blocks, first = [], 0
    for level, spec in enumerate(geometry.levels):
        index = geometry.axis_index(level, side, real_side)
        ordered = index.sort(dim=1).values
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise NotImplementedError("a window attends a key twice: one score would need two bias")
        slots = torch.full((len(index), side // spec.subwindow_size + 1), NO_SLOT)
        position = torch.arange(spec.region_size)
        part = first + position * spec.region_size if axis == 0 else position
        slots.scatter_(1, index.where(index >= 0, slots.shape[1] - 1), part.expand_as(index))
        blocks.append(slots[:, :-1])
        first += spec.region_size**2
    return torch.cat([*blocks, torch.full((len(blocks[0]), 1), NO_SLOT)], dim=1)


def _flex_keys(case: Case, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in blocks: one per window, then each coarse level's cells.

    Returns:
        int64 `[keys]` each: where a key is in the packed map (-1 for padding), and its row and
        column as `_axis_slots` numbers them.
    """
    geometry = case.geometry
    orders, rows, cols, row_start, col_start = [], [], [], 0, 0
    for level, start in enumerate(_level_starts(case)):
        level_rows, level_cols = geometry.map_cells(level, case.height, case.width)
        if level == 0:
            cell = geometry.query_index(case.height, case.width)
            cell = F.pad(cell, (0, block - geometry.num_queries), value=-1).flatten()
        else:
            cell = torch.arange(level_rows * level_cols)
            cell = F.pad(cell, (0, -len(cell) % block), value=-1)
        orders.append(torch.where(cell >= 0, cell + start, -1))
        rows.append(torch.where(cell >= 0, cell // level_cols + row_start, -1))
        cols.append(torch.where(cell >= 0, cell % level_cols + col_start, -1))
        row_start, col_start = row_start + level_rows, col_start + level_cols
    return torch.cat(orders), torch.cat(rows), torch.cat(cols)


def _block_mask(attends: Callable[[int], Tensor], window_rows: int, block: int) -> BlockMask:
    """Which blocks hold keys of each window; within a block the scores are masked."""
    # One row of windows at a time: all windows times all keys would not fit.
    rows = [attends(row).unflatten(1, (-1, block)).any(-1) for row in range(window_rows)]
    attended = torch.cat(rows)
    count = attended.sum(1).int()[None, None]
    order = attended.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(order),
        count,
        order,
        BLOCK_SIZE=block,
        seq_lengths=(attended.shape[0] * block, attended.shape[1] * block),
    )


def _flex_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    slots: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    side: Tensor,
    block_mask: BlockMask,
    settings: tuple[int, int, int, bool],
) -> Tensor:
    """The part that is compiled."""
    block, window_cols, num_keys, shifted = settings
    (row_slot, col_slot), (key_row, key_col) = slots, places

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        window = q // block
        slot = row_slot[window // window_cols, key_row[k]]
        slot = slot + col_slot[window % window_cols, key_col[k]]
        if shifted:
            slot = torch.where((k // block == window) & (side[q] != side[k]), NO_SLOT, slot)
        # Masked pairs are spread over many columns of -inf: their gradients would queue at one.
        slot = torch.where(slot < num_keys, slot, num_keys + k % block)
        return score + bias[head, q % block, slot]

    # The sparse blocks are smaller than the default tiles; flex decoding takes no such mask.
    options: Any = {"FORCE_USE_FLEX_ATTENTION": True, "BLOCK_M": block, "BLOCK_N": block}
    options |= {"BLOCK_M1": 32, "BLOCK_N1": block, "BLOCK_M2": block, "BLOCK_N2": 32}
    return flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        kernel_options=options if query.is_cuda and block >= 32 else None,
    )


def _flex(call: Call) -> Forward:
    """FlexAttention over windows in blocks, with the bias looked up by the geometry's tables."""
    case, geometry, device = call.case, call.case.geometry, call.grad_out.device
    padded = geometry.padded_size(case.height, case.width)
    window_rows, window_cols = geometry.num_windows(case.height, case.width)
    windows, queries = window_rows * window_cols, geometry.num_queries
    block = max(16, triton.next_power_of_2(queries))
    key_order, key_row, key_col = (x.to(device) for x in _flex_keys(case, block))
    row_slot, col_slot = (
        _axis_slots(geometry, side, real, axis).int().to(device)
        for axis, (side, real) in enumerate(zip(padded, (case.height, case.width), strict=True))
    )
    block_mask = _block_mask(
        lambda row: (row_slot[row, key_row] + col_slot[:, key_col]) < NO_SLOT, window_rows, block
    )
    # A negative entry stands for the last one in `_axis_slots`; the kernel takes it as it is.
    places = (key_row % row_slot.shape[1]).int(), (key_col % col_slot.shape[1]).int()
    row_side, col_side = (torch.arange(side) < geometry.shift for side in padded)
    token_side = (2 * row_side.int()[:, None] + col_side.int()).flatten().to(device)
    query_order = key_order[: windows * block].clamp(min=0)  # windows fill the first blocks
    side = F.pad(token_side[query_order], (0, len(key_order) - len(query_order)))
    key_order = key_order.clamp(min=0)
    inverse = geometry.query_index(case.height, case.width).flatten().argsort().to(device)
    settings = (block, window_cols, geometry.num_keys, geometry.shift > 0)
    function = _flex_call
    if device.type == "cuda":
        torch.compiler.reset()  # PyTorch bounds how often one function is compiled
        function = torch.compile(_flex_call, dynamic=False, fullgraph=True)

    def run() -> Tensor:
        query = pad_to_windows(call.leaves["query"], geometry).flatten(1, 2)
        query = query.index_select(1, query_order).transpose(1, 2)
        key, value = (
            _packed(call, name).index_select(1, key_order).transpose(1, 2)
            for name in ("key", "value")
        )
        bias = F.pad(call.leaves["bias"], (0, block), value=-torch.inf)
        bias = F.pad(bias, (0, 0, 0, block - queries))
        tables = ((row_slot, col_slot), places, side, block_mask, settings)
        out = function(query, key, value, bias, *tables)
        out = out.unflatten(2, (windows, block))[:, :, :, :queries]
        return _unwindow(out.transpose(1, 2), case, inverse)

    return run


CONTENDERS: dict[str, Contender] = {
    OURS: partial(_operator, backend="triton"),
    "unfold + SDPA": _unfold_sdpa,
    "FlexAttention": _flex,
    "eager": partial(_operator, backend="eager"),
    "reference": partial(_operator, backend="reference"),
}
