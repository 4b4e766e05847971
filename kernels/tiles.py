"""What the Triton kernels share: their argument bundles, and where queries and keys lie.

Vocabulary, as in `kernels.geometry`: a map is stored as ``height × width`` tokens, counts as
``pad_h × pad_w`` (whole windows), of which ``map_h × map_w`` are real, and is read rolled by
``shift``. Rows and columns are in the rolled map unless they are called stored.

Keys are taken level by level, in tiles that never mix two levels: a level's keys are rounded up to
whole tiles, and the places beyond the last key repeat it with a bias of -inf.
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


class Level(NamedTuple):
    """Compile-time sizes of one level of keys.

    ``full`` keys fill whole tiles of ``block``; ``tail`` lists (first key, size) of the smaller
    tiles that hold the rest.
    """

    fine: bool  # level 0, of tokens
    sub: int
    cells: int  # of a window, along one side
    region: int
    first: int  # first key in canonical order
    column: int  # first column in padded biases
    inline: bool  # pooled inside the attention kernel, not by a pass of its own
    block: int
    full: int
    tail: tuple[tuple[int, int], ...]

    @property
    def width(self) -> int:
        """Columns in padded biases."""
        return self.full + sum(size for _, size in self.tail)


class Shape(NamedTuple):
    """Compile-time settings: the sizes of a geometry and a head, the scale, the dropout."""

    window: int
    levels: tuple[Level, ...]
    num_queries: int
    num_keys: int
    shift: int
    wrap: bool
    one_period: bool  # no key lies further than one map beyond the edge
    even: bool  # whole windows are stored, and all their tokens are real
    narrow: bool  # 32 bits hold every offset inside an image
    same_strides: bool  # of key and value, so that they share offsets
    head_dim: int
    block_d: int  # head_dim rounded up to a power of two, at least 16
    m_pad: int  # queries of a window, rounded up to whole tiles
    n_pad: int  # keys of a window, each level rounded up to whole tiles
    precision: str  # of float32 products: "ieee" or "tf32"
    score_factor: float  # scale · log2(e): exponentials are taken in base 2
    scale: float
    drop_threshold: int  # 0 without dropout; see `kernels.dropout`
    keep_factor: float  # 1 / (1 − p)


class Pool(NamedTuple):
    """Pooling of a level: weights `[sub, sub]`, offsets `[heads, head_dim]`."""

    weight_ptr: Any
    k_offset_ptr: Any
    v_offset_ptr: Any


class PoolShape(NamedTuple):
    """The part of `Shape` that pooling needs."""

    shift: int
    narrow: bool
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
def locate_window(item, size, S: tl.constexpr):
    """Batch, row and column of window ``item`` of all images."""
    win_cols = size.pad_w // S.window
    num_windows = (size.pad_h // S.window) * win_cols
    batch = item // num_windows
    window = item % num_windows
    return batch, window // win_cols, window % win_cols


@triton.jit
def locate_queries(m, win_row, win_col, size, S: tl.constexpr):
    """Stored row and column of query ``m`` of a window, and whether the map holds such a token."""
    row = unroll(win_row * S.window + m // S.window, size.pad_h, S)
    col = unroll(win_col * S.window + m % S.window, size.pad_w, S)
    stored = m < S.num_queries
    if not S.even:
        stored = stored & (row < size.height) & (col < size.width)
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
        valid = (row >= 0) & (col >= 0)  # every position wraps onto a token
        stored = valid
        if not S.even:
            stored = (row < size.height) & (col < size.width)
    else:
        valid = (row >= 0) & (row < size.pad_h) & (col >= 0) & (col < size.pad_w)
        row = unroll(row, size.pad_h, S)
        col = unroll(col, size.pad_w, S)
        stored = valid
        if not S.even:
            valid = valid & (row < size.map_h) & (col < size.map_w)
            stored = valid & (row < size.height) & (col < size.width)
    return row, col, stored, valid


@triton.jit
def cell_is_key(cell, pad_side, map_side, SUB: tl.constexpr, S: tl.constexpr):
    """Whether a row or column of cells holds keys: on the map, and not padding under "mask"."""
    valid = (cell >= 0) & (cell < pad_side // SUB)
    if not (S.wrap or S.even):
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
def query_seam_side(m, win_row, win_col, size, S: tl.constexpr):
    """`seam_side` of the queries of a window."""
    row = win_row * S.window + m // S.window
    return seam_side(row, win_col * S.window + m % S.window, size, S)


@triton.jit
def key_seam_side(row, col, win_row, win_col, size, S: tl.constexpr):
    """`seam_side` of in-window keys, -1 for the others: the seam parts in-window pairs alone."""
    down = row - win_row * S.window
    right = col - win_col * S.window
    in_window = (down >= 0) & (down < S.window) & (right >= 0) & (right < S.window)
    return tl.where(in_window, seam_side(row, col, size, S), -1)


@triton.jit
def load_rows(rows, mask, ALL: tl.constexpr, S: tl.constexpr):
    """`[BLOCK, block_d]`: head_dim numbers from each of ``rows``; zeros where ``mask`` is false.

    ALL says that ``mask`` is true throughout.
    """
    d = tl.arange(0, S.block_d)
    places = rows[:, None] + d[None, :]
    if S.head_dim != S.block_d:
        return tl.load(places, mask=mask[:, None] & (d < S.head_dim)[None, :], other=0.0)
    if ALL:
        return tl.load(places)
    return tl.load(places, mask=mask[:, None], other=0.0)


@triton.jit
def store_rows(rows, tile, mask, S: tl.constexpr):
    """Store `[BLOCK, block_d]` at ``rows``, rounded to the pointer's type."""
    # Two axes for the numbers of a row, for of two-dimensional sums of products the compiler for
    # AMD stores what a thread happens to hold, which is 8 bytes.
    PART: tl.constexpr = 8
    PARTS: tl.constexpr = S.block_d // PART
    d = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    mask = mask[:, None, None]
    if S.head_dim != S.block_d:
        mask = mask & (d < S.head_dim)[None, :, :]
    tile = tl.reshape(tile.to(rows.dtype.element_ty), [tile.shape[0], PARTS, PART])
    tl.store(rows[:, None, None] + d[None, :, :], tile, mask=mask)


@triton.jit
def image_ptr(tokens, batch, head):
    """Pointer to a head of the first token of an image, in 64 bits before a stride multiplies."""
    return tokens.ptr + batch.to(tl.int64) * tokens.stride_b + head.to(tl.int64) * tokens.stride_h


@triton.jit
def token_offset(tokens, row, col, S: tl.constexpr):
    """Offsets of tokens from `image_ptr`."""
    if not S.narrow:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    return row * tokens.stride_r + col * tokens.stride_c


@triton.jit
def row_offset(index, size, S: tl.constexpr):
    """Offsets of tokens or cells of one image in a contiguous map `[..., heads, head_dim]`."""
    if not S.narrow:
        index = index.to(tl.int64)
    return index * (size.num_heads * S.head_dim)


@triton.jit
def packed_ptr(ptr, batch, count, head, size, S: tl.constexpr):
    """Pointer to a head of the first of ``count`` tokens or cells of an image, all contiguous."""
    return ptr + (batch.to(tl.int64) * count * size.num_heads + head) * S.head_dim


@triton.jit
def key_tile(
    k, level_start, batch, head, win_row, win_col, key, value, coarse_k_ptr, coarse_v_ptr, size,
    L: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Keys ``k`` of one level of one window; ``level_start`` is its first cell in the packed maps.

    Returns ``(keys, values, valid, side)``: tiles `[BLOCK_N, block_d]`, and for each key whether it
    takes part and its `key_seam_side`.
    """
    MARGIN: tl.constexpr = (L.region - L.cells) // 2
    place = tl.minimum(k, L.region * L.region - 1)
    row = win_row * L.cells - MARGIN + place // L.region
    col = win_col * L.cells - MARGIN + place % L.region
    if L.fine:
        side = key_seam_side(row, col, win_row, win_col, size, S)
        row, col, stored, valid = locate_fine(row, col, size, S)
        k_rows = image_ptr(key, batch, head)
        v_rows = image_ptr(value, batch, head)
        offset = token_offset(key, row, col, S)
        k_rows += offset
        v_rows += offset if S.same_strides else token_offset(value, row, col, S)
        ALL: tl.constexpr = S.wrap and S.even
        keys = load_rows(k_rows, stored, ALL, S)
        values = load_rows(v_rows, stored, ALL, S)
    else:
        side = place * 0 - 1
        valid = cell_is_key(row, size.pad_h, size.map_h, L.sub, S)
        valid = valid & cell_is_key(col, size.pad_w, size.map_w, L.sub, S)
        offset = row_offset(level_start + row * (size.pad_w // L.sub) + col, size, S)
        k_rows = packed_ptr(coarse_k_ptr, batch, size.coarse_cells, head, size, S) + offset
        v_rows = packed_ptr(coarse_v_ptr, batch, size.coarse_cells, head, size, S) + offset
        keys = load_rows(k_rows, valid, False, S)
        values = load_rows(v_rows, valid, False, S)
    return keys, values, valid, side


@triton.jit
def pool_tile(
    k, pool, batch, head, win_row, win_col, key, value, size,
    L: tl.constexpr, S: tl.constexpr, BLOCK_N: tl.constexpr, ACC_TYPE: tl.constexpr,
):  # fmt: skip
    """`key_tile` for keys ``k`` of a coarse level, pooled here from the tokens of the region.

    A product of tensor cores pools: the weights, spread over `[BLOCK_N, TOKENS]` with a row for
    each cell, times the tokens.
    """
    MARGIN: tl.constexpr = (L.region - L.cells) // 2
    TOKENS: tl.constexpr = 64
    # -- the cells of the region that lie on the map
    first_row = win_row * L.cells - MARGIN
    first_col = win_col * L.cells - MARGIN
    top = tl.maximum(first_row, 0)
    left = tl.maximum(first_col, 0)
    cols = (tl.minimum(first_col + L.region, size.pad_w // L.sub) - left) * L.sub
    rows = (tl.minimum(first_row + L.region, size.pad_h // L.sub) - top) * L.sub
    k_image = image_ptr(key, batch, head)
    v_image = image_ptr(value, batch, head)
    keys = tl.zeros([BLOCK_N, S.block_d], dtype=ACC_TYPE)
    values = tl.zeros([BLOCK_N, S.block_d], dtype=ACC_TYPE)
    for start in range(0, rows * cols, TOKENS):
        t = start + tl.arange(0, TOKENS)
        row = top * L.sub + t // cols
        col = left * L.sub + t % cols
        cell = (row // L.sub - first_row) * L.region + col // L.sub - first_col
        place = row % L.sub * L.sub + col % L.sub
        weight = tl.load(pool.weight_ptr + place, mask=t < rows * cols, other=0.0)
        spread = tl.where(k[:, None] == cell[None, :], weight[None, :], 0.0)
        row = unroll(row, size.pad_h, S)
        col = unroll(col, size.pad_w, S)
        stored = (t < rows * cols) & (row < size.height) & (col < size.width)
        token_k = load_rows(k_image + token_offset(key, row, col, S), stored, False, S)
        token_v = load_rows(v_image + token_offset(value, row, col, S), stored, False, S)
        spread = spread.to(token_k.dtype)
        keys = tl.dot(spread, token_k, acc=keys, input_precision=S.precision, out_dtype=ACC_TYPE)
        values = tl.dot(
            spread, token_v, acc=values, input_precision=S.precision, out_dtype=ACC_TYPE
        )
    # -- offsets, and which cells are keys
    d = tl.arange(0, S.block_d)
    offset = head * S.head_dim + d
    keys += tl.load(pool.k_offset_ptr + offset, mask=d < S.head_dim, other=0.0)[None, :]
    values += tl.load(pool.v_offset_ptr + offset, mask=d < S.head_dim, other=0.0)[None, :]
    cell_row = first_row + k // L.region
    cell_col = first_col + k % L.region
    valid = cell_is_key(cell_row, size.pad_h, size.map_h, L.sub, S)
    valid = valid & cell_is_key(cell_col, size.pad_w, size.map_w, L.sub, S)
    return keys.to(key.ptr.dtype.element_ty), values.to(key.ptr.dtype.element_ty), valid, k * 0 - 1


@triton.jit
def load_bias(ptr, k, L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`[BLOCK_M, BLOCK_N]` from key ``k`` of a level on; see `kernels.bias_layout`."""
    ROW: tl.constexpr = 8 * BLOCK_M
    j = (L.column + k) // 8 + tl.arange(0, BLOCK_N // 8)
    bias = tl.load(ptr + j[:, None] * ROW + tl.arange(0, ROW)[None, :])
    bias = tl.reshape(bias, [BLOCK_N // 8, BLOCK_M // 16, 8, 4, 2, 2])
    return tl.reshape(tl.permute(bias, [1, 4, 2, 0, 3, 5]), [BLOCK_M, BLOCK_N])


@triton.jit
def exclude(score, query_side, key_side, valid, L: tl.constexpr, S: tl.constexpr):
    """-inf in scores of pairs of a level that take no part."""
    if not (L.fine and S.wrap):
        score = tl.where(valid, score, -float("inf"))
    if L.fine and S.shift > 0:
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


@triton.jit
def keep_tile(seed_ptr, row, m, k, L: tl.constexpr, S: tl.constexpr):
    """`keep_mask` of queries ``m`` and a tile of a level's keys from ``k`` on."""
    n = L.first + k + tl.arange(0, L.block)
    return keep_mask(seed_ptr, row, m[:, None] * S.num_keys + n[None, :], S)
