"""Query, key and value as one map: the same numbers, one gradient, the same checks."""

import pytest
import torch
from cases import (
    ODD,
    ODD_CASES,
    Case,
    assert_same,
    make_pooling,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from kernels import focal_attention, focal_attention_qkvpacked
from kernels.maps import apart, as_given

FAST = ["eager", pytest.param("triton", marks=needs_interpreter)]
CASE = Case("two levels", 2, ((1, 4), (2, 3)), 3, 4, heads=2, head_dim=3, batch=2, shift=1)


CONSTANTS = {name: x.detach() for name, x in make_tensors(CASE).items()}


def call(qkv, backend):
    """One map on its own: everything else is a constant."""
    return focal_attention_qkvpacked(
        qkv,
        CONSTANTS["bias"],
        geometry=CASE.geometry,
        pooling=make_pooling(CASE, CONSTANTS),
        backend=backend,
    )


def projection(grad=True):
    shape = (*CASE.shape[:3], 3, *CASE.shape[3:])
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


@ODD
def test_one_map_gives_what_three_give_the_oracle(case):
    tensors, gradient = make_tensors(case), random_gradient(case)
    expected = run(case, tensors, "reference", gradient)
    assert_same(run(case, tensors, "eager", gradient, packed=True), expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_every_backend_takes_one_map(backend, dropout_p):
    for case in (CASE, ODD_CASES[8]):
        tensors, gradient = make_tensors(case), random_gradient(case)
        settings = {}
        if dropout_p:
            settings = {"dropout_p": dropout_p, "dropout_seed": torch.tensor([5])}
        expected = run(case, tensors, "reference", gradient, **settings)
        assert_same(run(case, tensors, backend, gradient, packed=True, **settings), expected)


@needs_interpreter
@pytest.mark.parametrize("scale", [0.0, 2.0**-20])
def test_a_scale_of_nearly_zero_is_taken_out_of_one_map(scale):
    tensors, gradient = make_tensors(CASE), random_gradient(CASE)
    expected = run(CASE, tensors, "reference", gradient, scale=scale)
    assert_same(run(CASE, tensors, "triton", gradient, packed=True, scale=scale), expected)


@pytest.mark.parametrize("backend", FAST)
def test_the_operator_alone_stands_between_one_map_and_the_output(backend):
    qkv = projection()
    node = call(qkv, backend).grad_fn
    (source, _) = next(link for link in node.next_functions if link[0] is not None)
    assert source.variable is qkv


@pytest.mark.parametrize("backend", FAST)
def test_a_graph_does_not_copy_the_gradient_together(backend):
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if "call" in node.op])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda qkv: call(qkv * 2, backend), fullgraph=True, backend=aot_autograd(fw_compiler=keep)
    )
    qkv = projection()
    (got,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
    (expected,) = torch.autograd.grad(call(qkv * 2, "reference").sum(), qkv)
    torch._dynamo.reset()
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0.0)
    _, backward = graphs
    assert sum("attention_backward" in x for x in backward) == 1
    assert not any("stack" in x or "cat" in x for x in backward)


@pytest.mark.parametrize("backend", FAST)
def test_operations_of_one_map_are_those_of_three(backend):
    counts = []
    for function in (
        lambda: call(projection(), backend),
        lambda: focal_attention(
            *(make_tensors(CASE)[name] for name in ("query", "key", "value", "bias")),
            geometry=CASE.geometry,
            pooling=make_pooling(CASE, make_tensors(CASE)),
            backend=backend,
        ),
    ):
        with FlopCounterMode(display=False) as counter:
            function().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("qkv", "error", "text"),
    [
        ([1.0], TypeError, "qkv must be a tensor, got list"),
        (torch.zeros(1, 4, 5, 2, 4), ValueError, r"qkv must be .*, got \[1, 4, 5, 2, 4\]"),
        (torch.zeros(1, 4, 5, 2, 2, 4), ValueError, r"qkv must hold .*, got \[1, 4, 5, 2, 2, 4\]"),
        (torch.zeros(1, 4, 5, 3, 2, 4).int(), TypeError, "qkv must be floating point"),
        (torch.zeros(1, 0, 5, 3, 2, 4), ValueError, r"positive, got qkv \[1, 0, 5, 3, 2, 4\]"),
    ],
)
def test_what_is_not_a_projection_is_refused(qkv, error, text):
    with pytest.raises(error, match=text):
        focal_attention_qkvpacked(qkv, torch.zeros(1), geometry=CASE.geometry)


def test_the_other_arguments_are_checked_as_for_three_maps():
    with pytest.raises(ValueError, match="bias"):
        focal_attention_qkvpacked(
            projection(), torch.zeros(1, dtype=torch.float64), geometry=CASE.geometry
        )
    with pytest.raises(ValueError, match=r"pooling must have one entry per coarse level"):
        focal_attention_qkvpacked(
            projection(), make_tensors(CASE)["bias"], geometry=CASE.geometry, pooling=()
        )
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        call(forward_ad.make_dual(projection(False), projection(False)), "eager")


def test_a_gradient_takes_the_form_of_the_maps():
    packed = torch.randn(1, 2, 2, 3, 1, 4)
    (whole,) = as_given(packed, 1)
    assert whole is packed
    for got, side in zip(as_given(packed, 3), apart([packed]), strict=True):
        assert got.data_ptr() == side.data_ptr()
        assert got.shape == (1, 2, 2, 1, 4)
