"""The Triton kernels, interpreted on a CPU, against the oracle: output and every gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import (
    ODD,
    Case,
    Tensors,
    assert_precise,
    assert_same,
    attend,
    cases,
    channels_first,
    error_ratios,
    fused,
    heads_first,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)
from hypothesis import given, settings

pytest.importorskip("triton", reason="needs Triton")
pytestmark = needs_interpreter

from sanitizer import Sanitizer  # noqa: E402

from kernels import FocalGeometry, backward, forward, gradient_plan, launch, ops, pooling  # noqa: E402

SMALL = Case("small", 2, ((1, 4), (2, 3)), 3, 5, heads=2, batch=1, shift=1)
MASKED = Case("masked", 4, ((1, 6), (2, 4), (4, 3)), 5, 4, 2, 3, 1, "mask", 1, (5, 3))


def check(case: Case, layout=dict, gradient: torch.Tensor | None = None, **options) -> None:
    tensors = make_tensors(case)
    gradient = random_gradient(case) if gradient is None else gradient
    expected = run(case, tensors, "reference", gradient, **options)
    with Sanitizer(protected=[*tensors.values(), gradient]) as sanitizer:
        got = run(case, tensors, "triton", gradient, layout, **options)
    assert not sanitizer.findings
    assert_same(got, expected)


# -- against the oracle ---------------------------------------------------------------------------


@ODD
def test_output_and_gradients_are_the_oracles(case):
    check(case)


@settings(max_examples=10, deadline=None)
@given(cases(largest_window=3, largest_side=4))
def test_output_and_gradients_are_the_oracles_for_any_geometry(case):
    check(replace(case, batch=1))


@pytest.mark.parametrize("layout", [fused, heads_first, channels_first])
@pytest.mark.parametrize("case", [SMALL, MASKED], ids=str)
def test_strided_inputs_give_the_same(case, layout):
    check(case, layout)


def keys_first(tensors: Tensors) -> Tensors:
    """The same values with the bias alone laid out `[heads, num_keys, window²]`."""
    return {**tensors, "bias": tensors["bias"].mT.contiguous().mT}


def test_calls_that_differ_in_one_thing_share_no_plan():
    small = replace(SMALL, height=2, width=3, heads=1)
    masked = replace(small, boundary="mask")
    calls: list[tuple[Case, Callable, dict[str, Any]]] = [
        (small, dict, {}),
        (small, fused, {}),
        (small, keys_first, {}),
        (small, dict, {"scale": 0.3}),
        (replace(small, shift=0), dict, {}),
        (replace(small, batch=2), dict, {}),
        (replace(small, dropout_p=0.3), dict, {}),
        (masked, dict, {}),
        (replace(masked, map_size=(2, 2)), dict, {}),
        (replace(small, ready=(1,)), dict, {}),
        (replace(small, offsets=False), dict, {}),
        (replace(small, levels=((1, 4), (2, 1))), dict, {}),
    ]
    for _ in range(2):  # planned by the first call, used by the second
        for case, layout, options in calls:
            tensors, gradient = make_tensors(case), random_gradient(case)
            expected = run(case, tensors, "reference", gradient, **options)
            assert_same(run(case, tensors, "triton", gradient, layout, **options), expected)
    plans = forward.forward_plan.cache_info()
    assert plans.misses == len(calls) - 2  # neither ready-made maps nor offsets change the kernel
    assert plans.hits >= len(calls)


def test_gradients_of_other_strides_share_no_plan():
    tensors, gradient = make_tensors(SMALL), random_gradient(SMALL)
    expected = run(SMALL, tensors, "reference", gradient)
    for handed in (gradient, gradient.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same(run(SMALL, tensors, "triton", handed), expected)


@pytest.mark.parametrize("head_dim", [1, 5, 16, 33, 49])
def test_any_head_dim_gives_the_same(head_dim):
    check(replace(SMALL, head_dim=head_dim, heads=1))


def test_a_released_stage_gives_the_same():
    case = Case("stage 3", 7, ((1, 13), (7, 3)), 14, 9, heads=1, head_dim=32, batch=1, shift=3)
    check(case)


def test_a_window_of_several_query_blocks_gives_the_same():
    # 196 queries in four tiles; 256 fine and 25 coarse keys in five, one of them mixed.
    check(Case("window 14", 14, ((1, 16), (14, 3)), 10, 16, heads=1, batch=1, shift=7))


@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize(
    "case",
    [
        # 25 queries, 49 + 9 keys: partial tiles of queries, of fine keys and of coarse ones.
        Case("mixed tile", 5, ((1, 7), (5, 3)), 5, 8, heads=1, batch=1, shift=2),
        # 64 = 4 tiles of fine keys exactly, then two coarse levels in tiles of their own.
        Case("no mixed tile", 4, ((1, 8), (1, 4), (2, 6)), 5, 4, 1, 4, 1, "mask", 1),
        # Keys of one level end within the first tile.
        Case("one tile", 2, ((1, 2), (2, 3)), 3, 4, heads=1, batch=1, boundary="mask"),
    ],
    ids=str,
)
def test_small_tiles_give_the_same(case, block_m, monkeypatch):
    monkeypatch.setattr(launch, "pick_tile", lambda *_: launch.Tile(block_m, 16, 4, 1))
    check(case)


@pytest.mark.parametrize("programs", [1, 3, 10**6])
def test_bias_gradient_in_groups_of_windows_gives_the_same(programs, monkeypatch):
    # 2 images of 4 windows and 2 key tiles: one group of 8, two of 4, eight of 1.
    monkeypatch.setattr(gradient_plan, "GRADIENT_PROGRAMS", programs)
    check(Case("groups", 2, ((1, 4), (2, 3)), 3, 4, heads=1))


@pytest.mark.parametrize("images", [1, 2])
def test_gradients_of_a_few_images_at_a_time_are_the_same(images, monkeypatch):
    # 3 images: three rounds of 1; one of 2, then one of 1.
    monkeypatch.setattr(gradient_plan.GradientPlan, "images", images)
    check(Case("rounds", 2, ((1, 4), (2, 3)), 3, 4, heads=1, batch=3))


def test_a_round_of_gradients_fits_the_axes_of_a_grid():
    geometry = Case("tiny", 2, ((1, 2), (2, 1)), 2, 2, heads=1).geometry
    query = torch.empty(2**17, 2, 2, 1, 16, device="meta", dtype=torch.float16)
    settings = (0.25, (2, 2), 0.0, "any")
    problem = launch.Problem(geometry, tuple(query.shape), query.dtype, *settings)
    maps = launch.strides_of(query, query, query, query)
    plan = gradient_plan.GradientPlan(problem, problem.tile("gradient"), maps)
    sizes = [len(images) for images in plan.chunks()]
    assert max(sizes) <= 65_535
    assert sum(sizes) == 2**17
    assert plan.groups <= 65_535


@pytest.mark.parametrize("scale", [1e-9, 0.0, -0.7])
def test_a_scale_that_the_bias_cannot_be_divided_by(scale):
    check(SMALL, scale=scale)


def test_maps_beyond_32_bits_are_found_so():
    def fits(*maps: torch.Tensor) -> bool:
        return launch.offsets_fit(maps[0].shape, launch.strides_of(*maps))

    large = torch.empty(1, 2**15, 2**14, 2, 4, device="meta")
    assert not fits(large)
    half = large[:, : 2**14]
    assert fits(half)
    assert not fits(half, large[:, ::2])
    assert fits(torch.empty(9, 2**14, 2**14, 2, 2, device="meta"))
    # The last offset is 2³¹ - 1, then 2³¹.
    row = torch.empty(1, 1, 2, 1, 2**30, device="meta")
    assert fits(row)
    assert not fits(row.as_strided(row.shape, (1, 1, 2**30 + 1, 1, 1)))


def test_offsets_of_64_bits_give_the_same(monkeypatch):
    monkeypatch.setattr(launch, "offsets_fit", lambda *_: False)
    check(SMALL)
    check(MASKED)


# -- gradients handed in --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gradient",
    [
        torch.ones((), dtype=torch.float64).expand(MASKED.shape),
        random_gradient(MASKED)[:, :1, :, :1].expand(MASKED.shape),
        channels_first({"out": random_gradient(MASKED)})["out"],
    ],
    ids=["expanded", "partly expanded", "strided"],
)
def test_a_strided_gradient_gives_the_same(gradient):
    check(MASKED, gradient=gradient)


def test_gradients_of_some_inputs_alone_are_the_same():
    tensors, gradient = make_tensors(SMALL), random_gradient(SMALL)
    expected = run(SMALL, tensors, "reference", gradient)
    frozen = {name: x.detach() for name, x in tensors.items()}
    for name in ("query", "bias", "weight_1", "value_offset_1"):
        wanted = {**frozen, name: frozen[name].clone().requires_grad_()}
        (grad,) = torch.autograd.grad(attend(SMALL, wanted, "triton"), wanted[name], gradient)
        torch.testing.assert_close(grad, expected[name], atol=1e-10, rtol=1e-10)


def test_one_tensor_as_query_key_and_value():
    tensors, gradient = make_tensors(SMALL), random_gradient(SMALL)
    tied = {**tensors, "key": tensors["query"], "value": tensors["query"]}
    expected, got = (
        torch.autograd.grad(attend(SMALL, tied, backend), tensors["query"], gradient)[0]
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


GRADCHECK = [
    Case("wrap", 2, ((1, 4), (2, 1)), 2, 3, heads=1, head_dim=1, batch=1, shift=1),
    Case("mask", 2, ((1, 2), (1, 4)), 3, 2, 1, 1, 1, "mask", 1, (2, 2), ready=(1,)),
]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradients_agree_with_finite_differences(case):
    tensors = make_tensors(case)
    names = list(tensors)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(case, dict(zip(names, inputs, strict=True)), "triton")

    # fast_mode projects the Jacobian on random vectors: a few runs of the interpreter.
    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


# -- edges ----------------------------------------------------------------------------------------


def test_a_query_without_any_key_gives_zeros_and_no_gradient():
    case = Case("no key", 2, ((1, 2), (2, 1)), 3, 5, 1, batch=1, boundary="mask", map_size=(2, 3))
    tensors, gradient = make_tensors(case), random_gradient(case)
    result = run(case, tensors, "triton", gradient)
    assert_same(result, run(case, tensors, "reference", gradient))
    assert (result["out"][:, 2:] == 0).all()
    assert (result["query"][:, 2:] == 0).all()
    assert (result["out"][:, :2, :3] != 0).all()


def test_an_empty_batch_gives_an_empty_map_and_zero_gradients():
    case = replace(SMALL, batch=0)
    result = run(case, make_tensors(case), "triton", random_gradient(case))
    assert result["out"].shape == case.shape
    assert all((result[name] == 0).all() for name in ("bias", "weight_1", "key_offset_1"))


def test_minus_infinity_in_the_bias_excludes_keys():
    tensors = make_tensors(SMALL)
    with torch.no_grad():
        tensors["bias"][:, 0, 1:] = -torch.inf
        tensors["bias"][:, 2, ::2] = -torch.inf
    gradient = random_gradient(SMALL)
    expected = run(SMALL, tensors, "reference", gradient)
    assert_same(run(SMALL, tensors, "triton", gradient), expected)


def test_large_scores_do_not_overflow():
    tensors, gradient = make_tensors(SMALL), random_gradient(SMALL)
    tensors["query"] = (tensors["query"].detach() * 1000).requires_grad_()
    expected = run(SMALL, tensors, "reference", gradient)
    got = run(SMALL, tensors, "triton", gradient)
    for name, tensor in expected.items():  # gradients of keys are as large as the queries
        size = 1000.0 if name.startswith(("key", "weight")) else 1.0
        torch.testing.assert_close(got[name] / size, tensor / size, atol=1e-10, rtol=1e-10)


def test_results_do_not_change_from_run_to_run():
    case = replace(SMALL, dropout_p=0.2)
    tensors, gradient = make_tensors(case, torch.float32), random_gradient(case, torch.float32)
    first, second = (run(case, tensors, "triton", gradient) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- what the kernels are launched with -----------------------------------------------------------


class Recorder:
    """Launches a kernel and keeps its arguments."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable:
        def launch_kernel(**arguments: Any) -> None:
            self.calls.append(arguments)
            self.kernel[grid](**arguments)

        return launch_kernel


@pytest.mark.parametrize("layout", [fused, heads_first])
def test_maps_with_a_contiguous_last_axis_are_read_in_place(layout, monkeypatch):
    recorders = []
    for module, name in (
        (forward, "forward_kernel"),
        (pooling, "pool_kernel"),
        (pooling, "pool_backward_kernel"),
        (backward, "delta_kernel"),
        (backward, "gradient_kernel"),
    ):
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])
    leaves = {name: x.detach() for name, x in make_tensors(SMALL).items()}
    tensors = {name: x.requires_grad_() for name, x in layout(leaves).items()}
    gradient = layout({"out": random_gradient(SMALL)} if layout is heads_first else leaves)
    gradient = gradient["out" if layout is heads_first else "value"].detach()
    assert not tensors["query"].is_contiguous()
    torch.autograd.grad(attend(SMALL, tensors, "triton"), list(tensors.values()), gradient)
    calls = [arguments for recorder in recorders for arguments in recorder.calls]
    assert len(calls) == 1 + 1 + 1 + 1 + 2
    for arguments in calls:
        for name, tensor in (*tensors.items(), ("grad_out", gradient)):
            if name in arguments:
                assert arguments[name].ptr.data_ptr() == tensor.data_ptr()
                assert arguments[name][1:] == tensor.stride()[:4]


def test_other_layouts_alone_are_copied():
    x = torch.randn(2, 3, 4, 3, 2, 5).unbind(3)[1]
    assert ops._rows(x) is x
    assert ops._rows(x.expand(2, 3, 4, 2, 5)) is not None
    strided = torch.randn(2, 2, 5, 3, 4).permute(0, 3, 4, 1, 2)
    assert ops._rows(strided).is_contiguous()
    single = torch.randn(2, 3, 4, 2, 7)[..., :1]
    assert ops._rows(single) is single


# -- lower precision ------------------------------------------------------------------------------

PRECISE = [
    Case("stage 2", 7, ((1, 13), (7, 5)), 9, 14, heads=1, head_dim=32, batch=1, shift=3),
    Case("two coarse levels", 4, ((1, 8), (2, 4), (4, 3)), 6, 5, 2, 16, 1, boundary="mask"),
    Case("large head", 2, ((1, 4), (2, 3)), 3, 5, heads=1, head_dim=130, batch=1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", PRECISE, ids=str)
def test_error_is_at_most_twice_the_plain_one(case, dtype):
    assert_precise(error_ratios(case, dtype, "triton", draws=2))


def test_a_float32_bias_beside_float16_maps():
    ratios = error_ratios(PRECISE[1], torch.float16, "triton", bias_dtype=torch.float32, draws=1)
    assert_precise(ratios)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_twice_the_plain_one_with_two_keys(dtype):
    # Gradients of the two scores cancel but for rounding.
    case = Case("two keys", 1, ((1, 3), (1, 1)), 1, 1, 1, 16, 1, boundary="mask")
    assert_precise(error_ratios(case, dtype, "triton", draws=40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_twice_the_plain_one_with_large_scores(dtype):
    # A scale of 4 makes scores of some tens; few draws would leave the ratio to chance.
    case = Case("large scores", 2, ((1, 4), (2, 3)), 3, 4, 1, 16, 1)
    assert_precise(error_ratios(case, dtype, "triton", draws=20, scale=4.0))


# -- pooling inside the attention kernel ----------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        SMALL,
        MASKED,
        Case("stage 3", 7, ((1, 13), (7, 3)), 14, 9, 1, 32, 1, shift=3),
        Case("stage 4", 7, ((1, 7), (7, 1)), 7, 7, 2, 32, 2),
        Case("no offsets", 2, ((1, 4), (2, 3)), 3, 4, 1, offsets=False, dropout_p=0.3),
        # 36 + 25 cells: several tiles of 16 pool the same region.
        Case("several tiles", 4, ((1, 4), (2, 6), (4, 5)), 9, 8, 1, boundary="mask"),
    ],
    ids=str,
)
def test_pooling_inside_the_kernel_gives_the_same(case, monkeypatch):
    monkeypatch.setattr(ops, "pools_inline", lambda *_: True)
    if case.name == "several tiles":
        monkeypatch.setattr(launch, "pick_tile", lambda *_: launch.Tile(16, 16, 4, 1))
    tensors = {name: x.detach() for name, x in make_tensors(case).items()}
    with Sanitizer(protected=[*tensors.values()]) as sanitizer:
        out = attend(case, tensors, "triton")
    assert not sanitizer.findings
    torch.testing.assert_close(out, attend(case, tensors, "reference"), atol=1e-10, rtol=1e-10)


def test_pooling_inside_the_kernel_makes_no_coarse_map(monkeypatch):
    case = Case("stage 4", 7, ((1, 7), (7, 1)), 7, 7, 1, 16, 1)
    monkeypatch.setattr(ops, "launch_pool", None)  # would raise if called
    attend(case, {name: x.detach() for name, x in make_tensors(case).items()}, "triton")


def test_a_pass_of_its_own_pools_where_gradients_are_wanted(monkeypatch):
    monkeypatch.setattr(ops, "pools_inline", lambda *_: pytest.fail("asked for the cost"))
    check(SMALL)


@pytest.mark.parametrize(
    ("stage", "batch", "inline"),
    [(1, 1, False), (2, 1, True), (2, 8, False), (3, 8, True), (3, 64, False), (4, 512, True)],
)
def test_pooling_is_inside_the_kernel_where_a_region_holds_few_windows(stage, batch, inline):
    side, region, heads = {1: (56, 7, 3), 2: (28, 5, 6), 3: (14, 3, 12), 4: (7, 1, 24)}[stage]
    geometry = FocalGeometry(7, ((1, 7 if stage == 4 else 13), (7, region)))
    assert launch.pools_inline(geometry, (batch, side, side, heads, 32)) is inline
