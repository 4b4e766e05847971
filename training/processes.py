"""How many processes a run has, and who starts them.

Fabric starts the processes of one machine itself, unless torchrun or srun did.
"""

import os
from typing import Any

from lightning_fabric.plugins.environments import LightningEnvironment, SLURMEnvironment

from conf.schema import ConfigError, TrainerConfig


def started_by() -> tuple[str, int, int] | None:
    """Who started this program several times: its name, processes on a machine, and machines."""
    environ = os.environ
    if "TORCHELASTIC_RUN_ID" in environ:
        here = int(environ["LOCAL_WORLD_SIZE"])
        return "torchrun", here, int(environ["WORLD_SIZE"]) // here
    if _slurm_tasks() > 1:
        nodes = int(environ.get("SLURM_NNODES", "1"))
        return "srun", _slurm_tasks() // nodes, nodes
    return None


def _slurm_tasks() -> int:
    if SLURMEnvironment.job_name() in ("bash", "interactive"):  # as Fabric has it
        return 0
    return int(os.environ.get("SLURM_NTASKS", "0"))


def environments() -> list[Any]:
    """Fabric's plugins: a single task of SLURM starts the processes of its machine itself."""
    return [LightningEnvironment()] if _slurm_tasks() == 1 else []


def layout(settings: TrainerConfig) -> tuple[str | int | list[int], int]:
    """Fabric's `devices` and `num_nodes` for the settings, or for what torchrun or srun started.

    Raises:
        ConfigError: The settings ask for other processes than those that were started.
    """
    devices: str | int | list[int] = settings.devices
    if settings.devices != "auto":
        numbers = [int(number) for number in settings.devices.split(",")]
        devices = numbers if len(numbers) > 1 else numbers[0]
    started = started_by()
    if started is None:
        return devices, settings.num_nodes
    name, here, nodes = started
    asked = len(devices) if isinstance(devices, list) else devices
    if asked not in ("auto", here):
        raise ConfigError(
            f'trainer.devices must be "auto" or the {here} processes that {name} started on each '
            f"machine, got {settings.devices!r}"
        )
    if settings.num_nodes not in (1, nodes):
        raise ConfigError(
            f"trainer.num_nodes must be 1 or the {nodes} machines that {name} started processes "
            f"on, got {settings.num_nodes}"
        )
    return devices if isinstance(devices, list) else here, nodes
