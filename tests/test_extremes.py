"""Extreme inputs: huge scores, no keys, constants, empty and tiny maps, offsets beyond 32 bits."""

import mmap
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import (
    Case,
    assert_precise,
    assert_same,
    attend,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)

from benchmarks import fuzz, fuzz_calls

BACKENDS = ["reference", "eager", pytest.param("triton", marks=needs_interpreter)]
FAST_BACKENDS = pytest.mark.parametrize("backend", BACKENDS[1:])
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
LOW_PRECISION = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
CASE = Case("small", 2, ((1, 4), (2, 1)), 3, 4, heads=1, batch=1, shift=1)
TWO_HEADS = replace(CASE, heads=2)
MASKED = Case("masked", 2, ((1, 4), (2, 3)), 3, 5, 2, 4, 1, "mask", map_size=(3, 4))


def exact_error(case: Case, tensors: dict, backend: str) -> float:
    """Of a backend in float64: the largest, as a part of the tensor that it is found in."""
    gradient = random_gradient(case)
    expected = run(case, tensors, "reference", gradient)
    got = run(case, tensors, backend, gradient)
    sizes = {name: tensor.abs().max().clamp(min=1.0) for name, tensor in expected.items()}
    return max(((got[name] - expected[name]).abs().max() / sizes[name]).item() for name in sizes)


def plain_errors(backend: str, dtype: torch.dtype, **call) -> dict[str, float]:
    """Errors of a backend in lower precision as multiples of the plain ones, over a few draws."""
    fuzzer = fuzz.Fuzzer([backend])
    for seed in range(2):
        name = str(dtype).removeprefix("torch.")
        fuzzer.check(fuzz.Call(dtype=name, seed=seed, **call))
    ratios = {kind: ratio for (*_, kind), ratio in fuzzer.root_mean_squares().items()}
    assert ratios
    return ratios


# -- scores of ten thousand -----------------------------------------------------------------------


@FAST_BACKENDS
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_of_ten_thousand_from_queries_and_keys(backend, sign):
    tensors = make_tensors(CASE)
    with torch.no_grad():
        for name in ("query", "key"):
            tensors[name] += tensors[name].sign() * 71
        tensors["key"] *= sign
    scores = tensors["query"].flatten(0, 3) @ tensors["key"].flatten(0, 3).T / 2
    assert scores.max() > 9e3
    assert scores.min() < -9e3
    assert exact_error(CASE, tensors, backend) < 1e-10


@FAST_BACKENDS
@LOW_PRECISION
def test_scores_of_ten_thousand_in_lower_precision(backend, dtype):
    tensors = make_tensors(CASE)
    scores = 5000 * tensors["query"].flatten(0, 3) @ tensors["key"].flatten(0, 3).T / 2
    assert scores.abs().max() > 1e4
    assert_precise(plain_errors(backend, dtype, case=CASE, spread=5000.0))


BIAS_LEVELS = {
    "lowered": lambda bias: bias - 1e4,
    "raised": lambda bias: bias + 1e4,
    "alternating": lambda bias: bias + 1e4 * (-1) ** torch.arange(bias.shape[2]),
}


@FAST_BACKENDS
@pytest.mark.parametrize("name", BIAS_LEVELS)
def test_biases_of_ten_thousand(backend, name):
    tensors = make_tensors(CASE)
    with torch.no_grad():
        tensors["bias"].copy_(BIAS_LEVELS[name](tensors["bias"]))
    assert exact_error(CASE, tensors, backend) < 1e-10


@FAST_BACKENDS
@LOW_PRECISION
@pytest.mark.parametrize("name", BIAS_LEVELS)
def test_biases_of_ten_thousand_in_lower_precision(backend, dtype, name, monkeypatch):
    level = BIAS_LEVELS[name]
    monkeypatch.setitem(fuzz_calls.BIASES, name, lambda bias: level(bias).to(bias.dtype))
    assert_precise(plain_errors(backend, dtype, case=CASE, bias=name))


@EVERY_BACKEND
def test_softmax_does_not_see_a_constant_bias(backend):
    tensors, gradient = make_tensors(CASE), random_gradient(CASE)
    expected = run(CASE, tensors, "reference", gradient)
    with torch.no_grad():
        tensors["bias"] -= 1e4
    assert_same(run(CASE, tensors, backend, gradient), expected)


@EVERY_BACKEND
@pytest.mark.parametrize("level", [-6e4, 6e4])
def test_the_largest_biases_of_float16(backend, level):
    # In base 2 they are half as large again: beyond float16.
    tensors, gradient = make_tensors(CASE, torch.float16), random_gradient(CASE, torch.float16)
    with torch.no_grad():
        tensors["bias"].fill_(level)
        tensors["query"].zero_()
    zero_bias = {name: x.detach().double() for name, x in tensors.items()}
    zero_bias["bias"].zero_()
    expected = attend(CASE, zero_bias, "reference")  # the mean of the values
    got = run(CASE, tensors, backend, gradient)
    torch.testing.assert_close(got["out"].double(), expected, atol=5e-3, rtol=5e-3)
    assert all(x.isfinite().all() for x in got.values())


# -- no key ---------------------------------------------------------------------------------------


@EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_queries_whose_bias_excludes_every_key_give_zeros_and_no_gradient(
    backend, dtype, dropout_p
):
    case = replace(TWO_HEADS, dropout_p=dropout_p)
    tensors = make_tensors(case, dtype)
    with torch.no_grad():
        tensors["bias"][0, 2] = -torch.inf  # one query of each window, first head
    got = run(case, tensors, backend, random_gradient(case, dtype))
    assert all(x.isfinite().all() for x in got.values())
    query_index = case.geometry.query_index(case.height, case.width)[:, 2]
    rows, cols = query_index // 4, query_index % 4  # of the map padded to 4 × 4
    stored = (rows < case.height) & (cols < case.width)
    assert stored.sum() == 4
    for name in ("out", "query"):
        at_query = got[name][:, rows[stored], cols[stored]]
        assert (at_query[..., 0, :] == 0).all()
        assert (at_query[..., 1, :] != 0).any()
    assert (got["bias"][0, 2] == 0).all()
    assert (got["bias"][1, 2] != 0).any()


@EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("case", [CASE, MASKED], ids=str)
def test_a_bias_that_excludes_everything_gives_zeros_alone(case, backend, dtype):
    tensors = make_tensors(case, dtype)
    with torch.no_grad():
        tensors["bias"].fill_(-torch.inf)
    got = run(case, tensors, backend, random_gradient(case, dtype))
    assert all((x == 0).all() for x in got.values())


@FAST_BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_windows_that_hold_no_real_token_give_zeros(backend, dtype):
    case = Case("padding", 2, ((1, 2), (2, 1)), 4, 4, 1, 4, 1, "mask", map_size=(1, 1))
    tensors = make_tensors(case, dtype)
    got = run(case, tensors, backend, random_gradient(case, dtype))
    assert all(x.isfinite().all() for x in got.values())
    for name in ("out", "query", "key", "value"):
        # The first window's coarse key is made of all its tokens, the padded ones too.
        assert (got[name][:, 2:] == 0).all(), name
        assert (got[name][:, :, 2:] == 0).all(), name
    assert (got["out"][:, :2, :2] != 0).all()


# -- constants ------------------------------------------------------------------------------------


@EVERY_BACKEND
@DTYPES
def test_constant_inputs_give_the_constant(backend, dtype):
    case = Case("constant", 3, ((1, 5), (3, 1)), 6, 3, heads=1, batch=1)
    tensors = make_tensors(case, dtype)
    constants = {"query": 2.0, "key": 3.0, "value": 0.5, "bias": -1.0, "weight_1": 1 / 9}
    with torch.no_grad():
        for name, x in tensors.items():
            x.fill_(constants.get(name, 0.0))  # offsets: zero
    got = run(case, tensors, backend, random_gradient(case, dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got["out"], torch.full_like(got["out"], 0.5), atol=4 * eps, rtol=0)
    # All keys are alike, so no query can gain by turning, and all values, so no weight matters.
    for name in ("query", "bias"):
        assert (got[name].abs() <= 16 * eps).all(), name


@EVERY_BACKEND
@DTYPES
def test_zeros_give_zeros(backend, dtype):
    tensors = make_tensors(CASE, dtype)
    with torch.no_grad():
        for x in tensors.values():
            x.zero_()
    got = run(CASE, tensors, backend, random_gradient(CASE, dtype))
    assert all((got[name] == 0).all() for name in ("out", "query", "key", "bias"))
    assert got["value"].isfinite().all()
    assert (got["value"] != 0).any()


# -- nothing, and one pixel -----------------------------------------------------------------------


@EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_an_empty_batch_gives_an_empty_map_and_zero_gradients(backend, dtype, dropout_p):
    case = replace(CASE, batch=0, dropout_p=dropout_p)
    got = run(case, make_tensors(case, dtype), backend, random_gradient(case, dtype))
    assert got["out"].shape == case.shape
    for name in ("bias", "weight_1", "key_offset_1", "value_offset_1"):
        assert got[name].numel() > 0
        assert (got[name] == 0).all(), name


@EVERY_BACKEND
@DTYPES
@pytest.mark.parametrize(("window", "boundary"), [(1, "wrap"), (1, "mask"), (3, "mask")])
def test_a_pixel_that_sees_itself_alone_gives_its_value(boundary, window, backend, dtype):
    # Under "wrap" a map of one pixel and a window of one token repeat the pixel nine times.
    region = 3 if window == 1 else 5
    case = Case("pixel", window, ((1, region),), 1, 1, 2, 5, 2, boundary)
    tensors, gradient = make_tensors(case, dtype), random_gradient(case, dtype)
    got = run(case, tensors, backend, gradient)
    size = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got["out"], tensors["value"], atol=size, rtol=size)
    torch.testing.assert_close(got["value"], gradient, atol=size, rtol=size)
    for name in ("query", "key"):
        assert (got[name].abs() <= 64 * size).all(), name


@FAST_BACKENDS
@DTYPES
@pytest.mark.parametrize("boundary", ["wrap", "mask"])
def test_a_map_of_one_pixel_has_the_oracles_gradients(boundary, backend, dtype):
    case = Case("pixel", 7, ((1, 13), (7, 3)), 1, 1, 1, 4, 1, boundary, shift=3)
    tensors = make_tensors(case, dtype)
    if dtype == torch.float64:
        assert exact_error(case, tensors, backend) < 1e-10
    else:
        got = attend(case, tensors, backend)
        exact = {name: x.detach().double() for name, x in tensors.items()}
        expected = attend(case, exact, "reference")
        size = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, atol=size, rtol=size)


# -- offsets beyond 32 bits -----------------------------------------------------------------------
#
# A map of 4,096 × 4,096 tokens with 96 channels holds 1.6e9 numbers, two of them 3.2e9: more than
# an int32 counts. In the kernels rows, columns, windows and cells of one image are int32 (2²⁴ of
# them at that size). An image's start is int64 always; offsets inside it are int64 where
# `launch.offsets_fit` finds that 32 bits do not hold them, and so are rows of statistics and parts.
# The test needs little memory: inputs whose strides are that large, in address space that is never
# touched in between.


def untouched(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until they are written, however many."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        pytest.skip(f"no address space for {count * dtype.itemsize / 2**30:.0f} GiB: {error}")
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8)).view(dtype)


@pytest.fixture
def no_copies_back(monkeypatch):
    """The interpreter copies storages onto themselves after a launch: all of that memory."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *_: None)


NO_RESERVE = 0x4000  # Linux; the module names it from Python 3.12 on
FAR = 2**31 + 12_345
FAR_CASE = Case("far", 2, ((1, 4), (2, 1)), 3, 3, heads=1, batch=1, shift=1)


@needs_interpreter
@pytest.mark.parametrize("axis", ["batch", "height", "width", "heads"])
def test_strides_beyond_32_bits_give_the_same(axis, no_copies_back):
    # Three entries, so that the stride itself still fits 32 bits and the last offset does not.
    case = replace(FAR_CASE, **({axis: 3} if axis in ("batch", "heads") else {}))
    tensors, gradient = make_tensors(case), random_gradient(case)
    expected = run(case, tensors, "reference", gradient)
    dim = ["batch", "height", "width", "heads"].index(axis)
    stride = -(-FAR // (case.shape[dim] - 1))
    assert stride < 2**31
    strides = list(torch.empty(case.shape).stride())
    strides[dim] = stride
    far = {name: x for name, x in tensors.items() if name not in ("query", "key", "value")}
    storage = untouched(
        stride * case.shape[dim] + 8 * torch.Size(case.shape).numel(), torch.float64
    )
    size = torch.Size(case.shape).numel()
    views = [storage.as_strided(case.shape, strides, index * size) for index in range(4)]
    for name, view in zip(("query", "key", "value"), views[1:], strict=True):
        far[name] = view.copy_(tensors[name].detach()).requires_grad_()
    far_gradient = views[0].copy_(gradient)
    far = {name: far[name] for name in tensors}
    assert_same(run(case, far, "triton", far_gradient), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_of_zero_gives_no_gradient_to_queries_and_keys(dtype):
    case = Case("scale 0", 4, ((1, 4), (1, 6)), 3, 6, heads=1, head_dim=5, batch=1)
    tensors = make_tensors(case, dtype)
    got = run(case, tensors, "eager", random_gradient(case, dtype), scale=0.0)
    assert not got["query"].any()
    assert not got["key_offset_1"].any()
