"""One result as a picture."""

from collections.abc import Callable, Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.paper import Figure as PaperFigure
from analysis.results import Result, Row, short_key
from analysis.tables import billions, rounded

OURS, PAPER, COST = "#1f5a94", "#b5533c", "#8a9aa8"
WIDTH, ROW_HEIGHT, FRAME_HEIGHT = 9.0, 0.42, 1.35  # inches


def draw(result: Result) -> bytes:
    """A PNG: a row for each variant; accuracy by seed and what it costs side by side.

    Panels without a number are left out, and the paper's accuracies with less than two.
    """
    rows = result.rows
    panels: list[tuple[str, list[float | None], Callable[[float], str]]] = [
        ("FLOPs", [row.flops for row in rows], billions),
        ("images/s", [row.images_per_second for row in rows], rounded),
        ("memory (MiB)", [row.memory for row in rows], rounded),
    ]
    panels = [panel for panel in panels if any(value is not None for value in panel[1])]
    papers = [row.paper.figures.get("top1") if row.paper else None for row in rows]
    has_paper = sum(figure is not None for figure in papers) > 1
    widths = [2.4] + [1.6] * has_paper + [1.0] * len(panels)
    figure = Figure(
        figsize=(WIDTH, FRAME_HEIGHT + ROW_HEIGHT * len(rows)), layout="constrained", dpi=110
    )
    grid = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    _accuracy(grid[0], rows)
    if has_paper:
        _paper(grid[1], papers)
    for axes, panel in zip(grid[1 + has_paper :], panels, strict=True):
        _bars(axes, *panel)
    for axes in grid:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(labelsize=8)
    grid[0].set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9)
    grid[0].set_ylim(len(rows) - 0.5, -0.5)
    names = ", ".join(short_key(axis) for axis in result.sweep.axes)
    figure.suptitle(f"{result.sweep.name} ({names})\n{result.setting}", fontsize=10)
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    """Every seed as a dot, mean and deviation as a bar with whiskers."""
    for index, row in enumerate(rows):
        if row.mean is None:
            axes.text(
                0.5,
                index,
                "no finished run",
                ha="center",
                va="center",
                fontsize=8,
                transform=axes.get_yaxis_transform(),
                color=COST,
            )
            continue
        axes.errorbar(
            row.mean,
            index,
            xerr=row.deviation or 0,
            fmt="|",
            color=OURS,
            markersize=14,
            markeredgewidth=2,
            capsize=3,
            linewidth=1.2,
        )
        axes.plot(row.top1, [index + 0.22] * len(row.top1), ".", color=OURS, alpha=0.5)
        axes.annotate(
            f"{row.mean:.1f}",
            (row.mean, index),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=OURS,
        )
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("top-1 here (%), mean ± deviation, dots: seeds", fontsize=8)


def _paper(axes: Axes, figures: Sequence[PaperFigure | None]) -> None:
    """The paper's accuracies, with their source."""
    for index, figure in enumerate(figures):
        if figure is None:
            continue
        axes.plot(figure.value, index, "D", color=PAPER, markersize=5)
        axes.annotate(
            f"{figure.value:.1f} {figure.source}",
            (figure.value, index),
            (0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color=PAPER,
        )
    axes.margins(x=0.35)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("the paper's, ImageNet-1K (%)", fontsize=8)


def _bars(
    axes: Axes, title: str, values: Sequence[float | None], text: Callable[[float], str]
) -> None:
    """One cost for each variant, its number at the bar."""
    for index, value in enumerate(values):
        if value is None:
            continue
        axes.barh(index, value, height=0.5, color=COST)
        axes.annotate(
            text(value),
            (0, index),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="black",
        )
    axes.set_xlabel(title, fontsize=8)
    axes.set_xticks([])
