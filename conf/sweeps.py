"""Sweeps that are set in a file: values that depend on the scale, and the names of the members.

An experiment under `conf/experiment/ablation/` sets Hydra's `MULTIRUN` mode, the axes and a sweep
folder that does not change, so that the same command again continues what it began. A member's
folder is named after the overrides that make it: `interaction=local,seed=1`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Chosen once for the whole sweep, or without effect on what a member learns.
NOT_IN_NAMES = ("experiment", "scale", "resume", "data.root", "data.path", "data.num_workers")
GROUPS_NOT_IN_NAMES = ("hydra", "logger")
SHORTENED = ("model.", "trainer.")


def at_scale(scale: str | None, values: DictConfig) -> Any:
    """The entry of `values` for `scale`; `${at_scale:…}` in a file.

    Raises:
        ValueError: There is no entry.
    """
    if scale is None or scale not in values:
        raise ValueError(f"scale must be one of {', '.join(map(str, values))}, got {scale}")
    return values[scale]


def member_name(overrides: Sequence[str], axes: Mapping[str, Any] | None = None) -> str:
    """The folder of a sweep's member, from what sets it apart; `${member_name:…}`.

    Args:
        overrides: All that make the member.
        axes: The experiment's own; what they set to one value for all members is left out.
    """
    fixed = {f"{key}={value}" for key, value in (axes or {}).items()}
    parts = []
    for override in sorted(set(overrides) - fixed):
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        group = key.split(".")[0].split("/")[0]
        if key in NOT_IN_NAMES or group in GROUPS_NOT_IN_NAMES:
            continue
        for prefix in SHORTENED:
            key = key.removeprefix(prefix)
        for old, new in ((" ", ""), ("[", ""), ("]", ""), (",", "-"), ("/", "_"), ("'", "")):
            value = value.replace(old, new)
        parts.append(f"{key}={as_given(value)}")
    return ",".join(parts) or "default"


def as_given(value: str) -> str:
    """A swept value as one writes it: of `model.shift=false,true` Hydra makes False and True."""
    return value.lower() if value in ("True", "False") else value


def register_resolvers() -> None:
    """Make `${at_scale:…}` and `${member_name:…}` known to OmegaConf."""
    OmegaConf.register_new_resolver("at_scale", at_scale, replace=True)
    OmegaConf.register_new_resolver("member_name", member_name, replace=True)
