"""The figures of the paper's ablations, from `paper.yaml`, each with its source."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("paper.yaml")
QUANTITIES = ("top1", "box_ap", "mask_ap", "parameters", "flops")
SOURCES = ("released", "recalled")


@dataclass(frozen=True)
class Figure:
    """A number and where it is from: one of `SOURCES`."""

    value: float
    source: str


@dataclass(frozen=True)
class PaperRow:
    """What the paper gives for one variant.

    Attributes:
        when: For some axes, the values that the variant may have.
        model: What the paper trained.
        figures: By quantity, one of `QUANTITIES`.
    """

    when: dict[str, list[str]]
    model: str
    figures: dict[str, Figure]


@cache
def _rows() -> dict[str, list[PaperRow]]:
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return {
        ablation: [
            PaperRow(
                row["when"],
                row["model"],
                {name: Figure(*row[name]) for name in QUANTITIES if name in row},
            )
            for row in rows
        ]
        for ablation, rows in content.items()
    }


def paper_row(ablation: str, values: dict[str, str]) -> PaperRow | None:
    """The paper's row for a variant of an ablation; None where it gives none.

    Args:
        ablation: Its name.
        values: The variant's value on each axis.
    """
    for row in _rows().get(ablation, []):
        if all(values.get(key) in accepted for key, accepted in row.when.items()):
            return row
    return None
