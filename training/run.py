"""One run from its configuration: prepare, train or evaluate, sum up."""

import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import models
from conf.schema import Config, ConfigError, TrainerConfig
from data import build
from kernels.processor import abilities
from training import checkpoint
from training.checkpoint import BEST, LAST
from training.console import RunConsole
from training.evaluation import FILE as EVALUATION_FILE
from training.evaluation import PICTURE as RELIABILITY_PICTURE
from training.evaluation import EvaluationReport
from training.fsdp import fsdp_strategy, load_model
from training.loop import Trainer
from training.model import attention_backend, build_model, freeze_backbone
from training.processes import environments, layout
from training.records import Records, read_history
from training.reporting import Reporter
from training.resuming import AUTO, CONFIG, Resumed, find, set_damaged_aside
from training.saving import restore
from training.signals import RunStopped, requeue
from training.summary import summary


def run(config: Config, run_dir: Path) -> dict[str, float]:
    """Train, or only evaluate, as `config` says.

    Everything that can be wrong with the configuration is found before anything is written.

    Args:
        config: A validated configuration.
        run_dir: Where results go; must exist, and hold no run but one that is continued in place.
            Of several processes that of the first counts.

    Returns:
        Loss, top-1 and top-5 (percent): of the best epoch, or of the evaluation.

    Raises:
        ConfigError: A setting does not suit the data, the model, the machine or the checkpoint.
        FloatingPointError: The loss stopped being finite.
        NotSavedError: The end of the run could not be saved.
        RunStopped: A signal came; the state is saved.
    """
    _set_up_torch(config.trainer)
    data = build(config.data)
    resumed = find(config, run_dir)
    beginning = resumed is None or resumed.path is None
    if config.finetune == "" and beginning:
        raise ConfigError(
            "finetune must name the file of weights that this experiment starts from: there is "
            f"no checkpoint in {run_dir} to continue"
        )
    precision = resolve_precision(config.trainer)
    fabric = _make_fabric(config.trainer, precision)
    console = RunConsole(epochs=config.trainer.epochs, enabled=fabric.is_global_zero)
    if resumed is not None:
        for fault in resumed.faults:
            console.line(f"warning: {fault}; using {resumed.path}")
        if config.resume == AUTO and resumed.content.get("epoch", 0) >= config.trainer.epochs:
            console.line(f"{run_dir} is finished: {config.trainer.epochs} epochs")
            return resumed.content["best"]
    model = build_model(config.model, data, seed=config.trainer.seed)
    backend = attention_backend(model, fabric.device, precision)
    if config.finetune and beginning:
        _load_weights(model, config.finetune, console)
    if config.trainer.freeze_backbone:
        freeze_backbone(model)
    fabric.launch()
    run_dir = Path(fabric.broadcast(str(run_dir)))

    overview = None
    if fabric.is_global_zero and not config.eval_only:  # before the trainer wraps the model
        overview = summary(config, model, data, device=fabric.device, precision=precision)
    trainer = Trainer(config, fabric=fabric, model=model, data=data)
    if resumed is not None:
        _restore(trainer, resumed, console)
    records = None
    if fabric.is_global_zero:
        records = _open_records(config, run_dir, trainer, resumed, console)
    reporter = Reporter(console, records)
    parts = [
        f"{config.model.name} ({_millions(model)} parameters) on {config.data.name}",
        _devices(fabric),
        precision,
        f"{backend} attention" if backend else "no focal attention",
        f"results in {run_dir}",
    ]
    console.line(" · ".join(parts))
    if overview is not None:
        console.overview(overview)
    failed, warned = True, False
    try:
        if config.eval_only:
            trainer.val_metrics = report = EvaluationReport(data.class_names, fabric.device)
            result = trainer.evaluate()
            assert result is not None  # no signal is caught here
            reporter.evaluation(trainer.global_step, result)
            details = report.details()
            if fabric.is_global_zero:
                report.write(run_dir, details)
        else:
            console.start(total_steps=trainer.total_steps, first_step=trainer.global_step)
            result = trainer.fit(run_dir, reporter)
        failed = False
    except RunStopped as stop:
        warned = stop.number == signal.SIGUSR1
        raise
    finally:
        trainer.worker_shield.lift()
        reporter.close(failed=failed)
        if failed and (run_dir / LAST).is_file():
            console.line(f"stopped; to continue: resume={run_dir}")
        note = requeue(resume=config.resume) if warned and fabric.is_global_zero else None
        if note is not None:
            console.line(note)
    console.summary(
        "Evaluation" if config.eval_only else "Run", _rows(config, run_dir, reporter, result)
    )
    return result


def _set_up_torch(settings: TrainerConfig) -> None:
    """Choose between speed and repeatable kernels, before a device is used."""
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.benchmark = not settings.deterministic
    torch.backends.cuda.matmul.allow_tf32 = True


def resolve_precision(settings: TrainerConfig) -> str:
    """The precision that `trainer.precision` stands for: "auto" is bfloat16 on hardware for it."""
    if settings.precision != "auto":
        return settings.precision
    if settings.accelerator != "cpu" and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = any(abilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


def _make_fabric(settings: TrainerConfig, precision: str) -> Fabric:
    """Fabric for the devices asked for."""
    devices, num_nodes = layout(settings)
    try:
        fabric = Fabric(
            accelerator=settings.accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=fsdp_strategy() if settings.strategy == "fsdp" else settings.strategy,
            precision=precision,  # type: ignore[arg-type]
            plugins=environments(),
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"trainer.accelerator={settings.accelerator} trainer.devices={settings.devices} "
            f"trainer.strategy={settings.strategy} cannot be had here: {error}"
        ) from error
    if precision == "16-mixed" and fabric.device.type == "cpu":
        raise ConfigError(
            "trainer.precision must be 32-true or bf16-mixed on a CPU, got '16-mixed'"
        )
    return fabric


def _devices(fabric: Fabric) -> str:
    """What the run computes on, in words."""
    if fabric.device.type == "cuda":
        name = torch.cuda.get_device_name(fabric.device)
    elif fabric.device.type == "cpu":
        name = f"CPU ({torch.get_num_threads()} threads)"
    else:
        name = fabric.device.type
    return name if fabric.world_size == 1 else f"{fabric.world_size} x {name}"


def _load_weights(model: nn.Module, path: str, console: RunConsole) -> None:
    """Start from the weights of a file, saying what did not fit."""
    try:
        notes = models.load_weights(model, path)
    except ValueError as error:
        raise ConfigError(f"finetune: {error}") from error
    console.line(f"weights from {path}")
    for note in notes:
        console.line(f"  {note}")


def _restore(trainer: Trainer, resumed: Resumed, console: RunConsole) -> None:
    """Continue a run, or take its evaluated weights."""
    config, content = trainer.config, resumed.content
    if resumed.path is None:
        console.line(f"no checkpoint in {resumed.folder} yet: starting from the beginning")
        return
    if config.eval_only:
        load_model(trainer.evaluated_model, content.get("ema") or content["model"])
        trainer.epoch, trainer.step = content["epoch"], content["step"]
        console.line(f"weights from {resumed.path}, epoch {content['epoch']}")
        return
    restore(trainer, content)
    console.line(f"continuing {resumed.path} at step {trainer.global_step}")
    for difference in checkpoint.differences(content["config"], asdict(config)):
        if not difference.startswith(("resume", "name", "finetune")):
            console.line(f"  changed since: {difference}")


def _open_records(
    config: Config,
    run_dir: Path,
    trainer: Trainer,
    resumed: Resumed | None,
    console: RunConsole,
) -> Records:
    """Begin the run folder: records, with the past of a continued run, and the configuration."""
    continued = resumed if resumed is not None and not config.eval_only else None
    content = continued.content if continued else {}
    records = Records(
        run_dir,
        name=config.name,
        logger=config.logger,
        config=asdict(config),
        wandb_id=content.get("wandb_id"),
        history=read_history(continued.folder, content.get("lines", 0)) if continued else None,
        replace=continued is not None and continued.in_place,
        warn=lambda text: console.line(f"warning: {text}"),
    )
    text = yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)
    records.folder.write(CONFIG, text.encode())
    if continued is not None and continued.in_place:
        checkpoint.remove_temporaries(run_dir)
        set_damaged_aside(continued)
    elif continued is not None and (continued.folder / BEST).is_file():
        shutil.copyfile(continued.folder / BEST, run_dir / BEST)
    return records


def _millions(model: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M"


def _rows(
    config: Config, run_dir: Path, reporter: Reporter, result: dict[str, float]
) -> dict[str, str]:
    """The closing table."""
    where = "" if config.eval_only else f" at epoch {result['epoch']:.0f}"
    rows = {
        "top-1": f"{result['top1']:.2f} %{where}",
        "top-5": f"{result['top5']:.2f} %",
        "loss": f"{result['loss']:.4f}",
    }
    if config.eval_only:
        rows["calibration error"] = f"{result['ece']:.2f} %"
        rows["report"] = f"{EVALUATION_FILE}, {RELIABILITY_PICTURE}"
    else:
        rows |= {
            "training": f"{reporter.images_per_second:.1f} images/s",
            "time": reporter.console.elapsed(),
            "checkpoints": "best.ckpt, last.ckpt and the one before it, last.1.ckpt",
        }
    rows["folder"] = str(run_dir)
    if config.logger.mode == "offline":
        rows["upload"] = f"wandb sync {run_dir}/wandb/offline-run-*"
    return rows
