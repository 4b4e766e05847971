"""The figures of the paper's ablations, from `paper.yaml`, each with its source."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

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
        when: Settings that the variant has, by their full keys.
        model: The paper's name of it.
        figures: By quantity, one of `QUANTITIES`.
    """

    when: dict[str, Any]
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


def paper_row(ablation: str, config: dict[str, Any]) -> PaperRow | None:
    """The paper's row for a run of an ablation; None where it gives none.

    Args:
        ablation: Its name.
        config: What the run's `config.yaml` says.
    """
    for row in _rows().get(ablation, []):
        if all(_setting(config, key) == value for key, value in row.when.items()):
            return row
    return None


def _setting(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
