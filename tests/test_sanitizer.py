"""The sanitizer finds planted faults, and none in the kernels.

Its run over the odd cases is in test_triton.py, beside the comparison with the oracle.
"""

from dataclasses import replace

import pytest
import torch
from cases import (
    Case,
    assert_same,
    fused,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)

pytest.importorskip("triton", reason="needs Triton")
pytestmark = needs_interpreter

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from sanitizer import Sanitizer  # noqa: E402

from kernels import launch, pooling  # noqa: E402

KERNELS = {
    "forward_kernel", "delta_kernel", "gradient_kernel", "fold_keys_kernel", "fold_queries_kernel",
    "pool_kernel", "pool_backward_kernel", "bias_kernel",
}  # fmt: skip
SMALL = Case("small", 2, ((1, 4), (2, 3)), 3, 5, heads=2, batch=2, shift=1)
MASKED = Case("masked", 4, ((1, 6), (2, 4), (4, 3)), 5, 4, 2, 17, 1, "mask", 1, (5, 3))


def sanitized(case: Case, layout=dict, dtype: torch.dtype = torch.float64) -> Sanitizer:
    """The sanitizer's record of forward and backward of a case."""
    tensors, gradient = make_tensors(case, dtype), random_gradient(case, dtype)
    with Sanitizer(protected=[*tensors.values(), gradient]) as sanitizer:
        run(case, tensors, "triton", gradient, layout)
    return sanitizer


# -- the kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (replace(MASKED, dropout_p=0.3), torch.float32),
        (Case("stage", 7, ((1, 13), (7, 3)), 8, 9, 1, 32, 1, shift=3), torch.float16),
    ],
    ids=str,
)
def test_no_kernel_strays_with_the_tiles_of_other_dtypes(case, dtype):
    sanitizer = sanitized(case, fused, dtype)
    assert not sanitizer.findings
    assert set(sanitizer.launches) == KERNELS
    assert sanitizer.accesses > 0


def test_the_sanitizer_changes_no_result():
    tensors, gradient = make_tensors(MASKED), random_gradient(MASKED)
    expected = run(MASKED, tensors, "reference", gradient)
    with Sanitizer() as sanitizer:
        got = run(MASKED, tensors, "triton", gradient)
    assert set(sanitizer.launches) == KERNELS
    assert_same(got, expected)


# -- planted faults -------------------------------------------------------------------------------


@triton.jit
def copy_kernel(source_ptr, target_ptr, count, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(source_ptr + place + FIRST, mask=place < count)
    tl.store(target_ptr + place, x, mask=place < count)


@triton.jit
def row_sum_kernel(source_ptr, target_ptr, stride, BLOCK: tl.constexpr):
    total = tl.sum(tl.load(source_ptr + tl.program_id(0) * stride + tl.arange(0, BLOCK)))
    tl.store(target_ptr, total)


def rules(sanitizer: Sanitizer) -> set[tuple[str, str]]:
    return {(finding.argument, finding.rule) for finding in sanitizer.findings}


def test_a_correct_kernel_has_no_finding():
    source, target = torch.arange(6.0), torch.zeros(6)
    with Sanitizer([source]) as sanitizer:
        copy_kernel[(2,)](source, target, 6, FIRST=0, BLOCK=4)
    assert not sanitizer.findings
    assert sanitizer.accesses == 12
    assert torch.equal(source, target)


def test_a_read_one_past_the_end_is_found():
    storage = torch.arange(8.0)
    with Sanitizer() as sanitizer:
        copy_kernel[(2,)](storage[:6], torch.zeros(6), 6, FIRST=1, BLOCK=4)
    (finding,) = sanitizer.findings
    assert (finding.argument, finding.rule) == ("source_ptr", "read out of bounds")
    assert (finding.program, finding.offset, finding.lanes) == ((1, 0, 0), 6, 1)


def test_a_read_before_the_start_is_found():
    with Sanitizer() as sanitizer:
        copy_kernel[(2,)](torch.zeros(8)[2:], torch.zeros(6), 6, FIRST=-1, BLOCK=4)
    assert [finding.offset for finding in sanitizer.findings] == [-1]


def test_a_write_past_the_end_is_found_and_not_made():
    storage = torch.zeros(8)
    with Sanitizer() as sanitizer:
        copy_kernel[(2,)](torch.ones(8), storage[:6], 8, FIRST=0, BLOCK=4)
    assert rules(sanitizer) == {("target_ptr", "write out of bounds")}
    assert storage.tolist() == [1.0] * 6 + [0.0] * 2


def test_an_access_in_a_gap_between_strides_is_found():
    with Sanitizer() as sanitizer:
        copy_kernel[(1,)](torch.zeros(6)[::2], torch.zeros(3), 3, FIRST=0, BLOCK=4)
    assert [(f.argument, f.offset) for f in sanitizer.findings] == [("source_ptr", 1)]


def test_an_access_to_another_argument_by_the_wrong_pointer_is_found():
    storage = torch.zeros(8)
    with Sanitizer() as sanitizer:
        copy_kernel[(1,)](storage[:4], storage[4:], 4, FIRST=4, BLOCK=4)
    assert rules(sanitizer) == {("source_ptr", "read out of bounds")}


def test_a_write_to_an_input_is_found():
    target = torch.zeros(6)
    with Sanitizer([target]) as sanitizer:
        copy_kernel[(2,)](torch.ones(6), target, 6, FIRST=0, BLOCK=4)
    assert rules(sanitizer) == {("target_ptr", "write to an input")}
    assert (target == 0).all()


def test_two_programs_that_write_one_place_are_found():
    source = torch.arange(8.0)
    with Sanitizer() as sanitizer:
        row_sum_kernel[(2,)](source, torch.zeros(1), 4, BLOCK=4)
    assert rules(sanitizer) == {("target_ptr", "two programs write different values")}
    with Sanitizer() as sanitizer:  # the same value from both is no conflict
        row_sum_kernel[(2,)](source, torch.zeros(1), 0, BLOCK=4)
    assert not sanitizer.findings


@pytest.mark.parametrize(
    ("first", "rule"),
    [(-4, "read of what another program writes"), (4, "written while another program reads")],
)
def test_a_program_that_reads_what_another_writes_is_found(first, rule):
    storage = torch.zeros(12)
    # Source and target are one tensor, and programs run one after the other.
    whole = storage[4:] if first < 0 else storage
    with Sanitizer() as sanitizer:
        move_kernel[(2,)](whole, 8, FIRST=first, BLOCK=4)
    assert ("source_ptr", rule) in rules(sanitizer)


@triton.jit
def move_kernel(source_ptr, count, FIRST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (place + FIRST >= 0) & (place + FIRST < count)
    x = tl.load(source_ptr + place + FIRST, mask=inside)
    tl.store(source_ptr + place, x)


# -- faults planted in our own kernels ------------------------------------------------------------


def test_attention_kernels_told_of_a_larger_map_are_found_to_overrun(monkeypatch):
    size = launch.Problem.size.fget

    def too_large(problem: launch.Problem):
        return size(problem)._replace(height=problem.query_shape[1] + 1)

    monkeypatch.setattr(launch.Problem, "size", property(too_large))
    case = Case("overrun", 2, ((1, 4),), 3, 4, heads=1, batch=1)
    found = {(f.kernel, f.argument, f.rule) for f in sanitized(case).findings}
    for kernel in ("forward_kernel", "gradient_kernel"):
        assert (kernel, "query", "read out of bounds") in found
    assert ("delta_kernel", "grad_out", "read out of bounds") in found
    for place in (
        ("forward_kernel", "out_ptr"),
        ("fold_keys_kernel", "grad_key"),
        ("fold_queries_kernel", "grad"),
    ):
        assert (*place, "write out of bounds") in found


def test_pooling_kernels_told_of_more_cells_are_found_to_overrun(monkeypatch):
    arguments = pooling.PoolProblem.arguments.fget

    def too_many(problem: pooling.PoolProblem):
        right = arguments(problem)
        return {**right, "count": right["count"] + 1}

    monkeypatch.setattr(pooling.PoolProblem, "arguments", property(too_many))
    found = {(f.kernel, f.argument, f.rule) for f in sanitized(replace(SMALL, batch=1)).findings}
    assert ("pool_kernel", "pooled_k_ptr", "write out of bounds") in found
    assert ("pool_backward_kernel", "coarse_grad_k_ptr", "read out of bounds") in found


def test_two_heads_that_write_one_place_are_found(monkeypatch):
    size = launch.Problem.size.fget

    def one_head(problem: launch.Problem):
        return size(problem)._replace(num_heads=1)

    monkeypatch.setattr(launch.Problem, "size", property(one_head))
    found = {(f.kernel, f.argument, f.rule) for f in sanitized(replace(SMALL, batch=1)).findings}
    for place in (("forward_kernel", "out_ptr"), ("gradient_kernel", "query_part_ptr")):
        assert (*place, "two programs write different values") in found
