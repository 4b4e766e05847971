"""What a run leaves on disk besides checkpoints: JSON lines, a picture and a W&B run."""

import json
import secrets
from pathlib import Path
from typing import Any, Literal, cast

import wandb
from matplotlib.figure import Figure

from conf.schema import ConfigError, LoggerConfig

FILE = "metrics.jsonl"


class Records:
    """Writes `metrics.jsonl`, `curves.png` and the Weights & Biases run of one run folder.

    A line has `kind` "train" (an interval of steps), "epoch" (its training and evaluation) or
    "evaluation" (of an evaluation-only run), the `step` it ends at, and its values.

    Args:
        run_dir: The run's folder; must not hold a run.
        name: Name of the run; its Weights & Biases group.
        logger: The Weights & Biases settings.
        config: The whole configuration as plain values.
        wandb_id: Id of the run to continue; None for a new one.
        history: Lines of the run that is continued.

    Raises:
        ConfigError: The folder already holds a run.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        name: str,
        logger: LoggerConfig,
        config: dict[str, Any],
        wandb_id: str | None = None,
        history: list[dict[str, Any]] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.lines: list[dict[str, Any]] = []
        try:
            self.file = open(run_dir / FILE, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError as error:
            raise ConfigError(
                f"hydra.run.dir must be a new folder, {run_dir} already holds a run"
            ) from error
        for line in history or []:
            self._append(line)
        self.wandb_id = wandb_id or secrets.token_hex(4)
        self.wandb = None
        if logger.mode != "disabled":
            self.wandb = wandb.init(
                mode=cast(Literal["offline", "online"], logger.mode),
                project=logger.project,
                entity=logger.entity,
                group=name,
                name=f"{name}/{run_dir.name}",
                tags=logger.tags,
                dir=run_dir,
                id=self.wandb_id,
                resume="allow" if logger.mode == "online" else None,
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )

    def _append(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one line; `values` go to Weights & Biases as `<kind>/<name>`."""
        self._append({"kind": kind, "step": step, **values})
        if self.wandb is not None:
            self.wandb.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def draw(self) -> None:
        """Draw loss and accuracy over epochs as `curves.png`."""
        epochs = [line for line in self.lines if line["kind"] == "epoch"]
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, value, label in zip(
            figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1 accuracy (%)"), strict=True
        ):
            steps = [line for line in self.lines if line["kind"] == "train"]
            axes.plot(
                [line["epoch"] for line in steps],
                [line[value] for line in steps],
                color="C0",
                alpha=0.35,
                linewidth=1,
            )
            for split, color in (("train", "C0"), ("val", "C1")):
                points = [(line["epoch"], line.get(f"{split}_{value}")) for line in epochs]
                points = [point for point in points if point[1] is not None]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), "o-", color=color, label=split, markersize=3
                    )
            axes.set(xlabel="epoch", ylabel=label)
            axes.grid(alpha=0.3)
            if epochs:
                axes.legend()
        figure.savefig(self.run_dir / "curves.png", dpi=120)

    def close(self, *, failed: bool = False) -> None:
        """Close the file and the Weights & Biases run."""
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


def read_history(folder: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a run up to optimiser step `step`; empty where it kept none.

    A last line that was cut off is later than any checkpoint, and left out.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines = [json.loads(text) for text in texts if text.endswith("\n")]
    return [line for line in lines if line["step"] <= step]
