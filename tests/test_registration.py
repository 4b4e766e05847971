"""The registered operators: opcheck, torch.compile, what is saved, choice of backend."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    Case,
    assert_same,
    attend,
    fused,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from kernels import Pooling, eager, focal_attention, resolve_backend
from kernels.geometry import encode_geometry

CASE = Case("two levels", 2, ((1, 4), (2, 3)), 3, 4, heads=2, head_dim=3, batch=1, shift=1)
SMALL = Case("small", 2, ((1, 2), (2, 1)), 1, 2, heads=1, head_dim=3, batch=1, shift=1)
TWO_COARSE = Case("coarse", 2, ((1, 4), (1, 2), (2, 1)), 2, 3, heads=1, batch=2, boundary="mask")
BACKENDS = ["eager", pytest.param("triton", marks=needs_interpreter)]


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def maps(case: Case, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Query, key and value as views of one projection."""
    qkv = random(*case.shape[:3], 3, *case.shape[3:], dtype=dtype, grad=grad)
    return list(qkv.unbind(3))


def given(packed: bool, case: Case, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Query, key and value as operators take them: three maps, or one."""
    if packed:
        return [random(*case.shape[:3], 3, *case.shape[3:], dtype=dtype, grad=grad)]
    return maps(case, dtype, grad)


def settings(case: Case, dropout_p: float, *kept_sizes: list[int] | None) -> tuple:
    seed = torch.tensor([7]) if dropout_p else None
    size = list(case.shape[1:3])
    return encode_geometry(case.geometry), 0.5, size, dropout_p, *kept_sizes, seed


def coarse_cells(case: Case) -> list[tuple[int, int]]:
    levels = range(1, len(case.levels))
    return [case.geometry.map_cells(level, case.height, case.width) for level in levels]


def pool_weights(case: Case, dtype: torch.dtype, grad: bool = True) -> list[torch.Tensor]:
    """Weights of the eager operator; none for the last level, whose maps are given as a whole."""
    sides = [subwindow for subwindow, _ in case.levels[1:-1]]
    return [random(side, side, dtype=dtype, grad=grad) for side in sides] + [
        torch.empty(0, 0, dtype=dtype)
    ]


def bias(case: Case, dtype: torch.dtype, grad: bool = True) -> torch.Tensor:
    geometry = case.geometry
    return random(case.heads, geometry.num_queries, geometry.num_keys, dtype=dtype, grad=grad)


CASES = pytest.mark.parametrize("case", [CASE, TWO_COARSE], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
PACKED = pytest.mark.parametrize("packed", [False, True], ids=["three maps", "one map"])
DROPOUT = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


# -- opcheck --------------------------------------------------------------------------------------


@CASES
@DTYPES
@DROPOUT
@PACKED
@pytest.mark.parametrize("keep", [False, True])
def test_eager_attention_is_registered_soundly(case, dtype, dropout_p, keep, packed):
    coarse = [
        [random(case.batch, *cells, case.heads, case.head_dim, dtype=dtype) for _ in range(2)]
        for cells in coarse_cells(case)
    ]
    keys, values = (list(x) for x in zip(*coarse, strict=True))
    weights = pool_weights(case, dtype)
    arguments = (given(packed, case, dtype), bias(case, dtype), keys, values, weights)
    size = case.shape[1:3]
    query = torch.empty(case.shape)
    sizes = eager._kept_sizes(query, case.geometry, size, dropout_p) if keep else None
    torch.library.opcheck(
        torch.ops.focal.eager_attention.default, (*arguments, *settings(case, dropout_p, sizes))
    )


@PACKED
@pytest.mark.parametrize("trains", [False, True])
def test_eager_attention_in_a_graph_is_registered_soundly(trains, packed):
    case, dtype = replace(CASE, ready=()), torch.float64
    keys, values = (
        [random(case.batch, *cells, case.heads, case.head_dim, dtype=dtype, grad=trains)]
        for cells in coarse_cells(case) * 2
    )
    weights = [random(2, 2, dtype=dtype, grad=trains)]
    query_key_value = given(packed, case, dtype, trains)
    arguments = (query_key_value, bias(case, dtype, trains), keys, values, weights)
    code, scale, size, dropout_p, seed = settings(case, 0.0)
    torch.library.opcheck(
        torch.ops.focal.eager_attention_in_graph.default,
        (*arguments, code, scale, size, dropout_p, trains, seed),
    )


@DTYPES
@PACKED
def test_eager_attention_backward_is_registered_soundly(dtype, packed):
    case = TWO_COARSE
    query_key_value = given(packed, case, dtype, grad=False)
    coarse = [
        random(2, case.batch, *cells, case.heads, case.head_dim, dtype=dtype, grad=False)
        for cells in coarse_cells(case)
    ]
    grad_out = random(*case.shape, dtype=dtype, grad=False)
    lists = (pool_weights(case, dtype, False), coarse, [])
    arguments = (grad_out, query_key_value, bias(case, dtype, False), *lists)
    torch.library.opcheck(
        torch.ops.focal.eager_attention_backward.default, (*arguments, *settings(case, 0.0))
    )


def triton_inputs(
    case: Case, dtype: torch.dtype, grad: bool = True, *, packed: bool = False
) -> tuple[Any, ...]:
    """Tensors of the Triton operator, from query, key and value to ready-made values."""
    levels = range(1, len(case.levels))
    here = [level for level in levels if level not in case.ready]
    sides = [case.levels[level][0] for level in here]
    counts = [rows * cols for rows, cols in coarse_cells(case)]
    cells = sum(counts[level - 1] for level in case.ready)
    head = (case.heads, case.head_dim)
    rows = len(here) * case.heads
    offsets = (random(rows, case.head_dim, dtype=dtype, grad=grad) for _ in range(2))
    ready = (random(case.batch, cells, *head, dtype=dtype, grad=grad) for _ in range(2))
    weights = random(sum(side**2 for side in sides), dtype=dtype, grad=grad)
    query_key_value = given(packed, case, dtype, grad)
    return (query_key_value, bias(case, dtype, grad), weights, *offsets, *ready)


def triton_settings(case: Case, dropout_p: float = 0.0) -> tuple:
    code, *rest = settings(case, dropout_p)
    return code, list(case.ready), *rest


MIXED = replace(TWO_COARSE, ready=(2,))


@needs_interpreter
@DROPOUT
@PACKED
def test_triton_attention_is_registered_soundly(dropout_p, packed):
    inputs = triton_inputs(SMALL, torch.float64, packed=packed)
    arguments = (*inputs, *triton_settings(SMALL, dropout_p), True)
    torch.library.opcheck(torch.ops.focal.attention.default, arguments)


@needs_interpreter
@pytest.mark.parametrize("case", [CASE, TWO_COARSE, MIXED, replace(MIXED, ready=(1, 2))], ids=str)
def test_triton_attention_of_several_levels_is_registered_soundly(case):
    torch.library.opcheck(
        torch.ops.focal.attention.default,
        (*triton_inputs(case, torch.float32), *triton_settings(case), True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@needs_interpreter
@pytest.mark.parametrize("case", [TWO_COARSE, MIXED], ids=str)
def test_triton_attention_that_keeps_nothing_is_registered_soundly(case):
    inputs = triton_inputs(case, torch.float64, grad=False)
    torch.library.opcheck(
        torch.ops.focal.attention.default, (*inputs, *triton_settings(case), False)
    )


@needs_interpreter
def test_triton_attention_that_kept_nothing_has_no_gradient():
    inputs = triton_inputs(SMALL, torch.float64)
    out, *_ = torch.ops.focal.attention.default(*inputs, *triton_settings(SMALL), False)
    with pytest.raises(RuntimeError, match="keep=False"):
        out.sum().backward()


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("case", [TWO_COARSE, MIXED], ids=str)
@PACKED
def test_triton_attention_backward_is_registered_soundly(case, dtype, packed):
    inputs = triton_inputs(case, dtype, grad=False, packed=packed)
    kept = torch.ops.focal.attention.default(*inputs, *triton_settings(case), True)
    arguments = (random(*case.shape, dtype=dtype, grad=False), *inputs[:3], *kept)
    torch.library.opcheck(
        torch.ops.focal.attention_backward.default, (*arguments, *triton_settings(case))
    )


# -- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [CASE, Case("mixed", 2, ((1, 2), (1, 4), (2, 3)), 3, 3, ready=(2,))]
)
def test_compiled_whole_graph_gives_the_same(case, backend, fresh_compiler):
    tensors, gradient = make_tensors(case), random_gradient(case)

    def function(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return attend(case, fused(tensors), backend) * 2

    expected = run(case, tensors, "reference", gradient * 2)
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), gradient)
    got = {"out": out.detach() / 2, **dict(zip(tensors, grads, strict=True))}
    assert_same(got, expected)


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param(
            "triton",
            marks=needs_interpreter,
        ),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_compiled_graph_serves_other_map_sizes(backend, grad, fresh_compiler):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def function(query, key, value, bias, weight):
        return focal_attention(
            *(query, key, value, bias),
            geometry=CASE.geometry,
            pooling=[Pooling(weight)],
            backend=backend,
        )

    def check(height: int, width: int) -> None:
        case = replace(CASE, height=height, width=width, offsets=False)
        tensors = make_tensors(case)
        if not grad:
            tensors = {name: x.detach() for name, x in tensors.items()}
        expected, out = attend(case, tensors, "reference"), function(*tensors.values())
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        if grad:
            gradient = random_gradient(case)
            got, want = (
                torch.autograd.grad(x, list(tensors.values()), gradient) for x in (out, expected)
            )
            torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)

    # Compiled for the first size, and once more with the sizes free.
    check(4, 6)
    check(5, 7)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(9, 6)


def test_a_plan_made_while_a_graph_is_made_is_no_part_of_it(monkeypatch, fresh_compiler):
    monkeypatch.setattr(eager, "_bands", eager._bands.__wrapped__)  # no plan is found made
    tensors, gradient, graphs = make_tensors(CASE), random_gradient(CASE), []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "call" in node.op])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        lambda tensors: attend(CASE, tensors, "eager"),
        fullgraph=True,
        backend=aot_autograd(fw_compiler=keep),
    )
    out = compiled(tensors)
    expected = run(CASE, tensors, "reference", gradient)
    grads = torch.autograd.grad(out, list(tensors.values()), gradient)
    assert_same({"out": out.detach(), **dict(zip(tensors, grads, strict=True))}, expected)
    forward, backward = graphs
    assert forward.count("focal.eager_attention.default") == 1
    assert backward.count("focal.eager_attention_backward.default") == 1
    assert not any("arange" in x or "tensor" in x or "cat" in x for x in forward)


# -- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("triton", marks=needs_interpreter),
    ],
)
def test_autocast_leaves_forward_at_the_precision_of_its_inputs(backend):
    tensors = {name: x.detach() for name, x in make_tensors(CASE, torch.float32).items()}
    expected = attend(CASE, tensors, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(CASE, tensors, backend)
    torch.testing.assert_close(out, expected)


# -- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_more_than_weights_of_the_eager_backend_is_saved(backend, dropout_p):
    case = Case("saved", 2, ((1, 8), (2, 3)), 4, 6, 2, 3, 2, dropout_p=dropout_p)
    geometry, tensors = case.geometry, make_tensors(case)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attend(case, tensors, backend)
    windows = case.batch * 2 * 3
    gathered = windows * case.heads * geometry.num_keys * case.head_dim
    scores = windows * case.heads * geometry.num_queries * geometry.num_keys
    kept = [x for x in saved if x.numel() > scores / 2]
    if backend == "eager":
        (weights,) = kept  # the map is small enough for one step
        assert weights.numel() < scores * 1.1  # keys are padded to whole vectors
        saved = [x for x in saved if x is not weights]
    else:
        assert not kept
    map_size, bias_size = tensors["query"].numel(), tensors["bias"].numel()
    assert map_size < gathered / 10
    assert bias_size < scores / 10
    sizes = {x.untyped_storage().data_ptr(): x.numel() for x in saved}
    assert max(sizes.values()) <= max(map_size, bias_size)
    # Query, key, value, out; in eager mode key and value padded and rolled for pooling; the bias,
    # the coarse maps and the statistics are small.
    assert sum(sizes.values()) <= 8 * map_size + bias_size


@needs_interpreter
def test_triton_saves_its_inputs_its_output_and_statistics_alone():
    case = Case("saved", 2, ((1, 8), (2, 3)), 4, 6, 2, 3, 2)
    tensors = make_tensors(case)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = attend(case, tensors, "triton")
    known = {x.data_ptr() for x in (*tensors.values(), out)}
    shapes = [tuple(x.shape) for x in saved if x.data_ptr() not in known]
    coarse, stats = (2, 6, 2, 3), (2, 6, 2, 2, 4)
    assert sorted(shapes) == sorted([coarse, coarse, stats])


# -- choice of backend ----------------------------------------------------------------------------


def test_auto_is_eager_on_a_cpu():
    assert resolve_backend("auto", torch.device("cpu")) == "eager"
    assert resolve_backend("auto", torch.device("cpu"), torch.bfloat16) == "eager"


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_an_explicit_backend_is_taken(name):
    assert resolve_backend(name, torch.device("cpu")) == name


@pytest.mark.parametrize("name", ["", "cuda", "Triton", None])
def test_an_unknown_backend_is_an_error(name):
    with pytest.raises(ValueError, match=r"backend must be one of .*'triton'\), got"):
        resolve_backend(name, torch.device("cpu"))
    with pytest.raises(ValueError, match="backend must be one of"):
        attend(CASE, make_tensors(CASE), name)


@needs_interpreter
def test_bfloat16_under_the_interpreter_is_an_error():
    tensors = make_tensors(CASE, torch.bfloat16)
    with pytest.raises(ValueError, match="interpreter computes bfloat16 products wrongly"):
        attend(CASE, tensors, "triton")


def test_triton_on_a_cpu_without_the_interpreter_is_an_error():
    code = (
        "import torch, kernels\n"
        "x = torch.zeros(1, 2, 2, 1, 4)\n"
        "geometry = kernels.FocalGeometry(2, ((1, 2),))\n"
        "call = dict(geometry=geometry, backend='triton')\n"
        "try:\n"
        "    kernels.focal_attention(x, x, x, torch.zeros(1, 4, 4), **call)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "call['backend'] = 'auto'\n"
        "print(kernels.focal_attention(x, x, x, torch.zeros(1, 4, 4), **call).shape)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert 'backend="triton" cannot run here: it needs a GPU, or TRITON_INTERPRET=1' in first
    assert "device cpu" in first
    assert second == "torch.Size([1, 2, 2, 1, 4])"
