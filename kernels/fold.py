"""Gradients of tokens and cells out of the parts that windows and key tiles left of them.

`kernels.backward` has the layouts of the parts. Each kernel reads them in ascending order of
windows or tiles, so that sums are the same from run to run.
"""

import triton
import triton.language as tl

from kernels.tiles import (
    image_ptr,
    locate_fine,
    locate_queries,
    locate_window,
    store_rows,
    token_offset,
)

__all__ = ["FOLD_BLOCK", "fold_keys_kernel", "fold_queries_kernel"]

FOLD_BLOCK = 32  # tokens or cells of a program of `fold_keys_kernel`


@triton.jit(do_not_specialize=["first_item"])
def fold_queries_kernel(
    part_ptr, grad, size, first_item,
    S: tl.constexpr, NUM_TILES: tl.constexpr, BLOCK_M: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Sum the key tiles' parts of ``dq``; grid (items · query blocks, heads)."""
    BLOCKS: tl.constexpr = S.m_pad // BLOCK_M
    i = tl.program_id(0) // BLOCKS
    head = tl.program_id(1)
    batch, win_row, win_col = locate_window(first_item + i, size, S)
    m = (tl.program_id(0) % BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = i.to(tl.int64) * size.num_heads + head
    rows = part_ptr + (place * NUM_TILES * S.m_pad + m)[:, None] * S.block_d
    rows += tl.arange(0, S.block_d)[None, :]
    acc = tl.zeros([BLOCK_M, S.block_d], dtype=ACC_TYPE)
    for tile in range(NUM_TILES):
        acc += tl.load(rows + tile * (S.m_pad * S.block_d)).to(ACC_TYPE)
    row, col, stored = locate_queries(m, win_row, win_col, size, S)
    target = image_ptr(grad, batch, head) + token_offset(grad, row, col, S)
    store_rows(target, acc * S.scale, stored, S)


@triton.jit
def wrap_window(at, count, S: tl.constexpr):
    """Row or column of a window under one that may lie beyond an edge."""
    if S.one_period:
        at = tl.where(at < 0, at + count, at)
        return tl.where(at >= count, at - count, at)
    return (at % count + count) % count


@triton.jit(do_not_specialize=["first_batch"])
def fold_keys_kernel(
    key_part_ptr, value_part_ptr, grad_key, grad_value, size, first_batch, count, level_start,
    S: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """Sum the windows' parts of ``dk`` and ``dv``; grid (cell tiles, heads, images).

    ``count`` cells (tokens at level 0) lie on the rolled, padded map of the level. The gradients of
    a coarse level are packed maps, which count as maps of one row.
    """
    MARGIN: tl.constexpr = (L.region - L.cells) // 2
    SIDE: tl.constexpr = (L.region + L.cells - 1) // L.cells  # windows along an axis, at most
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    batch = first_batch + tl.program_id(2)
    win_rows = size.pad_h // S.window
    win_cols = size.pad_w // S.window
    cell_row = cell // (win_cols * L.cells)
    cell_col = cell % (win_cols * L.cells)
    first_place = tl.program_id(2).to(tl.int64) * (win_rows * win_cols)
    d = tl.arange(0, S.block_d)[None, :]
    dk = tl.zeros([BLOCK, S.block_d], dtype=ACC_TYPE)
    dv = tl.zeros([BLOCK, S.block_d], dtype=ACC_TYPE)
    for step in range(SIDE * SIDE):
        # A window that may attend the cell, and the cell's place in its region.
        up = step // SIDE
        left = step % SIDE
        y = (cell_row + MARGIN) % L.cells + up * L.cells
        x = (cell_col + MARGIN) % L.cells + left * L.cells
        at_row = (cell_row + MARGIN) // L.cells - up
        at_col = (cell_col + MARGIN) // L.cells - left
        attended = (cell < count) & (y < L.region) & (x < L.region)
        if L.fine and S.wrap:
            at_row = wrap_window(at_row, win_rows, S)
            at_col = wrap_window(at_col, win_cols, S)
        else:
            attended = attended & (at_row >= 0) & (at_row < win_rows)
            attended = attended & (at_col >= 0) & (at_col < win_cols)
        place = first_place + at_row * win_cols + at_col
        place = (place * size.num_heads + head) * BLOCKS
        for block in tl.static_range(BLOCKS):
            rows = ((place + block) * L.full + y * L.region + x)[:, None] * S.block_d + d
            dk += tl.load(key_part_ptr + rows, mask=attended[:, None], other=0.0).to(ACC_TYPE)
            dv += tl.load(value_part_ptr + rows, mask=attended[:, None], other=0.0).to(ACC_TYPE)
    row, col, stored = cell * 0, level_start + cell, cell < count
    if L.fine:
        row, col, _, _ = locate_fine(cell_row, cell_col, size, S)
        # Tokens that are no keys are stored as well: their gradient is zero.
        stored = stored & (row < size.height) & (col < size.width)
    target_k = image_ptr(grad_key, batch, head) + token_offset(grad_key, row, col, S)
    target_v = image_ptr(grad_value, batch, head) + token_offset(grad_value, row, col, S)
    store_rows(target_k, dk * S.scale, stored, S)
    store_rows(target_v, dv, stored, S)
