"""The least that a layer must move and compute, beside what the kernels' launches move and compute.

**Least bytes.** Forward reads q, k, v and the bias once and writes out, and in training two float32
statistics per query. Backward reads q, k, v, out, its gradient, the statistics and the bias, and
writes the gradients of q, k, v and of the bias (float32). Pooled keys and values need not exist.

**Moved.** Each launch moves each tensor that it touches once between memory and the chip: windows
overlap, but their programs run close together and the second read hits the L2 cache. Partial sums
of the bias gradient move twice, for they are added up afterwards. *L2* counts every row of a tile
and every bias entry that every program asks for.

**Least operations.** Two per multiply-add: two products over the distinct pairs of queries and
keys on the map in forward, five in backward (the scores again, and the gradients of the weights,
q, k and v). *Issued* counts whole tiles, as `benchmarks.work` checks against the machine code.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compiled import Case, record
from benchmarks.work import Launch, work_of

__all__ = ["Cost", "Floor", "floors", "launch_cost", "least", "print_floors"]

MOST_BYTES, MOST_OPERATIONS = 1.15, 1.5  # excess above these wants a reason
PASSES = {
    "forward": ("pool_kernel", "forward_kernel"),
    "backward": ("pool_backward", "query_gradient", "bias_gradient", "key_gradient"),
}
STATISTIC_BYTES = 2 * 4
GRADIENT_BYTES = 4  # of an entry of the bias


@dataclass(frozen=True)
class Cost:
    """Bytes between memory and the chip, bytes between L2 and the chip, tensor-core operations."""

    bytes: int
    l2_bytes: int
    operations: int


@dataclass(frozen=True)
class Floor:
    """One pass of one layer.

    Args:
        case: Name of the call.
        direction: ``"forward"`` or ``"backward"``.
        dtype: Of query, key and value.
        batch: Images of the call, that all numbers are for.
        least_bytes: See the top of this file.
        least_operations: likewise.
        kernels: Cost of each launch by its kernel's name.
    """

    case: str
    direction: str
    dtype: str
    batch: int
    least_bytes: int
    least_operations: int
    kernels: dict[str, Cost]

    @property
    def cost(self) -> Cost:
        """Of all launches."""
        costs = self.kernels.values()
        return Cost(
            sum(cost.bytes for cost in costs),
            sum(cost.l2_bytes for cost in costs),
            sum(cost.operations for cost in costs),
        )

    @property
    def byte_ratio(self) -> float:
        """Moved bytes for each one that must be."""
        return self.cost.bytes / self.least_bytes

    @property
    def operation_ratio(self) -> float:
        """Issued operations for each one that must be."""
        return self.cost.operations / self.least_operations


def distinct_pairs(case: Case) -> int:
    """Pairs of a query and a key on the map, of the whole call."""
    geometry, keys = case.geometry, 0
    windows = geometry.num_windows(case.height, case.width)
    for level, spec in enumerate(geometry.levels):
        cells, margin = geometry.cells(level), geometry.margin(level)
        if level == 0 and geometry.boundary == "wrap":
            keys += math.prod(windows) * spec.region_size**2
            continue
        lines = []
        for side in windows:
            starts = [window * cells - margin for window in range(side)]
            ends = [min(at + spec.region_size, side * cells) for at in starts]
            lines.append(sum(end - max(at, 0) for at, end in zip(starts, ends, strict=True)))
        keys += math.prod(lines)
    return case.batch * case.heads * geometry.num_queries * keys


def least(case: Case, dtype: torch.dtype, direction: str) -> tuple[int, int]:
    """Least bytes and operations of one pass; for maps that are a multiple of the window."""
    geometry, size = case.geometry, dtype.itemsize
    tokens = case.batch * case.height * case.width * case.heads
    one_map = tokens * case.head_dim * size
    bias = case.heads * geometry.num_queries * geometry.num_keys
    pairs = distinct_pairs(case)
    if direction == "forward":
        moved = 4 * one_map + bias * size + tokens * STATISTIC_BYTES
        return moved, 2 * 2 * pairs * case.head_dim
    moved = 8 * one_map + bias * (size + GRADIENT_BYTES) + tokens * STATISTIC_BYTES
    return moved, 5 * 2 * pairs * case.head_dim


def _tensors(launch: Launch) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a launch touches, each once."""
    unused = {"seed_ptr"}
    if "FINE" in launch.arguments:
        fine = launch.arguments["FINE"]
        unused |= {"coarse_k_ptr", "coarse_v_ptr"} if fine else {"key", "value"}
    for name, value in launch.arguments.items():
        tensor = getattr(value, "ptr", value)
        if name not in unused and isinstance(tensor, torch.Tensor):
            yield name, tensor


def launch_cost(launch: Launch) -> Cost:
    """What a launch moves and computes."""
    moved = sum(
        tensor.numel() * tensor.element_size() * (2 if name == "partial_ptr" else 1)
        for name, tensor in _tensors(launch)
    )
    work, programs = work_of(launch), math.prod(launch.grid)
    bias = launch.arguments["key"].ptr.element_size()
    asked = programs * (work.row_bytes + work.exponentials * bias)
    return Cost(moved, int(asked), int(programs * work.multiply_adds * Fraction(2)))


def floors(cases: Sequence[Case], dtype: torch.dtype, target: str) -> list[Floor]:
    """Both passes of each case."""
    found = []
    for case in cases:
        launches = record(case, dtype, target)
        for direction, names in PASSES.items():
            kernels = {
                launch.name: launch_cost(launch)
                for launch in launches
                if launch.name.startswith(names)
            }
            name = str(dtype).split(".")[1]
            lowest = least(case, dtype, direction)
            found.append(Floor(case.name, direction, name, case.batch, *lowest, kernels))
    return found


def _shares(floor: Floor, attribute: str) -> str:
    """The parts of the kernels in a sum."""
    total = getattr(floor.cost, attribute)
    parts = {name: getattr(cost, attribute) / total for name, cost in floor.kernels.items()}
    shown = sorted(((part, name) for name, part in parts.items() if part > 0), reverse=True)
    return ", ".join(f"{name.replace('_kernel', '')} {part:.0%}" for part, name in shown)


def print_floors(rows: Sequence[Floor], console: Console) -> None:
    """Per image; an excess that wants a reason shows the kernels that it comes from."""
    table = Table(
        "case", "pass", "least MB", "moved MB", "ratio", "L2 MB", "least GFLOP", "issued GFLOP",
        "ratio", "where the excess is",
        title=f"Per image, at batch {rows[0].batch} in {rows[0].dtype}",
    )  # fmt: skip
    for row in rows:
        cost, reasons = row.cost, []
        if row.byte_ratio > MOST_BYTES:
            reasons.append("bytes: " + _shares(row, "bytes"))
        if row.operation_ratio > MOST_OPERATIONS:
            reasons.append("operations: " + _shares(row, "operations"))
        megabytes = [row.least_bytes, cost.bytes, cost.l2_bytes]
        shown = [f"{number / row.batch / 1e6:.3f}" for number in megabytes]
        work = [f"{n / row.batch / 1e9:.4f}" for n in (row.least_operations, cost.operations)]
        table.add_row(
            row.case, row.direction, *shown[:2], f"{row.byte_ratio:.2f}", shown[2], *work,
            f"{row.operation_ratio:.2f}", "; ".join(reasons),
        )  # fmt: skip
    console.print(table)
