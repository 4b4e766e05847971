"""The loop: optimiser steps, evaluation, then checkpoints, in this order in every epoch."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from safetensors.torch import save_file
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from conf.schema import Config, ConfigError, SGDConfig
from data import BrokenImages, ImageData, eval_loader, train_loader
from data.loading import TrainBatches
from data.seeding import STEP, derive_seed, seed_global
from training import fsdp
from training.distillation import Teacher
from training.memory import peak_memory_bytes, reset_peak_memory
from training.metrics import ClassificationMetrics, cross_entropy
from training.optimization import build_mixup, build_optimizer, build_schedule, learning_rate
from training.profiling import SKIPPED, WARMUP, StepProfiler
from training.reporting import Reporter
from training.saving import Saver
from training.signals import RunStopped, StopSignals, WorkerShield

Batch = tuple[torch.Tensor, torch.Tensor]


class Trainer:
    """Trains and evaluates one model; every process of a run has one.

    Args:
        config: The validated configuration.
        fabric: A launched Fabric.
        model: The model, on the CPU; it is moved to the Fabric's device in place.
        data: What to train and evaluate on.

    Raises:
        ConfigError: The training set is smaller than one global batch, the run is too short for
            the profiler, or the teacher cannot be built.
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

        # The first process has the most batches.
        share = math.ceil(len(data.val) / fabric.world_size)
        self.eval_steps = math.ceil(share / (settings.eval_batch_size or settings.batch_size))
        if settings.limit_val_batches is not None:
            self.eval_steps = min(self.eval_steps, settings.limit_val_batches)
        size = (1, data.in_chans, data.img_size, data.img_size)
        self.blank = torch.zeros(size, device=fabric.device)

        self.worker_shield = WorkerShield()
        for batches in (self.train_batches, self.val_batches):
            batches.loader.worker_init_fn = self.worker_shield
        untraced = SKIPPED + WARMUP
        if settings.profile is not None and settings.profile + untraced > self.total_steps:
            raise ConfigError(
                f"trainer.profile must leave {untraced} of the run's {self.total_steps} optimiser "
                f"steps untraced, got {settings.profile}"
            )

        if settings.channels_last:
            model.to(memory_format=torch.channels_last)
        if settings.compile:
            model.compile(mode=settings.compile_mode)
        self.sharded = settings.strategy == "fsdp"
        self.ema: ModelEmaV3 | None = None
        if settings.ema_decay:
            # A sharded model cannot be copied, and has tensors of two kinds.
            self.ema = ModelEmaV3(model, decay=settings.ema_decay, foreach=not self.sharded)
        self.wrapped = fabric.setup_module(model)  # the optimiser is for what this makes of it
        if self.ema is not None and self.sharded:
            mesh = cast(ModelParallelStrategy, fabric.strategy).device_mesh
            fsdp.shard_model(self.ema.module, mesh)
        elif self.ema is not None:
            self.ema.module.to(fabric.device)
        lr = learning_rate(config.optimizer, self.global_batch)
        scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        # PyTorch has no fused SGD for sharded parameters.
        fused = not (scaled or (self.sharded and isinstance(config.optimizer, SGDConfig)))
        self.optimizer = build_optimizer(config.optimizer, model, lr, fused=fused)
        self.schedule = build_schedule(
            config.schedule,
            self.optimizer,
            epochs=settings.epochs,
            steps_per_epoch=self.steps_per_epoch,
        )
        self.mixup = build_mixup(settings, data.num_classes)
        self.wrapped_optimizer = cast(Optimizer, fabric.setup_optimizers(self.optimizer))

        self.teacher: Teacher | None = None
        if config.distillation.teacher is not None:
            self.teacher = Teacher(config.distillation, data).to(fabric.device)

        self.epoch_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.interval_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.val_metrics = ClassificationMetrics(data.num_classes, fabric.device)
        self.epoch = 0  # epochs finished
        self.step = 0  # optimiser steps finished in the current epoch
        self.best: dict[str, float] | None = None
        self.signals = StopSignals()
        self._losses: list[torch.Tensor] = []  # of the micro-batches since the last check
        self._run_dir = Path()

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
            NotSavedError: The end of the run could not be saved.
            RunStopped: A signal came; the state is saved.
        """
        self._run_dir = run_dir
        reset_peak_memory(self.fabric.device)
        saver = Saver(self, run_dir, reporter)
        profiler = None
        if self.settings.profile is not None and self.fabric.is_global_zero:
            profiler = StepProfiler(self.settings.profile, run_dir, reporter.console.line)
        with self.signals, profiler or nullcontext():
            for epoch in range(self.epoch, self.settings.epochs):
                self._train_epoch(epoch, saver, reporter, profiler)
                self._finish_epoch(epoch + 1, saver, reporter)
        saver.finish()
        assert self.best is not None  # the last epoch is always evaluated
        return self.best

    def _train_epoch(
        self, epoch: int, saver: Saver, reporter: Reporter, profiler: StepProfiler | None
    ) -> None:
        """Run the steps of `epoch` that are left."""
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
            if profiler is not None:
                profiler.step()
            done = self.step == self.steps_per_epoch
            if self.global_step % settings.log_every == 0 or done:
                self._record(grad_norm, reporter)
            elif reporter.nothing_shown:
                reporter.show(self.interval_metrics.compute())
            self._stop_if_asked(done, saver)
            every = settings.checkpoint_every
            # The end of an epoch is saved after its evaluation.
            if every is not None and self.global_step % every == 0 and not done:
                saver.save()

    def _finish_epoch(self, epoch: int, saver: Saver, reporter: Reporter) -> None:
        """Evaluate if it is time, report and save; `epoch` are finished then."""
        train = self.epoch_metrics.compute()
        train["broken_images"] = self.broken.gather()
        val = None
        if epoch % self.settings.eval_every == 0 or epoch == self.settings.epochs:
            reporter.start_evaluation()
            found = dict(self.broken.found)
            val = self.evaluate()
            if val is None:  # it is done again, from its beginning
                self.broken.found = found
                self._stop(saver, self.signals.received)
        self.epoch_metrics.reset()
        self.epoch, self.step = epoch, 0
        improved = val is not None and (self.best is None or val["top1"] > self.best["top1"])
        if val is not None and improved:
            self.best = {**val, "epoch": epoch}
        peak = peak_memory_bytes(self.fabric.device)
        reporter.epoch(epoch, self.global_step, train, val, peak_memory_bytes=peak)
        saver.save(improved=improved)

    def _stop_if_asked(self, done: bool, saver: Saver) -> None:
        """End the run if a signal has come; several processes agree on it where they meet."""
        asked = self.signals.received or 0
        if self.fabric.world_size > 1:
            if self.global_step % self.settings.log_every and not done:
                return
            mine = torch.tensor(asked, device=self.fabric.device)
            asked = int(cast(torch.Tensor, self.fabric.all_reduce(mine, reduce_op="max")))
        if asked:
            self._stop(saver, asked)

    def _stop(self, saver: Saver, number: int | None) -> NoReturn:
        """Save and end the run because of the signal `number`."""
        saver.save()
        raise RunStopped(number, first=self.fabric.is_global_zero)

    def _optimizer_step(self, batches: Iterator[Batch]) -> torch.Tensor | None:
        """One optimiser step over `accumulate` micro-batches; returns the gradient's norm."""
        settings = self.settings
        for micro in range(settings.accumulate):
            position = self.global_step * settings.accumulate + micro
            images, targets = self._micro_batch(batches, position)
            expected = None
            if self.teacher is not None:
                with self.fabric.autocast():
                    expected = self.teacher(images)
            accumulating = micro + 1 < settings.accumulate
            with self.fabric.no_backward_sync(self.wrapped, enabled=accumulating):
                logits = self.wrapped(images)
                loss = cross_entropy(logits, targets, settings.label_smoothing)
                if self.teacher is not None and expected is not None:
                    loss = self.teacher.loss(logits, expected, loss)
                self.fabric.backward(loss / settings.accumulate)
            self._losses.append(loss.detach())
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
        return None if grad_norm is None else fsdp.full({"": grad_norm})[""]

    def _micro_batch(self, batches: Iterator[Batch], position: int) -> Batch:
        """The next batch as the model sees it; seeds what is random in micro-batch `position`."""
        images, targets = self.fabric.to_device(next(batches))
        seed_global(derive_seed(self.settings.seed, STEP, position, self.fabric.global_rank))
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        if self.settings.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def check_finite(self, *, weights: bool = False) -> None:
        """Look at the losses since the last check; all processes must call it.

        Args:
            weights: Look at the weights too.

        Raises:
            FloatingPointError: One is not finite; the batch that gave it is in the run folder.
        """
        losses = [float(loss) for loss in torch.stack(self._losses)] if self._losses else []
        first = self.global_step * self.settings.accumulate - len(losses)
        self._losses.clear()
        index = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        parameters = list(self.model.parameters()) if weights else []
        whole = all(bool(fsdp.local(value).isfinite().all()) for value in parameters)
        mine = torch.tensor(index is not None or not whole, device=self.fabric.device).int()
        if int(cast(torch.Tensor, self.fabric.all_reduce(mine, reduce_op="max"))) == 0:
            return
        if index is not None:
            what, position = f"the training loss is {losses[index]}", first + index
        elif not whole:
            what, position = "a weight is not finite", first + len(losses) - 1
        else:
            raise FloatingPointError("the training loss of another process is not finite")
        step = position // self.settings.accumulate + 1
        path = self._save_batch(position, step)
        raise FloatingPointError(
            f"{what} at step {step}; its batch is in {path}; lower optimizer.base_lr, lengthen "
            "schedule.warmup_epochs or set trainer.clip_grad"
        )

    def _save_batch(self, position: int, step: int) -> Path:
        """Load micro-batch `position` of this process once more and write it to a file."""
        epoch, start = divmod(position, self.steps_per_epoch * self.settings.accumulate)
        self.batches.set_position(epoch, start)
        images, targets = self._micro_batch(iter(self.train_batches), position)
        path = self._run_dir / f"bad_batch_step_{step}_rank_{self.fabric.global_rank}.safetensors"
        save_file({"images": images.contiguous(), "targets": targets}, path)
        return path

    def _record(self, grad_norm: torch.Tensor | None, reporter: Reporter) -> None:
        """Report the steps since the last record."""
        self.check_finite()
        values = self.interval_metrics.compute()
        self.interval_metrics.reset()
        values["lr"] = max(group["lr"] for group in self.optimizer.param_groups)
        if grad_norm is not None:
            values["grad_norm"] = float(grad_norm)
        reporter.train(self.global_step, self.global_step / self.steps_per_epoch, values)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Loss, top-1 and top-5 (percent) on the evaluation set, each image counted once.

        None if a signal came before the end; several processes finish all the same.
        """
        model = self.evaluated_model
        model.eval()
        self.val_metrics.reset()
        if self.sharded:
            fsdp.broadcast_buffers(model)
        batches = iter(self.val_batches)
        for _ in range(self.eval_steps):
            if self.signals.received is not None and self.fabric.world_size == 1:
                return None
            batch = next(batches, None)
            # The bare module: processes may have different numbers of batches here.
            with self.fabric.autocast():
                if batch is not None:
                    images, targets = self.fabric.to_device(batch)
                    logits = model(images)
                    self.val_metrics.update(cross_entropy(logits, targets), logits, targets)
                elif self.sharded:  # the others need this process's part of the weights
                    model(self.blank)
        self.broken.gather()  # over its limit a run ends here
        return self.val_metrics.compute()
