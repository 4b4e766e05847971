"""The eager backend against the oracle: output and every gradient."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import (
    ODD,
    Case,
    assert_precise,
    assert_same,
    attend,
    cases,
    channels_first,
    error_ratios,
    fused,
    heads_first,
    make_tensors,
    random_gradient,
    run,
)
from hypothesis import given, settings

from kernels import FocalGeometry, eager, eager_kept
from kernels.eager_gather import Workspaces
from kernels.eager_plan import make_plan, most_scores

LAYOUTS = pytest.mark.parametrize("layout", [fused, heads_first, channels_first])
LARGE = Case("stage", 7, ((1, 13), (7, 5)), 23, 30, heads=2, head_dim=6, batch=3, shift=3)
MASKED = Case(
    "masked", 4, ((1, 8), (2, 4), (4, 3)), 13, 10, batch=3, boundary="mask", map_size=(11, 7)
)


def check(case: Case, layout=dict) -> None:
    tensors, gradient = make_tensors(case), random_gradient(case)
    expected = run(case, tensors, "reference", gradient)
    assert_same(run(case, tensors, "eager", gradient, layout), expected)


@pytest.fixture
def small_steps(monkeypatch, request):
    """Bands and groups of images as small as ``request.param`` scores."""
    eager._bands.cache_clear()
    monkeypatch.setitem(eager.SCORES_PER_STEP, "cpu", request.param)
    yield
    eager._bands.cache_clear()


# -- against the oracle ---------------------------------------------------------------------------


@ODD
def test_output_and_gradients_are_the_oracles(case):
    check(case)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_output_and_gradients_are_the_oracles_for_any_geometry(case):
    check(case)


@LAYOUTS
@pytest.mark.parametrize("case", [LARGE, MASKED], ids=str)
def test_strided_inputs_give_the_same(case, layout):
    check(case, layout)


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3, 8], indirect=True)
@pytest.mark.parametrize("small_steps", [100_000, 2_000_000], indirect=True)
@pytest.mark.parametrize("case", [LARGE, MASKED], ids=str)
def test_gradients_of_the_bias_are_summed_by_any_number_of_threads(case, small_steps, threads):
    check(case)


# LARGE has five columns of four windows, of 21 364 scores each: the budgets give single windows,
# parts of a column, columns, single images and several images.
@pytest.mark.parametrize("small_steps", [1, 50_000, 220_000, 800_000, 2_000_000], indirect=True)
@pytest.mark.parametrize("case", [LARGE, MASKED], ids=str)
def test_bands_and_groups_of_images_give_the_same(case, small_steps):
    check(case)


def test_steps_cover_every_window_of_every_image_once():
    geometry, size = LARGE.geometry, (LARGE.height, LARGE.width)
    rows, cols = geometry.num_windows(*size)
    per_window = LARGE.heads * geometry.num_queries * geometry.num_keys
    # Budgets of one window, a part of a row, one, two and four rows, two images, and everything.
    for windows in (1, 2, cols, 2 * cols, 4 * cols, 2 * rows * cols, 100):
        budget = windows * per_window
        plan = make_plan(geometry, size, size, LARGE.heads, torch.device("cpu"), budget)
        seen = [
            (loaded.start + image, row, col)
            for loaded in plan.loads(LARGE.batch)
            for band, images in plan.steps(loaded)
            for image in range(images.start, images.stop)
            for row in range(band.rows.start, band.rows.stop)
            for col in range(band.cols.start, band.cols.stop)
        ]
        assert sorted(seen) == list(product(range(LARGE.batch), range(rows), range(cols)))
        assert max(band.num_windows for band in plan.bands) * plan.images <= windows


def test_products_that_a_thread_computes_lie_in_memory_of_their_own():
    """Threads get halves of a step: of its products, and of what a copy or sum fills."""
    size, like = LARGE.shape[1:3], torch.empty(LARGE.shape)
    plan = make_plan(LARGE.geometry, size, size, LARGE.heads, like.device, budget=100_000)
    assert {band.shape for band in plan.bands} == {(4, 1)}  # rows of the map for each half
    work = Workspaces(plan, like).of(plan.bands[0], slice(0, 1))
    products = work.score_shape[0]
    starts = [[part.data_ptr() for part in side] for side in work.key_value.sides]
    assert max(x for side in starts for x in side[: products // 2]) < min(
        x for side in starts for x in side[products // 2 :]
    )
    assert all(side.is_contiguous() for side in work.grad_key_value.sides)
    patch = plan.levels[0]
    unrolled = patch.new_unrolled(torch.empty(2, *LARGE.shape), images=1)
    assert max(unrolled.stride()) == unrolled.stride(1) > unrolled.stride(3) > unrolled.stride(0)


def test_inner_bands_share_their_masks():
    geometry = FocalGeometry(2, ((1, 4), (2, 3)))
    plan = make_plan(geometry, (20, 6), (20, 6), 1, torch.device("cpu"), budget=1)
    assert len(plan.bands) == 30
    # At both edges and between, along both axes; the middle one excludes nothing.
    kinds = {id(band.mask) for band in plan.bands}
    assert len(kinds) == 9


@settings(max_examples=100, deadline=None)
@given(cases())
def test_a_compiler_leaves_room_for_the_scores_of_every_step(case):
    geometry, size = case.geometry, case.shape[1:3]
    plan = make_plan(geometry, size, case.map_size or size, case.heads, torch.device("cpu"), 1000)
    assert sum(map(plan.num_scores, plan.bands)) <= most_scores(geometry, *size)


# -- levels that all windows share ----------------------------------------------------------------

STAGES = [((1, 13), (7, 7)), ((1, 13), (7, 5)), ((1, 13), (7, 3)), ((1, 7), (7, 1))]
SHARED = [
    Case("stage 1 shape", 3, ((1, 5), (3, 3)), 12, 9, heads=2, head_dim=4, batch=3),
    Case("whole map", 4, ((1, 6), (4, 3), (2, 4)), 8, 8, heads=2, head_dim=4, batch=3),
    Case("shifted", 4, ((1, 6), (4, 3)), 8, 8, heads=2, head_dim=4, batch=3, shift=2),
    Case("masked", 4, ((1, 6), (4, 3)), 8, 8, batch=2, boundary="mask", shift=1),
    Case("partly real", 4, ((1, 6), (4, 3)), 8, 8, batch=2, boundary="mask", map_size=(8, 5)),
    Case("stored smaller", 4, ((1, 6), (4, 3)), 7, 6, batch=2),
    Case("middle level", 4, ((1, 4), (2, 4), (4, 1)), 8, 8, heads=2, head_dim=4, batch=2),
]


def plan_of(geometry: FocalGeometry, side: int, map_size=None, **options):
    size = (side, side)
    return make_plan(geometry, size, map_size or size, 2, torch.device("cpu"), 10**6, **options)


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_shared_levels_give_the_same(case):
    check(case)


def test_at_224_pixels_pooled_maps_are_shared_and_stage_3_is_one_product():
    plans = [
        plan_of(FocalGeometry(7, levels), side)
        for levels, side in zip(STAGES, (56, 28, 14, 7), strict=True)
    ]
    assert [plan.keys.num_shared for plan in plans] == [64, 16, 196 + 4, 49 + 1]
    assert [plan.keys.num_windowed for plan in plans] == [169, 169, 0, 0]
    assert [plan.queries.count for plan in plans] == [(8, 8), (4, 4), (1, 1), (1, 1)]
    assert all(plan.keys.num_columns % 8 == 0 for plan in plans)


def test_maps_much_larger_than_a_region_are_not_shared():
    plan = plan_of(FocalGeometry(7, STAGES[1]), 56)
    assert plan.keys.num_shared == 0
    assert plan.keys.num_windowed == 169 + 25


def test_levels_that_follow_one_another_are_one_run_of_keys():
    plan = plan_of(FocalGeometry(4, ((1, 4), (2, 4), (4, 1))), 8)  # the middle one is shared
    assert plan.keys.windowed == (slice(0, 16), slice(32, 33))
    assert plan.keys.shared == (slice(16, 32),)
    plan = plan_of(FocalGeometry(4, ((1, 4), (2, 4), (4, 1))), 16)
    assert plan.keys.windowed == (slice(0, 33),)
    assert plan.keys.shared == ()


def test_a_map_that_a_window_attends_twice_is_not_shared():
    # Twice the same key, with two biases: under "wrap" a region of 6 goes around a map of 4.
    assert plan_of(FocalGeometry(4, ((1, 6),)), 4).keys.num_shared == 0
    assert plan_of(FocalGeometry(4, ((1, 4),)), 4).keys.num_shared == 16


def test_tokens_that_no_window_attends_are_not_shared():
    # They may hold anything, and what is not a number would reach all through weights of zero.
    geometry = FocalGeometry(4, ((1, 6), (4, 3)), boundary="mask")
    assert plan_of(geometry, 8, (8, 5)).keys.num_shared == 4  # the pooled map alone


def test_without_sharing_columns_are_in_canonical_order():
    plan = plan_of(FocalGeometry(7, STAGES[2]), 14, share=False)
    assert plan.keys.windowed == (slice(0, 178),)


def test_an_expanded_gradient_gives_the_same():
    tensors = make_tensors(MASKED)
    gradient = torch.ones((), dtype=torch.float64).expand(MASKED.shape)
    assert gradient.stride() == (0,) * 5
    expected = run(MASKED, tensors, "reference", gradient)
    assert_same(run(MASKED, tensors, "eager", gradient), expected)


def test_a_partly_expanded_gradient_gives_the_same():
    tensors = make_tensors(MASKED)
    gradient = random_gradient(MASKED)[:, :1, :, :1].expand(MASKED.shape)
    expected = run(MASKED, tensors, "reference", gradient)
    assert_same(run(MASKED, tensors, "eager", gradient), expected)


def test_gradients_of_some_inputs_alone_are_the_same():
    tensors, gradient = make_tensors(LARGE), random_gradient(LARGE)
    expected = run(LARGE, tensors, "reference", gradient)
    frozen = {name: x.detach() for name, x in tensors.items()}
    for name in ("query", "bias", "weight_1"):
        wanted = {**frozen, name: frozen[name].clone().requires_grad_()}
        (grad,) = torch.autograd.grad(attend(LARGE, wanted, "eager"), wanted[name], gradient)
        torch.testing.assert_close(grad, expected[name], atol=1e-10, rtol=1e-10)


def test_keys_and_values_of_one_projection_are_pooled_where_they_lie():
    qkv = torch.randn(2, 4, 6, 3, 2, 5)
    _, key, value = qkv.unbind(3)
    tokens = eager._as_heads(eager._side_by_side(key, value))
    assert tokens.data_ptr() == key.data_ptr()
    apart = eager._as_heads(eager._side_by_side(key.clone(), value.clone()))
    torch.testing.assert_close(tokens, apart, rtol=0.0, atol=0.0)
    torch.testing.assert_close(tokens, torch.cat((key, value), dim=3), rtol=0.0, atol=0.0)


def test_one_tensor_as_query_key_and_value():
    case = Case("tied", 3, ((1, 5), (3, 3)), 4, 5)
    tensors, gradient = make_tensors(case), random_gradient(case)
    tied = {**tensors, "key": tensors["query"], "value": tensors["query"]}
    grads = [
        torch.autograd.grad(attend(case, tied, backend), tensors["query"], gradient)[0]
        for backend in ("reference", "eager")
    ]
    torch.testing.assert_close(*reversed(grads), atol=1e-10, rtol=1e-10)


GRADCHECK = [
    Case("wrap", 2, ((1, 4), (2, 3)), 3, 4, heads=1, head_dim=2, batch=1, shift=1),
    Case("mask", 2, ((1, 4), (2, 3)), 3, 5, 1, 2, 1, "mask", 1, (2, 5)),
    Case("ready", 2, ((1, 2), (1, 4)), 3, 3, heads=2, head_dim=1, batch=1, ready=(1,)),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradients_agree_with_finite_differences(case):
    tensors = make_tensors(case)
    names = list(tensors)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(case, dict(zip(names, inputs, strict=True)), "eager")

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), atol=1e-6)


# -- edges ----------------------------------------------------------------------------------------


def test_a_query_without_any_key_gives_zeros_and_no_gradient():
    case = Case("no key", 2, ((1, 2), (2, 1)), 5, 7, boundary="mask", map_size=(2, 3))
    check(case)
    result = run(case, make_tensors(case), "eager", random_gradient(case))
    assert (result["out"][:, 2:] == 0).all()
    assert (result["query"][:, 2:] == 0).all()
    assert all(tensor.isfinite().all() for tensor in result.values())


def test_an_empty_batch_gives_an_empty_map_and_zero_gradients():
    case = Case("empty", 3, ((1, 5), (3, 3)), 4, 5, batch=0)
    result = run(case, make_tensors(case), "eager", random_gradient(case))
    assert result["out"].shape == case.shape
    assert all((result[name] == 0).all() for name in ("bias", "weight_1", "key_offset_1"))


def test_large_scores_do_not_overflow():
    tensors, gradient = make_tensors(MASKED), random_gradient(MASKED)
    tensors["query"] = (tensors["query"].detach() * 1000).requires_grad_()
    expected = run(MASKED, tensors, "reference", gradient)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    got = run(MASKED, tensors, "eager", gradient)
    for name, tensor in expected.items():  # gradients of keys are as large as the queries
        size = 1000.0 if name.startswith(("key", "weight")) else 1.0
        torch.testing.assert_close(got[name] / size, tensor / size, atol=1e-10, rtol=1e-10)


def test_results_do_not_change_from_run_to_run():
    tensors, gradient = make_tensors(LARGE, torch.float32), random_gradient(LARGE, torch.float32)
    first, second = (run(LARGE, tensors, "eager", gradient) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def keeping(monkeypatch):
    """How many weights each call kept, and a way to forbid it."""
    attention, counts, allowed = eager._attention, [], [True]

    def spy(*arguments):
        *rest, kept_sizes, seed = arguments
        out = attention(*rest, kept_sizes if allowed[0] else None, seed)
        counts.append(sum(len(x) for x in out[1:] if x.ndim == 1))  # the others are pooled maps
        return out

    monkeypatch.setattr(eager, "_attention", spy)
    return counts, allowed


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("case", [LARGE, MASKED], ids=str)
def test_kept_weights_give_what_weights_computed_again_give(case, dropout_p, keeping):
    counts, allowed = keeping
    case = replace(case, dropout_p=dropout_p)
    tensors, gradient = make_tensors(case), random_gradient(case)
    kept = run(case, tensors, "eager", gradient)
    allowed[0] = False
    computed = run(case, tensors, "eager", gradient)
    assert counts[0] > 0 == counts[1]
    assert all(torch.equal(kept[name], computed[name]) for name in kept)


@pytest.mark.parametrize("small_steps", [400], indirect=True)
@pytest.mark.parametrize("together", [1, 2**17])
def test_weights_are_kept_in_pieces_of_whole_steps(together, small_steps, monkeypatch):
    tensors, gradient = make_tensors(LARGE), random_gradient(LARGE)
    expected = run(LARGE, tensors, "eager", gradient)
    sizes = eager._kept_sizes(tensors["query"], LARGE.geometry, LARGE.shape[1:3], 0.0)
    monkeypatch.setattr(eager_kept, "KEPT_TOGETHER", together)
    pieces = eager._kept_sizes(tensors["query"], LARGE.geometry, LARGE.shape[1:3], 0.0)
    assert len(sizes) == 1 < len(pieces)
    assert sum(sizes) == sum(pieces)
    got = run(LARGE, tensors, "eager", gradient)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("small_steps", [400], indirect=True)
def test_a_graph_of_known_sizes_keeps_the_pieces_of_plain_execution(
    small_steps, monkeypatch, fresh_compiler
):
    attention, seen = eager._attention, []

    def spy(*arguments):
        seen.append(arguments[-2])
        return attention(*arguments)

    monkeypatch.setattr(eager, "_attention", spy)
    monkeypatch.setattr(eager_kept, "KEPT_TOGETHER", 2**17)
    tensors = make_tensors(LARGE)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    compiled(LARGE, tensors, "eager").sum().backward()
    expected = eager._kept_sizes(tensors["query"], LARGE.geometry, LARGE.shape[1:3], 0.0)
    assert len(expected) > 1
    assert all(sizes == expected for sizes in seen)
    assert seen


def test_weights_are_kept_for_a_gradient_alone(keeping):
    counts, _ = keeping
    tensors = make_tensors(LARGE)
    with torch.no_grad():
        attend(LARGE, tensors, "eager")
    attend(LARGE, {name: x.detach() for name, x in tensors.items()}, "eager")
    assert counts == [0, 0]


@pytest.mark.parametrize(("cache", "scores"), [(2**19, 5 * 2**16), (2**21, 5 * 2**17)])
def test_a_step_on_a_cpu_fits_its_second_level_cache(cache, scores, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"l2_cache_size": cache})
    assert eager._scores_per_cpu_step() == scores


# -- lower precision ------------------------------------------------------------------------------

PRECISE = [
    Case("stage 2", 7, ((1, 13), (7, 5)), 16, 14, heads=2, head_dim=32, shift=3),
    Case(
        "masked levels", 4, ((1, 8), (2, 4), (4, 3)), 10, 13, heads=2, head_dim=16, boundary="mask"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PRECISE, ids=str)
def test_error_is_at_most_twice_the_plain_one(case, dtype):
    assert_precise(error_ratios(case, dtype, "eager"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_error_is_at_most_twice_the_plain_one_with_two_keys(dtype):
    # Gradients of scores sum to zero over the keys; an error in Δ breaks that for all keys alike.
    case = Case("two keys", 1, ((1, 3), (1, 1)), 1, 1, 1, 16, 1, boundary="mask")
    assert_precise(error_ratios(case, dtype, "eager", draws=40))


@pytest.mark.parametrize("small_steps", [1], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_over_many_steps_lose_no_precision(dtype, small_steps):
    # 384 steps: sums in 16 bits would err more with each.
    case = Case("many", 2, ((1, 4),), 48, 4, heads=1, head_dim=8, batch=16)
    assert_precise(error_ratios(case, dtype, "eager"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_bias_beside_16_bit_maps(dtype):
    assert_precise(error_ratios(PRECISE[0], dtype, "eager", bias_dtype=torch.float32))
