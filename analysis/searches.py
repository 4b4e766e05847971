"""A hyper-parameter search as a table and a picture."""

import csv
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from analysis.figures import COST, OURS, PAPER
from analysis.results import short_key
from conf.search_space import SearchConfig

if TYPE_CHECKING:
    import optuna

TABLE, PICTURE = "trials.csv", "search.png"


def summarise(
    study: "optuna.study.Study",
    trials: "list[optuna.trial.FrozenTrial]",
    config: SearchConfig,
    output: Path,
) -> str:
    """Write `trials.csv` and `search.png`.

    Args:
        study: The search.
        trials: Those of it that ended.
        config: What was searched.
        output: The folder to write to.

    Returns:
        The best trial, with the command that runs it again, in words.
    """
    columns = ["trial", "state", config.metric, "epochs", *config.space, "folder", "fault"]
    with open(output / TABLE, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for trial in trials:
            reached = trial.intermediate_values
            value = trial.value if trial.value is not None else reached.get(max(reached, default=0))
            given = [trial.params.get(key) for key in config.space]
            attributes = [trial.user_attrs.get(key) for key in ("folder", "fault")]
            state = trial.state.name.lower()
            writer.writerow([trial.number, state, value, len(reached), *given, *attributes])
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    ended = sum(trial.state.name == "PRUNED" for trial in trials)
    failed = sum("fault" in trial.user_attrs for trial in trials)
    lines = [f"{len(complete)} trials to the end, {ended} ended early, {failed} failed"]
    if complete:
        _draw(study, config, output / PICTURE)
        best = study.best_trial
        values = [f"{key}={value}" for key, value in best.params.items()]
        lines += [
            f"best: {config.metric} {best.value:.4g} ({output / best.user_attrs['folder']})",
            f"python train.py {shlex.join([*config.arguments, *values])}",
        ]
    return "\n".join([*lines, f"{output / TABLE}, {PICTURE}"])


def _draw(study: "optuna.study.Study", config: SearchConfig, path: Path) -> None:
    """The metric over the trials and over each setting; trials that ended early are hollow."""
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    early = [t for t in study.trials if t.state.name == "PRUNED" and t.intermediate_values]
    points = [(trial, trial.value or 0.0, True) for trial in complete]
    points += [(t, t.intermediate_values[max(t.intermediate_values)], False) for t in early]
    figure = Figure(figsize=(2.4 * (1 + len(config.space)), 2.8), layout="constrained", dpi=110)
    grid = figure.subplots(1, 1 + len(config.space), sharey=True, squeeze=False)[0]
    for axes, key in zip(grid, [None, *config.space], strict=True):
        axis = config.space[key] if key is not None else None
        texts = axis.texts() if axis is not None else []
        for trial, value, whole in points:
            x: Any = trial.number if key is None else trial.params[key]
            best = trial.number == study.best_trial.number
            axes.plot(
                texts.index(x) if texts else x,
                value,
                "o",
                color=PAPER if best else OURS if whole else COST,
                markerfacecolor=None if whole else "none",
                markersize=6 if best else 4,
            )
        if texts:
            axes.set_xticks(range(len(texts)), texts)
            axes.margins(x=0.2)
        if axis is not None and axis.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0e}".replace("e-0", "e-"))
            axes.xaxis.set_minor_locator(NullLocator())
        if key is None:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("trial" if key is None else short_key(key), fontsize=9)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    grid[0].set_ylabel(config.metric, fontsize=9)
    figure.suptitle(f"{config.name}: the best in red, ended early hollow", fontsize=10)
    figure.savefig(path, metadata={"Software": None})
