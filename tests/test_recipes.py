"""Recipes and baselines: what they say is what they run."""

from pathlib import Path

import pytest
import torch
from runs import TINY
from timm import create_model
from torch import nn

import conf
import models
from conf import ConfigError, compose
from data import build
from training import checkpoint, run
from training.model import build_model, freeze_backbone

RECIPES = Path(conf.__file__).parent / "experiment" / "imagenet"
SIZES = ("tiny", "small", "base", "large")
BASELINES = {
    "swin_tiny": 27.5,
    "swin_small": 48.8,
    "swin_base": 86.8,
    "deit_tiny": 5.5,
    "deit_small": 21.7,
    "resnet50": 23.5,
}
OPTIONS = (
    *TINY,
    "trainer.epochs=1",
    "trainer.batch_size=16",
    "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1",
)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", ["", "_conv"])
def test_every_size_and_form_has_the_released_recipe_and_the_papers(size: str, form: str) -> None:
    released = compose(f"experiment=imagenet/focal_{size}{form}", "data.root=x")
    paper = compose(f"experiment=imagenet/focal_{size}{form}_paper", "data.root=x")
    for config in (released, paper):
        assert config.model.name == f"focal_{size}"
        assert config.model.conv_embed is (True if form else None)
        assert config.trainer.epochs == 300
    assert released.name == f"imagenet_focal_{size}{form}"
    changed = checkpoint.differences(vars(released.data), vars(paper.data))
    assert changed == ["erase_prob: 0.25 → 0.0"]
    assert (released.schedule.warmup_lr, paper.schedule.warmup_lr) == (1e-6, 1e-5)
    assert released.model.drop_path_rate == {"tiny": 0.2, "small": 0.3}.get(size, 0.5)
    assert paper.model.drop_path_rate == {"tiny": 0.2, "small": 0.2}.get(size, 0.3)


@pytest.mark.parametrize("name", BASELINES)
def test_a_named_baseline_builds_with_its_parameters_and_takes_the_images(name: str) -> None:
    config = compose(f"model={name}")
    data = build(config.data)
    with torch.device("meta"):
        model = build_model(config.model, data, seed=0).eval()
        logits = model(torch.empty(1, 3, data.img_size, data.img_size))
    assert logits.shape == (1, 10)
    # At another size positions and windows change the count a little.
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(BASELINES[name], rel=0.02)


@pytest.mark.parametrize("name", ["resnet50", "deit_small"])
def test_a_baseline_runs_the_same_recipe_with_its_own_drop_path(name: str) -> None:
    config = compose("experiment=imagenet/baseline", f"model={name}", "data.root=x")
    focal = compose("experiment=imagenet/focal_tiny", "data.root=x")
    assert config.trainer == focal.trainer
    assert config.data == focal.data
    assert (config.optimizer, config.schedule) == (focal.optimizer, focal.schedule)
    assert config.model.name.startswith(name)
    assert config.model.drop_path_rate == (None if name == "resnet50" else 0.1)
    assert config.name == f"imagenet_{config.model.name}"


@pytest.mark.parametrize("name", ["evaluate", "finetune", "finetune_384", "from_swin", "linear"])
def test_a_recipe_that_starts_from_a_file_asks_for_it(name: str) -> None:
    with pytest.raises(ConfigError, match="finetune must name the file of weights"):
        compose(f"experiment=imagenet/{name}", "data.root=x")


def test_a_recipe_that_starts_from_a_file_is_not_begun_without_it_by_automatic_resume(
    tmp_path: Path,
) -> None:
    config = compose(*OPTIONS, "finetune=''", "resume=auto")
    with pytest.raises(ConfigError, match="finetune must name the file of weights"):
        run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fine_tuning_at_384_gives_every_stage_its_window() -> None:
    config = compose("experiment=imagenet/finetune_384", "data.root=x", "finetune=x")
    assert config.data.img_size == 384
    window = config.model.window_size
    model = create_model(
        config.model.name, img_size=384, window_size=window, embed_dim=32, depths=(1,) * 4
    )
    assert [stage[0].window_size for stage in model.geometries] == [12, 12, 12, 12]


@pytest.mark.parametrize("name", ["focal_micro", "resnet18"])
def test_linear_evaluation_trains_the_classifier_alone(name: str) -> None:
    model = create_model(name, num_classes=3)
    freeze_backbone(model)
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Linear)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trained} == {
        id(parameter) for parameter in classifier.parameters()
    }


def test_a_linear_evaluation_from_a_run_leaves_its_backbone_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    run(compose(*OPTIONS), tmp_path / "first")
    file = tmp_path / "first/best.ckpt"
    (tmp_path / "linear").mkdir()
    run(
        compose(*OPTIONS, "trainer.freeze_backbone=true", f"finetune={file}", "optimizer=sgd"),
        tmp_path / "linear",
    )
    before, after = (checkpoint.load(tmp_path / f"{n}/best.ckpt") for n in ("first", "linear"))
    changed = {
        name
        for name, value in before["model"].items()
        if not torch.equal(value, after["model"][name])
    }
    assert changed == {"head.fc.weight", "head.fc.bias"}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "resnet18"])
def test_a_baseline_starts_from_its_own_weights_with_a_new_classifier(
    name: str, tmp_path: Path
) -> None:
    options = {"depths": (1, 1), "embed_dim": 24} if name.startswith("swin") else {}
    source, target = (create_model(name, num_classes=n, **options) for n in (3, 4))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    notes = models.load_weights(target, tmp_path / "weights.pth")
    assert len(notes) == 2
    assert all("keeps its initialisation" in note for note in notes)
    expected, got = source.state_dict(), target.state_dict()
    for key in expected.keys() - {"head.fc.weight", "head.fc.bias", "fc.weight", "fc.bias"}:
        assert torch.equal(got[key], expected[key]), key


def test_a_recipe_says_where_its_figures_come_from() -> None:
    for path in RECIPES.glob("*.yaml"):
        comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = " ".join(comments)
        assert any(word in text for word in ("released", "recalled")), path.name
