"""Export, whole-graph compilation, checkpointing, autocast and function transforms."""

from dataclasses import replace

import pytest
import timm
import torch
from cases import (
    Case,
    assert_same,
    attend,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import models  # noqa: F401 (registers the models with timm)
from kernels import Pooling, focal_attention

BACKENDS = pytest.mark.parametrize(
    "backend", ["eager", pytest.param("triton", marks=needs_interpreter)]
)
CASE = Case("two levels", 2, ((1, 4), (2, 3)), 3, 4, heads=1, head_dim=3, batch=2, shift=1)


pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Attention(nn.Module):
    """The operator as a module that holds its parameters."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        tensors = make_tensors(replace(CASE, offsets=False))
        self.bias = nn.Parameter(tensors["bias"].detach())
        self.weight = nn.Parameter(tensors["weight_1"].detach())
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return focal_attention(
            query,
            key,
            value,
            self.bias,
            geometry=CASE.geometry,
            pooling=[Pooling(self.weight)],
            backend=self.backend,
        )


def maps(batch: int, height: int = 3, width: int = 4) -> tuple[Tensor, ...]:
    case = replace(CASE, batch=batch, height=height, width=width)
    tensors = make_tensors(case, seed=batch)
    return tuple(tensors[name].detach() for name in ("query", "key", "value"))


def micro(backend: str = "eager", **options) -> nn.Module:
    return timm.create_model(
        "focal_micro", num_classes=5, img_size=56, attention_backend=backend, **options
    ).eval()


# -- export ---------------------------------------------------------------------------------------


@BACKENDS
def test_the_exported_operator_gives_the_oracles_output_for_any_batch(backend):
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Attention(backend), maps(2), dynamic_shapes=({0: batch},) * 3, strict=False
    )
    oracle = Attention("reference")
    for size in (1, 2, 5):
        got = program.module()(*maps(size))
        torch.testing.assert_close(got, oracle(*maps(size)), atol=1e-10, rtol=1e-10)


def test_the_exported_operator_is_saved_and_loaded(tmp_path):
    program = torch.export.export(Attention("eager"), maps(2), strict=False)
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    expected = Attention("reference")(*maps(2))
    torch.testing.assert_close(loaded(*maps(2)), expected, atol=1e-10, rtol=1e-10)


def test_an_exported_model_gives_the_same_for_any_batch():
    model, oracle = micro().double(), micro("reference").double()
    oracle.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 56, 56, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: batch},), strict=False)
    for count in (1, 3):
        got = program.module()(images[:count])
        torch.testing.assert_close(got, oracle(images[:count]), atol=1e-10, rtol=1e-10)


def test_an_exported_model_of_another_input_size_gives_the_same():
    model, oracle = micro().double(), micro("reference").double()
    oracle.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 72, 88, dtype=torch.float64)
    program = torch.export.export(model, (image,), strict=False)
    torch.testing.assert_close(program.module()(image), oracle(image), atol=1e-10, rtol=1e-10)


# -- torch.compile --------------------------------------------------------------------------------


@BACKENDS
def test_the_operator_compiles_as_a_whole_graph_with_dropout(backend):
    tensors, gradient = make_tensors(CASE), random_gradient(CASE)
    case = replace(CASE, dropout_p=0.3)
    expected = run(case, tensors, "reference", gradient)
    compiled = torch.compile(
        lambda tensors: attend(case, tensors, backend), fullgraph=True, backend="aot_eager"
    )
    out = compiled(tensors)
    grads = torch.autograd.grad(out, list(tensors.values()), gradient)
    assert_same({"out": out.detach(), **dict(zip(tensors, grads, strict=True))}, expected)


def test_a_model_compiles_as_a_whole_graph():
    model, oracle = micro().double(), micro("reference").double()
    oracle.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(images).sum().backward()
    oracle(images).sum().backward()
    expected = dict(oracle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-10, rtol=1e-9)


# -- activation checkpointing ---------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(("use_reentrant", "dropout_p"), [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_checkpointing_gives_the_oracles_gradients(backend, use_reentrant, dropout_p):
    tensors, gradient = make_tensors(CASE), random_gradient(CASE)
    names = list(tensors)

    def function(*inputs: Tensor, backend: str = backend) -> Tensor:
        # No seed: it is drawn, and must be drawn alike when forward is run again.
        named = dict(zip(names, inputs, strict=True))
        return attend(CASE, named, backend, dropout_p=dropout_p)

    torch.manual_seed(5)
    expected_out = function(*tensors.values(), backend="reference")
    expected = torch.autograd.grad(expected_out, list(tensors.values()), gradient)
    torch.manual_seed(5)
    out = checkpoint(function, *tensors.values(), use_reentrant=use_reentrant)
    torch.rand(3)  # moves the generator between forward and backward
    out.backward(gradient)
    assert_same(
        {"out": out.detach(), **{name: x.grad for name, x in tensors.items()}},
        {"out": expected_out.detach(), **dict(zip(names, expected, strict=True))},
    )


# -- autocast -------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autocast_changes_neither_dtypes_nor_results(backend, dtype):
    tensors, gradient = make_tensors(CASE, dtype), random_gradient(CASE, dtype)
    tensors["bias"] = tensors["bias"].detach().float().requires_grad_()  # as autocast leaves it
    expected = run(CASE, tensors, backend, gradient)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(CASE, tensors, backend)
    grads = torch.autograd.grad(out, list(tensors.values()), gradient)
    assert torch.equal(out, expected["out"])
    for (name, tensor), grad in zip(tensors.items(), grads, strict=True):
        assert grad.dtype == tensor.dtype
        assert torch.equal(grad, expected[name]), name


@BACKENDS
def test_maps_that_autocast_made_of_different_dtypes_are_refused(backend):
    tensors = {name: x.detach().float() for name, x in make_tensors(CASE).items()}
    tensors["value"] = tensors["value"].half()
    with pytest.raises(TypeError, match="value must have the dtype of query"):
        attend(CASE, tensors, backend)


# -- function transforms --------------------------------------------------------------------------


def of_query(backend: str, tensors: dict[str, Tensor]):
    """The operator as a function of its queries alone."""
    return lambda query: attend(CASE, {**tensors, "query": query}, backend)


@BACKENDS
def test_vmap_is_right_or_refused(backend):
    tensors = {name: x.detach() for name, x in make_tensors(CASE).items()}
    queries = torch.stack([tensors["query"], 2 * tensors["query"]])
    expected = torch.stack([of_query("reference", tensors)(query) for query in queries])
    try:
        got = torch.func.vmap(of_query(backend, tensors))(queries)
    except RuntimeError as error:
        assert "Batching rule not implemented for focal::" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


@BACKENDS
def test_forward_mode_derivatives_are_refused_rather_than_zero(backend):
    tensors = {name: x.detach() for name, x in make_tensors(CASE).items()}
    query = tensors["query"]
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(of_query(backend, tensors), (query,), (query,))
    pooled = {**tensors, "query": query}
    with forward_ad.dual_level():
        pooled["weight_1"] = forward_ad.make_dual(tensors["weight_1"], tensors["weight_1"])
        with pytest.raises(NotImplementedError, match="use backend='reference'"):
            attend(CASE, pooled, backend)
    _, tangent = torch.func.jvp(of_query("reference", tensors), (query,), (query,))
    assert tangent.abs().max() > 0


@BACKENDS
def test_reverse_mode_by_function_transform_is_refused(backend):
    tensors = {name: x.detach() for name, x in make_tensors(CASE).items()}
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vjp(of_query(backend, tensors), tensors["query"])
