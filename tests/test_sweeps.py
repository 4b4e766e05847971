"""Sweeps: each member a command of its own, in its folder, with its devices."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf
from ranks import FOCAL, TINY

from conf import ConfigError, compose, expand_arguments, register_schemas
from conf.launchers import LAUNCHERS, Launcher
from launching import members, places
from launching.members import MemberError, member_command, run_member
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    *FOCAL,
    *TINY,
    "trainer.epochs=1",
    "trainer.batch_size=8",
    "trainer.limit_train_batches=1",
)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def seeds(sweep: Path) -> list[int]:
    """The seed of each member, by its number, from the configuration of its finished run."""
    folders = sorted(path.parent for path in sweep.glob("*/best.ckpt"))
    return [checkpoint.load(path / "last.ckpt")["config"]["trainer"]["seed"] for path in folders]


def test_torchrun_starts_one_run_of_all_its_processes(tmp_path: Path) -> None:
    started = python(
        tmp_path,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        str(ROOT / "train.py"),
        *SHORT,
    )
    assert started.returncode == 0, started.stderr
    assert started.stdout.count("results in") == 1
    assert "2 x CPU (" in started.stdout
    assert len(list(tmp_path.glob("outputs/focal_micro/*"))) == 1
    assert len(list(tmp_path.glob("outputs/focal_micro/*/last.ckpt"))) == 1


def test_members_of_a_parallel_sweep_have_several_processes_and_never_repeat_the_sweep(
    tmp_path: Path,
) -> None:
    sweep = (
        "hydra.mode=MULTIRUN",  # as an experiment's own file sets it
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=sweep",
        "trainer.seed=1,2",
        "trainer.devices=2",
        "trainer.strategy=ddp",
    )
    done = python(tmp_path, str(ROOT / "train.py"), *SHORT, *sweep)
    assert done.returncode == 0, done.stderr
    assert seeds(tmp_path / "sweep") == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]
    for member in ("0", "1"):
        output = (tmp_path / "sweep" / member / "console.log").read_text()
        assert output.count("results in") == 1
        assert "2 x CPU (" in output
        overrides = yaml.safe_load((tmp_path / "sweep" / member / ".hydra/overrides.yaml").open())
        assert f"trainer.seed={int(member) + 1}" in overrides


def test_submitit_runs_members_on_this_machine_and_a_failure_stops_no_other(tmp_path: Path) -> None:
    options = ("hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "trainer.seed=1,2")
    (tmp_path / "sweep" / "0").mkdir(parents=True)
    (tmp_path / "sweep" / "0" / "metrics.jsonl").write_text("")  # of another run
    done = python(tmp_path, str(ROOT / "train.py"), "-m", *SHORT, *options)
    assert done.returncode != 0
    assert "the run in sweep/0 failed with exit code 1; see sweep/0/console.log" in done.stderr
    assert "sweep/0 already holds a run" in (tmp_path / "sweep" / "0" / "console.log").read_text()
    assert seeds(tmp_path / "sweep") == [2]


def hydra_config(launcher: str, *overrides: str, **settings: Any) -> Any:
    return SimpleNamespace(
        runtime=SimpleNamespace(
            choices={"hydra/launcher": launcher},
            config_sources=[SimpleNamespace(provider="command-line", path="extra")],
        ),
        overrides=SimpleNamespace(task=list(overrides), hydra=settings.pop("hydra", [])),
        launcher=SimpleNamespace(**settings),
    )


class Settings(SimpleNamespace):
    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)


def test_a_member_gets_its_own_arguments_and_none_of_the_sweeps() -> None:
    hydra = [
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=s",
        "hydra.sweeper.max_batch_size=3",
        "hydra.mode=MULTIRUN",
        "hydra.verbose=true",
    ]
    config = hydra_config("joblib", "trainer.seed=1", hydra=hydra)
    command = member_command(config, Path("s/it's"))
    assert command[1:] == [
        str(ROOT / "train.py"),
        "--config-dir",
        "extra",
        "trainer.seed=1",
        "hydra.verbose=true",
        "hydra.mode=RUN",
        r"hydra.run.dir='s/it\'s'",
    ]


@pytest.fixture
def lock_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(places, "_lock_folder", lambda: tmp_path)
    return tmp_path


def test_jobs_at_the_same_time_hold_different_gpus(
    lock_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: set[str] = set()
    used: list[str] = []
    most = 0

    def wait(command: Any, environment: dict[str, str], output: Any) -> int:
        nonlocal most
        mine = environment["CUDA_VISIBLE_DEVICES"].split(",")
        assert not running & set(mine)
        running.update(mine)
        most = max(most, len(running))
        used.extend(mine)
        time.sleep(0.3)
        running.difference_update(mine)
        return 0

    monkeypatch.setattr(members, "_wait", wait)
    monkeypatch.setattr(members, "visible_gpus", lambda accelerator: ("2", "5", "7"))
    errors: list[BaseException] = []

    settings = [compose(f"trainer.devices={devices}").trainer for devices in (1, 2)]

    def job(number: int) -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        config = hydra_config("joblib")
        config.launcher = Settings(n_jobs=-1)
        try:
            run_member(settings[number % 2], config, folder)
        except BaseException as error:
            errors.append(error)

    jobs = [threading.Thread(target=job, args=(number,)) for number in range(4)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert not errors
    assert len(used) == 1 + 2 + 1 + 2
    assert set(used) <= {"2", "5", "7"}
    assert most > 1


@pytest.mark.parametrize(
    ("devices", "jobs", "gpus", "cores", "expected"),
    [
        ("auto", 4, (), 16, (("cpu0", "cpu1", "cpu2", "cpu3"), 1, 4)),
        ("2", 4, (), 16, (("cpu0", "cpu1", "cpu2", "cpu3"), 1, 2)),
        ("auto", 16, ("0", "1"), 16, (("0", "1"), 1, 8)),
        ("2", 16, ("0", "1"), 16, (("0", "1"), 2, 8)),
        ("auto", 9, (), 2, (tuple(f"cpu{i}" for i in range(9)), 1, 1)),
    ],
)
def test_a_machine_is_divided_among_jobs(
    devices: str, jobs: int, gpus: tuple[str, ...], cores: int, expected: tuple[Any, ...]
) -> None:
    settings = compose(f"trainer.devices={devices}").trainer
    found = places.plan(settings, jobs=jobs, gpus=gpus, cores=cores)
    assert (found.names, found.per_job, found.threads) == expected


@pytest.mark.parametrize(
    ("devices", "message"),
    [("'0,1'", r"must be a number or \"auto\" in a sweep"), ("3", "must not exceed the 2 GPUs")],
)
def test_devices_that_a_job_cannot_take_are_refused(devices: str, message: str) -> None:
    settings = compose(f"trainer.devices={devices}").trainer
    with pytest.raises(ConfigError, match=message):
        places.plan(settings, jobs=2, gpus=("0", "1"), cores=2)


def test_gpus_are_those_that_the_process_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places.visible_gpus("auto") == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5e, 3")
    assert places.visible_gpus("gpu") == ("GPU-5e", "3")
    assert places.visible_gpus("cpu") == ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_a_launcher_reaches_its_run_once_and_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    script = (
        "import signal, sys, time; from pathlib import Path; got = []\n"
        f"signal.signal({int(number)}, lambda n, f: got.append(n))\n"
        "Path('ready').touch()\n"
        "while not got: time.sleep(0.01)\n"
        "time.sleep(0.2); sys.exit(128 + got[0] if len(got) == 1 else 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(members, "member_command", lambda *_: [sys.executable, "-c", script])
    before = signal.getsignal(number)

    def send() -> None:
        while not Path("ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as stop:
        run_member(compose().trainer, hydra_config("basic"), tmp_path)
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before


def test_a_failed_run_is_named_by_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
    monkeypatch.setattr(members, "member_command", lambda *_: failing)
    with pytest.raises(MemberError, match=r"failed with exit code 3; see .*console\.log"):
        run_member(compose().trainer, hydra_config("ray"), tmp_path)
    assert (tmp_path / "console.log").read_text() == "why\n"


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"SLURM_NTASKS": "2"}])
def test_a_sweep_that_is_started_several_times_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a sweep must be started once"):
        run_member(compose().trainer, hydra_config("basic"), tmp_path)


def test_processes_after_the_first_leave_no_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert expand_arguments(["name=a"]) == ["name=a"]
    monkeypatch.setenv("RANK", "0")
    assert expand_arguments(["name=a"]) == ["name=a"]
    monkeypatch.setenv("RANK", "3")
    quiet = ["hydra.output_subdir=null", "hydra.job.name=train_process_3"]
    elsewhere = ["hydra.run.dir=.", "hydra/job_logging=stdout"]
    assert expand_arguments(["name=a"]) == ["name=a", *quiet, *elsewhere]
    assert expand_arguments(["hydra.run.dir=r"]) == ["hydra.run.dir=r", *quiet]


def test_a_sweep_that_is_continued_needs_a_folder_that_stays_the_same() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweep\.dir must be set with resume=auto"):
        expand_arguments(["-m", "resume=auto"])
    given = ["-m", "resume=auto", "hydra.sweep.dir=s"]
    assert expand_arguments(given) == given


def test_a_launcher_that_is_not_installed_is_told_with_its_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(LAUNCHERS, "joblib", Launcher("no_such_package.launcher", "launchers"))
    with pytest.raises(ConfigError, match=r'hydra/launcher=joblib .* pip install -e "\.\[launch'):
        expand_arguments(["-m", "hydra/launcher=joblib"])


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_every_launcher_composes_with_its_settings_and_those_of_the_command(name: str) -> None:
    pytest.importorskip(LAUNCHERS[name].module)
    given = {} if name == "ray" else {"hydra.launcher.submitit_folder": "here"}
    if name == "joblib":
        given = {"hydra.launcher.n_jobs": "3", "hydra.launcher.batch_size": "2"}
    arguments = [f"hydra/launcher={name}", *(f"{key}={value}" for key, value in given.items())]
    register_schemas()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra_compose("config", expand_arguments(arguments), return_hydra_config=True)
    expected = {
        f"hydra.launcher.{key.lstrip('+')}": value
        for key, value in LAUNCHERS[name].settings.items()
    }
    for key, value in {**expected, **given}.items():
        assert str(OmegaConf.select(config, key)) == value, key
