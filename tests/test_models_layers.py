"""Layers that a CPU computes in parts: the same numbers, and nothing hidden from their user."""

import pytest
import torch
from torch.nn import functional as F

from models import layers
from models.focal_attention import _Unbind
from models.layers import Mlp, part_size


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(layers, "PART_ROWS", 4)
    monkeypatch.setitem(layers.part_size.__kwdefaults__, "size", 1)


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
    assert size <= max(layers.PART_SIZE // width, layers.PART_ROWS)
    assert size * count - rows < count * unit


def test_gradients_side_by_side_are_not_copied():
    qkv = torch.randn(2, 4, 5, 3, 2, 6, requires_grad=True)
    whole = torch.randn(2, 4, 5, 3, 2, 6)
    parts = whole.unbind(3)
    for grads in (parts, [x.clone() for x in parts], parts[::-1], (parts[0], parts[2], parts[1])):
        (got,) = torch.autograd.grad(_Unbind.apply(qkv), qkv, grads)
        torch.testing.assert_close(got, torch.stack(tuple(grads), dim=3), atol=0.0, rtol=0.0)
        assert (got.data_ptr() == whole.data_ptr()) == (grads is parts)


def test_a_compiled_linear_layer_gives_the_same():
    layer = layers.Linear(6, 10)
    x = torch.randn(3, 4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    arguments = (x, layer.weight.detach(), layer.bias.detach())
    torch.library.opcheck(torch.ops.focal.cpu_linear.default, arguments)
    torch.library.opcheck(torch.ops.focal.cpu_linear.default, (*arguments[:2], None))
