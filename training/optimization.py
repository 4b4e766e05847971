"""Optimiser, learning-rate schedule and mixup, all timm's."""

from typing import Any

from timm.data.mixup import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.scheduler.step_lr import StepLRScheduler
from torch import nn
from torch.optim import Optimizer

from conf.schema import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    OptimizerConfig,
    ScheduleConfig,
    SGDConfig,
    TrainerConfig,
)


def learning_rate(config: OptimizerConfig, global_batch: int) -> float:
    """The peak learning rate for `global_batch` images per optimiser step."""
    if config.scale_lr:
        return config.base_lr * global_batch / config.scale_batch
    return config.base_lr


def build_optimizer(
    config: OptimizerConfig, model: nn.Module, lr: float, *, fused: bool = True
) -> Optimizer:
    """Group the parameters by weight decay (and depth) and create the optimiser.

    Args:
        config: The optimiser's settings.
        model: Whose parameters to optimise.
        lr: Peak learning rate.
        fused: Use PyTorch's fused step. It unscales float16 gradients itself, so Fabric cannot clip
            them before it: pass False where a loss scaler is at work.
    """
    if isinstance(config, AdamWConfig):
        name = "adamw"
        options: dict[str, Any] = {"betas": tuple(config.betas), "eps": config.eps}
    elif isinstance(config, SGDConfig):
        name = "sgd" if config.nesterov else "momentum"
        options = {"momentum": config.momentum}
    else:
        raise TypeError(f"config must be AdamWConfig or SGDConfig, got {type(config).__name__}")
    # Fused: on a CPU one pass over the parameters where the default takes a dozen, several times as
    # fast at tens of millions of parameters.
    return create_optimizer_v2(
        model,
        fused=fused,
        opt=name,
        lr=lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        **options,
    )


def build_schedule(
    config: ScheduleConfig, optimizer: Optimizer, *, epochs: int, steps_per_epoch: int
) -> Scheduler:
    """A schedule of the step alone: `step_update(step)` sets the rate of that optimiser step.

    As in the released code, the cosine runs over all steps and the warm-up covers its beginning.
    """
    warmup: dict[str, Any] = {
        "warmup_t": round(config.warmup_epochs * steps_per_epoch),
        "warmup_lr_init": config.warmup_lr,
        "warmup_prefix": False,
        "t_in_epochs": False,
    }
    if isinstance(config, CosineConfig):
        return CosineLRScheduler(
            optimizer, t_initial=epochs * steps_per_epoch, lr_min=config.min_lr, **warmup
        )
    if isinstance(config, ConstantConfig):
        return StepLRScheduler(optimizer, decay_t=1, decay_rate=1.0, **warmup)
    raise TypeError(f"config must be CosineConfig or ConstantConfig, got {type(config).__name__}")


def build_mixup(config: TrainerConfig, num_classes: int) -> Mixup | None:
    """Mixup and CutMix with label smoothing; None where both are off."""
    if not config.mixup and not config.cutmix:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.label_smoothing,
        num_classes=num_classes,
    )
