"""Layers that a CPU computes in parts: the same numbers, and nothing hidden from their user."""

import itertools

import pytest
import torch
from gradients import assert_same_with_gradients
from timm import create_model
from torch.nn import functional as F

from models import layers, opaque, products
from models.layers import LayerNorm, Mlp
from models.products import part_size


@pytest.fixture(params=["oneDNN", "oneDNN for weights too", "BLAS", "BLAS without bias"])
def small_parts(request, monkeypatch):
    """Parts of a few tokens, with either library's products, or both."""
    if request.param == "BLAS":
        monkeypatch.setattr(products, "_ONEDNN_LINEAR", None)
    elif products._ONEDNN_LINEAR is None:
        pytest.skip("this processor takes the BLAS")
    monkeypatch.setattr(products, "_BLAS_WITHOUT_BIAS", request.param == "BLAS without bias")
    monkeypatch.setattr(products, "_ONEDNN_WEIGHTS", request.param == "oneDNN for weights too")
    monkeypatch.setattr(products, "PART_ROWS", 4)
    monkeypatch.setitem(products.part_size.__kwdefaults__, "size", 1)


def plain(mlp: Mlp, x: torch.Tensor) -> torch.Tensor:
    hidden = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias))
    return F.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 1, 1), (0, 2, 2)], ids=str)
def test_mlp_in_parts_gives_the_same(small_parts, dtype, shape):
    mlp = Mlp(6, 10).to(dtype)
    x = torch.randn(*shape, 6, dtype=dtype).permute(0, 2, 1, 3).requires_grad_()
    tolerance = {"atol": 1e-10 if dtype == torch.float64 else 1e-5, "rtol": 0.0}
    expected, got = plain(mlp, x), mlp(x)
    gradient = torch.randn_like(expected)
    inputs = [x, *mlp.parameters()]
    for a, b in zip(
        (got, *torch.autograd.grad(got, inputs, gradient)),
        (expected, *torch.autograd.grad(expected, inputs, gradient)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [2, 0])
def test_a_linear_layer_gives_the_same(small_parts, dtype, bias, batch):
    layer = layers.Linear(6, 10, bias=bias).to(dtype)
    x = torch.randn(batch, 5, 3, 6, dtype=dtype).permute(0, 2, 1, 3).requires_grad_()
    expected, got = F.linear(x, layer.weight, layer.bias), layer(x)
    gradient, inputs = torch.randn_like(expected), [x, *layer.parameters()]
    for a, b in zip(
        (got, *torch.autograd.grad(got, inputs, gradient)),
        (expected, *torch.autograd.grad(expected, inputs, gradient)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-10 if dtype == torch.float64 else 1e-5, rtol=0.0)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())


@pytest.mark.parametrize(
    ("told", "mkl", "faster"),
    [
        ({"cpu_name": "Intel Xeon"}, True, True),
        ({"cpu_name": "Intel Xeon"}, False, False),
        ({"cpu_name": "AMD EPYC"}, True, False),
        ({}, True, False),
    ],
    ids=["Intel", "Intel without MKL", "AMD", "unknown"],
)
def test_the_blas_is_known_by_the_processor_s_name(told, mkl, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert products._blas_is_faster_without_bias() == faster


@pytest.mark.parametrize(
    ("told", "faster"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_vp2intersect": True}, True),
        ({"cpu_name": "AMD EPYC", "avx512_vp2intersect": False}, False),
        ({"cpu_name": "Intel Xeon", "avx512_vp2intersect": True}, False),
        ({}, False),
    ],
    ids=["Zen 5", "Zen 4", "Intel", "unknown"],
)
def test_vectors_computed_whole_are_known_by_an_instruction(told, faster, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told)
    assert products._onednn_is_faster_for_weights() == faster


@pytest.mark.parametrize(
    ("blas_without_bias", "onednn_weights", "expected"),
    [
        (True, False, ["output"]),
        (False, False, ["output", "input"]),
        (False, True, ["output", "input", "weight"]),
    ],
    ids=["Intel", "Zen 4", "Zen 5"],
)
@pytest.mark.parametrize(("width", "out"), [(6, 10), (10, 6)])
def test_products_are_the_faster_library_s(
    blas_without_bias, onednn_weights, expected, width, out, monkeypatch
):
    of_shape, onednn = {(3, out): "output", (3, width): "input", (6, 10): "weight"}, []

    def recorded(x, weight, bias, *rest):
        result = F.linear(x, weight, bias)
        onednn.append(of_shape[tuple(result.shape)])
        return result

    monkeypatch.setattr(products, "_ONEDNN_LINEAR", recorded)
    monkeypatch.setattr(products, "_BLAS_WITHOUT_BIAS", blas_without_bias)
    monkeypatch.setattr(products, "_ONEDNN_WEIGHTS", onednn_weights)
    layer, x = layers.Linear(width, out), torch.randn(3, width, requires_grad=True)
    _, of_weight = torch.autograd.grad(layer(x).sum(), [x, layer.weight])
    assert onednn == expected
    assert of_weight.is_contiguous()  # as compilers are told


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_and_replaced_layers_are_called(small_parts, grad):
    mlp = Mlp(6, 10)
    seen = []
    mlp.fc1.register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    mlp.fc2 = torch.nn.Sequential(mlp.fc2, torch.nn.Tanh())
    with torch.set_grad_enabled(grad):
        out = mlp(torch.randn(9, 6) * 100)
    assert sum(seen) == 9
    assert out.abs().max() <= 1


def test_autocast_gives_its_dtype():
    mlp = Mlp(6, 10)
    for grad in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            assert mlp(torch.randn(3, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize(("rows", "width", "unit"), [(1, 1, 1), (10**6, 384, 1), (5000, 96, 196)])
def test_parts_are_whole_units_and_nearly_equal(rows, width, unit):
    size = part_size(rows, width, unit=unit)
    count = -(-rows // size)
    assert size % unit == 0
    assert size <= max(products.PART_SIZE // width, products.PART_ROWS)
    assert size * count - rows < count * unit


@pytest.mark.parametrize("bias", [True, False])
def test_a_compiled_linear_layer_gives_the_same(bias, fresh_compiler):
    layer = layers.Linear(6, 10, bias=bias)
    x = torch.randn(3, 4, 6, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = F.linear(x, layer.weight, layer.bias)
    assert_same_with_gradients(compiled(x), expected, [x, *layer.parameters()], 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_a_compiled_linear_layer_gives_the_gradients_that_are_wanted(wanted, fresh_compiler):
    layer, x = layers.Linear(6, 10), torch.randn(3, 4, 6)
    inputs = []
    for tensor, want in zip((x, layer.weight, layer.bias), wanted, strict=True):
        tensor.requires_grad_(want)
        inputs += [tensor] if want else []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled(x), F.linear(x, layer.weight, layer.bias), inputs, 1e-5)


@pytest.mark.parametrize("wanted", [[True, True, True], [False, True, False]], ids=str)
def test_the_gradients_of_the_linear_operator_are_registered_soundly(wanted):
    tensors = [torch.randn(*shape) for shape in ((3, 4, 10), (3, 4, 6), (10, 6))]
    torch.library.opcheck(torch.ops.focal.cpu_linear_backward.default, (*tensors, wanted))


@pytest.mark.parametrize("grad", [True, False])
def test_the_linear_operator_is_registered_soundly(grad):
    tensors = [torch.randn(*shape, requires_grad=grad) for shape in ((3, 4, 6), (10, 6), (10,))]
    torch.library.opcheck(torch.ops.focal.cpu_linear.default, tensors)
    torch.library.opcheck(torch.ops.focal.cpu_linear.default, (*tensors[:2], None))


@pytest.mark.parametrize("tokens", [9, 0])
@pytest.mark.parametrize("keep", [True, False])
def test_the_mlp_operators_are_registered_soundly(small_parts, tokens, keep):
    shapes = ((tokens, 6), (10, 6), (10,), (6, 10), (6,))
    tensors = [torch.randn(*x, dtype=torch.float64, requires_grad=keep) for x in shapes]
    torch.library.opcheck(torch.ops.focal.cpu_mlp.default, (*tensors, keep))
    parts = len(tensors[0].split(part_size(tokens, 10)))
    assert parts > 1 or not tokens
    x, weight1, _, weight2, _ = (tensor.detach() for tensor in tensors)
    operator = torch.ops.focal.cpu_mlp_pieces
    if not keep:
        torch.library.opcheck(operator.default, (*tensors, 0))
        return
    for pieces in {1, parts}:
        torch.library.opcheck(operator.default, (*tensors, pieces))
        hidden = operator(*tensors, pieces)[1:]
        assert [len(piece) for piece in hidden] == [len(part) for part in x.chunk(pieces)]
        arguments = (torch.randn_like(x), x, weight1, weight2, [h.detach() for h in hidden])
        torch.library.opcheck(torch.ops.focal.cpu_mlp_backward.default, arguments)


def test_the_mlp_operator_keeps_nothing_unasked_and_then_has_no_gradient(small_parts):
    tensors = [torch.randn(*x, requires_grad=True) for x in ((9, 6), (10, 6), (10,), (6, 10), (6,))]
    assert len(torch.ops.focal.cpu_mlp_pieces(*tensors, 0)) == 1
    with pytest.raises(RuntimeError, match="keep=False"):
        torch.ops.focal.cpu_mlp(*tensors, False).sum().backward()


def traced(function, *arguments) -> str:
    """What a compiled function calls."""
    graphs = []
    torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(
        *arguments
    )
    return " ".join(str(node.target) for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_compiled_mlp_gives_the_same_in_parts(small_parts, dtype, fresh_compiler):
    mlp = Mlp(6, 10).to(dtype)
    x = torch.randn(2, 9, 6, dtype=dtype, requires_grad=True)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert_same_with_gradients(compiled(x), plain(mlp, x), [x, *mlp.parameters()], tolerance)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(mlp, x), atol=tolerance, rtol=0.0)
    assert "cpu_mlp" in traced(mlp, x)


def test_a_compiled_mlp_serves_other_sizes(small_parts, fresh_compiler):
    mlp = Mlp(6, 10).double()
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (9, 5):
        x = torch.randn(2, tokens, 6, dtype=torch.float64, requires_grad=True)
        assert_same_with_gradients(compiled(x), plain(mlp, x), [x, *mlp.parameters()])
    with torch.compiler.set_stance("fail_on_recompile"):
        x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
        assert_same_with_gradients(compiled(x), plain(mlp, x), [x, *mlp.parameters()])


def test_a_compiled_mlp_of_known_size_keeps_its_parts_as_they_are(
    small_parts, fresh_compiler, monkeypatch
):
    operator, seen = opaque._mlp, set()

    def spy(*arguments):
        seen.add(arguments[-1])
        return operator(*arguments)

    monkeypatch.setattr(opaque, "_mlp", spy)
    mlp, x = Mlp(6, 10), torch.randn(9, 6)
    torch.compile(mlp, fullgraph=True, backend="aot_eager")(x).sum().backward()
    parts = len(x.split(part_size(9, 10)))
    assert seen == {parts}
    assert parts > 1


def test_a_compiled_mlp_that_is_no_plain_one_is_compiled_whole(small_parts, fresh_compiler):
    x = torch.randn(9, 6)
    dropping, replaced, low = Mlp(6, 10, drop=0.5), Mlp(6, 10), Mlp(6, 10).bfloat16()
    replaced.fc2 = torch.nn.Sequential(replaced.fc2, torch.nn.Tanh())
    for mlp in (dropping, replaced, low):
        assert "cpu_mlp" not in traced(mlp, x.to(mlp.fc1.weight.dtype))
    assert "cpu_mlp" in traced(dropping.eval(), x)


@pytest.mark.parametrize("grad", [True, False])
def test_the_layer_norm_operators_are_registered_soundly(grad):
    tensors = [
        torch.randn(*x, dtype=torch.float64, requires_grad=grad) for x in ((3, 4, 6), (6,), (6,))
    ]
    torch.library.opcheck(torch.ops.focal.cpu_layer_norm.default, (*tensors, 1e-5))


@pytest.mark.parametrize("shape", [(3, 4, 6), (0, 6)], ids=str)
def test_a_compiled_layer_norm_gives_the_same(shape, fresh_compiler):
    norm = LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    expected = F.layer_norm(x, (6,), norm.weight, norm.bias, norm.eps)
    assert_same_with_gradients(compiled(x), expected, [x, *norm.parameters()])
    assert "cpu_layer_norm" in traced(norm, x)
    assert "cpu_layer_norm" not in traced(norm.bfloat16(), x.bfloat16())


def test_every_layer_norm_of_the_model_is_left_to_pytorch():
    norms = [x for x in create_model("focal_micro").modules() if isinstance(x, torch.nn.LayerNorm)]
    assert norms
    assert all(isinstance(norm, LayerNorm) for norm in norms)
