"""The command line of a run that continues another: the other's arguments need no repeating."""

import os
from pathlib import Path

from omegaconf import OmegaConf

from conf.launchers import launcher_arguments
from conf.schema import ConfigError

OVERRIDES = Path(".hydra") / "overrides.yaml"  # where Hydra keeps a run's arguments


def key_of(argument: str) -> str:
    """The key that an argument sets."""
    return argument.split("=", 1)[0].lstrip("+~")


def _value(arguments: list[str], key: str) -> str | None:
    values = [argument.split("=", 1)[1] for argument in arguments if argument.startswith(f"{key}=")]
    return values[-1].strip("'\"") if values else None


def quoted(path: Path) -> str:
    """`path` as a value in Hydra's grammar."""
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{text}'"


def expand_arguments(arguments: list[str]) -> list[str]:
    """The arguments that Hydra gets for those that the user gave.

    Raises:
        ConfigError: They cannot be followed; names the argument.
    """
    launcher = _value(arguments, "hydra/launcher")
    settings = launcher_arguments(launcher, {key_of(argument) for argument in arguments})
    return keep_to_itself([*expand_resume(arguments), *settings])


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
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    if resume == "auto" and is_sweep:
        if _value(arguments, "hydra.sweep.dir") is None:
            raise ConfigError(
                "hydra.sweep.dir must be set with resume=auto in a multirun, so that each start "
                "finds the same folders: hydra.sweep.dir=DIR"
            )
        return arguments
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
    is_folder = path.is_dir() and path.suffix != ".ckpt"  # a checkpoint in parts is one too
    in_place = is_folder and not evaluate
    if in_place and is_sweep:
        raise ConfigError(f"resume must name a checkpoint file in a multirun, got {path}")
    given = {key_of(argument) for argument in arguments} | {"resume", "eval_only"}
    if not in_place:
        given.add("finetune")
    file = (path if is_folder else path.parent) / OVERRIDES
    kept = [argument for argument in _read(file) if key_of(argument) not in given]
    folder = [f"hydra.run.dir={quoted(path)}"] if in_place and not has_folder else []
    return [*kept, *arguments, *folder]


def keep_to_itself(arguments: list[str]) -> list[str]:
    """What the arguments are in a process that torchrun or srun started beside a first one.

    Each composes the configuration itself, and by the clock their run folders may differ: only the
    first one makes its folder and tells the others (`training.run`).
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        return arguments
    quiet = ["hydra.output_subdir=null", f"hydra.job.name=train_process_{rank}"]
    if _value(arguments, "hydra.run.dir") is None:
        quiet += ["hydra.run.dir=.", "hydra/job_logging=stdout"]
    return [*arguments, *quiet]


def _read(path: Path) -> list[str]:
    """The arguments in a file of Hydra; none if a run was started from Python."""
    if not path.is_file():
        return []
    try:
        items = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # a damaged file can fail in any way of a YAML reader
        raise ConfigError(f"resume: cannot read {path}: {error}") from error
    return [str(item) for item in items] if isinstance(items, list) else []
