"""The least that a layer must move and compute, beside what the kernels' launches move and compute.

**Least bytes.** Forward reads q, k, v and the bias once and writes out, and in training two float32
statistics per query. Backward reads q, k, v, out, its gradient, the statistics and the bias, and
writes the gradients of q, k, v and of the bias (float32). Pooled keys and values need not exist.

**Moved.** Each launch moves once what it touches of each tensor: windows overlap, but their
programs run close together and the second read hits the second-level cache (L2). The workspace of
the gradients is written by one kernel and read by another. *Cached* is the part of it that never
leaves L2, where a round of launches leaves no more than fits. PyTorch's
sums over parts of the gradients of the bias and of the pooling weights are not counted. *L2* counts
what every program asks for: rows of tiles, bias, workspace.

**Least operations.** Two per multiply-add: two products over the distinct pairs of queries and
keys on the map in forward, five in backward (the scores again, and the gradients of the weights,
q, k and v). *Issued* counts whole tiles, as `benchmarks.trips` checks against the machine code.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.compiled import Case, record
from benchmarks.work import Launch, work_of

__all__ = [
    "FLOOR_COLUMNS",
    "Cost",
    "Floor",
    "floor_cells",
    "floor_title",
    "floors",
    "launch_cost",
    "least",
    "print_floors",
]

MOST_BYTES, MOST_OPERATIONS = 1.15, 1.5  # excess above these wants a reason
CACHE_BYTES = 2**25  # that L2 has for a workspace, on a GPU with 40 MB of it and more
SMALLEST_SHARE = 0.02  # of an excess that is worth a word
PASSES = {
    "forward": ("bias_kernel", "pool_kernel", "forward_kernel"),
    "forward, pooling inside": ("bias_kernel", "forward_kernel (pooling inside)"),
    "backward": (
        "bias_kernel",
        "pool_backward_kernel",
        "delta_kernel",
        "gradient_kernel (fine)",
        "gradient_kernel (coarse)",
        "fold_keys_kernel (fine)",
        "fold_keys_kernel (coarse)",
        "fold_queries_kernel",
    ),
}
STATISTIC_BYTES = 2 * 4
GRADIENT_BYTES = 4  # of an entry of the bias
# What tensors that are no maps are to an explanation.
GROUPS = {
    **dict.fromkeys(("query_part_ptr", "key_part_ptr", "value_part_ptr", "part_ptr"), "workspace"),
    **dict.fromkeys(("stats_ptr", "delta_ptr"), "statistics"),
    **dict.fromkeys(("coarse_k_ptr", "coarse_v_ptr"), "pooled maps"),
    **dict.fromkeys(("pooled_k_ptr", "pooled_v_ptr"), "pooled maps"),
    **dict.fromkeys(("bias_ptr", "layout_ptr"), "bias"),
    "bias_part_ptr": "sums of the bias gradient",
    "partial_ptr": "sums of the pooling weights",
}
WORKSPACE = ("query_part_ptr", "key_part_ptr", "value_part_ptr", "part_ptr")


@dataclass(frozen=True)
class Cost:
    """What launches move and compute.

    Args:
        bytes: Between memory and the chip, were nothing kept between launches.
        cached_bytes: The part of them that stays in the second-level cache.
        l2_bytes: Between the second-level cache and the multiprocessors.
        operations: Of tensor cores, over whole tiles.
    """

    bytes: int = 0
    cached_bytes: int = 0
    l2_bytes: int = 0
    operations: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.cached_bytes + other.cached_bytes,
            self.l2_bytes + other.l2_bytes,
            self.operations + other.operations,
        )


@dataclass(frozen=True)
class Floor:
    """One pass of one layer.

    Args:
        case: Name of the call.
        direction: A key of `PASSES`.
        dtype: Of query, key and value.
        batch: Images of the call, that all numbers are for.
        least_bytes: See the top of this file.
        least_operations: likewise.
        kernels: Cost of all launches of each kernel by its name.
        reasons: What the excess comes from.
    """

    case: str
    direction: str
    dtype: str
    batch: int
    least_bytes: int
    least_operations: int
    kernels: dict[str, Cost]
    reasons: str

    @property
    def cost(self) -> Cost:
        """Of all launches."""
        return sum(self.kernels.values(), Cost())

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
    if direction.startswith("forward"):
        moved = 4 * one_map + bias * size + tokens * STATISTIC_BYTES
        return moved, 2 * 2 * pairs * case.head_dim
    moved = 8 * one_map + bias * (size + GRADIENT_BYTES) + tokens * STATISTIC_BYTES
    return moved, 5 * 2 * pairs * case.head_dim


def _parts(launch: Launch) -> Iterator[tuple[str, Fraction]]:
    """Bytes that a launch touches of each tensor."""
    arguments, images = launch.arguments, work_of(launch).images or Fraction(1)
    level: Any = arguments.get("L")
    shape = arguments["S"]
    unused = {"seed_ptr", "pools"}
    if level is not None:
        unused |= {"coarse_k_ptr", "coarse_v_ptr"} if level.fine else {"key", "value"}
    if "delta_kernel" in launch.name and arguments["query"].ptr.element_size() == 2:
        unused |= {"query", "key", "value", "coarse_k_ptr", "coarse_v_ptr", "bias_ptr", "stats_ptr"}
    for name, value in arguments.items():
        tensor = getattr(value, "ptr", value)
        if name in unused or not isinstance(tensor, torch.Tensor):
            continue
        touched = Fraction(tensor.numel())
        if name == "bias_ptr":
            touched *= Fraction(level.width, shape.n_pad) if level else 1
        elif name in ("grad_key", "grad_value") and "pool_backward_kernel" in launch.name:
            touched *= 2 * images / tensor.shape[0]  # added to
        elif name == "bias_part_ptr":  # read and written: sums go on
            touched *= 2 * Fraction(level.region**2, shape.num_keys)
        elif name in WORKSPACE:
            windows = math.prod(side // shape.window for side in _padded(launch))
            touched = images * windows * arguments["size"].num_heads * shape.block_d
            if name in ("query_part_ptr", "part_ptr"):
                tiles = level.full // level.block if level else arguments["NUM_TILES"]
                touched *= tiles * shape.m_pad
            elif "gradient_kernel" in launch.name:
                touched *= level.full * Fraction(shape.m_pad, arguments["BLOCK_M"])
            else:
                touched *= level.region**2 * arguments["BLOCKS"]
        elif name not in (
            "weight_ptr",
            "k_offset_ptr",
            "v_offset_ptr",
            "partial_ptr",
            "layout_ptr",
        ):
            touched *= images / tensor.shape[0]
        yield name, touched * tensor.element_size()


def _padded(launch: Launch) -> tuple[int, int]:
    size = launch.arguments["size"]
    return size.pad_h, size.pad_w


def launch_cost(launch: Launch) -> Cost:
    """What a launch moves and computes."""
    arguments, work = launch.arguments, work_of(launch)
    touched = dict(_parts(launch))
    workspace = sum(touched[name] for name in WORKSPACE if name in touched)
    held = sum(
        arguments[name].numel() * arguments[name].element_size()
        for name in WORKSPACE
        if name in arguments
    )
    programs = math.prod(launch.grid)
    asked = programs * work.row_bytes
    if "gradient_kernel" in launch.name:
        asked += workspace
    if work.exponentials:
        asked += programs * work.exponentials * arguments["bias_ptr"].element_size()
    return Cost(
        bytes=int(sum(touched.values())),
        cached_bytes=int(workspace) if held <= CACHE_BYTES else 0,
        l2_bytes=int(asked),
        operations=int(programs * work.multiply_adds * 2),
    )


def _reasons(case: Case, launches: Sequence[Launch], excess: tuple[float, float]) -> str:
    """Where bytes and operations beyond the least come from."""
    reasons = []
    if excess[0] > MOST_BYTES:
        total: Counter[str] = Counter()
        for launch in launches:
            for name, number in _parts(launch):
                total[GROUPS.get(name, "q, k, v, out and their gradients")] += int(number)
        parts = [(name, number / total.total()) for name, number in total.most_common()]
        shares = [f"{name} {part:.0%}" for name, part in parts if part >= SMALLEST_SHARE]
        reasons.append("moved: " + ", ".join(shares))
    if excess[1] > MOST_OPERATIONS:
        scoring = next(launch for launch in launches if work_of(launch).exponentials)
        geometry, shape = case.geometry, scoring.arguments["S"]
        listed = case.batch * case.heads * math.prod(geometry.num_windows(case.height, case.width))
        listed *= geometry.num_queries * geometry.num_keys
        reasons.append(
            f"tiles: {geometry.num_queries} of {shape.m_pad} query rows, {geometry.num_keys} of "
            f"{shape.n_pad} keys; {distinct_pairs(case) / listed:.0%} of the pairs on the map"
        )
        if "pooling inside" in scoring.name:
            reasons.append("each window pools the cells of its region again")
    return "; ".join(reasons)


def floors(cases: Sequence[Case], dtype: torch.dtype, target: str) -> list[Floor]:
    """Every pass of each case."""
    found = []
    for case in cases:
        recorded = record(case, dtype, target)
        for direction in PASSES:
            launches = [launch for launch in recorded if launch.direction == direction]
            if not launches:
                continue
            kernels: dict[str, Cost] = {}
            for launch in launches:
                kernels[launch.name] = kernels.get(launch.name, Cost()) + launch_cost(launch)
            moved, operations = least(case, dtype, direction)
            cost = sum(kernels.values(), Cost())
            excess = cost.bytes / moved, cost.operations / operations
            reasons = _reasons(case, launches, excess)
            name = str(dtype).split(".")[1]
            found.append(
                Floor(case.name, direction, name, case.batch, moved, operations, kernels, reasons)
            )
    return found


FLOOR_COLUMNS = (
    "case", "pass", "least MB", "moved MB", "ratio", "cached MB", "ratio without", "L2 MB",
    "least GFLOP", "issued GFLOP", "ratio", "where the excess is",
)  # fmt: skip


def floor_cells(row: Floor) -> list[str]:
    """One line of the table, per image."""
    cost, mega, giga = row.cost, 1e6 * row.batch, 1e9 * row.batch
    return [
        row.case,
        row.direction,
        f"{row.least_bytes / mega:.3f}",
        f"{cost.bytes / mega:.3f}",
        f"{row.byte_ratio:.2f}",
        f"{cost.cached_bytes / mega:.3f}",
        f"{(cost.bytes - cost.cached_bytes) / row.least_bytes:.2f}",
        f"{cost.l2_bytes / mega:.3f}",
        f"{row.least_operations / giga:.4f}",
        f"{cost.operations / giga:.4f}",
        f"{row.operation_ratio:.2f}",
        row.reasons,
    ]


def floor_title(rows: Sequence[Floor]) -> str:
    """What the numbers of the table are for."""
    return f"Least and moved per image, at batch {rows[0].batch} in {rows[0].dtype}"


def print_floors(rows: Sequence[Floor], console: Console) -> None:
    """Per image; an excess that wants a reason shows it."""
    table = Table(*FLOOR_COLUMNS, title=floor_title(rows))
    for row in rows:
        table.add_row(*floor_cells(row))
    console.print(table)
