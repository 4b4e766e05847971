"""Random calls of the operator for `benchmarks.fuzz`: what they are, and how one is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.operator_cases import Case, Tensors, cases, make_pooling, make_tensors

__all__ = ["DTYPES", "Call", "calls", "gradient_of", "leaves_of", "run_call"]

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16
)}  # fmt: skip
MOST_WINDOWS = 8  # times images times heads: what the interpreter runs in about a second


@dataclass(frozen=True)
class Call:
    """One call of the operator and of its backward, as plain data.

    Args:
        case: Geometry and sizes.
        dtype: A key of `DTYPES`.
        joint: Whether query, key and value are ``"separate"``, ``"fused"`` views of one projection
            or one and the same (``"tied"``).
        layouts: Keys of `LAYOUTS`, for query, key, value and the ready-made maps.
        bias: Layout of the bias or what it excludes, a key of `BIASES`.
        bias_float32: Whether the bias is float32 whatever ``dtype`` is.
        gradient: Of the output, a key of `GRADIENTS`.
        scale: As `kernels.focal_attention` takes it.
        spread: Factor on the queries: how large scores are.
        seed: Of the tensors' numbers.
    """

    case: Case
    dtype: str = "float64"
    joint: str = "separate"
    layouts: tuple[str, str, str, str] = ("plain",) * 4
    bias: str = "plain"
    bias_float32: bool = False
    gradient: str = "plain"
    scale: float | None = None
    spread: float = 1.0
    seed: int = 0


def _laid_out(*order: int) -> Callable[[Tensor], Tensor]:
    """Memory in another order of axes, the shape unchanged."""
    back = [order.index(axis) for axis in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(back)


def _inside(x: Tensor) -> Tensor:
    """A view of a larger tensor of NaN."""
    padded = F.pad(x, (1, 1) * x.dim(), value=math.nan)
    return padded[tuple(slice(1, -1) for _ in x.shape)]


def _stepped(dim: int) -> Callable[[Tensor], Tensor]:
    """Every other entry along one axis of a tensor that holds NaN in between."""

    def view(x: Tensor) -> Tensor:
        both = torch.stack([x, torch.full_like(x, math.nan)], dim + 1).flatten(dim, dim + 1)
        return both[(slice(None),) * dim + (slice(0, None, 2),)]

    return view


def _shared(*dims: int) -> Callable[[Tensor], Tensor]:
    """One entry along each of these axes stands for all: stride 0."""
    return lambda x: x[tuple(slice(1 if d in dims else None) for d in range(5))].expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "heads first": _laid_out(0, 3, 1, 2, 4),
    "columns first": _laid_out(0, 2, 1, 3, 4),
    "channels first": _laid_out(0, 3, 4, 1, 2),
    "inside": _inside,
    "stepped columns": _stepped(2),
    "stepped channels": _stepped(4),
    "shared by images": _shared(0),
    "shared by columns": _shared(2),
    "shared by heads and channels": _shared(3, 4),
}


def _exclude(bias: Tensor, rows: bool) -> Tensor:
    """-inf in every third entry, or in every entry of every third row."""
    count = bias.shape[1] if rows else bias.numel()
    chosen = torch.arange(count, device=bias.device) % 3 == 0
    chosen = chosen.view(1, -1, 1) if rows else chosen.view_as(bias)
    return bias.masked_fill(chosen, -math.inf)


BIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "shared by heads": lambda x: x[:1].expand_as(x),
    "shared by queries": lambda x: x[:, :1].expand_as(x),
    "entries excluded": partial(_exclude, rows=False),
    "rows excluded": partial(_exclude, rows=True),
}
GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    name: LAYOUTS[name] for name in ("plain", "channels first", "inside", "shared by columns")
} | {"ones": lambda x: x.new_ones(()).expand_as(x), "zeros": torch.zeros_like}


@st.composite
def calls(draw: Callable, dtypes: Sequence[str] = tuple(DTYPES)) -> Call:
    """Every kind of call, small enough for the interpreter."""
    case = replace(
        draw(cases(largest_window=5, largest_side=9)),
        batch=draw(st.sampled_from((1, 1, 2, 3, 0))),
        heads=draw(st.sampled_from((1, 1, 2, 3))),
        head_dim=draw(st.sampled_from((1, 2, 3, 5, 8, 17))),
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.3, 0.9))),
    )
    sides = (case.height, case.width)
    windows = math.prod(case.geometry.num_windows(*sides)) * case.batch * case.heads
    if windows > MOST_WINDOWS:  # at most two windows along each axis
        height, width = (min(side, 2 * case.window) for side in sides)
        inner = case.map_size and (min(case.map_size[0], height), min(case.map_size[1], width))
        case = replace(case, height=height, width=width, map_size=inner)
    layouts = tuple(draw(st.sampled_from(tuple(LAYOUTS))) for _ in range(4))
    return Call(
        case,
        draw(st.sampled_from(tuple(dtypes))),
        draw(st.sampled_from(("separate", "separate", "fused", "tied"))),
        layouts,
        draw(st.sampled_from(tuple(BIASES))),
        draw(st.booleans()),
        draw(st.sampled_from(tuple(GRADIENTS))),
        draw(st.sampled_from((None, 1.0, -0.7, 0.0))),
        draw(st.sampled_from((1.0, 1.0, 10.0))),
        draw(st.integers(0, 2**31 - 1)),
    )


def leaves_of(call: Call, device: str) -> Tensors:
    """What the gradients of a call are taken of, by name."""
    dtype = DTYPES[call.dtype]
    tensors = make_tensors(call.case, dtype, device, call.seed)
    if call.bias_float32 and call.dtype != "float64":
        tensors["bias"] = tensors["bias"].detach().float().requires_grad_()
    tensors["query"] = (tensors["query"].detach() * call.spread).requires_grad_()
    if call.joint == "tied":
        del tensors["key"], tensors["value"]
    return tensors


def _arguments(call: Call, leaves: Tensors) -> Tensors:
    """The operator's tensors: views of the leaves as the call lays them out."""
    tensors = dict(leaves)
    names = ("query", "key", "value")
    if call.joint == "tied":
        view = LAYOUTS[call.layouts[0]](tensors["query"])
        tensors |= dict.fromkeys(names, view)
    elif call.joint == "fused":
        qkv = torch.stack([tensors[name] for name in names], dim=3)
        tensors |= dict(zip(names, qkv.unbind(3), strict=True))
    else:
        for name, layout in zip(names, call.layouts, strict=False):
            tensors[name] = LAYOUTS[layout](tensors[name])
    for name in tensors:
        if name.startswith("coarse"):
            tensors[name] = LAYOUTS[call.layouts[3]](tensors[name])
    tensors["bias"] = BIASES[call.bias](tensors["bias"])
    return tensors


def gradient_of(call: Call, device: str) -> Tensor:
    """The gradient of the output that a call's backward starts from."""
    generator = torch.Generator().manual_seed(call.seed + 1)
    gradient = torch.randn(call.case.shape, generator=generator, dtype=torch.float64)
    return gradient.to(device, DTYPES[call.dtype])


def run_call(
    function: Callable[..., Tensor], call: Call, leaves: Tensors, gradient: Tensor, plain: bool
) -> Tensors:
    """Output and gradients; ``plain`` hands over contiguous copies whatever the layouts are."""
    case, tensors = call.case, _arguments(call, leaves)
    gradient = GRADIENTS[call.gradient](gradient)
    if plain:
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        gradient = gradient.contiguous()
    seed = torch.tensor([call.seed], device=gradient.device) if case.dropout_p else None
    out = function(
        tensors["query"],
        tensors["key"],
        tensors["value"],
        tensors["bias"],
        geometry=case.geometry,
        pooling=make_pooling(case, tensors),
        scale=call.scale,
        map_size=case.map_size,
        dropout_p=case.dropout_p,
        dropout_seed=seed,
    )
    grads = torch.autograd.grad(out, list(leaves.values()), gradient)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
