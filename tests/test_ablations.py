"""The ablations: every member composes and builds, sweeps go on, a failing member is borne."""

import json
import signal
import time
from pathlib import Path

import hydra
import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from test_resume_kills import begin
from test_train import python_train

import conf
from conf import Config, compose, register_schemas
from conf.sweeps import member_name
from data import ImageData
from data.synthetic import Synthetic
from training.model import build_model

FOLDER = Path(conf.__file__).parent
NAMES = sorted(path.stem for path in (FOLDER / "experiment/ablation").glob("*.yaml"))
SCALES = {"cpu": (), "imagenet": ("data.root=x",)}


def sweep(name: str, scale: str, *overrides: str) -> DictConfig:
    """The composed experiment with Hydra's part."""
    register_schemas()
    given = [f"experiment=ablation/{name}", f"scale={scale}", *SCALES[scale], *overrides]
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return hydra.compose("config", overrides=given, return_hydra_config=True)


def members(node: DictConfig) -> list[list[str]]:
    """The overrides of every member, combined as Hydra's sweeper does."""
    axes = [f"{key}={value}" for key, value in node.hydra.sweeper.params.items()]
    overrides = OverridesParser.create().parse_overrides([*axes, *node.hydra.overrides.task])
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return batch


def build(config: Config) -> torch.nn.Module:
    size = config.data.img_size
    images = Synthetic(1, num_classes=1000, in_chans=3, img_size=size)
    names = tuple(map(str, range(1000)))
    data = ImageData(images, images, names, in_chans=3, img_size=size)
    return build_model(config.model, data, seed=0)


def test_the_eight_ablations_are_there() -> None:
    assert (
        sorted(
            [
                "window_size",
                "window_shift",
                "interaction",
                "depth",
                "focal_levels",
                "region_size",
                "pooling",
                "boundary",
            ]
        )
        == NAMES
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", NAMES)
def test_every_member_composes_and_builds_a_model_of_its_own(
    name: str, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.focal_transformer.init_linear", lambda module: None)
    node = sweep(name, scale)
    assert node.hydra.mode.name == "MULTIRUN"
    assert node.hydra.sweep.dir == f"outputs/ablation/{name}/{scale}"
    batch = members(node)
    axes = node.hydra.sweeper.params
    assert len({member_name(member, axes) for member in batch}) == len(batch)
    configs = [compose(*member) for member in batch]
    assert {config.name for config in configs} == {f"ablation/{name}"}
    assert {config.resume for config in configs} == {"auto"}
    assert {config.logger.tags[0] for config in configs} == {scale}
    assert {config.model.name for config in configs} == {
        {"cpu": "focal_micro", "imagenet": "focal_tiny"}[scale]
    }
    first = [config for config in configs if config.trainer.seed == 0]
    assert len({str(config.model) for config in first}) == len(first) > 1
    for config in first:
        build(config)


# Two members that take seconds; their names without what they have in common.
SWEEP = (
    "experiment=ablation/boundary",
    "hydra.sweep.dir=sweep",
    "hydra.sweep.subdir=${model.boundary}",
    "logger=none",
    "data.train_size=64",
    "data.val_size=32",
    "trainer.seed=0",
    "trainer.epochs=6",
    "trainer.batch_size=16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "model.depths=[1,1,1,1]",
)


def records(member: Path) -> list[dict]:
    """What a member recorded of its epochs; nothing before it begins."""
    path = member / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["kind"] == "epoch"]


def test_the_same_command_again_skips_what_is_finished_and_continues_what_is_not(
    tmp_path: Path,
) -> None:
    wrap, mask = tmp_path / "sweep/wrap", tmp_path / "sweep/mask"
    with begin(tmp_path, *SWEEP) as process:
        while not records(mask):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    before = (wrap / "metrics.jsonl").stat().st_mtime_ns
    assert len(records(wrap)) == 6
    assert 0 < len(records(mask)) < 6

    done = python_train(tmp_path, *SWEEP)
    assert done.returncode == 0, done.stderr
    assert "wrap is finished: 6 epochs" in done.stdout
    assert "continuing sweep/mask/last.ckpt" in done.stdout
    assert (wrap / "metrics.jsonl").stat().st_mtime_ns == before
    assert [line["epoch"] for line in records(mask)] == [1, 2, 3, 4, 5, 6]
    for line in records(mask):
        assert line["images_per_second"] > 0
        assert line["peak_memory_bytes"] > 1e6
    assert (tmp_path / "sweep/multirun.yaml").is_file()
    for member in (wrap, mask):
        assert (member / "config.yaml").is_file()


def test_a_member_that_fails_leaves_its_traceback_and_the_others_run(tmp_path: Path) -> None:
    axis = "model.region_sizes=[6,6,6,6],[1,1,1,1]"  # even regions fit no odd window
    sweep = (*SWEEP, "trainer.epochs=1", "model.boundary=wrap", axis)
    sweep = (*sweep, "hydra.sweep.subdir=${model.region_sizes.0}")
    (tmp_path / "sweep/1").mkdir(parents=True)
    (tmp_path / "sweep/1/error.txt").write_text("of an earlier start")
    done = python_train(tmp_path, *sweep)
    assert done.returncode == 1
    assert "error: the run in sweep/6 failed with exit code 1" in done.stderr
    error = (tmp_path / "sweep/6/error.txt").read_text()
    assert error.startswith("Traceback")
    assert "model focal_micro cannot be built" in error
    assert records(tmp_path / "sweep/6") == []
    assert [line["epoch"] for line in records(tmp_path / "sweep/1")] == [1]
    assert not (tmp_path / "sweep/1/error.txt").exists()


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (
            ["interaction=local", "trainer.seed=1", "experiment=ablation/x"],
            "interaction=local,seed=1",
        ),
        (["model.depths=[2, 2,4,2]", "scale=imagenet", "data.root=/x"], "depths=2-2-4-2"),
        (["trainer.seed=0", "+data=fashion_mnist", "logger=none"], "data=fashion_mnist,seed=0"),
        (["finetune=a/b.pth", "hydra.sweep.dir=x", "logger.mode=online"], "finetune=a_b.pth"),
        (["trainer.epochs=3", "trainer.seed=0"], "seed=0"),
        (["trainer.epochs=4", "trainer.seed=0"], "epochs=4,seed=0"),
        (["model.shift=True"], "shift=true"),
        (["experiment=ablation/x"], "default"),
    ],
)
def test_a_member_is_named_after_what_sets_it_apart(overrides: list[str], name: str) -> None:
    assert member_name(overrides, {"trainer.seed": "0,1", "trainer.epochs": 3}) == name


def test_an_experiment_without_a_scale_says_which_there_are() -> None:
    node = sweep("depth", "cpu")
    node.hydra.runtime.choices.scale = None
    with pytest.raises(OmegaConfBaseException, match="scale must be one of cpu, imagenet"):
        members(node)
