"""What a run leaves on disk besides checkpoints: JSON lines, a picture and a W&B run."""

import fcntl
import json
import os
import secrets
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, cast

import wandb
from matplotlib.figure import Figure

from conf.schema import ConfigError, LoggerConfig

FILE, LOCK = "metrics.jsonl", ".lock"


class RunFolder:
    """Holds a run folder for one process, until the process ends however it ends.

    Raises:
        ConfigError: Another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path / LOCK, "w", encoding="utf-8")  # noqa: SIM115
        try:
            # A lock of this process alone: loading processes do not inherit it and cannot keep it.
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.close()
            raise ConfigError(
                f"hydra.run.dir must be a folder that no other process writes to, got {path}"
            ) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that a crash leaves the old one or the new one."""
        temporary = self.path / f"{name}.tmp"
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)

    def close(self) -> None:
        """Let go of the folder."""
        self.file.close()


class Records:
    """Writes `metrics.jsonl`, `curves.png` and the Weights & Biases run of one run folder.

    A line has `kind` "train" (an interval of steps), "epoch" (its training and evaluation) or
    "evaluation" (of an evaluation-only run), the `step` it ends at, and its values.

    A line that the disk has no room for is kept and written with the next.

    Args:
        run_dir: The run's folder; must not hold a run, unless `replace` is set.
        name: Name of the run; its Weights & Biases group.
        logger: The Weights & Biases settings.
        config: The whole configuration as plain values.
        wandb_id: Id of the run to continue; None for a new one.
        history: Lines of the run that is continued.
        replace: The folder holds the run that is continued, or one that never saved.
        warn: Called with a line about what cannot be written.

    Raises:
        ConfigError: The folder already holds a run, or another process writes to it.
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
        replace: bool = False,
        warn: Callable[[str], None],
    ) -> None:
        self.run_dir = run_dir
        self.warn = warn
        if not replace and (run_dir / FILE).exists():
            raise ConfigError(
                f"hydra.run.dir must be a new folder, {run_dir} already holds a run; to continue "
                f"it use resume={run_dir}"
            )
        self.folder = RunFolder(run_dir)
        self.lines = list(history or [])
        text = _encode(self.lines)
        self.folder.write(FILE, text)
        self.file = open(run_dir / FILE, "ab", buffering=0)  # noqa: SIM115
        self._pending = b""  # what is not in the file yet
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

    def _write_pending(self) -> None:
        while self._pending:
            written = self.file.write(self._pending)
            self._pending = self._pending[written:]  # a full disk may take a part

    def sync(self) -> None:
        """Make every line durable.

        Raises:
            OSError: The disk has no room.
        """
        self._write_pending()
        os.fsync(self.file.fileno())

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Append one line; `values` go to Weights & Biases as `<kind>/<name>`."""
        line = {"kind": kind, "step": step, **values}
        self.lines.append(line)
        self._pending += _encode([line])
        try:
            self._write_pending()
        except OSError as error:
            self.warn(f"cannot write {self.run_dir / FILE}, will try again: {error}")
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
        picture = BytesIO()
        figure.savefig(picture, dpi=120)
        try:
            self.folder.write("curves.png", picture.getvalue())
        except OSError as error:
            self.warn(f"cannot write {self.run_dir / 'curves.png'}: {error}")

    def close(self, *, failed: bool = False) -> None:
        """Close the file, the folder and the Weights & Biases run."""
        self.file.close()
        self.folder.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


def _encode(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read_history(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` lines of a run: those written before its checkpoint was.

    Lines after them are of steps that will be run again. A line that cannot be read ends the
    history.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines()[:count]:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
