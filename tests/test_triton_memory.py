"""No Triton kernel reads or writes beyond its tensors: all of them lie inside NaN storage."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import Case, assert_same, make_tensors, needs_interpreter, random_gradient, run

pytest.importorskip("triton", reason="needs Triton")
pytestmark = needs_interpreter

from kernels import backward, bias_layout, forward, gradient_plan, launch, pooling  # noqa: E402


class Guarded:
    """Tensors inside NaN-filled storage that remember what lies around them."""

    def __init__(self) -> None:
        self.blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.scratch: set[int] = set()  # may stay unwritten, for nobody reads all of it

    def _keep(self, storage: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
        self.blocks.append((storage, inside))
        return inside

    def flat(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor with as much NaN before and behind it."""
        count = torch.Size(shape).numel()
        guard = count + 64
        storage = torch.full((count + 2 * guard,), torch.nan, dtype=dtype)
        return self._keep(storage, storage[guard : guard + count].view(*shape))

    def strided(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor with NaN around it along every axis; its last axis is contiguous."""
        storage = torch.full([size + 2 for size in shape], torch.nan, dtype=dtype)
        return self._keep(storage, storage[tuple(slice(1, -1) for _ in shape)])

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        make = self.strided if x.dim() == 5 else self.flat
        return make(x.shape, x.dtype).copy_(x.detach())

    def check(self) -> None:
        """All is written, and nothing around it."""
        for storage, inside in self.blocks:
            if inside.data_ptr() not in self.scratch:
                assert not inside.isnan().any(), f"unwritten in {list(inside.shape)}"
            outside = storage.clone()
            size, stride = inside.size(), inside.stride()
            outside.as_strided(size, stride, inside.storage_offset()).fill_(torch.nan)
            assert outside.isnan().all(), f"written around {list(inside.shape)}"


class GuardedTorch:
    """Stands in for `torch` in a module: what it allocates is guarded."""

    def __init__(self, guarded: Guarded) -> None:
        self.guarded = guarded

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: Any) -> torch.Tensor:
        return self.guarded.flat(as_shape(shape), dtype)

    def empty_like(self, x: torch.Tensor) -> torch.Tensor:
        return self.guarded.flat(x.shape, x.dtype)


def as_shape(arguments: tuple) -> Sequence[int]:
    return arguments if isinstance(arguments[0], int) else arguments[0]


@pytest.fixture
def guarded(monkeypatch) -> Guarded:
    """Every allocation of the launchers is guarded."""
    guarded = Guarded()
    for module in (bias_layout, forward, backward, pooling):
        monkeypatch.setattr(module, "torch", GuardedTorch(guarded))
    new_empty, new_zeros = torch.Tensor.new_empty, torch.Tensor.new_zeros

    def guarded_empty(x: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        if 0 in as_shape(shape):
            return new_empty(x, *shape, **options)
        return guarded.flat(as_shape(shape), x.dtype)

    def guarded_zeros(x: torch.Tensor, *shape: Any, **options: Any) -> torch.Tensor:
        if 0 in as_shape(shape):
            return new_zeros(x, *shape, **options)
        return guarded.flat(as_shape(shape), x.dtype).zero_()

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)
    monkeypatch.setattr(torch.Tensor, "new_zeros", guarded_zeros)
    workspace = gradient_plan.GradientPlan.workspace

    def scratch(*arguments: Any) -> tuple[torch.Tensor, ...]:
        parts = workspace(*arguments)
        guarded.scratch.update(part.data_ptr() for part in parts)
        return parts

    monkeypatch.setattr(gradient_plan.GradientPlan, "workspace", scratch)
    return guarded


CASES = [
    Case("wrap", 3, ((1, 5), (3, 3)), 4, 5, heads=2, batch=2, shift=1),
    Case("mask", 4, ((1, 6), (2, 4)), 5, 6, 2, 3, 1, "mask", 2, (4, 5)),
    Case("padded head", 2, ((1, 4), (2, 3)), 3, 5, heads=2, head_dim=17, batch=1),
    Case("two coarse levels", 4, ((1, 4), (2, 4), (4, 1)), 5, 9, 1, 4, 1),
    Case("window alone", 4, ((1, 4),), 5, 6, heads=2, batch=1, shift=2),
    Case("keys repeat", 2, ((1, 8), (1, 4)), 3, 2, 1, 4, 1, shift=1),
    Case("no key", 2, ((1, 2), (2, 1)), 3, 5, 1, 4, 1, "mask", 0, (2, 3)),
    Case("ready-made maps", 4, ((1, 6), (2, 4)), 3, 5, 1, 4, 2, ready=(1,)),
    Case("dropout", 3, ((1, 5), (3, 3)), 4, 5, 1, 4, 1, "mask", 1, dropout_p=0.3),
    Case("one token", 1, ((1, 1), (1, 3)), 1, 1, heads=1, head_dim=1, batch=1),
]


def check(case: Case, guarded: Guarded) -> None:
    plain, gradient = make_tensors(case), random_gradient(case)
    expected = run(case, plain, "reference", gradient)
    guarded.blocks.clear()  # what the oracle allocated
    tensors = {name: guarded.copy(x).detach().requires_grad_() for name, x in plain.items()}
    result = run(case, tensors, "triton", guarded.copy(gradient))
    guarded.check()
    for name, tensor in plain.items():  # no input is written
        assert torch.equal(tensors[name], tensor), name
    assert_same(result, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_beyond_a_tensor_is_read_or_written(case, guarded):
    check(case, guarded)


def test_nothing_beyond_a_tensor_is_read_or_written_in_small_tiles(guarded, monkeypatch):
    monkeypatch.setattr(launch, "pick_tile", lambda *_: launch.Tile(16, 16, 4, 1))
    check(Case("small tiles", 5, ((1, 7), (5, 3)), 5, 8, 1, 4, 1, shift=2), guarded)


def test_the_guards_see_a_read_and_a_write_beyond_the_end():
    guarded = Guarded()
    inside = guarded.copy(torch.zeros(2, 3))
    guarded.check()
    assert inside.as_strided((7,), (1,)).isnan().any()
    inside.as_strided((7,), (1,)).fill_(1.0)
    with pytest.raises(AssertionError, match="written around"):
        guarded.check()
    guarded = Guarded()
    guarded.flat((2, 3), torch.float64)[0] = 1.0
    with pytest.raises(AssertionError, match="unwritten"):
        guarded.check()
