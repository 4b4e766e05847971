"""Search for good settings with Optuna: `python search.py conf/search/digits.yaml`; see `--help`.

Each trial is a run of `train.py` in a process and a folder of its own. The study is an SQLite file
beside them, so that the same command continues a search that was stopped, and the trial that it was
at, from that trial's last checkpoint. A trial that fails does not end the search.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from filelock import FileLock, Timeout

from conf import ConfigError
from conf.search_space import AxisConfig, SearchConfig, read_search

if TYPE_CHECKING:
    import optuna

TRAIN = Path(__file__).resolve().parent / "train.py"
DATABASE, CONSOLE = "study.db", "console.txt"
FAULT, FOLDER, SETTINGS = "fault", "folder", "settings"  # attributes of trials and of the study
POLL_SECONDS = 0.5


class Search:
    """A search in its folder.

    Args:
        config: The checked configuration.
        output: The folder; a search that it holds is continued.

    Raises:
        ConfigError: Optuna is missing, or the folder holds another search.
    """

    def __init__(self, config: SearchConfig, output: Path) -> None:
        try:
            import optuna
        except ImportError as error:
            raise ConfigError(
                f'search.py needs Optuna: pip install -e ".[search]" ({error})'
            ) from error
        self.optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config = config
        self.output = output
        pruner: Any = optuna.pruners.NopPruner()
        if config.pruning is not None:
            pruner = optuna.pruners.MedianPruner(
                n_startup_trials=config.pruning.startup_trials,
                n_warmup_steps=config.pruning.warmup_epochs,
            )
        self.study = optuna.create_study(
            storage=f"sqlite:///{output / DATABASE}",
            study_name=config.name,
            direction=cast(Any, config.direction),
            pruner=pruner,
            load_if_exists=True,
        )
        # A search that is continued must not draw its first numbers again.
        seed = config.seed + len(self.study.trials)
        self.study.sampler = optuna.samplers.TPESampler(seed=seed)
        settings = {key: value for key, value in asdict(config).items() if key != "trials"}
        held = self.study.user_attrs.get(SETTINGS, settings)
        different = [key for key in settings if held.get(key) != settings[key]]
        if different:
            raise ConfigError(
                f"--output must be a new folder for a search with other {', '.join(different)}, "
                f"got {output}"
            )
        self.study.set_user_attr(SETTINGS, settings)

    @property
    def done(self) -> "list[optuna.trial.FrozenTrial]":
        """Trials that ended: to their last epoch, early, or in a failure of their own."""
        return [
            trial
            for trial in self.study.trials
            if trial.state.name in ("COMPLETE", "PRUNED") or FAULT in trial.user_attrs
        ]

    def run(self) -> None:
        """Run the trials that are left, first those that were cut off."""
        for cut in self.study.trials:
            if cut.state.name == "RUNNING":
                self.study.tell(cut.number, state=self.optuna.trial.TrialState.FAIL)
                kept = {key: cut.user_attrs[key] for key in (FOLDER,) if key in cut.user_attrs}
                self.study.enqueue_trial(cut.params, user_attrs=kept)
        for number in range(len(self.done), self.config.trials):
            trial = self.study.ask()
            values = {k: suggest(trial, k, axis) for k, axis in self.config.space.items()}
            if FOLDER not in trial.user_attrs:
                trial.set_user_attr(FOLDER, f"trial_{trial.number:03d}")
            text = ", ".join(f"{key}={value}" for key, value in values.items())
            print(f"trial {number + 1} of {self.config.trials}: {text}", flush=True)
            outcome = self._run_trial(trial, values)
            print(f"  {outcome}", flush=True)

    def _run_trial(self, trial: "optuna.trial.Trial", values: dict[str, str]) -> str:
        """Run one trial and tell the study; returns what came out, in words."""
        states = self.optuna.trial.TrialState
        folder = self.output / trial.user_attrs[FOLDER]
        folder.mkdir(exist_ok=True)
        words = [*self.config.arguments, *(f"{key}={value}" for key, value in values.items())]
        command = [sys.executable, str(TRAIN), *words, "resume=auto", f"hydra.run.dir='{folder}'"]
        with open(folder / CONSOLE, "a", encoding="utf-8") as console:
            # In a session of its own, so that Ctrl-C reaches it once: from here.
            process = subprocess.Popen(
                command, stdout=console, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                pruned = self._watch(process, trial, folder)
            except BaseException:
                process.terminate()  # it saves
                process.wait()
                print("  stopped; the same command goes on from here", flush=True)
                raise
        metrics = self._metrics(folder)
        if pruned:
            self.study.tell(trial, state=states.PRUNED)
            return f"ended early: {self.config.metric} {metrics[max(metrics)]:.4g}"
        fault = None
        if process.returncode != 0:
            text = (folder / CONSOLE).read_text(encoding="utf-8", errors="replace").strip()
            fault = (text.splitlines() or [f"exit code {process.returncode}"])[-1].strip()
        elif not metrics:
            fault = f"metric {self.config.metric!r} must be in the epoch lines of metrics.jsonl"
        if fault is not None:
            trial.set_user_attr(FAULT, fault)
            self.study.tell(trial, state=states.FAIL)
            return f"failed: {fault} ({folder / CONSOLE})"
        value = metrics[max(metrics)]
        self.study.tell(trial, value)
        return f"{self.config.metric} {value:.4g}, best {self.study.best_value:.4g}"

    def _watch(self, process: subprocess.Popen, trial: "optuna.trial.Trial", folder: Path) -> bool:
        """Report epochs until the process ends; True if the trial was ended early."""
        reported: set[int] = set()
        while True:
            ended = process.poll() is not None  # looked at first: what it wrote last counts too
            for epoch, value in self._metrics(folder).items():
                if epoch not in reported:
                    trial.report(value, epoch)
                    reported.add(epoch)
            if ended:
                return False
            if reported and trial.should_prune():
                process.terminate()
                process.wait()
                return True
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)

    def _metrics(self, folder: Path) -> dict[int, float]:
        """The metric by epoch, so far."""
        from training.records import read_history  # brings all of training: after every check

        lines = read_history(folder, sys.maxsize)
        epochs = [line for line in lines if line["kind"] == "epoch" and self.config.metric in line]
        return {line["epoch"]: line[self.config.metric] for line in epochs}


def suggest(trial: "optuna.trial.Trial", key: str, axis: AxisConfig) -> str:
    """A value for a setting, as an argument of `train.py`."""
    if axis.choices is not None:
        return trial.suggest_categorical(key, axis.texts())
    if all(isinstance(x, int) for x in (axis.low, axis.high)):
        step = 1 if axis.step is None else axis.step
        return str(trial.suggest_int(key, axis.low, axis.high, step=step, log=axis.log))
    return repr(trial.suggest_float(key, axis.low, axis.high, step=axis.step, log=axis.log))


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("space", type=Path, metavar="SPACE", help="conf/search/NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="arguments of train.py")
    parser.add_argument("--trials", type=int, metavar="N", help="in all; default: as SPACE says")
    parser.add_argument("--output", type=Path, metavar="DIR", help="outputs/search/NAME")
    options = parser.parse_intermixed_args(words)
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        config = read_search(options.space, options.overrides)
        if options.trials is not None:
            if options.trials < 1:
                raise ConfigError(f"--trials must be positive, got {options.trials}")
            config.trials = options.trials
        output = options.output or Path("outputs/search") / config.name
        output.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(output / ".lock", timeout=0):
                search = Search(config, output)
                search.run()
        except Timeout as error:
            raise ConfigError(
                f"--output must be a folder in which no other search is at work, got {output}"
            ) from error
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(130) from error
    finally:
        signal.signal(signal.SIGTERM, before)
    from analysis.searches import summarise  # brings matplotlib

    print(summarise(search.study, search.done, config, output))
    if not any(trial.state.name == "COMPLETE" for trial in search.study.trials):
        raise SystemExit("error: no trial ran to its end")


if __name__ == "__main__":
    main()
