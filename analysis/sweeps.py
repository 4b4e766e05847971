"""Reads the folder of a sweep: which members it should have, and what became of each.

A sweep folder holds Hydra's `multirun.yaml`, which names the axes, and a folder for each member,
with `config.yaml`, `metrics.jsonl`, the arguments that made it (`.hydra/overrides.yaml`) and, if it
failed, `error.txt`. A member is finished if its last epoch is in `metrics.jsonl`, whatever happened
before.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf import ConfigError
from conf.sweeps import as_given, member_name, register_resolvers
from training.records import read_history

MULTIRUN, CONFIG, ERROR = "multirun.yaml", "config.yaml", "error.txt"
OVERRIDES = Path(".hydra") / "overrides.yaml"
SEED = "trainer.seed"


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        values: The member's value on each axis but the seed.
        seed: Its seed; None if the sweep has one seed.
        folder: Its folder; None if it never began.
        config: Its configuration; empty if it did not come so far.
        epochs: The lines of finished epochs, in order.
        error: The last line of its `error.txt`; None without one.
    """

    values: dict[str, str]
    seed: str | None
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None

    @property
    def finished(self) -> bool:
        """The last epoch is done and evaluated."""
        return bool(self.epochs) and self.epochs[-1]["epoch"] == self.config["trainer"]["epochs"]

    @property
    def fault(self) -> str | None:
        """Why the member has no result; None if it has one."""
        if self.finished:
            return None
        if self.folder is None:
            return "missing: it has not begun"
        if self.error is not None:
            return f"failed: {self.error}"
        if not self.config:
            return "unfinished: it wrote no configuration"
        done = self.epochs[-1]["epoch"] if self.epochs else 0
        return f"unfinished: {done} of {self.config['trainer']['epochs']} epochs"


@dataclass(frozen=True)
class Sweep:
    """A sweep folder.

    Attributes:
        path: The folder.
        name: What was swept: the experiment's name without `ablation/`.
        scale: The scale it ran at; None if its experiment knows no scales.
        axes: The keys that were swept, without the seed.
        fixed: What the sweep sets to one value for all members.
        members: Every member that the last command named, and those of earlier commands that
            differ from them on the axes alone, in the order of the axes.
        strays: Folders of runs that differ in something else.
    """

    path: Path
    name: str
    scale: str | None
    axes: tuple[str, ...]
    fixed: dict[str, str]
    members: tuple[Member, ...]
    strays: tuple[Path, ...]

    @property
    def stem(self) -> str:
        """What the files made of it are called."""
        return f"ablation_{self.name}_{self.path.resolve().name}".replace("/", "_")

    @cached_property
    def variants(self) -> list[list[Member]]:
        """Members that differ in the seed alone, together."""
        groups: dict[tuple[str, ...], list[Member]] = {}
        for member in self.members:
            groups.setdefault(tuple(member.values.values()), []).append(member)
        return list(groups.values())

    @property
    def example(self) -> dict[str, Any]:
        """The configuration of some member; empty if none began."""
        return next((member.config for member in self.members if member.config), {})


def find_sweeps(paths: Iterable[Path]) -> list[Sweep]:
    """Read the sweeps in some folders.

    Args:
        paths: Sweep folders, or folders above them.

    Raises:
        ConfigError: A path is no folder or holds no sweep, or a sweep cannot be read.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"RUNS must be folders, got {path}")
        found = sorted(file.parent for file in path.rglob(MULTIRUN))
        if not found:
            raise ConfigError(
                f"RUNS must be sweeps or folders above them, but no {MULTIRUN} lies under {path}; "
                "one is left by: python train.py experiment=ablation/NAME"
            )
        folders |= dict.fromkeys(found)
    return [read_sweep(folder) for folder in folders]


def read_sweep(path: Path) -> Sweep:
    """Read one sweep folder.

    Raises:
        ConfigError: A file in it cannot be read.
    """
    content = _read_multirun(path / MULTIRUN)
    params = [f"{key}={value}" for key, value in content["params"].items()]
    arguments = content["arguments"]
    try:
        full = _expand(params)
        expected = _expand([*params, *arguments])
    except HydraException as error:
        raise ConfigError(f"{path / MULTIRUN}: {error}") from error
    keys = [
        key
        for key in expected[0]
        if key in content["params"] or len({member[key] for member in expected}) > 1
    ]
    if not keys:
        raise ConfigError(f"{path / MULTIRUN} must sweep a setting, but names none")

    folders: dict[tuple[str, ...], list[Path]] = {_values(member, keys): [] for member in expected}
    strays = []
    others = _name_without(expected[0], keys)
    for file in sorted(path.glob(f"*/{OVERRIDES}")):
        given = dict(map(_setting, _read_yaml(file) or []))
        if given.keys() >= set(keys) and _name_without(given, keys) == others:
            folders.setdefault(_values(given, keys), []).append(file.parent.parent)
        else:
            strays.append(file.parent.parent)
    places = {_values(member, list(full[0])): place for place, member in enumerate(full)}
    members = [
        _best(dict(zip(keys, values, strict=True)), folders[values])
        for values in sorted(
            folders, key=lambda values: places.get(values[: len(full[0])], len(places))
        )
    ]
    free = [key for key in keys if key != SEED]
    varied = [key for key in free if len({member.values[key] for member in members}) > 1]
    return Sweep(
        path=path,
        name=content["name"].removeprefix("ablation/"),
        scale=content["scale"],
        axes=tuple(varied or free),
        fixed={key: members[0].values[key] for key in free if varied and key not in varied},
        members=tuple(members),
        strays=tuple(strays),
    )


def _values(settings: dict[str, str], keys: list[str]) -> tuple[str, ...]:
    return tuple(settings[key] for key in keys)


def _name_without(settings: dict[str, str], keys: list[str]) -> str:
    """What tells runs of one sweep from others: settings off its axes, as folders are named."""
    return member_name([f"{key}={value}" for key, value in settings.items() if key not in keys])


def _setting(argument: str) -> tuple[str, str]:
    """Key and value."""
    key, _, value = argument.partition("=")
    return key.lstrip("+~"), as_given(value)


def _expand(arguments: list[str]) -> list[dict[str, str]]:
    """The settings of every member, as Hydra itself combines them."""
    overrides = OverridesParser.create().parse_overrides(arguments)
    (batch,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    return [dict(map(_setting, member)) for member in batch]


def _best(values: dict[str, str], folders: list[Path]) -> Member:
    """The member from the folder where it came furthest: an earlier sweep may have left another."""
    members = [_read_member(values, folder) for folder in folders]
    if not members:
        return Member(_without_seed(values), values.get(SEED))
    return max(members, key=lambda member: (member.finished, len(member.epochs)))


def _without_seed(values: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in values.items() if key != SEED}


def _read_member(values: dict[str, str], folder: Path) -> Member:
    file = folder / ERROR
    text = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else None
    config = _read_yaml(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    epochs = [line for line in read_history(folder, sys.maxsize) if line["kind"] == "epoch"]
    return Member(
        values=_without_seed(values),
        seed=values.get(SEED),
        folder=folder,
        config=config,
        epochs=epochs if config else [],
        error=None if text is None else (text.splitlines() or ["no reason given"])[-1].strip(),
    )


def _read_multirun(path: Path) -> dict[str, Any]:
    """Name, scale, axes and arguments of a sweep; axes may refer to other settings."""
    register_resolvers()
    try:
        node = OmegaConf.load(path)
        hydra = node.hydra
        return {
            "name": node.name,
            "scale": hydra.runtime.choices.get("scale"),
            "params": OmegaConf.to_container(
                hydra.sweeper.params or OmegaConf.create(), resolve=True
            ),
            "arguments": list(hydra.overrides.task),
        }
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} must be what Hydra writes for a sweep: {error}") from error


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
