"""The file of a hyper-parameter search: typed, with its rules checked before any work."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.compose import compose
from conf.schema import ConfigError

DIRECTIONS = ("maximize", "minimize")


@dataclass
class AxisConfig:
    """The values of one setting: `choices`, or from `low` to `high`, whole if both are.

    Attributes:
        log: The logarithm is spread evenly; excludes `step`.
        step: Distance of neighbouring values from `low` on.
    """

    low: Any = None
    high: Any = None
    log: bool = False
    step: Any = None
    choices: list[Any] | None = None

    def texts(self) -> list[str]:
        """Every choice, as an argument has it."""
        values = self.choices or []
        return [x if isinstance(x, str) else json.dumps(x, separators=(",", ":")) for x in values]


@dataclass
class PruningConfig:
    """When a trial ends early: it is behind the median of those before it at the same epoch.

    Attributes:
        startup_trials: Trials that all run to their end.
        warmup_epochs: Epochs that every trial runs.
    """

    startup_trials: int = 5
    warmup_epochs: int = 1


@dataclass
class SearchConfig:
    """A search.

    Attributes:
        name: The folder under `outputs/search/`.
        arguments: Of `train.py`, the same for every trial.
        metric: A value of the epoch lines of `metrics.jsonl`; that of the last epoch counts.
        direction: "maximize" or "minimize".
        trials: How many.
        seed: Of the search; that of the runs is among `arguments`.
        pruning: None: every trial runs to its end.
        space: The settings to search, by their keys.
    """

    name: str = MISSING
    arguments: list[str] = field(default_factory=list)
    metric: str = "val_top1"
    direction: str = "maximize"
    trials: int = 20
    seed: int = 0
    pruning: PruningConfig | None = None
    space: dict[str, AxisConfig] = MISSING


def read_search(path: Path, overrides: list[str]) -> SearchConfig:
    """Read the file of a search and check that its whole space can be run.

    Args:
        path: A YAML file.
        overrides: More arguments for `train.py`, after those of the file.

    Raises:
        ConfigError: There is no such file, a key is unknown, or a value breaks a rule.
    """
    if not path.is_file():
        raise ConfigError(f"SPACE must be a YAML file such as conf/search/digits.yaml, got {path}")
    try:
        node = OmegaConf.merge(OmegaConf.structured(SearchConfig), OmegaConf.load(path))
        search = OmegaConf.to_object(node)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    assert isinstance(search, SearchConfig)
    search.arguments = [*search.arguments, *overrides]
    _require(search.direction in DIRECTIONS, "direction", "be one of maximize, minimize", search)
    _require(search.trials > 0, "trials", "be positive", search)
    _require(bool(search.space), "space", "name a setting", search)
    for key, axis in search.space.items():
        _check_axis(key, axis)
    _check_runs(search)
    return search


def _require(holds: bool, key: str, rule: str, search: SearchConfig) -> None:
    if not holds:
        raise ConfigError(f"{key} must {rule}, got {getattr(search, key)!r}")


def _check_axis(key: str, axis: AxisConfig) -> None:
    rule = f"space.{key} must have"
    if axis.choices is not None:
        if not axis.choices or axis.low is not None or axis.high is not None:
            raise ConfigError(f"{rule} choices, or low and high, got {axis}")
        return
    numbers = [axis.low, axis.high]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
        raise ConfigError(f"{rule} choices, or numbers low and high, got {axis}")
    if not axis.low < axis.high:
        raise ConfigError(f"{rule} low below high, got {axis.low} and {axis.high}")
    if axis.log and (axis.low <= 0 or axis.step is not None):
        raise ConfigError(f"{rule} a positive low and no step with log, got {axis}")
    if axis.step is not None and not axis.step > 0:
        raise ConfigError(f"{rule} a positive step, got {axis.step}")


def _check_runs(search: SearchConfig) -> None:
    """Compose the ends of every axis: a wrong key or value must not show in the tenth trial."""
    first = {
        key: axis.texts()[0] if axis.choices else str(axis.low)
        for key, axis in search.space.items()
    }
    for key, axis in search.space.items():
        for value in axis.texts() or [str(axis.low), str(axis.high)]:
            chosen = first | {key: value}
            try:
                compose(*search.arguments, *(f"{k}={v}" for k, v in chosen.items()))
            except (ConfigError, HydraException) as error:
                raise ConfigError(f"{key}={value}: {error.__cause__ or error}") from error
