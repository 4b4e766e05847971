"""What a run prints: one line at the start, a progress bar, a line per epoch and a summary."""

import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class RunConsole:
    """Progress of one run; on a terminal as a live bar, elsewhere as plain lines.

    Args:
        epochs: Epochs of the run.
        enabled: False keeps quiet, for processes other than the first.
    """

    def __init__(self, *, epochs: int, enabled: bool = True) -> None:
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.epochs = epochs
        self.total_steps = self.first_step = self.step = 0
        self.began = time.monotonic()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or not enabled,
        )
        self.task = self.progress.add_task("starting", status="")

    def line(self, text: str) -> None:
        """Print one line, above the bar if it is shown."""
        self.console.print(text, markup=False)

    def overview(self, content: Table | str) -> None:
        """Print the model's table, or the line that stands for it."""
        self.console.print(content, markup=False)

    def start(self, *, total_steps: int, first_step: int = 0) -> None:
        """Show the bar of a run of `total_steps`, `first_step` of them done before; starts time."""
        self.total_steps = total_steps
        self.first_step = self.step = first_step
        self.began = time.monotonic()
        self.progress.update(self.task, total=total_steps, completed=first_step)
        self.progress.start()

    def stop(self) -> None:
        """Take the bar away."""
        self.progress.stop()

    def phase(self, text: str) -> None:
        """Name what is being done."""
        self.progress.update(self.task, description=text)

    def advance(self) -> None:
        """Count one optimiser step."""
        self.step += 1
        self.progress.advance(self.task)

    def _time_left(self) -> str:
        done = self.step - self.first_step
        left = (time.monotonic() - self.began) / done * (self.total_steps - self.step)
        return _duration(left)

    def status(self, loss: float, top1: float, images_per_second: float) -> None:
        """Show the current loss, accuracy (percent), speed and the time left."""
        text = (
            f"loss {loss:.3f}  acc {top1:.1f}%  {images_per_second:.0f} img/s  "
            f"{self._time_left()} left"
        )
        if self.progress.disable:
            self.line(f"step {self.step}/{self.total_steps}  {text}")
        self.progress.update(self.task, status=text)

    def elapsed(self) -> str:
        """Time since `start`, as hours:minutes:seconds."""
        return _duration(time.monotonic() - self.began)

    def epoch(self, epoch: int, train: dict[str, float], val: dict[str, float] | None) -> None:
        """Print the line of a finished epoch."""
        text = (
            f"epoch {epoch}/{self.epochs}  train loss {train['loss']:.3f} acc {train['top1']:.1f}%"
        )
        if val is not None:
            text += (
                f"  val loss {val['loss']:.3f} top-1 {val['top1']:.2f}% top-5 {val['top5']:.2f}%"
            )
        self.line(f"{text}  {self.elapsed()}")

    def summary(self, title: str, rows: dict[str, str]) -> None:
        """Print the closing table."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, value)
        self.console.print(table)
