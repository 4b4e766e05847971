"""Reads what `python -m analysis.ablations` wrote, and draws it beside the paper's figures."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from notebooks.figures import BLACK, BLUE, GREY, RED, ROOT

__all__ = [
    "COSTS",
    "Effect",
    "Table",
    "Variant",
    "draw_costs",
    "draw_effects",
    "effects",
    "read_tables",
]

FOLDER = ROOT / "docs" / "figures"
COMMAND = "python -m analysis.ablations outputs/ablation --output docs/figures"
BEFORE_AXES, AFTER_AXES = ("ablation", "scale"), "parameters"  # columns around those of the axes
COSTS = {"flops": ("MFLOPs of a forward pass", 1e6), "parameters": ("million parameters", 1e6)}
_PAPER: dict[str, Any] = {"marker": "D", "markersize": 5, "linestyle": ""}


@dataclass(frozen=True)
class Variant:
    """One line of a table.

    Args:
        values: Of the swept settings.
        cost: By name, a key of `COSTS`; what could not be counted is left out.
        mean: Top-1, percent, over the seeds that finished; None if none did.
        deviation: Over those seeds; None for fewer than two.
        finished: Seeds that finished.
        paper: The paper's top-1; None where it gives none.
        source: Where the paper's figure is from.
    """

    values: dict[str, str]
    cost: dict[str, float]
    mean: float | None
    deviation: float | None
    finished: int
    paper: float | None
    source: str

    @property
    def label(self) -> str:
        """All values, in the order of the axes."""
        return ", ".join(self.values.values())

    @property
    def error(self) -> float:
        """Standard error of the mean; 0 where it cannot be told."""
        return (self.deviation or 0.0) / max(self.finished, 1) ** 0.5


@dataclass(frozen=True)
class Table:
    """One ablation at one scale."""

    name: str
    scale: str
    path: Path
    variants: tuple[Variant, ...]


def read_tables(scale: str, folder: Path = FOLDER) -> list[Table]:
    """Read the tables of all ablations at a scale.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A file is no such table.
    """
    tables = [_read(path) for path in sorted(folder.glob("ablation_*.csv"))]
    found = [table for table in tables if table.scale == scale]
    if not found:
        others = ", ".join(sorted({table.scale for table in tables})) or "none"
        raise FileNotFoundError(
            f"{folder} must hold tables ablation_NAME_{scale}.csv (scales found: {others}); make "
            f"them with: {COMMAND}"
        )
    return found


def _read(path: Path) -> Table:
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = list(lines[0]) if lines else []
    if tuple(columns[:2]) != BEFORE_AXES or AFTER_AXES not in columns:
        raise ValueError(f"{path} must be a table that this makes: {COMMAND}; got {columns}")
    axes = list(takewhile(lambda column: column != AFTER_AXES, columns[2:]))
    swept = [axis for axis in axes if len({line[axis] for line in lines}) > 1] or axes
    variants = tuple(
        Variant(
            values={_short_key(axis): _short_value(line[axis]) for axis in swept},
            cost={
                name: float(line[name]) / unit for name, (_, unit) in COSTS.items() if line[name]
            },
            mean=_number(line["top1_mean"]),
            deviation=_number(line["top1_deviation"]),
            finished=int(line["finished"]),
            paper=_number(line["paper_top1"]),
            source=line["paper_top1_source"],
        )
        for line in lines
    )
    return Table(lines[0]["ablation"], lines[0]["scale"], path, variants)


def _short_key(axis: str) -> str:
    """The last part of a setting's key."""
    return axis.replace("/", ".").rpartition(".")[2]


def _short_value(value: str) -> str:
    """The numbers of a list joined by dashes; anything else as it is."""
    return value.strip("[]").replace(" ", "").replace(",", "-")


def _tell(values: Mapping[str, str]) -> str:
    """Words alone, other values with their setting's name."""
    return ", ".join(
        value if value.isalpha() and value not in ("true", "false") else f"{key} {value}"
        for key, value in values.items()
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


# -- drawing ----------------------------------------------------------------------------------


def draw_costs(axes: Axes, table: Table, cost: str) -> None:
    """Top-1 of each variant, with the deviation over seeds, against what it costs."""
    title, _ = COSTS[cost]
    for variant in table.variants:
        if variant.mean is None or cost not in variant.cost:
            continue
        axes.errorbar(
            variant.cost[cost],
            variant.mean,
            yerr=variant.deviation or 0.0,
            color=BLUE,
            marker="o",
            markersize=5,
            capsize=3,
        )
        axes.annotate(
            variant.label,
            (variant.cost[cost], variant.mean),
            (6, 4),
            textcoords="offset points",
            fontsize=7,
        )
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.6 * (high - low))  # the labels stand to the right
    axes.margins(y=0.2)
    axes.set(title=table.name, xlabel=title, ylabel="top-1 (%)")


@dataclass(frozen=True)
class Effect:
    """What one change of one setting did to top-1, in percentage points.

    Args:
        label: The change.
        here: The difference of the means.
        error: Its standard error.
        paper: The paper's difference; None where it gives none.
        recalled: One of the paper's figures is recalled, not read again.
    """

    label: str
    here: float
    error: float
    paper: float | None
    recalled: bool


def effects(table: Table) -> list[Effect]:
    """Each setting against its first value, the others kept; pairs without two results left out."""
    found = []
    for key, first in table.variants[0].values.items():
        for variant in table.variants:
            base_values = {**variant.values, key: first}
            base = next((x for x in table.variants if x.values == base_values), None)
            if base is None or base is variant or base.mean is None or variant.mean is None:
                continue
            rest = _tell({name: x for name, x in variant.values.items() if name != key})
            both = variant.paper is not None and base.paper is not None
            found.append(
                Effect(
                    f"{key} {first} → {variant.values[key]}" + (f" ({rest})" if rest else ""),
                    variant.mean - base.mean,
                    (variant.error**2 + base.error**2) ** 0.5,
                    variant.paper - base.paper if both else None,  # type: ignore[operator]
                    "recalled" in (variant.source, base.source),
                )
            )
    return found


def draw_effects(axes: Axes, tables: Sequence[Table]) -> None:
    """The effects of all tables, a line each."""
    rows = [(table, effect) for table in tables for effect in effects(table)]
    for place, (_, effect) in enumerate(rows):
        axes.errorbar(
            effect.here,
            place,
            xerr=2 * effect.error,
            color=BLUE,
            marker="o",
            markersize=5,
            capsize=3,
        )
        if effect.paper is not None:
            inside = "white" if effect.recalled else RED
            axes.plot(effect.paper, place + 0.2, color=RED, markerfacecolor=inside, **_PAPER)
    axes.plot([], [], color=BLUE, marker="o", label="here, ± 2 standard errors over seeds")
    axes.plot([], [], color=RED, label="the paper, ImageNet-1K", **_PAPER)
    axes.plot([], [], color=RED, markerfacecolor="white", label="the paper, recalled", **_PAPER)
    axes.axvline(0, color=BLACK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [effect.label for _, effect in rows])
    starts = [place for place, (table, _) in enumerate(rows) if table is not rows[place - 1][0]]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color=GREY, linewidth=0.6, linestyle=":")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel="difference of top-1 (percentage points)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
