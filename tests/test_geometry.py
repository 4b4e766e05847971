"""Which keys a window attends: the paper's figures, brute force, and the rules."""

import math

import pytest
import torch
from cases import geometries
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import FocalGeometry, FocalLevel
from kernels.geometry import decode_geometry, encode_geometry


def brute_force_axis(
    geometry: FocalGeometry, level: int, padded: int, real: int, window: int
) -> list[int]:
    """Coordinates of the keys of one window along one axis, found token by token."""
    sub, region = geometry.levels[level].subwindow_size, geometry.levels[level].region_size
    # Every cell as the list of padded tokens under it, in the order of the rolled map.
    rolled = [(place + geometry.shift) % padded for place in range(padded)]
    cells = [rolled[first : first + sub] for first in range(0, padded, sub)]
    centre = window * geometry.window_size + geometry.window_size / 2
    first = centre / sub - region / 2
    assert first == int(first)
    found = []
    for cell in range(int(first), int(first) + region):
        on_map = 0 <= cell < len(cells)
        if level == 0:
            if geometry.boundary == "wrap":
                found.append(rolled[cell % padded])
            else:
                found.append(rolled[cell] if on_map and rolled[cell] < real else -1)
        elif not on_map or (
            geometry.boundary == "mask" and all(token >= real for token in cells[cell])
        ):
            found.append(-1)
        else:
            found.append(cell)
    return found


def brute_force_keys(
    geometry: FocalGeometry, height: int, width: int, map_size: tuple[int, int]
) -> list[list[int]]:
    """`FocalGeometry.key_index`, one window, level, row and column at a time."""
    ws = geometry.window_size
    rows, cols = math.ceil(height / ws), math.ceil(width / ws)
    windows = []
    for win_row in range(rows):
        for win_col in range(cols):
            keys = []
            for level, spec in enumerate(geometry.levels):
                stride = cols * ws // spec.subwindow_size
                for y in brute_force_axis(geometry, level, rows * ws, map_size[0], win_row):
                    for x in brute_force_axis(geometry, level, cols * ws, map_size[1], win_col):
                        keys.append(-1 if y < 0 or x < 0 else y * stride + x)
            windows.append(keys)
    return windows


# -- the paper and the released models ------------------------------------------------------------


def test_paper_illustration_has_its_keys():
    geometry = FocalGeometry(4, ((1, 8), (2, 6), (4, 5)))
    assert geometry.keys_per_level == (64, 36, 25)
    assert geometry.num_windows(20, 20) == (5, 5)
    assert geometry.receptive_field == 20
    # The window in the middle attends the whole map at the coarsest level.
    index = geometry.key_index(20, 20)[12]
    assert index.shape == (125,)
    assert index[-25:].tolist() == list(range(25))
    # Its fine region: rows and columns 6 to 13.
    expected = [row * 20 + col for row in range(6, 14) for col in range(6, 14)]
    assert index[:64].tolist() == expected


@pytest.mark.parametrize(
    ("fine", "coarse", "num_keys", "field"),
    [(13, 7, 218, 49), (13, 5, 194, 35), (13, 3, 178, 21), (7, 1, 50, 7)],
)
def test_released_stages_have_their_keys(fine, coarse, num_keys, field):
    geometry = FocalGeometry(7, ((1, fine), (7, coarse)))
    assert geometry.num_keys == num_keys
    assert geometry.num_queries == 49
    assert geometry.receptive_field == field


@pytest.mark.parametrize("corner", [0, 3, 12, 15])
def test_corner_window_of_a_28_map_wraps_69_of_120_ring_keys(corner):
    geometry = FocalGeometry(7, ((1, 13),))
    wrapped = geometry.key_index(28, 28)[corner]
    masked = FocalGeometry(7, ((1, 13),), "mask").key_index(28, 28)[corner]
    assert 13**2 - 7**2 == 120
    assert (masked < 0).sum() == 69
    assert (wrapped >= 0).all()
    assert torch.equal(wrapped[masked >= 0], masked[masked >= 0])


# -- brute force ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(geometries(), st.integers(1, 11), st.integers(1, 11), st.data())
def test_keys_are_those_found_token_by_token(geometry, height, width, data):
    map_size = data.draw(st.none() | st.tuples(st.integers(1, height), st.integers(1, width)))
    expected = brute_force_keys(geometry, height, width, map_size or (height, width))
    assert geometry.key_index(height, width, map_size=map_size).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 11), st.integers(1, 11))
def test_queries_are_the_tokens_of_the_rolled_windows(geometry, height, width):
    rows, cols = geometry.padded_size(height, width)
    rolled = torch.arange(rows * cols).view(rows, cols).roll([-geometry.shift] * 2, dims=(0, 1))
    ws = geometry.window_size
    windows = rolled.unfold(0, ws, ws).unfold(1, ws, ws).reshape(-1, ws * ws)
    assert torch.equal(geometry.query_index(height, width), windows)
    # Every token is the query of one window.
    assert sorted(windows.flatten().tolist()) == list(range(rows * cols))


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 11), st.integers(1, 11))
def test_window_slots_hold_the_queries_themselves(geometry, height, width):
    wrapped = FocalGeometry(geometry.window_size, geometry.levels, "wrap", geometry.shift)
    keys = wrapped.key_index(height, width)[:, wrapped.window_key_slots()]
    assert torch.equal(keys, wrapped.query_index(height, width))


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 11), st.integers(1, 11))
def test_seam_parts_pairs_whose_order_the_roll_turned_round(geometry, height, width):
    # Two tokens of a window come from two sides of the map when the roll turned their order round.
    cols = geometry.padded_size(height, width)[1]
    seam = geometry.seam_mask(height, width)
    for window, queries in enumerate(geometry.query_index(height, width).tolist()):
        for a, first in enumerate(queries):
            for b, second in enumerate(queries):
                rows = (a // geometry.window_size, b // geometry.window_size)
                sides = (a % geometry.window_size, b % geometry.window_size)
                distance = (
                    second // cols - first // cols - (rows[1] - rows[0]),
                    second % cols - first % cols - (sides[1] - sides[0]),
                )
                assert bool(seam[window, a, b]) == (distance != (0, 0))


def test_without_a_shift_no_pair_is_parted():
    assert not FocalGeometry(4, ((1, 6),)).seam_mask(9, 5).any()


@pytest.mark.parametrize("boundary", ["wrap", "mask"])
@pytest.mark.parametrize("shift", [0, 1])
def test_coarse_keys_beyond_the_edge_are_never_keys(boundary, shift):
    geometry = FocalGeometry(3, ((1, 3), (3, 3)), boundary, shift)
    coarse = geometry.key_index(6, 6)[:, 9:]
    # Four windows, each in a corner: five of its nine cells lie beyond the edge.
    assert ((coarse < 0).sum(dim=1) == 5).all()
    assert {tuple(sorted(row[row >= 0].tolist())) for row in coarse} == {(0, 1, 2, 3)}


def test_padding_is_a_key_under_wrap_and_none_under_mask():
    wrap, mask = (FocalGeometry(3, ((1, 5), (3, 3)), b).key_index(4, 5) for b in ("wrap", "mask"))
    padding = {r * 6 + c for r in range(6) for c in range(6) if r >= 4 or c >= 5}
    assert padding & set(wrap[:, :25].flatten().tolist()) == padding
    assert not padding & set(mask[:, :25].flatten().tolist())


def test_cells_of_padding_alone_are_no_keys_under_mask():
    # 3 real rows of 8: cells 2 and 3 of a side hold padding alone.
    geometry = FocalGeometry(4, ((1, 4), (2, 8)), "mask")
    coarse = geometry.key_index(8, 8, map_size=(3, 8))[:, 16:]
    assert set(coarse[coarse >= 0].tolist()) == set(range(8))


def test_boundary_changes_nothing_where_no_region_reaches_the_edge():
    index = [FocalGeometry(2, ((1, 4),), b).key_index(6, 6)[4] for b in ("wrap", "mask")]
    assert torch.equal(*index)


# -- sizes ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(1, 30), st.integers(1, 30))
def test_sizes_agree_with_the_indices(geometry, height, width):
    rows, cols = geometry.padded_size(height, width)
    windows = geometry.num_windows(height, width)
    assert rows % geometry.window_size == cols % geometry.window_size == 0
    assert 0 <= rows - height < geometry.window_size
    assert 0 <= cols - width < geometry.window_size
    index = geometry.key_index(height, width)
    assert index.shape == (windows[0] * windows[1], geometry.num_keys)
    start = 0
    for level, spec in enumerate(geometry.levels):
        assert geometry.cells(level) + 2 * geometry.margin(level) == spec.region_size
        cells = geometry.map_cells(level, height, width)
        assert cells == (rows // spec.subwindow_size, cols // spec.subwindow_size)
        part = index[:, start : start + spec.region_size**2]
        assert part.min() >= -1
        assert part.max() < cells[0] * cells[1]
        start += spec.region_size**2


@settings(max_examples=60, deadline=None)
@given(geometries())
def test_a_geometry_survives_encoding(geometry):
    code = encode_geometry(geometry)
    assert all(type(number) is int for number in code)
    assert decode_geometry(code) == geometry


def test_pairs_and_levels_are_the_same_geometry():
    pairs, levels = ((1, 13), (7, 7)), (FocalLevel(1, 13), FocalLevel(7, 7))
    assert FocalGeometry(7, pairs) == FocalGeometry(7, levels) == FocalGeometry(7, list(pairs))
    assert hash(FocalGeometry(7, list(pairs))) == hash(FocalGeometry(7, levels))


# -- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "level"),
    [(7, (2, 5)), (4, (3, 5)), (4, (8, 1)), (4, (1, 7)), (4, (2, 3)), (4, (1, 2)), (7, (7, 2))],
)
def test_a_level_that_does_not_fit_names_its_three_numbers(window, level):
    levels = (level,) if level[0] == 1 else ((1, window), level)
    with pytest.raises(ValueError, match=r"levels\[") as error:
        FocalGeometry(window, levels)
    numbers = f"window_size={window}, subwindow_size={level[0]}, region_size={level[1]}"
    assert numbers in str(error.value)
    assert f"levels[{len(levels) - 1}]" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, ((1, 3),)), ValueError, "window_size must be positive, got 0"),
        ((-7, ((1, 7),)), ValueError, "window_size must be positive, got -7"),
        ((7.0, ((1, 7),)), TypeError, "window_size must be an integer, got 7.0"),
        ((True, ((1, 1),)), TypeError, "window_size must be an integer, got True"),
        ((7, ()), ValueError, "levels must hold at least the finest level"),
        ((7, ((7, 1),)), ValueError, "subwindow_size must be 1, got 7"),
        ((7, ((0, 7),)), ValueError, "subwindow_size must be positive, got 0"),
        ((7, ((1, -7),)), ValueError, "region_size must be positive, got -7"),
        ((7, ((1, 7.0),)), TypeError, "region_size must be an integer, got 7.0"),
        (
            (7, ((1, 7, 1),)),
            TypeError,
            r"a level must be a FocalLevel or a pair .* got \(1, 7, 1\)",
        ),
        ((7, (7,)), TypeError, "a level must be a FocalLevel or a pair .* got 7"),
        ((7, ("17",)), TypeError, "a level must be a FocalLevel or a pair .* got '17'"),
        ((7, ((1, 7),), "zeros"), ValueError, r"boundary must be one of .*, got 'zeros'"),
        ((7, ((1, 7),), "wrap", 7), ValueError, r"shift must lie in \[0, window_size=7\), got 7"),
        ((7, ((1, 7),), "wrap", -1), ValueError, r"shift must lie in \[0, window_size=7\), got -1"),
        ((7, ((1, 7),), "wrap", 1.5), TypeError, "shift must be an integer, got 1.5"),
        ((7, ((1, 7),), "wrap", True), TypeError, "shift must be an integer, got True"),
    ],
)
def test_a_broken_rule_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        FocalGeometry(*arguments)
