"""The configuration: every file composes, mistakes are named."""

import re
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf

import conf
from conf import ConfigError, compose
from conf.schema import (
    AdamWConfig,
    CosineConfig,
    DigitsConfig,
    ImageFolderConfig,
    SGDConfig,
)

FOLDER = Path(conf.__file__).parent
GROUPS = (
    "model",
    "data",
    "optimizer",
    "schedule",
    "trainer",
    "logger",
    "interaction",
    "scale",
    "experiment",
)
NEEDED = {
    "data=imagefolder": "data.root=x",
    "data=imagenet": "data.root=x",
    "data=huggingface": "data.path=x",
    "data=torchvision": "data.dataset=mnist data.root=x",
    "data=fashion_mnist": "data.root=x",
    "data=cifar10": "data.root=x",
    "data=cifar100": "data.root=x",
    "data=imagenette": "data.root=x",
    "data=webdataset": "data.train=x data.val=x",
    "data=imagenet_wds": "data.train=x data.val=x",
    "model=timm": "model.name=x",
    "scale=imagenet": "data.root=x",
}


def options(group: str) -> list[str]:
    files = (FOLDER / group).rglob("*.yaml")
    return sorted(path.relative_to(FOLDER / group).with_suffix("").as_posix() for path in files)


CHOICES = [f"{group}={option}" for group in GROUPS for option in options(group)]


def overrides_of(choice: str) -> list[str]:
    """The choice with what its opening comment says to give."""
    if choice in NEEDED:
        return [choice, *NEEDED[choice].split()]
    overrides = [choice]
    if choice.startswith("experiment="):
        path = FOLDER / "experiment" / f"{choice.removeprefix('experiment=')}.yaml"
        command = path.read_text().splitlines()[1]
        overrides += [f"{key}=x" for key in ("data.root", "finetune") if f" {key}=" in command]
    return overrides


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_composes_into_a_valid_configuration(choice: str) -> None:
    config = compose(*overrides_of(choice))
    assert config.trainer.epochs > 0


def test_the_default_is_focal_small_on_the_digits() -> None:
    config = compose()
    assert config.model.name == "focal_small"
    assert isinstance(config.data, DigitsConfig)
    assert config.name == "focal_small"


def test_a_group_file_brings_its_own_schema() -> None:
    assert isinstance(compose("optimizer=sgd").optimizer, SGDConfig)


def test_the_help_lists_every_option_of_every_group_and_no_other() -> None:
    text = (FOLDER / "hydra/help/focal.yaml").read_text()
    section = text[text.index("Groups, chosen") : text.index("Settings, changed")]
    section = re.sub(r"\([^)]*\)", "", section)
    listed: dict[str, list[str]] = {}
    for line in section.splitlines()[1:]:
        words = line.split()
        if words and words[0] in GROUPS and line.startswith("    " + words[0]):
            group = words.pop(0)
            listed[group] = []
        if words:
            listed[group] += words
    assert {group: sorted(names) for group, names in listed.items()} == {
        group: options(group) for group in GROUPS
    }


@pytest.mark.parametrize("path", sorted((FOLDER / "experiment").rglob("*.yaml")), ids=str)
def test_an_experiment_opens_with_its_command_and_expected_result(path: Path) -> None:
    lines = path.read_text().splitlines()
    name = path.relative_to(FOLDER / "experiment").with_suffix("").as_posix()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python train.py experiment={name}")
    assert lines[2].startswith("# Expect: ")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_imagenet_experiments_are_the_released_recipe(size: str) -> None:
    config = compose(f"experiment=imagenet/focal_{size}", "data.root=x")
    trainer, data, optimizer = config.trainer, config.data, config.optimizer
    assert isinstance(data, ImageFolderConfig)
    assert isinstance(optimizer, AdamWConfig)
    assert isinstance(config.schedule, CosineConfig)
    assert config.model.name == f"focal_{size}"
    assert config.model.drop_path_rate == {"tiny": 0.2, "small": 0.3, "base": 0.5}[size]
    assert (trainer.epochs, trainer.batch_size * int(trainer.devices)) == (300, 1024)
    assert (trainer.clip_grad, trainer.label_smoothing) == (5.0, 0.1)
    assert (trainer.mixup, trainer.cutmix, trainer.mixup_switch_prob) == (0.8, 1.0, 0.5)
    assert (optimizer.base_lr, optimizer.scale_lr, optimizer.scale_batch) == (5e-4, True, 512)
    assert (optimizer.weight_decay, optimizer.betas, optimizer.eps) == (0.05, [0.9, 0.999], 1e-8)
    assert (config.schedule.warmup_epochs, config.schedule.warmup_lr) == (20, 1e-6)
    assert config.schedule.min_lr == 1e-5
    assert (data.auto_augment, data.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (data.erase_prob, data.interpolation, data.crop_pct) == (0.25, "bicubic", 0.875)


def test_the_paper_presets_differ_from_the_released_recipe_where_the_paper_does() -> None:
    config = compose("experiment=imagenet/focal_base_paper", "data.root=x")
    assert config.model.name == "focal_base"
    assert config.model.drop_path_rate == 0.3
    assert isinstance(config.data, ImageFolderConfig)
    assert config.data.erase_prob == 0
    assert config.schedule.warmup_lr == 1e-5
    assert config.trainer.epochs == 300


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.epoch=3", "trainer.epoch"),
        ("trainer.epochs=many", "trainer.epochs"),
        ("model.conv_embeds=true", "model.conv_embeds"),
        ("data.rotate=left", "data.rotate"),
        ("optimizer.momentum=0.9", "optimizer.momentum"),
        ("model.levels=[[1,13]]", "model.levels"),
    ],
)
def test_a_typo_or_a_wrong_type_fails_with_the_name_of_the_key(override: str, key: str) -> None:
    with pytest.raises(HydraException) as error:
        compose(override)
    assert key in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=imagefolder"], "data.root must be set"),
        (["trainer.batch_size=0"], "trainer.batch_size must be positive, got 0"),
        (["trainer.precision=fp16"], "trainer.precision must be one of auto, 32-true, bf16-mixed"),
        (["trainer.devices=two"], "trainer.devices must be a number"),
        (["trainer.epochs=2", "schedule.warmup_epochs=2"], "schedule.warmup_epochs must be"),
        (["trainer.mixup=0.8", "trainer.batch_size=31"], "trainer.batch_size must be even"),
        (["trainer.accumulate=4", "trainer.limit_train_batches=2"], "trainer.limit_train_batches"),
        (["trainer.compile_mode=fast"], "trainer.compile_mode must be one of default, reduce-"),
        (
            ["trainer.compile_mode=reduce-overhead"],
            "trainer.compile must be true with trainer.compile_mode=reduce-overhead, got False",
        ),
        (
            [
                "trainer.compile=true",
                "trainer.compile_mode=max-autotune",
                "trainer.accumulate=2",
            ],
            "trainer.accumulate must be 1 with trainer.compile_mode=max-autotune, got 2",
        ),
        (["model.window_size=[7,seven]"], "model.window_size must be an integer or a list"),
        (["+model.kwargs.windw=7"], "model.kwargs must be empty for focal_small"),
        (["model.drop_path_rate=1.5"], "model.drop_path_rate must lie between 0 and 1, got 1.5"),
        (["optimizer.betas=[0.9]"], "optimizer.betas must be two numbers"),
        (["logger.mode=on"], "logger.mode must be one of"),
        (["data=imagefolder", "data.root=x", "data.mean=[0.5]"], "data.mean must have three"),
        (["data=cifar10", "data.root=x", "data.std=[0,1,1]"], "data.std must be positive"),
        (["data=cifar10", "data.root=x", "data.max_broken=-1"], "data.max_broken must not be"),
        (["data=cifar10", "data.root=x", "data.auto_augment=random-m9"], "data.auto_augment must"),
        (["data=imagenet_wds", "data.train=x", "data.val=x", "data.num_classes=0"], "num_classes"),
        (["data=webdataset", "data.train=x", "data.val=x", "data.image_keys=[]"], "image_keys"),
        (["data.repeated_aug=0"], "data.repeated_aug must be positive, got 0"),
        (["resume=a.ckpt", "finetune=b.pth"], "finetune must be unset when resume is set"),
        (["eval_only=true"], "resume or finetune must name the weights"),
    ],
)
def test_a_value_that_breaks_a_rule_names_the_key_and_the_rule(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(*overrides)


@pytest.mark.parametrize(
    ("override", "name"), [("model=focal_tiny", "focal_tiny"), ("experiment=debug", "debug")]
)
def test_a_run_folder_is_named_after_the_experiment_or_the_model(override: str, name: str) -> None:
    conf.register_schemas()
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        node = hydra.compose("config", overrides=[override], return_hydra_config=True)
    hydra_node = OmegaConf.to_container(node.hydra, resolve=False)
    assert isinstance(hydra_node, dict)
    assert hydra_node["run"]["dir"].startswith("outputs/${name}/${now:")
    assert node.name == name
