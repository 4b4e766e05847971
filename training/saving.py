"""What a run saves, in which order, and how it starts again from it.

`last.ckpt` holds everything that continuing needs: weights, their moving average, optimiser, loss
scaler, position, metrics so far, the number of lines of `metrics.jsonl` and the Weights & Biases
run id. Learning rate, sample order, augmentation and dropout are functions of the position and the
seed (see `data.seeding`), so no generator state is stored. `last.1.ckpt` is the one before it.
`best.ckpt` holds the evaluated weights alone. Where the model is sharded these two are folders to
which every process writes its part (`training.shards`), and `best.ckpt` is a file as always.
"""

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from conf.schema import ConfigError
from training import checkpoint, fsdp, shards
from training.checkpoint import BEST, LAST, PREVIOUS
from training.reporting import Reporter

if TYPE_CHECKING:
    from training.loop import Trainer


class NotSavedError(RuntimeError):
    """The end of a run is not on disk; the message says why and what to do."""


class Saver:
    """Writes the checkpoints of a run; a full disk makes it warn and try again with the next.

    Args:
        trainer: Whose state to save.
        run_dir: Where to.
        reporter: Knows the records and prints warnings.
    """

    def __init__(self, trainer: "Trainer", run_dir: Path, reporter: Reporter) -> None:
        self.trainer = trainer
        self.run_dir = run_dir
        self.reporter = reporter
        self.error: OSError | None = None  # why the newest state is not on disk
        self._unsaved_best: dict[str, Any] | None = None

    def save(self, *, improved: bool = False) -> None:
        """Write `last.ckpt`, and before it `best.ckpt` if the evaluation `improved`.

        In this order: a run that stops between the two evaluates again and saves the same best.
        All processes must call it.

        Raises:
            FloatingPointError: A parameter is not finite; the files stay as they were.
        """
        trainer = self.trainer
        trainer.check_finite(weights=True)
        trainer.broken.gather()
        metrics = {
            "epoch": trainer.epoch_metrics.state_dict(),
            "interval": trainer.interval_metrics.state_dict(),
        }
        if improved:
            best = self._best()
            self._unsaved_best = best if trainer.fabric.is_global_zero else None
        error: OSError | None = None
        digest = ""
        slices: dict[str, torch.Tensor] = {}
        content = self._last(metrics)
        if self._in_parts:
            content = shards.split(content, slices)
        try:
            if trainer.fabric.is_global_zero:
                self._save_best()
                self.reporter.sync()  # the lines that the checkpoint counts
            if self._in_parts:
                digest = shards.save_part(self.run_dir / LAST, trainer.fabric.global_rank, slices)
            elif trainer.fabric.is_global_zero:
                checkpoint.save(self.run_dir / LAST, content, previous=self.run_dir / PREVIOUS)
        except OSError as problem:
            error = problem
        if self._in_parts:
            error = self._commit(content, digest, error)
        self._note(error, improved)
        trainer.fabric.barrier()

    @property
    def _in_parts(self) -> bool:
        return fsdp.is_sharded(self.trainer.model)

    def _commit(self, rest: dict[str, Any], digest: str, error: OSError | None) -> OSError | None:
        """Complete `last.ckpt` if every process has written its part; gives the first error."""
        results: list[tuple[str, OSError | None]] = [("", None)] * self.trainer.fabric.world_size
        dist.all_gather_object(results, (digest, error))
        error = next((problem for _, problem in results if problem is not None), None)
        path = self.run_dir / LAST
        if error is None and self.trainer.fabric.is_global_zero:
            try:
                digests = [digest for digest, _ in results]
                shards.commit(path, rest, digests, previous=self.run_dir / PREVIOUS)
            except OSError as problem:
                error = problem
        if error is not None and self.trainer.fabric.is_global_zero:
            shards.discard(path)
        return error

    def _note(self, error: OSError | None, improved: bool) -> None:
        """Remember that the newest state is on disk, or why it is not."""
        self.error = error if self.trainer.fabric.is_global_zero else None
        if self.error is not None:
            if improved:  # the weights will have changed when it is tried again
                self._unsaved_best = deepcopy(self._unsaved_best)
            self.reporter.warn(
                f"cannot save step {self.trainer.global_step} to {self.run_dir}: {error}; older "
                "checkpoints are as they were; the run goes on and tries again at the next save"
            )

    def finish(self) -> None:
        """The run has ended.

        Raises:
            NotSavedError: Its last state could not be saved.
        """
        if self.error is not None:
            raise NotSavedError(
                f"the end of the run could not be saved to {self.run_dir} ({self.error}); make "
                f"room and continue from the last save with resume={self.run_dir}"
            ) from self.error

    def _best(self) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "config": asdict(trainer.config),
            "epoch": trainer.epoch,
            "step": trainer.step,
            "best": trainer.best,
            "model": fsdp.full(trainer.evaluated_model.state_dict()),
        }

    def _save_best(self) -> None:
        if self._unsaved_best is not None:
            checkpoint.save(self.run_dir / BEST, self._unsaved_best)
            self._unsaved_best = None

    def _last(self, metrics: dict[str, Any]) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "config": asdict(trainer.config),
            "epoch": trainer.epoch,
            "step": trainer.step,
            "steps_per_epoch": trainer.steps_per_epoch,
            "best": trainer.best,
            "model": trainer.model.state_dict(),
            "ema": None if trainer.ema is None else trainer.ema.module.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.fabric.strategy.precision.state_dict(),
            "metrics": metrics,
            "broken": trainer.broken.found,
            "lines": self.reporter.lines,
            "wandb_id": self.reporter.wandb_id,
        }


def restore(trainer: "Trainer", content: dict[str, Any]) -> None:
    """Continue from what `Saver` wrote to `last.ckpt`.

    Raises:
        ConfigError: The checkpoint is past the last epoch, ends inside an epoch that this
            configuration cuts into other steps, or has no moving average where one is kept.
    """
    settings = trainer.settings
    if content["epoch"] >= settings.epochs:
        raise ConfigError(
            f"trainer.epochs must exceed the {content['epoch']} epochs that the checkpoint has "
            f"finished, got {settings.epochs}"
        )
    if content["step"] and content["steps_per_epoch"] != trainer.steps_per_epoch:
        raise ConfigError(
            "trainer.batch_size · trainer.accumulate · processes must be as before: the "
            f"checkpoint stopped inside an epoch of {content['steps_per_epoch']} steps, this "
            f"configuration has {trainer.steps_per_epoch}"
        )
    if (content["ema"] is None) != (trainer.ema is None):
        raise ConfigError(
            "trainer.ema_decay must be set if and only if the checkpoint's run had it set, got "
            f"{settings.ema_decay}"
        )
    fsdp.load_model(trainer.model, content["model"])
    if trainer.ema is not None:
        fsdp.load_model(trainer.ema.module, content["ema"])
    fsdp.load_optimizer(trainer.optimizer, content["optimizer"])
    trainer.fabric.strategy.precision.load_state_dict(content["scaler"])
    trainer.epoch, trainer.step = content["epoch"], content["step"]
    trainer.best = content["best"]
    trainer.broken.found |= content["broken"]
    if trainer.fabric.is_global_zero:  # the sums are over all processes: one holds them
        trainer.epoch_metrics.load_state_dict(content["metrics"]["epoch"])
        trainer.interval_metrics.load_state_dict(content["metrics"]["interval"])
