"""One result as a Markdown table and as CSV."""

import csv
import io
from collections.abc import Callable
from typing import Any

from analysis.paper import QUANTITIES, Figure
from analysis.results import Result, Row, short_key, short_value

NONE = "—"
_PAPER = {"top1": "top-1", "box_ap": "box AP", "mask_ap": "mask AP"}


def markdown(result: Result) -> str:
    """The table with what it rests on above it and its notes below."""
    columns = _columns(result)
    text = [" | ".join(columns), " | ".join("---" for _ in columns)]
    text += [" | ".join(column[i] for column in columns.values()) for i in range(len(result.rows))]
    lines = [f"{_headline(result)}\n", *(f"| {line} |" for line in text)]
    if result.notes:
        lines += ["", *(f"- {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def _headline(result: Result) -> str:
    which = {"last": "of the last epoch", "best": "of each run's best epoch"}[result.epoch]
    return (
        f"**{result.sweep.name}**, {result.setting}. Top-1 (%) {which}, mean ± standard deviation "
        "over seeds (runs that count); FLOPs of a forward pass over one image, a multiply-add "
        "counted once."
    )


def _columns(result: Result) -> dict[str, list[str]]:
    """Every column that has something to say, as text."""
    rows = result.rows
    columns = {
        short_key(axis): [short_value(row.values[axis]) for row in rows]
        for axis in result.sweep.axes
    } or {"variant": ["all" for _ in rows]}
    columns |= {
        "parameters": [_or_none(millions, row.parameters) for row in rows],
        "FLOPs": [_or_none(billions, row.flops) for row in rows],
        "top-1": [_accuracy(row) for row in rows],
        "images/s": [_or_none(rounded, row.images_per_second) for row in rows],
        "memory, MiB": [_or_none(rounded, row.memory) for row in rows],
    }
    columns |= _paper_columns(rows)
    optional = {"images/s", "memory, MiB"}
    return {
        name: values
        for name, values in columns.items()
        if name not in optional or set(values) != {NONE}
    }


def _or_none(text: Callable[[float], str], value: float | None) -> str:
    return NONE if value is None else text(value)


def millions(parameters: float) -> str:
    """Parameters as papers write them."""
    return f"{parameters / 1e6:.2f}M"


def billions(flops: float) -> str:
    """Operations as papers write them, small models' in millions."""
    return f"{flops / 1e9:.2f}G" if flops >= 1e8 else f"{flops / 1e6:.1f}M"


def rounded(value: float) -> str:
    """A speed or a memory, to about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _accuracy(row: Row) -> str:
    if row.mean is None:
        return f"{NONE} (0 of {len(row.members)})"
    spread = "" if row.deviation is None else f" ± {row.deviation:.2f}"
    of = "" if len(row.top1) == len(row.members) else f" of {len(row.members)}"
    return f"{row.mean:.2f}{spread} ({len(row.top1)}{of})"


def _paper_columns(rows: tuple[Row, ...]) -> dict[str, list[str]]:
    if all(row.paper is None for row in rows):
        return {}
    columns = {"in the paper": [row.paper.model if row.paper else NONE for row in rows]}
    figures = [row.paper.figures if row.paper else {} for row in rows]
    for quantity, title in _PAPER.items():
        if any(quantity in given for given in figures):
            columns[title] = [_sourced(given.get(quantity), "{:.1f}") for given in figures]
    if any("flops" in given for given in figures):
        columns["parameters, FLOPs"] = [
            NONE
            if "flops" not in given
            else f"{given['parameters'].value:.2f}M, {_sourced(given['flops'], '{:.2f}G')}"
            for given in figures
        ]
    # A title of ours and one of the paper's must differ.
    return {
        name if name == "in the paper" else f"its {name}": values
        for name, values in columns.items()
    }


def _sourced(figure: Figure | None, form: str) -> str:
    return NONE if figure is None else f"{form.format(figure.value)} ({figure.source})"


def as_csv(result: Result) -> str:
    """Every number in full, one line for each variant."""
    file = io.StringIO()
    lines = [_record(result, row) for row in result.rows]
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _record(result: Result, row: Row) -> dict[str, Any]:
    faults = [
        f"seed {member.seed}: {member.fault}" for member in row.members if member.fault is not None
    ]
    record: dict[str, Any] = {
        "ablation": result.sweep.name,
        "scale": result.sweep.scale,
        **row.values,
        "parameters": row.parameters,
        "flops": row.flops,
        "epoch": result.epoch,
        "runs": len(row.members),
        "finished": len(row.finished),
        "top1_mean": row.mean,
        "top1_deviation": row.deviation,
        "top1_by_seed": ";".join(
            f"{member.seed}:{top1:.4f}" for member, top1 in zip(row.finished, row.top1, strict=True)
        ),
        "images_per_second": row.images_per_second,
        "peak_memory_mib": row.memory,
        "faults": "; ".join(faults),
        "paper_model": row.paper and row.paper.model,
    }
    for quantity in QUANTITIES:
        figure = row.paper.figures.get(quantity) if row.paper else None
        record[f"paper_{quantity}"] = figure and figure.value
        record[f"paper_{quantity}_source"] = figure and figure.source
    return record
