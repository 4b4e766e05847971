"""Cases of the operator, shared by the tests: inputs, layouts, runs that give every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.operator_cases import (  # noqa: F401 (the tests import them from here)
    Case,
    Tensors,
    cases,
    geometries,
    make_pooling,
    make_tensors,
)
from kernels import focal_attention, focal_attention_qkvpacked
from kernels.api import TRITON_INSTALLED

if TRITON_INSTALLED:
    from kernels.ops import INTERPRETED
else:
    INTERPRETED = False

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="Triton kernels run on CPU tensors under TRITON_INTERPRET=1 alone"
)


def case_id(case: Case) -> str:
    return str(case)


# Odd on purpose: height ≠ width, no multiple of the window, maps smaller than a window, one head,
# one to four levels, no ring, batch 1, both boundaries, with and without shift, a padded map.
ODD_CASES = (
    Case("two levels", 3, ((1, 5), (3, 3)), 7, 5),
    Case("two levels shifted", 3, ((1, 5), (3, 3)), 7, 8, heads=1, batch=1, shift=1),
    Case("two levels masked", 3, ((1, 5), (3, 3)), 5, 7, batch=1, boundary="mask"),
    Case("masked and shifted", 4, ((1, 6), (2, 4)), 6, 9, 1, boundary="mask", shift=2),
    Case("window alone", 4, ((1, 4),), 6, 5, heads=1, batch=1),
    Case("window alone shifted", 4, ((1, 4),), 8, 4, shift=2, heads=3),
    Case("ring alone", 2, ((1, 4),), 5, 3, heads=1),
    Case("no ring", 4, ((1, 4), (4, 3)), 5, 9, batch=1, offsets=False),
    Case("three levels", 4, ((1, 8), (2, 6), (4, 5)), 9, 6, heads=1, batch=1),
    Case("four levels", 4, ((1, 6), (1, 8), (2, 4), (4, 3)), 6, 5, shift=2, batch=1),
    Case("map smaller than the window", 7, ((1, 13), (7, 3)), 3, 5),
    Case("masked map smaller than the window", 7, ((1, 13), (7, 3)), 5, 3, boundary="mask"),
    Case("one pixel", 7, ((1, 13), (7, 3)), 1, 1, heads=1, batch=1),
    Case("one pixel masked and shifted", 5, ((1, 7), (5, 3)), 1, 1, boundary="mask", shift=2),
    Case("window of one token", 1, ((1, 3), (1, 1)), 3, 2, heads=1),
    Case("region reaches two windows", 2, ((1, 8), (2, 5)), 5, 3, heads=1, batch=1),
    Case("reaches two windows masked", 2, ((1, 8), (1, 4)), 5, 6, 1, 4, 1, "mask", shift=1),
    Case("keys repeat", 3, ((1, 11), (3, 3)), 3, 5, shift=2, heads=1),
    Case("padded by the caller", 3, ((1, 5), (3, 3)), 6, 9, boundary="mask", map_size=(5, 4)),
    Case(
        "padded and shifted", 4, ((1, 6), (4, 3)), 8, 9, boundary="mask", shift=2, map_size=(3, 5)
    ),
    Case("padded under wrap", 3, ((1, 5), (3, 1)), 6, 6, map_size=(4, 5), shift=1),
    Case("ready-made maps", 4, ((1, 6), (2, 4)), 7, 5, ready=(1,), shift=1),
    Case("ready-made among pooled maps", 4, ((1, 6), (2, 4), (4, 3)), 7, 5, ready=(2,)),
    Case("long thin map", 3, ((1, 5), (3, 5)), 1, 11, boundary="mask"),
)
ODD = pytest.mark.parametrize("case", ODD_CASES, ids=case_id)


def attend(
    case: Case, tensors: Tensors, backend: str, *, packed: bool = False, **options
) -> Tensor:
    """The operator's output for a case; ``packed`` for query, key and value as one map."""
    if case.dropout_p:
        options = {"dropout_p": case.dropout_p, **options}
        if "dropout_seed" not in options:  # made here alone: a copy to a GPU cannot be captured
            options["dropout_seed"] = torch.tensor([1234], device=tensors["query"].device)
    maps = [tensors[name] for name in ("query", "key", "value")]
    function = focal_attention_qkvpacked if packed else focal_attention
    return function(
        *([torch.stack(maps, dim=3)] if packed else maps),
        tensors["bias"],
        geometry=case.geometry,
        pooling=make_pooling(case, tensors),
        map_size=case.map_size,
        backend=backend,
        **options,
    )


def fused(tensors: Tensors) -> Tensors:
    """The same values with query, key and value as views of one projection."""
    qkv = torch.stack([tensors[name] for name in ("query", "key", "value")], dim=3)
    return {**tensors, **dict(zip(("query", "key", "value"), qkv.unbind(3), strict=True))}


def heads_first(tensors: Tensors) -> Tensors:
    """The same values with every map laid out `[batch, heads, height, width, head_dim]`."""
    return _laid_out(tensors, (0, 3, 1, 2, 4), (0, 2, 3, 1, 4))


def channels_first(tensors: Tensors) -> Tensors:
    """The same values laid out `[batch, heads, head_dim, height, width]`: a strided last axis."""
    return _laid_out(tensors, (0, 3, 4, 1, 2), (0, 3, 4, 1, 2))


def _laid_out(tensors: Tensors, there: Sequence[int], back: Sequence[int]) -> Tensors:
    return {
        name: x.permute(*there).contiguous().permute(*back)
        if x.dim() == 5
        else x.mT.contiguous().mT
        for name, x in tensors.items()
    }


def random_gradient(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(99)
    gradient = torch.randn(case.shape, generator=generator, dtype=torch.float64)
    return gradient.to(device=device, dtype=dtype)


def run(
    case: Case,
    tensors: Tensors,
    backend: str,
    grad_out: Tensor,
    layout: Callable[[Tensors], Tensors] = dict,
    **options,
) -> Tensors:
    """The output (``"out"``) and the gradient of every tensor of a case."""
    out = attend(case, layout(tensors), backend, **options)
    names = list(tensors)
    grads = torch.autograd.grad(out, [tensors[name] for name in names], grad_out)
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def assert_same(got: Tensors, expected: Tensors, tolerance: float = 1e-10) -> None:
    """Every tensor within ``tolerance``, and none missing."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name],
            tensor,
            atol=tolerance,
            rtol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def error_ratios(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    bias_dtype: torch.dtype | None = None,
    draws: int = 6,
    precision: str = "highest",
    **options,
) -> dict[str, float]:
    """Errors of a backend as multiples of the oracle's own at that precision.

    Both are root mean squares over ``draws`` sets of tensors, against the oracle in float64 on the
    same rounded inputs. ``precision`` is that of the backend's float32 products, as PyTorch names
    it; the oracle's are exact.
    """
    sums: dict[str, list[float]] = {}
    for seed in range(draws):
        tensors = make_tensors(case, dtype, device, seed)
        if bias_dtype is not None:
            tensors["bias"] = tensors["bias"].detach().to(bias_dtype).requires_grad_()
        gradient = random_gradient(case, dtype, device)
        exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
        expected = run(case, exact, "reference", gradient.double(), **options)
        plain = run(case, tensors, "reference", gradient, **options)
        torch.set_float32_matmul_precision(precision)
        try:
            got = run(case, tensors, backend, gradient, **options)
        finally:
            torch.set_float32_matmul_precision("highest")
        for name, tensor in expected.items():
            assert got[name].dtype == (dtype if name == "out" else tensors[name].dtype)
            errors = sums.setdefault(name, [0.0, 0.0])
            for index, result in enumerate((got, plain)):
                errors[index] += (result[name].double() - tensor).square().sum().item()
    assert all(plain > 0 for _, plain in sums.values()), "an exact case tells nothing"
    return {name: (error / plain) ** 0.5 for name, (error, plain) in sums.items()}


def assert_precise(ratios: dict[str, float], limit: float = 2.0) -> None:
    """No error is more than ``limit`` times the plain one."""
    beyond = {name: ratio for name, ratio in ratios.items() if not ratio <= limit}
    assert not beyond, f"times the plain error: {beyond}"
