"""The look of the notebooks' figures, and where they are saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "FOLDER",
    "GREEN",
    "GREY",
    "LEVEL_COLOURS",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "label_panels",
    "save",
    "use_style",
]

ROOT = Path(__file__).resolve().parent.parent
# Where figures go instead of docs/figures: an execution that is only a test sets it.
FOLDER = "NOTEBOOK_FIGURES"
LARGEST = 200_000  # bytes

# Okabe and Ito's colours, which the colour-blind tell apart.
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
ORANGE, RED, PURPLE = "#E69F00", "#D55E00", "#CC79A7"
BLACK, GREY = "#222222", "#9A9A9A"
LEVEL_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)  # of the levels, finest first


def use_style() -> None:
    """Set what all figures share."""
    rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 110,
            "font.size": 9,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
        }
    )


def label_panels(panels: Sequence[Axes]) -> None:
    """Letter the panels of a figure, a, b, c …, for the text to name them."""
    for letter, axes in zip("abcdefghijkl", panels, strict=False):
        axes.set_title(letter, loc="left", fontweight="bold")


def save(figure: Figure, name: str) -> Path:
    """Write ``name.png`` among the figures of the documentation.

    A file that holds this picture already is left alone.

    Raises:
        ValueError: The picture has more than 200,000 bytes.
    """
    folder = Path(os.environ.get(FOLDER) or ROOT / "docs" / "figures")
    picture = BytesIO()
    # Without the library's version, which would make a new file of an old picture.
    figure.savefig(picture, format="png", metadata={"Software": None})
    content = picture.getvalue()
    if len(content) > LARGEST:
        raise ValueError(f"{name}.png must have at most {LARGEST} bytes, got {len(content)}")
    path = folder / f"{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
    return path
