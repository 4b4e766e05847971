"""Hydra's launchers of sweeps, with settings that suit training.

They are the plugins' own, `hydra/launcher=NAME` on the command line; what the command does not set
is set here. (A file of the same name would stand in the way of the plugin's own configuration.)
"""

from dataclasses import dataclass, field
from importlib.util import find_spec

from conf.schema import ConfigError


@dataclass(frozen=True)
class Launcher:
    """A plugin: its module, the extra that installs it, and values under `hydra.launcher`."""

    module: str
    extra: str
    settings: dict[str, str] = field(default_factory=dict)


LAUNCHERS = {
    "joblib": Launcher(
        "hydra_plugins.hydra_joblib_launcher",
        "launchers",
        {"pre_dispatch": "n_jobs", "batch_size": "1"},
    ),
    "submitit_local": Launcher(
        "hydra_plugins.hydra_submitit_launcher",
        "launchers",
        {"timeout_min": "10080", "cpus_per_task": "1"},  # a week: waiting for a place counts
    ),
    "submitit_slurm": Launcher(
        "hydra_plugins.hydra_submitit_launcher",
        "launchers",
        # One task: it starts the processes of its machine itself. Time to save before the limit;
        # with resume=auto the job then goes on.
        {
            "timeout_min": "1440",
            "gpus_per_node": "1",
            "cpus_per_task": "8",
            "tasks_per_node": "1",
            "signal_delay_s": "120",
            "max_num_timeout": "100",
        },
    ),
    "ray": Launcher(
        "hydra_plugins.hydra_ray_launcher",
        "ray",
        {"+ray.remote.num_gpus": "1", "+ray.remote.num_cpus": "1", "+ray.remote.max_retries": "0"},
    ),
}


def launcher_arguments(name: str | None, given: set[str]) -> list[str]:
    """What a command that chooses launcher `name` leaves out.

    Args:
        name: The launcher; None where the command chooses none.
        given: Keys that the command sets.

    Raises:
        ConfigError: The launcher is not installed; says what to install.
    """
    if name not in LAUNCHERS:
        return []
    launcher = LAUNCHERS[name]
    if not _is_installed(launcher.module):
        raise ConfigError(
            f"hydra/launcher={name} needs a package that is not installed: "
            f'pip install -e ".[{launcher.extra}]"'
        )
    settings = []
    for key, value in launcher.settings.items():
        path = f"hydra.launcher.{key.lstrip('+')}"
        if path not in given:
            settings.append(f"{'+' if key.startswith('+') else ''}{path}={value}")
    return settings


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False
