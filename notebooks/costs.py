"""What full, window and focal attention cost: counted, and measured on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F

from benchmarks.codegen import RELEASED, Case
from benchmarks.contenders import CONTENDERS, Call, Contender, Forward, draw_call
from benchmarks.contest import run_once
from benchmarks.floors import least
from benchmarks.timing import interleave
from benchmarks.workloads import TRAINING, plain_windows
from kernels import FocalGeometry, FocalLevel, focal_attention
from kernels.flops import forward_flops
from kernels.geometry import encode_geometry
from notebooks.figures import BLACK, BLUE, ORANGE

__all__ = [
    "COUNTS",
    "KINDS",
    "WAYS",
    "case_of",
    "check_full_attention",
    "counts",
    "draw_lines",
    "measure",
    "saved_bytes",
]

CPU = torch.device("cpu")
STRIDE = 4  # pixels to a token in stage 1
KINDS = ("full", "window", "focal")
COUNTS = {
    "keys": "keys per query",
    "flops": "GFLOPs of a forward pass",
    "bytes": "least MB moved by a forward pass",
}
UNITS = {"keys": 1.0, "flops": 1e9, "bytes": 1e6}


def case_of(kind: str, pixels: int) -> Case:
    """The attention of stage 1 of Focal-T over one image, with the keys of a kind.

    Args:
        kind: ``"full"`` (one window that spans the map), ``"window"`` (Swin's) or ``"focal"``.
        pixels: Side of the image, a multiple of 4.
    """
    side = pixels // STRIDE
    geometries = {
        "full": FocalGeometry(side, (FocalLevel(1, side),)),
        "window": plain_windows(224, 1)[0].geometry,
        "focal": RELEASED[1].geometry,
    }
    return replace(
        RELEASED[1], name=kind, geometry=geometries[kind], height=side, width=side, batch=1
    )


def counts(kind: str, pixels: int) -> dict[str, float]:
    """The quantities of `COUNTS`, in float32; full attention is counted without a bias."""
    case = case_of(kind, pixels)
    geometry = case.geometry
    shape = (case.batch, case.height, case.width, case.heads, case.head_dim)
    moved, _ = least(case, torch.float32, "forward")
    if kind == "full":
        moved -= torch.float32.itemsize * case.heads * geometry.num_queries * geometry.num_keys
    found = {
        "keys": geometry.num_keys,
        "flops": forward_flops(shape, encode_geometry(geometry)),
        "bytes": moved,
    }
    return {name: number / UNITS[name] for name, number in found.items()}


# -- measured ---------------------------------------------------------------------------------


def _full(call: Call, *, stored: bool) -> Forward:
    """Every token attends every token; ``stored``: the weights exist, as in the formula."""

    def run() -> Tensor:
        query, key, value = (
            call.leaves[name].flatten(1, 2).transpose(1, 2) for name in ("query", "key", "value")
        )
        if stored:
            weights = (query @ key.transpose(2, 3) * query.shape[3] ** -0.5).softmax(dim=3)
            out = weights @ value
        else:
            out = F.scaled_dot_product_attention(query, key, value)
        return out.transpose(1, 2).unflatten(1, (call.case.height, call.case.width))

    return run


@dataclass(frozen=True)
class Way:
    """A kind of attention, computed in one way, and how it is drawn."""

    kind: str
    contender: Contender
    colour: str
    marker: str
    dashes: str = "-"


WAYS = {
    "full, weights stored": Way("full", partial(_full, stored=True), BLACK, "s", ":"),
    "full, fused (SDPA)": Way("full", partial(_full, stored=False), BLACK, "s"),
    "focal, unfolded + SDPA": Way("focal", CONTENDERS["unfold + SDPA"], BLUE, "o", ":"),
    "focal, eager": Way("focal", CONTENDERS["eager"], BLUE, "o"),
    "window, eager": Way("window", CONTENDERS["eager"], ORANGE, "^"),
}


def _draw(way: Way, pixels: int) -> tuple[Call, Forward]:
    """Random inputs, and the forward pass over them."""
    if way.kind == "full":  # without the bias, a table of all pairs
        call = draw_call(case_of("window", pixels), torch.float32, CPU)
        leaves = {name: call.leaves[name] for name in ("query", "key", "value")}
        call = Call(case_of("full", pixels), leaves, call.grad_out)
    else:
        call = draw_call(case_of(way.kind, pixels), torch.float32, CPU)
    return call, way.contender(call)


def check_full_attention(pixels: int = 56) -> None:
    """Check that full attention is what the operator computes for one window over the map.

    Raises:
        AssertionError: It is not.
    """
    for name, way in WAYS.items():
        if way.kind != "full":
            continue
        call, forward = _draw(way, pixels)
        geometry = call.case.geometry
        bias = torch.zeros(call.case.heads, geometry.num_queries, geometry.num_keys)
        query, key, value = call.leaves.values()
        expected = focal_attention(
            query, key, value, bias, geometry=geometry, pooling=(), backend="reference"
        )
        torch.testing.assert_close(forward(), expected, msg=partial("{}: {}".format, name))


def saved_bytes(name: str, pixels: int) -> int:
    """Bytes that autograd keeps for the backward pass of a way, every storage once."""
    _, forward = _draw(WAYS[name], pixels)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = forward()  # held until all is counted: what it keeps must not be freed
    total = sum(kept.values())
    del out
    return total


def measure(
    names: Sequence[str], pixels: Sequence[int], work: str = TRAINING, *, seconds: float = 1.0
) -> dict[str, list[float]]:
    """Median milliseconds of each way at each image size, timed in turns.

    Args:
        names: Keys of `WAYS`.
        pixels: Sides of the images.
        work: ``"forward"``, or ``"forward + backward"``.
        seconds: Time for each image size.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    for size in pixels:
        functions = {}
        for name in names:
            call, forward = _draw(WAYS[name], size)
            functions[name] = partial(run_once, call, forward, work, call.grad_out)
            functions[name]()  # allocates
        for name, timing in interleave(functions, CPU, seconds=seconds, min_rounds=3).items():
            times[name].append(timing.milliseconds)
    return times


def draw_lines(
    axes: Axes, pixels: Sequence[int], lines: Mapping[str, Sequence[float]], label: str
) -> None:
    """A quantity against the image size, both logarithmic; names are keys of `WAYS` or of `KINDS`.

    Names without a way of their own take the look of a way of their kind.
    """
    for name, values in lines.items():
        way = WAYS.get(name) or next(
            way for way in WAYS.values() if way.kind == name and way.dashes == "-"
        )
        axes.plot(
            pixels,
            values,
            color=way.colour,
            marker=way.marker,
            linestyle=way.dashes,
            markersize=4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="side of the image (pixels)", title=label)
    axes.set_xticks(pixels, [str(size) for size in pixels])
    axes.minorticks_off()
