"""Finds the checkpoint that a run continues from."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from conf.schema import Config, ConfigError
from training import shards
from training.checkpoint import BEST, LAST, PREVIOUS, differences, load_first, remove

AUTO = "auto"
CONFIG = "config.yaml"


@dataclass
class Resumed:
    """What a run continues.

    Attributes:
        folder: The folder of the run that is continued.
        in_place: Whether that is the folder of this run too.
        path: The checkpoint; None where the run was stopped before its first save.
        content: What `path` holds.
        faults: Why newer checkpoints were passed over.
    """

    folder: Path
    in_place: bool
    path: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def find(config: Config, run_dir: Path) -> Resumed | None:
    """The newest good checkpoint of what `config.resume` names; None to begin a run.

    Raises:
        ConfigError: There is none, or it is of another model.
    """
    if config.resume is None:
        return None
    target = run_dir if config.resume == AUTO else Path(config.resume)
    if target.is_dir() and not shards.is_sharded(target):
        folder = target
        paths = [folder / name for name in ((BEST,) if config.eval_only else (LAST, PREVIOUS))]
    else:
        folder = target.parent
        earlier = [target.with_name(PREVIOUS)] if target.name == LAST else []
        paths = [target, *earlier]
    in_place = not config.eval_only and folder.resolve() == run_dir.resolve()
    if in_place and not any(path.exists() for path in paths):
        if config.resume == AUTO or (folder / CONFIG).is_file():
            return Resumed(folder, in_place)
        raise ConfigError(f"resume must name a folder that holds a run, got {folder}")
    content, path, faults = load_first(paths, shards.load)
    changed = differences(content["config"]["model"], asdict(config.model), "model.")
    if changed:
        raise ConfigError(
            f"model must be that of the checkpoint, differing (checkpoint → here): "
            f"{'; '.join(changed)}. The run's own settings are in {path.parent}/{CONFIG}"
        )
    if not config.eval_only and "optimizer" not in content:
        raise ConfigError(
            "resume must name a last.ckpt to continue training; a best.ckpt holds weights alone, "
            "for eval_only=true or finetune"
        )
    return Resumed(folder, in_place, path, content, faults)


def set_damaged_aside(resumed: Resumed) -> None:
    """Rename a damaged `last.ckpt`: the next save would put it in the place of the good one."""
    if resumed.path is not None and resumed.path.name == PREVIOUS:
        damaged = resumed.folder / LAST
        if damaged.exists():
            aside = damaged.with_name(f"{LAST}.damaged")
            remove(aside)
            os.replace(damaged, aside)
