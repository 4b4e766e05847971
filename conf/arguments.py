"""The command line of a run that continues another: the other's arguments need no repeating."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from conf.schema import ConfigError

OVERRIDES = Path(".hydra") / "overrides.yaml"  # where Hydra keeps a run's arguments


def _key(argument: str) -> str:
    return argument.split("=", 1)[0].lstrip("+~")


def _value(arguments: list[str], key: str) -> str | None:
    values = [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{key}=")]
    return values[-1].strip("'\"") if values else None


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def expand_resume(arguments: list[str]) -> list[str]:
    """Put the arguments of the run that `resume=` names before those given now, which win.

    A folder is continued in place, a file in a new folder. `resume=auto` continues what the run
    folder holds; that folder must be the same each time, so it is `hydra.run.dir` or named after
    the cluster's job.

    Args:
        arguments: The command line without the program's name.

    Raises:
        ConfigError: The run folder of `resume=auto` is not given, the arguments of the run cannot
            be read, or several runs are to continue in one folder.
    """
    resume = _value(arguments, "resume")
    if resume is None or resume == "null":
        return arguments
    has_folder = _value(arguments, "hydra.run.dir") is not None
    if resume == "auto":
        job = os.environ.get("SLURM_JOB_ID")
        if has_folder:
            return arguments
        if job is None:
            raise ConfigError(
                "hydra.run.dir must be set with resume=auto, so that each start finds the same "
                "folder: hydra.run.dir=DIR"
            )
        return [*arguments, f"hydra.run.dir=outputs/${{name}}/job_{job}"]

    path = Path(resume)
    evaluate = (_value(arguments, "eval_only") or "false").lower() == "true"
    in_place = path.is_dir() and not evaluate
    if in_place and {"-m", "--multirun"} & set(arguments):
        raise ConfigError(f"resume must name a checkpoint file in a multirun, got {path}")
    given = {_key(argument) for argument in arguments} | {"resume", "eval_only"}
    if not in_place:
        given.add("finetune")
    file = (path if path.is_dir() else path.parent) / OVERRIDES
    kept = [argument for argument in _read(file) if _key(argument) not in given]
    folder = [f"hydra.run.dir={_quoted(path)}"] if in_place and not has_folder else []
    return [*kept, *arguments, *folder]


def _read(path: Path) -> list[str]:
    """The arguments in a file of Hydra; none if a run was started from Python."""
    if not path.is_file():
        return []
    try:
        items = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # a damaged file can fail in any way of a YAML reader
        raise ConfigError(f"resume: cannot read {path}: {error}") from error
    return [str(item) for item in items] if isinstance(items, list) else []
