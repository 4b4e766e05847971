"""Sends what happens in a run to the console and to the records, and measures its speed."""

import time

from training.console import RunConsole
from training.records import Records


class Reporter:
    """One place for the loop to report to.

    Args:
        console: Prints progress; quiet on processes other than the first.
        records: Writes the run folder; None on processes other than the first.
    """

    def __init__(self, console: RunConsole, records: Records | None) -> None:
        self.console = console
        self.records = records
        self.nothing_shown = True
        self._interval_images = self._epoch_images = self._images = 0
        self._interval_began = self._epoch_seconds = self._seconds = 0.0

    @property
    def wandb_id(self) -> str | None:
        """Id of the Weights & Biases run, for continuing it."""
        return None if self.records is None else self.records.wandb_id

    @property
    def lines(self) -> int:
        """Lines of `metrics.jsonl` so far."""
        return 0 if self.records is None else len(self.records.lines)

    def sync(self) -> None:
        """Make those lines durable.

        Raises:
            OSError: The disk has no room.
        """
        if self.records is not None:
            self.records.sync()

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.line(f"warning: {text}")

    @property
    def images_per_second(self) -> float:
        """Training speed so far; evaluation and saving left out."""
        return self._images / self._seconds if self._seconds else 0.0

    def start_training(self, epoch: int) -> None:
        """`epoch`, counted from 0, begins."""
        self.console.phase(f"epoch {epoch + 1}/{self.console.epochs}")
        self._interval_images = self._epoch_images = 0
        self._epoch_seconds = 0.0
        self._interval_began = time.monotonic()

    def start_evaluation(self) -> None:
        """An evaluation begins."""
        self.console.phase("evaluating")

    def advance(self, images: int) -> None:
        """An optimiser step over `images` images is done."""
        self._interval_images += images
        self.console.advance()

    def show(self, values: dict[str, float]) -> float:
        """Show `loss` and `top1` of the current interval; returns its images per second."""
        self.nothing_shown = False
        speed = self._interval_images / (time.monotonic() - self._interval_began)
        self.console.status(values["loss"], values["top1"], speed)
        return speed

    def train(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """An interval of steps ends at `step`, `epoch` epochs into the run."""
        speed = self.show(values)
        seconds = time.monotonic() - self._interval_began
        self._seconds += seconds
        self._epoch_seconds += seconds
        self._images += self._interval_images
        self._epoch_images += self._interval_images
        self._interval_images = 0
        self._interval_began = time.monotonic()
        if self.records is not None:
            line = {"epoch": round(epoch, 4), **values, "images_per_second": round(speed, 1)}
            self.records.write("train", step, line)

    def epoch(
        self,
        epoch: int,
        step: int,
        train: dict[str, float],
        val: dict[str, float] | None,
        *,
        peak_memory_bytes: int,
    ) -> None:
        """`epoch` epochs are finished, the last one evaluated if `val` is given."""
        self.console.epoch(epoch, train, val)
        if self.records is not None:
            line: dict[str, float] = {"epoch": epoch}
            for split, values in (("train", train), ("val", val or {})):
                line |= {f"{split}_{name}": value for name, value in values.items()}
            if self._epoch_seconds:  # else it was trained before an interruption
                line["images_per_second"] = round(self._epoch_images / self._epoch_seconds, 1)
            line["peak_memory_bytes"] = peak_memory_bytes
            self.records.write("epoch", step, line)
            self.records.draw()

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """The result of an evaluation-only run."""
        if self.records is not None:
            self.records.write("evaluation", step, values)

    def close(self, *, failed: bool) -> None:
        """The run has ended."""
        self.console.stop()
        if self.records is not None:
            self.records.close(failed=failed)
