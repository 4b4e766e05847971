"""What the Triton kernels share: their argument bundles, and where queries and keys lie.

Vocabulary, as in `kernels.geometry`: a map is stored as ``height × width`` tokens, counts as
``pad_h × pad_w`` (whole windows), of which ``map_h × map_w`` are real, and is read rolled by
``shift``. Rows and columns are in the rolled map unless they are called stored.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class TokenMap(NamedTuple):
    """A `[batch, height, width, heads, head_dim]` tensor with a contiguous last axis."""

    ptr: Any
    stride_b: Any
    stride_r: Any
    stride_c: Any
    stride_h: Any


class Size(NamedTuple):
    """Run-time sizes."""

    height: Any
    width: Any
    pad_h: Any
    pad_w: Any
    map_h: Any
    map_w: Any
    num_heads: Any
    coarse_cells: Any  # cells of all coarse levels of one image


class CoarseLevel(NamedTuple):
    """Compile-time sizes of a coarse level; ``first`` is its first key in canonical order."""

    first: int
    sub: int
    cells: int
    region: int


class Shape(NamedTuple):
    """Compile-time settings: the sizes of a geometry and a head, the scale, the dropout."""

    window: int
    region: int
    coarse: tuple[CoarseLevel, ...]
    num_queries: int
    num_keys: int
    shift: int
    wrap: bool
    one_period: bool  # no key lies further than one map beyond the edge
    head_dim: int
    block_d: int  # head_dim rounded up to a power of two, at least 16
    m_pad: int  # queries of a window, rounded up to whole tiles
    n_pad: int  # keys of a window, rounded up to whole tiles
    precision: str  # of float32 products: "ieee" or "tf32"
    score_factor: float  # scale · log2(e): scores are taken in base 2
    scale: float
    drop_threshold: int  # 0 without dropout; see `kernels.dropout`
    keep_factor: float  # 1 / (1 − p)


class PoolShape(NamedTuple):
    """The part of `Shape` that pooling needs."""

    shift: int
    head_dim: int
    block_d: int


@triton.jit
def unroll(line, pad_side, S: tl.constexpr):
    """Row or column of the padded map under one of the rolled map, for ``0 <= line < pad_side``."""
    if S.shift > 0:
        line += S.shift
        line = tl.where(line >= pad_side, line - pad_side, line)
    return line


@triton.jit
def locate_queries(m, win_row, win_col, size, S: tl.constexpr):
    """Stored row and column of query ``m`` of a window, and whether the map holds such a token."""
    row = unroll(win_row * S.window + m // S.window, size.pad_h, S)
    col = unroll(win_col * S.window + m % S.window, size.pad_w, S)
    stored = (m < S.num_queries) & (row < size.height) & (col < size.width)
    return row, col, stored


@triton.jit
def wrap(line, pad_side, S: tl.constexpr):
    """Row or column of the padded map under one that may lie beyond an edge of the rolled map."""
    line += S.shift
    if S.one_period:
        line = tl.where(line < 0, line + pad_side, line)
        return tl.where(line >= pad_side, line - pad_side, line)
    # The remainder has the sign of its left side: add a period and take it again.
    return (line % pad_side + pad_side) % pad_side


@triton.jit
def locate_fine(row, col, size, S: tl.constexpr):
    """Stored row and column of fine keys at a row and column that may lie beyond the edge.

    Returns ``(row, col, stored, valid)``: ``stored`` where memory holds the token, ``valid`` where
    it is a key. Under "wrap" padding is a key of zeros; under "mask" it is none.
    """
    if S.wrap:
        row = wrap(row, size.pad_h, S)
        col = wrap(col, size.pad_w, S)
        stored = (row < size.height) & (col < size.width)
        valid = (row >= 0) & (col >= 0)  # every position wraps onto a token
    else:
        valid = (row >= 0) & (row < size.pad_h) & (col >= 0) & (col < size.pad_w)
        row = unroll(row, size.pad_h, S)
        col = unroll(col, size.pad_w, S)
        valid = valid & (row < size.map_h) & (col < size.map_w)
        stored = valid & (row < size.height) & (col < size.width)
    return row, col, stored, valid


@triton.jit
def cell_is_key(cell, pad_side, map_side, SUB: tl.constexpr, S: tl.constexpr):
    """Whether a row or column of cells holds keys: on the map, and not padding under "mask"."""
    valid = (cell >= 0) & (cell < pad_side // SUB)
    if not S.wrap:
        first = unroll(cell * SUB, pad_side, S)
        valid = valid & ((first < map_side) | (first + SUB > pad_side))
    return valid


@triton.jit
def seam_side(row, col, size, S: tl.constexpr):
    """Which of the four sides of the roll's seam a token of the rolled map comes from."""
    below = (row >= size.pad_h - S.shift).to(tl.int32)
    right = (col >= size.pad_w - S.shift).to(tl.int32)
    return 2 * below + right


@triton.jit
def key_seam_side(row, col, win_row, win_col, size, S: tl.constexpr):
    """`seam_side` of in-window keys, -1 for the others: the seam parts in-window pairs alone."""
    down = row - win_row * S.window
    right = col - win_col * S.window
    in_window = (down >= 0) & (down < S.window) & (right >= 0) & (right < S.window)
    return tl.where(in_window, seam_side(row, col, size, S), -1)


@triton.jit
def load_rows(rows, mask, S: tl.constexpr):
    """`[BLOCK, block_d]`: head_dim numbers from each of ``rows``; zeros where ``mask`` is false."""
    d = tl.arange(0, S.block_d)
    mask = mask[:, None]
    if S.head_dim != S.block_d:
        mask = mask & (d < S.head_dim)[None, :]
    return tl.load(rows[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(rows, tile, mask, S: tl.constexpr):
    """Store `[BLOCK, block_d]` at ``rows``, rounded to the pointer's type."""
    d = tl.arange(0, S.block_d)
    mask = mask[:, None]
    if S.head_dim != S.block_d:
        mask = mask & (d < S.head_dim)[None, :]
    tl.store(rows[:, None] + d[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def token_rows(tokens, batch, row, col, head):
    """Pointers to the first number of a head of tokens, in 64 bits before a stride multiplies."""
    start = batch.to(tl.int64) * tokens.stride_b + head.to(tl.int64) * tokens.stride_h
    place = row.to(tl.int64) * tokens.stride_r + col.to(tl.int64) * tokens.stride_c
    return tokens.ptr + start + place


@triton.jit
def cell_rows(ptr, batch, cell, head, size, S: tl.constexpr):
    """Pointers to the first number of a head of packed coarse cells."""
    index = batch.to(tl.int64) * size.coarse_cells + cell
    return ptr + (index * size.num_heads + head) * S.head_dim


@triton.jit
def coarse_level_keys(
    n, cell, valid, level_start, win_row, win_col, size, L: tl.constexpr, S: tl.constexpr
):
    """Fill in packed cell number and validity of the keys ``n`` that belong to one coarse level."""
    MARGIN: tl.constexpr = (L.region - L.cells) // 2
    k = n - L.first
    row = win_row * L.cells - MARGIN + k // L.region
    col = win_col * L.cells - MARGIN + k % L.region
    here = (k >= 0) & (k < L.region * L.region)
    is_key = cell_is_key(row, size.pad_h, size.map_h, L.sub, S)
    is_key = is_key & cell_is_key(col, size.pad_w, size.map_w, L.sub, S)
    cell = tl.where(here, level_start + row * (size.pad_w // L.sub) + col, cell)
    return cell, valid | (here & is_key)


@triton.jit
def coarse_keys(n, win_row, win_col, size, S: tl.constexpr):
    """Packed cell number of coarse keys ``n``, and whether they take part."""
    cell = n * 0
    valid = n < 0
    level_start = 0
    for i in tl.static_range(len(S.coarse)):
        cell, valid = coarse_level_keys(
            n, cell, valid, level_start, win_row, win_col, size, S.coarse[i], S
        )
        level_start += (size.pad_h // S.coarse[i].sub) * (size.pad_w // S.coarse[i].sub)
    return cell, valid


@triton.jit
def key_tile(
    n, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
    S: tl.constexpr, FINE: tl.constexpr, COARSE: tl.constexpr,
):  # fmt: skip
    """Keys ``n`` (canonical order) of one window; FINE and COARSE say which kinds are among them.

    Returns ``(k, v, valid, side)``: tiles `[BLOCK_N, block_d]`, and for each key whether it takes
    part and its `key_seam_side`.
    """
    is_fine = n < S.region * S.region
    if FINE:
        MARGIN: tl.constexpr = (S.region - S.window) // 2
        key_row = win_row * S.window - MARGIN + n // S.region
        key_col = win_col * S.window - MARGIN + n % S.region
        row, col, stored, valid = locate_fine(key_row, key_col, size, S)
        side = key_seam_side(key_row, key_col, win_row, win_col, size, S)
        if COARSE:
            stored = stored & is_fine
            valid = valid & is_fine
            side = tl.where(is_fine, side, -1)
        k = load_rows(token_rows(key, batch, row, col, head), stored, S)
        v = load_rows(token_rows(value, batch, row, col, head), stored, S)
    if COARSE:
        cell, is_key = coarse_keys(n, win_row, win_col, size, S)
        coarse_k = load_rows(cell_rows(coarse_k_ptr, batch, cell, head, size, S), is_key, S)
        coarse_v = load_rows(cell_rows(coarse_v_ptr, batch, cell, head, size, S), is_key, S)
        if FINE:
            # Each row is zero in one of the two: two wide loads cost less than one that must choose
            # its pointer, which the compiler cuts into single numbers.
            k += coarse_k
            v += coarse_v
            valid = valid | is_key
        else:
            k = coarse_k
            v = coarse_v
            valid = is_key
            side = n * 0 - 1
    return k, v, valid, side


@triton.jit
def exclude(
    score, query_side, key_side, valid, S: tl.constexpr, VALID: tl.constexpr, FINE: tl.constexpr
):
    """-inf in scores of pairs that take no part; VALID: no key is invalid, FINE: some are fine."""
    if not VALID:
        score = tl.where(valid, score, -float("inf"))
    if FINE and S.shift > 0:
        score = tl.where((key_side >= 0) & (key_side != query_side), -float("inf"), score)
    return score


@triton.jit
def mix(x):
    """The finaliser of MurmurHash3 on uint32; see `kernels.dropout`."""
    x = x ^ (x >> 16)
    x = x * 0x85EBCA6B
    x = x ^ (x >> 13)
    x = x * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def keep_mask(seed_ptr, row, pair, S: tl.constexpr):
    """Pairs (query · num_keys + key) of a (batch, window, head) ``row`` that dropout keeps."""
    start = mix((row ^ tl.load(seed_ptr)).to(tl.uint32))
    hashed = mix(start + pair.to(tl.uint32) * 0x9E3779B1)
    # Compared in 64 bits, for the threshold needs all 32 and the sign.
    return hashed.to(tl.int64) >= S.drop_threshold
