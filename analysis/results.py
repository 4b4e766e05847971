"""From the members of a sweep to one row for each variant."""

import statistics
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.costs import Cost, count
from analysis.paper import PaperRow, paper_row
from analysis.sweeps import SEED, Member, Sweep
from conf import ConfigError
from training.checkpoint import differences

EPOCHS = ("last", "best")
SAID = ("data.img_size", "trainer.epochs")  # in the line that `setting` is, for every sweep


@dataclass(frozen=True)
class Row:
    """A variant: the members that differ in the seed alone.

    Attributes:
        values: The variant's value on each axis.
        members: One for each seed.
        epoch: Which evaluation of a run counts: its last, or its best.
        cost: Size and work of its model; None if it cannot be counted here.
        paper: What the paper gives for it.
    """

    values: dict[str, str]
    members: tuple[Member, ...]
    epoch: str
    cost: Cost | None
    paper: PaperRow | None

    @property
    def label(self) -> str:
        """Its values as a few words."""
        return ", ".join(short_value(value) for value in self.values.values())

    @property
    def finished(self) -> list[Member]:
        """The members that have a result."""
        return [member for member in self.members if member.finished]

    @cached_property
    def top1(self) -> list[float]:
        """Top-1 accuracy in percent of each finished member."""
        choose = max if self.epoch == "best" else (lambda values: values[-1])
        return [
            choose([line["val_top1"] for line in member.epochs if "val_top1" in line])
            for member in self.finished
        ]

    @property
    def mean(self) -> float | None:
        """Of top-1 over seeds."""
        return statistics.fmean(self.top1) if self.top1 else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of top-1 over seeds (n − 1); None for fewer than two."""
        return statistics.stdev(self.top1) if len(self.top1) > 1 else None

    @property
    def parameters(self) -> int | None:
        """Of the model."""
        return None if self.cost is None else self.cost.parameters

    @property
    def flops(self) -> int | None:
        """Of the model, for one image."""
        return None if self.cost is None else self.cost.flops

    @property
    def images_per_second(self) -> float | None:
        """Training speed of the fastest epoch of all finished members: other work only slows."""
        return max(self._values("images_per_second"), default=None)

    @property
    def memory(self) -> float | None:
        """Largest memory of a finished member, in MiB."""
        values = self._values("peak_memory_bytes")
        return max(values) / 2**20 if values else None

    def _values(self, name: str) -> list[float]:
        lines = [line for member in self.finished for line in member.epochs]
        return [line[name] for line in lines if line.get(name) is not None]


@dataclass(frozen=True)
class Result:
    """What came out of one sweep.

    Attributes:
        sweep: The sweep.
        epoch: Which evaluation of a run counts: its last, or its best.
        rows: One for each variant.
        notes: What a reader must know beside them: members without a result and why, folders that
            belong to no member, costs that cannot be counted here.
    """

    sweep: Sweep
    epoch: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def setting(self) -> str:
        """What all members share, in a line."""
        config: dict[str, Any] = self.sweep.example
        if not config:
            return "no member has begun"
        trainer, data = config["trainer"], config["data"]
        return (
            f"{config['model']['name']} on {data['name']} at {data['img_size']} pixels, "
            f"{_number(trainer['epochs'], 'epoch')}, batch {trainer['batch_size']}, "
            f"{_number(len({member.seed for member in self.sweep.members}), 'seed')}"
            + "".join(
                f", {short_key(key)} {short_value(value)}"
                for key, value in self.sweep.fixed.items()
                if key not in SAID
            )
        )


def collect(sweep: Sweep, *, epoch: str = "last") -> Result:
    """Put the members of a sweep together.

    Args:
        sweep: The sweep.
        epoch: Which evaluation of a run counts: "last", or "best", which chooses by the figure that
            it then reports.
    """
    rows, notes = [], []
    for members in sweep.variants:
        config = next((member.config for member in members if member.config), None)
        cost = None
        if config is not None:
            try:
                cost = count(config)
            except ConfigError as error:
                notes.append(f"parameters and FLOPs are not counted: {error}")
        values = members[0].values
        row = Row(
            {axis: values[axis] for axis in sweep.axes},
            tuple(members),
            epoch,
            cost,
            paper_row(sweep.name, values),
        )
        rows.append(row)
        for member in members:
            if member.fault is not None:
                seed = "" if member.seed is None else f", seed {member.seed}"
                notes.append(f"{row.label}{seed}: {member.fault}")
    notes += _differences(sweep)
    if sweep.strays:
        names = ", ".join(folder.name for folder in sweep.strays)
        notes.append(f"left out, as they differ in more than the axes: {names}")
    return Result(sweep, epoch, tuple(rows), tuple(dict.fromkeys(notes)))


def _differences(sweep: Sweep) -> list[str]:
    """Settings in which members differ though neither the axes nor the command say so.

    The files of an experiment may change between two commands of a sweep. The model's settings are
    those of the axes and compared within a variant alone.
    """
    found = []
    for members in sweep.variants:
        configs = [member.config for member in members if member.config]
        for config in configs:
            found += differences(_without_model(sweep.example), _without_model(config))
            found += differences(configs[0], config)
    swept = (*sweep.axes, *sweep.fixed, SEED, "resume", "logger")
    changed = [
        text
        for text in dict.fromkeys(found)
        if not any(text.startswith((f"{key}:", f"{key}.")) for key in swept)
    ]
    return [f"members differ off the axes: {text}" for text in changed]


def _without_model(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "model"}


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def short_key(key: str) -> str:
    """The last part of a setting's key."""
    return key.replace("/", ".").rpartition(".")[2]


def short_value(value: str) -> str:
    """A value as it reads in a table: the numbers of a list joined by dashes."""
    inner = value[1:-1]
    if value[:1] == "[" and value[-1:] == "]" and "[" not in inner:
        return "-".join(part.strip() for part in inner.split(","))
    return value.strip("'\"")
