"""Rules that types cannot express, checked before any work starts.

Only the configuration is looked at here. What needs the data or the model (a window that does not
fit, an empty folder) is checked where those are built.
"""

from typing import Any

from conf.schema import (
    AdamWConfig,
    Config,
    ConfigError,
    DigitsConfig,
    DistillationConfig,
    ImageConfig,
    LampsConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    SyntheticConfig,
    TrainerConfig,
    WebDatasetConfig,
)

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp", "fsdp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
SMALLEST_LAMPS = 48  # pixels: room for every row
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # CUDA graphs
COMPILE_MODES = ("default", *GRAPH_MODES)
WANDB_MODES = ("offline", "online", "disabled")
INTERPOLATIONS = ("bilinear", "bicubic", "random")
ERASE_MODES = ("const", "rand", "pixel")
POLICIES = ("rand", "augmix", "3a", "original", "originalr", "v0", "v0r")  # of timm


def _require(holds: bool, key: str, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{key} must {rule}, got {value!r}")


def _positive(key: str, value: float | None) -> None:
    _require(value is None or value > 0, key, "be positive", value)


def _not_negative(key: str, value: float | None) -> None:
    _require(value is None or value >= 0, key, "not be negative", value)


def _fraction(key: str, value: float | None) -> None:
    _require(value is None or 0 <= value <= 1, key, "lie between 0 and 1", value)


def _one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, key, f"be one of {', '.join(choices)}", value)


def _int_or_ints(key: str, value: Any) -> None:
    items = value if isinstance(value, list) else [value]
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in items)
    _require(value is None or whole, key, "be an integer or a list of integers", value)


def _validate_model(model: ModelConfig) -> None:
    for name in ("window_size", "focal_levels", "expand_size", "region_sizes"):
        _int_or_ints(f"model.{name}", getattr(model, name))
    for name in ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"):
        _fraction(f"model.{name}", getattr(model, name))
    _require(
        not model.kwargs or not model.name.startswith("focal_"),
        "model.kwargs",
        f"be empty for {model.name}, whose options have keys of their own",
        model.kwargs,
    )


def _validate_images(data: ImageConfig) -> None:
    for name in ("crop_pct", "min_crop_area"):
        _positive(f"data.{name}", getattr(data, name))
        _fraction(f"data.{name}", getattr(data, name))
    for name in ("hflip", "erase_prob"):
        _fraction(f"data.{name}", getattr(data, name))
    for name in ("color_jitter", "max_broken"):
        _not_negative(f"data.{name}", getattr(data, name))
    _one_of("data.interpolation", data.interpolation, INTERPOLATIONS)
    _one_of("data.erase_mode", data.erase_mode, ERASE_MODES)
    if data.auto_augment is not None:
        policy = data.auto_augment.split("-")[0]
        rule = f"be a policy of timm's, beginning with {', '.join(POLICIES)}"
        _require(policy in POLICIES, "data.auto_augment", rule, data.auto_augment)
    for name in ("mean", "std"):
        value = getattr(data, name)
        _require(len(value) == 3, f"data.{name}", "have three entries", value)
    _require(min(data.std) > 0, "data.std", "be positive", data.std)
    if isinstance(data, WebDatasetConfig):
        _positive("data.num_classes", data.num_classes)
        _require(bool(data.image_keys), "data.image_keys", "not be empty", data.image_keys)


def _validate_lamps(data: LampsConfig) -> None:
    for name in ("train_size", "val_size"):
        _positive(f"data.{name}", getattr(data, name))
    for name in ("noise", "data_seed"):
        _not_negative(f"data.{name}", getattr(data, name))
    enough = data.img_size >= SMALLEST_LAMPS
    _require(enough, "data.img_size", f"be at least {SMALLEST_LAMPS}", data.img_size)


def _validate_data(config: Config) -> None:
    data = config.data
    _positive("data.img_size", data.img_size)
    _not_negative("data.num_workers", data.num_workers)
    _positive("data.repeated_aug", data.repeated_aug)
    if isinstance(data, DigitsConfig):
        _fraction("data.scale", data.scale)
        _fraction("data.translate", data.translate)
        _not_negative("data.rotate", data.rotate)
    elif isinstance(data, ImageConfig):
        _validate_images(data)
    elif isinstance(data, LampsConfig):
        _validate_lamps(data)
    elif isinstance(data, SyntheticConfig):
        for name in ("num_classes", "in_chans", "train_size", "val_size"):
            _positive(f"data.{name}", getattr(data, name))


def _validate_optimizer(optimizer: OptimizerConfig) -> None:
    _positive("optimizer.base_lr", optimizer.base_lr)
    _positive("optimizer.scale_batch", optimizer.scale_batch)
    _not_negative("optimizer.weight_decay", optimizer.weight_decay)
    _positive("optimizer.layer_decay", optimizer.layer_decay)
    _fraction("optimizer.layer_decay", optimizer.layer_decay)
    if isinstance(optimizer, AdamWConfig):
        in_range = len(optimizer.betas) == 2 and all(0 <= beta < 1 for beta in optimizer.betas)
        _require(in_range, "optimizer.betas", "be two numbers from [0, 1)", optimizer.betas)
        _positive("optimizer.eps", optimizer.eps)


def _validate_schedule(schedule: ScheduleConfig, trainer: TrainerConfig) -> None:
    _not_negative("schedule.warmup_lr", schedule.warmup_lr)
    _require(
        0 <= schedule.warmup_epochs < trainer.epochs,
        "schedule.warmup_epochs",
        f"be at least 0 and less than trainer.epochs ({trainer.epochs})",
        schedule.warmup_epochs,
    )


def _validate_trainer(trainer: TrainerConfig) -> None:
    for name in (
        "epochs",
        "batch_size",
        "eval_batch_size",
        "accumulate",
        "clip_grad",
        "num_nodes",
        "limit_train_batches",
        "limit_val_batches",
        "eval_every",
        "checkpoint_every",
        "log_every",
        "profile",
    ):
        _positive(f"trainer.{name}", getattr(trainer, name))
    for name in ("label_smoothing", "mixup_prob", "mixup_switch_prob", "ema_decay"):
        _fraction(f"trainer.{name}", getattr(trainer, name))
    for name in ("mixup", "cutmix", "seed"):
        _not_negative(f"trainer.{name}", getattr(trainer, name))
    _one_of("trainer.precision", trainer.precision, PRECISIONS)
    _one_of("trainer.strategy", trainer.strategy, STRATEGIES)
    _one_of("trainer.accelerator", trainer.accelerator, ACCELERATORS)
    _require(
        trainer.strategy != "fsdp" or trainer.precision != "16-mixed",
        "trainer.precision",
        "be auto, bf16-mixed or 32-true with trainer.strategy=fsdp",
        trainer.precision,
    )
    _one_of("trainer.compile_mode", trainer.compile_mode, COMPILE_MODES)
    _require(
        trainer.compile or trainer.compile_mode == "default",
        "trainer.compile",
        f"be true with trainer.compile_mode={trainer.compile_mode}",
        trainer.compile,
    )
    # A graph's replay overwrites the gradients that the one before it left.
    _require(
        trainer.accumulate == 1 or trainer.compile_mode not in GRAPH_MODES,
        "trainer.accumulate",
        f"be 1 with trainer.compile_mode={trainer.compile_mode}",
        trainer.accumulate,
    )
    numbers = trainer.devices.split(",")
    _require(
        trainer.devices == "auto" or all(number.strip().isdigit() for number in numbers),
        "trainer.devices",
        'be a number, "auto" or device indices such as "0,1"',
        trainer.devices,
    )
    if trainer.mixup or trainer.cutmix:
        even = trainer.batch_size % 2 == 0
        _require(even, "trainer.batch_size", "be even with mixup or cutmix", trainer.batch_size)
    if trainer.limit_train_batches is not None:
        _require(
            trainer.limit_train_batches >= trainer.accumulate,
            "trainer.limit_train_batches",
            f"be at least trainer.accumulate ({trainer.accumulate})",
            trainer.limit_train_batches,
        )


def _validate_distillation(distillation: DistillationConfig) -> None:
    _positive("distillation.temperature", distillation.temperature)
    _fraction("distillation.alpha", distillation.alpha)
    _require(
        (distillation.teacher is None) == (distillation.weights is None),
        "distillation.weights",
        f"be set if and only if distillation.teacher is ({distillation.teacher})",
        distillation.weights,
    )


def validate(config: Config) -> None:
    """Check every value of the configuration against its rule.

    Raises:
        ConfigError: A value breaks a rule; the message names the key, the rule and the value.
    """
    _validate_model(config.model)
    _validate_data(config)
    _validate_optimizer(config.optimizer)
    _validate_trainer(config.trainer)
    _validate_schedule(config.schedule, config.trainer)
    _validate_distillation(config.distillation)
    _one_of("logger.mode", config.logger.mode, WANDB_MODES)
    # A folder may hold a run that was stopped before its first save and begins again.
    _require(
        not (config.resume and config.resume.endswith(".ckpt") and config.finetune),
        "finetune",
        "be unset when resume is set to a file",
        config.finetune,
    )
    _require(
        not (config.resume == "auto" and config.eval_only),
        "resume",
        "name a folder or a file when eval_only is true",
        config.resume,
    )
    _require(
        config.finetune != "" or bool(config.resume),
        "finetune",
        "name the file of weights that this experiment starts from",
        config.finetune,
    )
    _require(
        bool(config.resume or config.finetune) or not config.eval_only,
        "resume or finetune",
        "name the weights to evaluate when eval_only is true",
        config.resume,
    )
