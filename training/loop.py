"""The loop: optimiser steps, evaluation, then checkpoints, in this order in every epoch."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from conf.schema import Config, ConfigError
from data import BrokenImages, ImageData, eval_loader, train_loader
from data.loading import TrainBatches
from data.seeding import STEP, derive_seed, seed_global
from training import checkpoint
from training.metrics import ClassificationMetrics, cross_entropy
from training.optimization import build_mixup, build_optimizer, build_schedule, learning_rate
from training.reporting import Reporter

Batch = tuple[torch.Tensor, torch.Tensor]


class Trainer:
    """Trains and evaluates one model; every process of a run has one.

    Args:
        config: The validated configuration.
        fabric: A launched Fabric.
        model: The model, on the CPU; it is moved to the Fabric's device in place.
        data: What to train and evaluate on.

    Raises:
        ConfigError: The training set is smaller than one global batch.
    """

    def __init__(
        self, config: Config, *, fabric: Fabric, model: nn.Module, data: ImageData
    ) -> None:
        self.config = config
        self.settings = settings = config.trainer
        self.fabric = fabric
        self.model = model

        available = len(data.train) // (settings.batch_size * fabric.world_size)
        if settings.limit_train_batches is not None:
            available = min(available, settings.limit_train_batches)
        self.steps_per_epoch = available // settings.accumulate
        self.global_batch = settings.batch_size * settings.accumulate * fabric.world_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                "trainer.batch_size · trainer.accumulate · processes must not exceed the "
                f"{len(data.train)} training images, got {settings.batch_size} · "
                f"{settings.accumulate} · {fabric.world_size}"
            )
        shard: dict[str, Any] = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        self.broken = BrokenImages(data.max_broken)
        loading: dict[str, Any] = {
            "broken": self.broken,
            "num_workers": config.data.num_workers,
            "pin_memory": fabric.device.type == "cuda",
        }
        self.batches = TrainBatches(
            len(data.train),
            settings.batch_size,
            seed=settings.seed,
            limit=self.steps_per_epoch * settings.accumulate,
            repeats=config.data.repeated_aug,
            **shard,
        )
        self.train_batches = train_loader(data.train, self.batches, **loading)
        self.val_batches = eval_loader(
            data.val, settings.eval_batch_size or settings.batch_size, **shard, **loading
        )

        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        lr = learning_rate(config.optimizer, self.global_batch)
        scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        self.optimizer = build_optimizer(config.optimizer, model, lr, fused=not scaled)
        self.schedule = build_schedule(
            config.schedule,
            self.optimizer,
            epochs=settings.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.mixup = build_mixup(settings, data.num_classes)
        if settings.compile:
            model.compile()
        self.wrapped, self.wrapped_optimizer = fabric.setup(model, self.optimizer)
        self.ema = ModelEmaV3(model, decay=settings.ema_decay) if settings.ema_decay else None

        self.epoch_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.interval_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.val_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.epoch = 0  # epochs finished
        self.step = 0  # optimiser steps finished in the current epoch
        self.best: dict[str, float] | None = None

    @property
    def evaluated_model(self) -> nn.Module:
        """What evaluation and `best.ckpt` use: the moving average where there is one."""
        return self.model if self.ema is None else self.ema.module

    @property
    def global_step(self) -> int:
        """Optimiser steps finished since the run began."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.settings.epochs * self.steps_per_epoch

    def fit(self, run_dir: Path, reporter: Reporter) -> dict[str, float]:
        """Train to the last epoch, evaluating, reporting and saving to `run_dir` on the way.

        Returns:
            The best evaluation: `loss`, `top1` and `top5` in percent, and its `epoch`.

        Raises:
            FloatingPointError: The loss stopped being finite.
        """
        for epoch in range(self.epoch, self.settings.epochs):
            train = self._train_epoch(epoch, run_dir, reporter)
            self.epoch, self.step = epoch + 1, 0
            due = self.epoch % self.settings.eval_every == 0
            val = None
            if due or self.epoch == self.settings.epochs:
                reporter.start_evaluation()
                val = self.evaluate()
            improved = val is not None and (self.best is None or val["top1"] > self.best["top1"])
            if val is not None and improved:
                self.best = {**val, "epoch": self.epoch}
            reporter.epoch(self.epoch, self.global_step, train, val)
            self._save(run_dir / "last.ckpt", reporter.wandb_id)
            if improved:
                self._save_weights(run_dir / "best.ckpt")
        assert self.best is not None  # the last epoch is always evaluated
        return self.best

    def _train_epoch(self, epoch: int, run_dir: Path, reporter: Reporter) -> dict[str, float]:
        """Run the steps of `epoch` that are left and return its training metrics."""
        settings = self.settings
        self.wrapped.train(not settings.freeze_backbone)  # frozen features are those of evaluation
        self.batches.set_position(epoch, self.step * settings.accumulate)
        batches = iter(self.train_batches)
        reporter.start_training(epoch)
        while self.step < self.steps_per_epoch:
            self.schedule.step_update(self.global_step)
            grad_norm = self._optimizer_step(batches)
            self.step += 1
            reporter.advance(self.global_batch)
            done = self.step == self.steps_per_epoch
            if self.global_step % settings.log_every == 0 or done:
                self._record(grad_norm, reporter)
            elif reporter.nothing_shown:
                reporter.show(self.interval_metrics.compute())
            every = settings.checkpoint_every
            # The end of an epoch is saved after its evaluation.
            if every is not None and self.global_step % every == 0 and not done:
                self._save(run_dir / "last.ckpt", reporter.wandb_id)
        train = self.epoch_metrics.compute()
        self.epoch_metrics.reset()
        train["broken_images"] = self.broken.gather()
        return train

    def _optimizer_step(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """One optimiser step over `accumulate` micro-batches; returns the gradient's norm."""
        settings = self.settings
        for micro in range(settings.accumulate):
            images, targets = self.fabric.to_device(next(batches))
            position = self.global_step * settings.accumulate + micro
            seed_global(derive_seed(settings.seed, STEP, position, self.fabric.global_rank))
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            if settings.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            accumulating = micro + 1 < settings.accumulate
            with self.fabric.no_backward_sync(self.wrapped, enabled=accumulating):
                logits = self.wrapped(images)
                loss = cross_entropy(logits, targets, settings.label_smoothing)
                self.fabric.backward(loss / settings.accumulate)
            for metrics in (self.epoch_metrics, self.interval_metrics):
                metrics.update(loss, logits, targets)
        grad_norm = None
        if settings.clip_grad is not None:
            grad_norm = self.fabric.clip_gradients(
                self.wrapped,
                self.wrapped_optimizer,
                max_norm=settings.clip_grad,
                error_if_nonfinite=False,  # a loss scaler skips such steps; _record finds the rest
            )
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        return grad_norm

    def _record(self, grad_norm: torch.Tensor | None, reporter: Reporter) -> None:
        """Report the steps since the last record."""
        values = self.interval_metrics.compute()
        self.interval_metrics.reset()
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the training loss is {values['loss']} at step {self.global_step}; lower "
                "optimizer.base_lr, lengthen schedule.warmup_epochs or set trainer.clip_grad"
            )
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        reporter.train(self.global_step, self.global_step / self.steps_per_epoch, values)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 (percent) on the evaluation set, each image counted once."""
        model = self.evaluated_model
        model.eval()
        self.val_metrics.reset()
        for index, (images, targets) in enumerate(self.val_batches):
            if index == self.settings.limit_val_batches:
                break
            images, targets = self.fabric.to_device((images, targets))
            # The bare module: processes may have different numbers of batches here.
            with self.fabric.autocast():
                logits = model(images)
            self.val_metrics.update(cross_entropy(logits, targets), logits, targets)
        self.broken.gather()  # over its limit a run ends here
        return self.val_metrics.compute()

    def _save(self, path: Path, wandb_id: str | None) -> None:
        """Write all that continuing needs; all processes must call it."""
        metrics = {
            "epoch": self.epoch_metrics.state_dict(),
            "interval": self.interval_metrics.state_dict(),
        }
        if self.fabric.is_global_zero:
            content: dict[str, Any] = {
                "config": asdict(self.config),
                "epoch": self.epoch,
                "step": self.step,
                "steps_per_epoch": self.steps_per_epoch,
                "best": self.best,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.fabric.strategy.precision.state_dict(),
                "metrics": metrics,
                "wandb_id": wandb_id,
            }
            checkpoint.save(path, content)
        self.fabric.barrier()

    def _save_weights(self, path: Path) -> None:
        """Write the evaluated weights; all processes must call it."""
        if self.fabric.is_global_zero:
            content = {
                "config": asdict(self.config),
                "epoch": self.epoch,
                "step": self.step,
                "best": self.best,
                "model": self.evaluated_model.state_dict(),
            }
            checkpoint.save(path, content)
        self.fabric.barrier()

    def resume(self, content: dict[str, Any]) -> None:
        """Continue from what `_save` wrote.

        Raises:
            ConfigError: The checkpoint holds weights alone, is past the last epoch, or ends inside
                an epoch that this configuration cuts into other steps.
        """
        if "optimizer" not in content:
            raise ConfigError(
                "resume must name a last.ckpt to continue training; a best.ckpt holds weights "
                "alone, for eval_only=true or finetune"
            )
        if content["epoch"] >= self.settings.epochs:
            raise ConfigError(
                f"trainer.epochs must exceed the {content['epoch']} epochs that the checkpoint has "
                f"finished, got {self.settings.epochs}"
            )
        if content["step"] and content["steps_per_epoch"] != self.steps_per_epoch:
            raise ConfigError(
                "trainer.batch_size · trainer.accumulate · processes must be as before: the "
                f"checkpoint stopped inside an epoch of {content['steps_per_epoch']} steps, this "
                f"configuration has {self.steps_per_epoch}"
            )
        if (content["ema"] is None) != (self.ema is None):
            raise ConfigError(
                "trainer.ema_decay must be set if and only if the checkpoint's run had it set, got "
                f"{self.settings.ema_decay}"
            )
        self.model.load_state_dict(content["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.fabric.strategy.precision.load_state_dict(content["scaler"])
        self.epoch, self.step, self.best = content["epoch"], content["step"], content["best"]
        if self.fabric.is_global_zero:  # the sums are over all processes: one holds them
            self.epoch_metrics.load_state_dict(content["metrics"]["epoch"])
            self.interval_metrics.load_state_dict(content["metrics"]["interval"])
