"""The compiler report as tables: its rows, a summary of each layer, and a Markdown file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.floors import FLOOR_COLUMNS, PASSES, Floor, floor_cells, floor_title

__all__ = ["Layer", "Row", "layers", "markdown", "print_layers", "print_rows"]


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Args:
        case: Name of the call.
        direction: The pass that the launch is part of, a key of `floors.PASSES`.
        kernel: Name of the kernel.
        dtype: Of query, key and value.
        target: Name of the architecture.
        warps: Of a program.
        registers: Of a thread.
        spilled_bytes: Of a thread, local memory included.
        shared_bytes: Of a program.
        resident_blocks: Programs that a multiprocessor holds at once.
        tensor_kind: Mnemonics of the tensor-core instructions.
        tensor_instructions: How many there are.
        products: Executed for each one that the tiles take; more than 1 where warps repeat a tile.
        row_bytes: Least bytes of one access to a row of a token, a cell or the workspace; None
            where there is none.
        narrow_rows: Accesses to rows of fewer than 16 bytes.
        bias_bytes: Least bytes of one access to the bias; None where it is not read.
        row_traffic: Bytes of rows loaded for each one that whole tiles take, if they take any.
        loads: Number of global loads by their bytes.
        stores: Number of global stores by their bytes.
        instructions: All that can be reached.
        executed: Instructions that one warp executes.
        per_pair: Thread-instructions of the whole launch per query-key pair of the layer, so that
            the figures of all kernels add up.
        exponentials: Executed for each one needed; None where none is.
        kinds: ``executed`` by kind of instruction.
    """

    case: str
    direction: str
    kernel: str
    dtype: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    resident_blocks: int
    tensor_kind: str
    tensor_instructions: int
    products: float
    row_bytes: int | None
    narrow_rows: int
    bias_bytes: int | None
    row_traffic: float | None
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int
    executed: float
    per_pair: float
    exponentials: float | None
    kinds: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """Thread-instructions of a layer per query-key pair.

    Args:
        case: Name of the call.
        dtype: Of query, key and value.
        target: Name of the architecture.
        forward: Of attention alone, coarse levels pooled by a pass of their own.
        pooling: Of that pass.
        bias: Of laying out the bias for forward, at the batch of the call.
        pooling_inside: Of attention that pools itself; None where it does not.
        backward: Of all kernels of the backward pass.
        ratio: Backward for each one of forward, pooling and bias included.
    """

    case: str
    dtype: str
    target: str
    forward: float
    pooling: float
    bias: float
    pooling_inside: float | None
    backward: float
    ratio: float


def layers(rows: Sequence[Row]) -> list[Layer]:
    """A summary of each layer whose kernels are all among the rows."""
    found = []
    for case, dtype, target in dict.fromkeys((row.case, row.dtype, row.target) for row in rows):
        mine: dict[str, dict[str, float]] = {direction: {} for direction in PASSES}
        for row in rows:
            if (row.case, row.dtype, row.target) == (case, dtype, target):
                mine[row.direction][row.kernel] = row.per_pair
        if any(mine[name].keys() != set(PASSES[name]) for name in ("forward", "backward")):
            continue
        bias, pooling, forward = (mine["forward"][name] for name in PASSES["forward"])
        backward = sum(mine["backward"].values())
        inside = mine["forward, pooling inside"].get("forward_kernel (pooling inside)")
        ratio = backward / (forward + pooling + bias)
        found.append(Layer(case, dtype, target, forward, pooling, bias, inside, backward, ratio))
    return found


def _text(value: Any) -> str:
    """A cell of the table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, dict):
        return " ".join(f"{number}x{key}" for key, number in value.items())
    return str(value)


COLUMNS = {
    "case": "case", "direction": "pass", "kernel": "kernel", "dtype": "dtype",
    "target": "target", "registers": "regs", "spilled_bytes": "spilled", "shared_bytes": "shared",
    "resident_blocks": "blocks", "tensor_kind": "tensor cores", "tensor_instructions": "count",
    "products": "copies", "row_bytes": "row access", "loads": "loads x bytes",
    "stores": "stores x bytes", "instructions": "static", "executed": "executed",
    "per_pair": "per pair", "exponentials": "exponentials",
}  # fmt: skip

LAYER_TITLE = "Thread-instructions per query-key pair"
MARKDOWN_COLUMNS = {
    "direction": "pass", "kernel": "kernel", "registers": "registers",
    "spilled_bytes": "spilled bytes", "shared_bytes": "shared bytes", "warps": "warps",
    "resident_blocks": "resident blocks", "tensor_kind": "tensor instructions",
    "row_bytes": "row bytes",
    "bias_bytes": "bias bytes", "products": "products", "per_pair": "per pair",
}  # fmt: skip
LAYER_COLUMNS = {
    "target": "target", "dtype": "dtype", "case": "layer", "forward": "forward",
    "pooling": "pooling", "bias": "bias", "pooling_inside": "forward, pooling inside",
    "backward": "backward", "ratio": "backward / forward",
}  # fmt: skip


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """One table; what it leaves out is in the saved file."""
    table = Table()
    for heading in COLUMNS.values():
        table.add_column(heading, no_wrap=heading in ("case", "dtype", "target"))
    for row in rows:
        table.add_row(*(_text(getattr(row, name)) for name in COLUMNS))
    console.print(table)


def print_layers(summary: Sequence[Layer], console: Console) -> None:
    """One line for each layer."""
    table = Table(*LAYER_COLUMNS.values(), title=LAYER_TITLE)
    for layer in summary:
        table.add_row(*(_text(getattr(layer, name)) for name in LAYER_COLUMNS))
    console.print(table)


def _markdown_table(headings: Iterable[str], lines: Iterable[Sequence[str]]) -> str:
    headings = list(headings)
    text = [headings, ["---"] * len(headings), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in text) + "\n"


def markdown(
    rows: Sequence[Row], floors: Sequence[Floor], versions: dict[str, str], command: str
) -> str:
    """The whole report, short."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        "# What the compiler makes of the kernels\n",
        f"`{command}` with {made}. Registers and spilled bytes are a thread's; row bytes and "
        "bias bytes are the narrowest access to a row and to the bias; products are executed for "
        "each one that the tiles take. An instruction that a warp executes counts for all its "
        "threads, and a pair is one that the layer's windows list.\n",
        f"## {LAYER_TITLE}\n",
        _markdown_table(
            LAYER_COLUMNS.values(),
            [[_text(getattr(layer, name)) for name in LAYER_COLUMNS] for layer in layers(rows)],
        ),
        f"## {floor_title(floors)}\n",
        _markdown_table(FLOOR_COLUMNS, [floor_cells(row) for row in floors]),
    ]
    for target, dtype, case in dict.fromkeys((row.target, row.dtype, row.case) for row in rows):
        lines = [
            [_text(getattr(row, name)) for name in MARKDOWN_COLUMNS]
            for row in rows
            if (row.target, row.dtype, row.case) == (target, dtype, case)
        ]
        parts += [
            f"## {target}, {dtype}, {case}\n",
            _markdown_table(MARKDOWN_COLUMNS.values(), lines),
        ]
    return "\n".join(parts)
