"""The rows of the attention benchmark, on a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.timing import environment_line

__all__ = ["Row", "markdown", "markdown_table", "rich_table"]


@dataclass(frozen=True)
class Row:
    """One line of the report; figures are None where ``status`` is not "ok"."""

    case: str
    map: str
    batch: int
    heads: int
    head_dim: int
    dtype: str
    work: str
    contender: str
    status: str = "ok"  # or "failed", "unsupported", "not reached"
    note: str = ""
    error: float | None = None
    milliseconds: float | None = None
    times_ours: float | None = None
    host_milliseconds: float | None = None
    runs: int | None = None
    peak_mib: float | None = None
    tflops: float | None = None
    tflops_share: float | None = None
    gbps: float | None = None
    gbps_share: float | None = None


COLUMNS = (
    "case",
    "batch, map, heads",
    "type",
    "pass",
    "contender",
    "ms",
    "times ours",
    "host ms",
    "TFLOP/s",
    "of peak",
    "GB/s",
    "of copy",
    "peak MiB",
    "error",
    "note",
)


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    note = "" if row.status == "ok" else row.status
    note = ": ".join(part for part in (note, row.note) if part)
    if row.runs == 1:
        note = "timed once"
    return [
        row.case,
        f"{row.batch}, {row.map}, {row.heads}",
        row.dtype,
        row.work,
        row.contender,
        _number(row.milliseconds, "{:.3f}"),
        _number(row.times_ours, "{:.2f}"),
        _number(row.host_milliseconds, "{:.3f}"),
        _number(row.tflops, "{:.1f}"),
        _number(row.tflops_share, "{:.1%}"),
        _number(row.gbps, "{:.0f}"),
        _number(row.gbps_share, "{:.1%}"),
        _number(row.peak_mib, "{:.0f}"),
        _number(row.error, "{:.0e}"),
        note,
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def rich_table(rows: Iterable[Row]) -> Table:
    """For a terminal."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    return table


def markdown_table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [list(columns), ["---"] * len(columns), *escaped]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def markdown(state: Mapping[str, Any]) -> str:
    """The whole benchmark; ``state`` as `benchmarks.attention` saves it."""
    rows = [Row(**row) for row in state["rows"]]
    ceilings = {name: f"{value:.0f}" for name, value in state["ceilings"].items()}
    copy = ceilings.pop("copy")
    products = ", ".join(f"{name} {value} TFLOP/s" for name, value in ceilings.items())
    parts = [
        environment_line(state["environment"]),
        f"Measured ceilings: matrix product {products}; copy {copy} GB/s, read and written.",
    ]
    if "driver" not in state["environment"]:
        parts.append("**Made on a CPU: the times say nothing about the kernels.**")
    parts.append(
        "Medians of interleaved rounds with cold caches: *ms* on the device, *host ms* until the "
        "call returned (where it is the longer, a loop of such calls runs at the host's pace). "
        "*times ours* is within the same rounds, *peak MiB* beyond the inputs, *error* relative to "
        "the oracle in a wider type."
    )
    shown = [cells(row) for row in rows if row.status != "not reached"]
    parts.append(markdown_table(COLUMNS, shown))
    missed = dict.fromkeys(
        f"{row.case} ({row.dtype}, {row.contender}, {row.work})"
        for row in rows
        if row.status == "not reached"
    )
    if missed:
        parts.append("Not reached in time: " + "; ".join(missed) + ".")
    return "\n\n".join(parts)
