"""Dataclasses that type every configuration key, registered as Hydra schemas.

A YAML file under ``conf/`` holds only what differs from its dataclass here. Hydra rejects a key
that no dataclass has and a value of the wrong type before anything runs. The dataclasses are
unfrozen because Hydra composes by assignment; nothing writes to them after ``train.py`` made them.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from conf.sweeps import register_resolvers


class ConfigError(ValueError):
    """A setting the user must change; the message names the setting, the rule and the value."""


@dataclass
class ModelConfig:
    """A timm model name and the options given to it; None keeps the variant's own value.

    `window_size`, `focal_levels`, `expand_size` and `region_sizes` take one integer or a list with
    one per stage. `levels` lists `[subwindow_size, region_size]` pairs per stage and excludes the
    latter three. The options are those of `models.FocalTransformer`.
    """

    name: str = MISSING
    patch_size: int | None = None
    embed_dim: int | None = None
    depths: list[int] | None = None
    num_heads: list[int] | None = None
    window_size: Any = None
    focal_levels: Any = None
    expand_size: Any = None
    region_sizes: Any = None
    levels: list[list[list[int]]] | None = None
    pool: str | None = None
    boundary: str | None = None
    shift: bool | None = None
    mlp_ratio: float | None = None
    qkv_bias: bool | None = None
    global_pool: str | None = None
    drop_rate: float | None = None
    proj_drop_rate: float | None = None
    attn_drop_rate: float | None = None
    drop_path_rate: float | None = None
    conv_embed: bool | None = None
    layer_scale: float | None = None
    pre_norm: bool | None = None
    patch_norm: bool | None = None
    abs_pos: bool | None = None
    grad_checkpointing: bool | None = None
    attention_backend: str | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # for timm models of other families


@dataclass
class DataConfig:
    """What every data source has.

    With `repeated_aug` above 1 each image stands that many times in its global batch, each time
    augmented anew, and an epoch sees as many times fewer images: its length stays.
    """

    name: str = MISSING
    img_size: int = MISSING  # side of the images, pixels
    num_workers: int = 0  # loading processes
    repeated_aug: int = 1


@dataclass
class DigitsConfig(DataConfig):
    """scikit-learn's 1,797 handwritten digits; training images get a small random affine map."""

    rotate: float = 10.0  # largest rotation, degrees
    scale: float = 0.1  # largest relative change of size
    translate: float = 0.05  # largest shift, as a part of the image side
    split_seed: int = 0


@dataclass
class ImageConfig(DataConfig):
    """What every source of stored images has: timm's transforms and what damage it bears.

    An image that cannot be decoded is named and left out; more than `max_broken` of them end the
    run.
    """

    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"
    crop_pct: float = 0.875  # evaluation resizes to img_size / crop_pct and crops the centre
    min_crop_area: float = 0.08  # smallest part of the image a training crop may cover
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None  # a timm policy, such as rand-m9-mstd0.5-inc1
    erase_prob: float = 0.0
    erase_mode: str = "pixel"
    max_broken: int = 10


@dataclass
class ImageFolderConfig(ImageConfig):
    """ImageNet's layout, `root/train/<class>/*` and `root/val/<class>/*`."""

    root: str = MISSING


@dataclass
class HuggingFaceConfig(ImageConfig):
    """A data set of the Hugging Face `datasets` library, memory-mapped.

    `path` is a folder (from `save_to_disk`, or of parquet files or images) or a name on the Hub,
    which is looked up in the local cache alone unless `download` is true.
    """

    path: str = MISSING
    subset: str | None = None  # the configuration, where a data set has several
    train_split: str = "train"
    val_split: str = "validation"
    image_column: str = "image"
    label_column: str = "label"
    download: bool = False


@dataclass
class WebDatasetConfig(ImageConfig):
    """Local WebDataset shards; `train` and `val` are patterns such as `DIR/train-{0000..0146}.tar`.

    Extensions name the parts of a sample: the image has one of `image_keys`, the label, a whole
    number as text, has `label_key`.
    """

    train: str = MISSING
    val: str = MISSING
    image_keys: list[str] = field(default_factory=lambda: ["jpg", "jpeg", "png", "webp"])
    label_key: str = "cls"
    num_classes: int | None = None  # None: the largest training label + 1
    index_dir: str | None = None  # keeps what a start reads of the shards; None: read each time


@dataclass
class TorchvisionConfig(ImageConfig):
    """A data set built into torchvision, under `root` in torchvision's layout."""

    dataset: str = MISSING
    root: str = MISSING
    download: bool = False


@dataclass
class SyntheticConfig(DataConfig):
    """Noise images made once, for measuring throughput without a disk."""

    num_classes: int = 1000
    in_chans: int = 3
    train_size: int = 1024
    val_size: int = 256


@dataclass
class LampsConfig(DataConfig):
    """Made images whose class takes fine detail and far-away context; see `data/lamps.py`."""

    train_size: int = 10000
    val_size: int = 2000
    noise: float = 0.15  # standard deviation of each pixel's noise; tiles have a contrast of 1.5
    data_seed: int = 0


@dataclass
class OptimizerConfig:
    """Learning rate and weight decay; vectors, biases and bias tables are never decayed.

    With `scale_lr` the learning rate is `base_lr` · global batch / `scale_batch`, else `base_lr`.
    `layer_decay` multiplies the rate once per layer from the head down.
    """

    name: str = MISSING
    base_lr: float = MISSING
    scale_lr: bool = False
    scale_batch: int = 512
    weight_decay: float = 0.05
    layer_decay: float | None = None


@dataclass
class AdamWConfig(OptimizerConfig):
    """AdamW."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8


@dataclass
class SGDConfig(OptimizerConfig):
    """SGD with momentum."""

    momentum: float = 0.9
    nesterov: bool = True


@dataclass
class ScheduleConfig:
    """Per-step schedule: a linear warm-up from `warmup_lr`, then the schedule's own shape."""

    name: str = MISSING
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0


@dataclass
class CosineConfig(ScheduleConfig):
    """Half a cosine down to `min_lr` at the last step."""

    min_lr: float = 0.0


@dataclass
class ConstantConfig(ScheduleConfig):
    """A constant learning rate."""


@dataclass
class TrainerConfig:
    """The loop, its devices and its regularisation.

    One optimiser step sees `batch_size` · `accumulate` · processes images; the gradient is clipped
    once per step. `batch_size` counts images per process and micro-batch.
    """

    epochs: int = MISSING
    batch_size: int = MISSING
    eval_batch_size: int | None = None  # None: batch_size
    accumulate: int = 1
    clip_grad: float | None = 5.0  # largest global gradient norm; None: no clipping
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of mixup; 0: off
    cutmix: float = 0.0  # alpha of CutMix; 0: off
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    ema_decay: float | None = None  # evaluate and keep the moving average of the weights
    freeze_backbone: bool = False  # train the classifier alone, as in linear evaluation
    seed: int = 0
    deterministic: bool = False
    precision: str = "32-true"  # or bf16-mixed, 16-mixed; auto: bf16-mixed where it is fast
    accelerator: str = "auto"
    devices: str = "auto"  # a number, "auto", or device indices such as "0,1"
    num_nodes: int = 1
    strategy: str = "auto"  # or ddp; fsdp: parameters sharded over all processes
    compile: bool = False
    compile_mode: str = "default"  # reduce-overhead: CUDA graphs; max-autotune: and slow to start
    channels_last: bool = False
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    eval_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    checkpoint_every: int | None = None  # optimiser steps between saves inside an epoch
    log_every: int = 10  # optimiser steps between records
    profile: int | None = None  # optimiser steps to trace, after three without


@dataclass
class DistillationConfig:
    """A timm teacher whose predictions the model learns beside the labels.

    The loss is (1 − `alpha`) · cross entropy + `alpha` · `temperature`² · the Kullback-Leibler
    divergence of the two softened predictions.
    """

    teacher: str | None = None  # a timm model name; None: no distillation
    weights: str | None = None  # the teacher's weights: .safetensors, .pth or a best.ckpt
    temperature: float = 1.0
    alpha: float = 0.5
    kwargs: dict[str, Any] = field(default_factory=dict)  # options of the teacher


@dataclass
class LoggerConfig:
    """Weights & Biases mode: "offline", "online" or "disabled". JSON lines are always written."""

    mode: str = "offline"
    project: str = "focal-transformer"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class Config:
    """The whole configuration.

    `resume` continues a run: "auto" that of the run folder, if it holds one, or a folder, or a
    checkpoint file. `finetune` starts one from weights.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    name: str = "${model.name}"  # the folder under outputs/ and the Weights & Biases group
    resume: str | None = None
    finetune: str | None = None
    eval_only: bool = False


# Group/name of each schema; a YAML file names its own in its defaults list.
SCHEMAS: dict[str, type] = {
    "model/timm": ModelConfig,
    "data/digits": DigitsConfig,
    "data/imagefolder": ImageFolderConfig,
    "data/huggingface": HuggingFaceConfig,
    "data/webdataset": WebDatasetConfig,
    "data/torchvision": TorchvisionConfig,
    "data/lamps": LampsConfig,
    "data/synthetic": SyntheticConfig,
    "optimizer/adamw": AdamWConfig,
    "optimizer/sgd": SGDConfig,
    "schedule/cosine": CosineConfig,
    "schedule/constant": ConstantConfig,
    "trainer/trainer": TrainerConfig,
    "logger/wandb": LoggerConfig,
}


def register_schemas() -> None:
    """Store every schema with Hydra, under `schema/<group>/<name>`; call before composing."""
    register_resolvers()
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config, package="_global_")
    for path, node in SCHEMAS.items():
        group, name = path.split("/")
        store.store(group=f"schema/{group}", name=name, node=node)
