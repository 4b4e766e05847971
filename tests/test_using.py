"""Using a trained model: folders, predictions, attention maps, export, torch.hub."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from test_models import small_model
from torch import nn

import export
import models
import predict
from conf import ConfigError, compose
from data import build
from kernels import FocalGeometry
from models.attention_maps import attention_map, block_attention
from models.focal_attention import FocalAttention
from training import checkpoint
from training.model import build_model
from training.trained import load_run

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    "model=focal_micro",
    "model.depths=[2,1]",
    "model.num_heads=[1,2]",
    "model.region_sizes=[5,3]",
    "model.shift=true",
    "data.img_size=56",
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a run leaves, with other weights in the average than in the model."""
    config = compose(*TINY)
    model, average = (build_model(config.model, build(config.data), seed=n) for n in (1, 2))
    folder = tmp_path / "run"
    folder.mkdir()
    content = {
        "config": asdict(config),
        "epoch": 1,
        "step": 0,
        "model": model.state_dict(),
        "ema": average.state_dict(),
    }
    checkpoint.save(folder / "best.ckpt", content)
    return folder


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    Image.effect_noise(size, 60).convert("RGB").save(path)
    return path


# -- folders --------------------------------------------------------------------------------------


def test_an_exported_run_loads_with_the_averaged_weights_classes_and_images(run_dir, tmp_path):
    export.main([str(run_dir), "--output", str(tmp_path / "out")])
    model: Any = models.load(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model.safetensors",
        "config.json",
    }
    average = checkpoint.load(run_dir / "best.ckpt")["ema"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, average[name]), name
    assert not model.training
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert tuple(model.pretrained_cfg["input_size"]) == (3, 56, 56)
    assert [stage[-1].shift for stage in model.geometries] == [3, 0]
    again = models.load(tmp_path / "out" / "model.safetensors")
    assert torch.equal(again.state_dict()["norm.weight"], average["norm.weight"])


def test_the_transform_of_a_digits_model_gives_what_it_was_evaluated_on(run_dir, tmp_path):
    data = build(compose(*TINY).data)
    model = load_run(run_dir)
    digits: Any = data.val
    ink = (digits.images[0] / digits.images.max() * 255).round().byte()
    Image.fromarray(ink.numpy()).resize((56, 56), Image.Resampling.BILINEAR).convert("RGB").save(
        tmp_path / "digit.png"
    )
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    got = transform(Image.open(tmp_path / "digit.png"))
    inside = (..., slice(6, -6), slice(6, -6))  # at the border the data's grid sees background
    torch.testing.assert_close(got[inside], digits[0][0][inside], atol=0.05, rtol=0)


def test_a_run_whose_data_is_gone_is_exported_without_class_names(run_dir, tmp_path):
    config = compose(*TINY, "data=imagefolder", "data.root=gone", "data.crop_pct=0.9")
    content = checkpoint.load(run_dir / "best.ckpt") | {"config": asdict(config)}
    checkpoint.save(run_dir / "best.ckpt", content)
    config_of: Any = load_run(run_dir).pretrained_cfg
    assert config_of["label_names"] is None
    assert config_of["crop_pct"] == 0.9


def test_timm_reads_the_description_of_an_exported_folder(run_dir, tmp_path):
    models.save(load_run(run_dir), tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}")
    model.load_state_dict(models.load(tmp_path / "out").state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "hf-hub:someone/model"}, "architecture must be the name of a model"),
        ({"model_args": {"checkpoint_path": "x.pth"}}, "must be options of the model"),
        ({"model_args": {"windw": 7}}, "windw"),
        ({"num_classes": 3}, "class_names must hold one name for each of 3 classes"),
        ({"num_classes": 3, "label_names": None}, "cannot load .*model.safetensors"),
        ({"pretrained_cfg": {}}, "preprocessing must have"),
    ],
)
def test_a_description_that_is_not_a_models_is_refused(change, message, run_dir, tmp_path):
    models.save(load_run(run_dir), tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        models.load(tmp_path / "out")


@pytest.mark.parametrize("what", ["folder", "weights"])
def test_loading_names_what_is_missing(what, run_dir, tmp_path):
    models.save(load_run(run_dir), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    path = tmp_path / ("none" if what == "folder" else "out")
    with pytest.raises(ValueError, match=r"path must name a folder with model\.safetensors"):
        models.load(path)


# -- attention maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["fc", "mean", "max", "conv"])
@pytest.mark.parametrize("query", [None, (3, 4)])
def test_the_weights_of_every_head_sum_to_one(pool, query):
    model = small_model(pool=pool, shift=True, depths=(2, 2))
    image = torch.randn(1, 3, 36, 50, dtype=torch.float64)  # padded to whole windows
    for stage in range(2):
        for block in range(2):
            weights = attention_map(model, image, stage=stage, block=block, query=query)
            assert weights.min() >= 0
            torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(stage + 1).double())


def test_a_map_is_what_equal_scores_make_it_by_hand():
    # An 8×8 map, window 4: 16 fine keys and four pooled windows, of which those beyond the edge are
    # none. With no score every key has the weight 1 / (16 + 4); a pooled one spreads its over 16.
    attention = FocalAttention(2, 1, FocalGeometry(4, ((1, 4), (4, 3)), "mask")).double()
    for parameter in attention.parameters():
        nn.init.zeros_(parameter)
    weights = block_attention(attention, torch.randn(1, 8, 8, 2).double(), query=(1, 1))
    expected = torch.full((1, 8, 8), 1 / 20 / 16, dtype=torch.float64)
    expected[:, :4, :4] += 1 / 20
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shift", [0, 2])
def test_with_fine_keys_alone_the_weights_applied_to_values_are_the_output(shift):
    geometry = FocalGeometry(4, ((1, 8),), "mask", shift)
    attention = FocalAttention(6, 2, geometry).double()
    attention.proj = nn.Identity()
    x = torch.randn(1, 8, 12, 6, dtype=torch.float64)
    value = attention.qkv(x)[0, ..., 12:].unflatten(2, (2, 3))
    weights = block_attention(attention, x, query=(5, 7))
    expected = torch.einsum("hrc,rchd->hd", weights, value).flatten()
    torch.testing.assert_close(attention(x)[0, 5, 7], expected, atol=1e-10, rtol=0)


def test_a_query_outside_the_map_is_refused():
    with pytest.raises(ValueError, match="query must lie in the map of 20 by 28 tokens"):
        attention_map(small_model(), torch.randn(1, 3, 40, 56).double(), stage=0, query=(20, 0))


# -- predict.py -----------------------------------------------------------------------------------


def test_predict_prints_the_likeliest_classes_and_draws_the_overlay(run_dir, tmp_path, capsys):
    first, second = (picture(tmp_path / f"{name}.png") for name in "ab")
    words = [str(first), str(second), "--model", str(run_dir), "--top", "3"]
    overlay = tmp_path / "overlay.png"
    predict.predict(predict.arguments([*words, "--overlay", str(overlay), "--query", "5", "50"]))
    out = capsys.readouterr().out
    assert out.count("%") == 6
    assert "overlay.png" in out.replace("\n", "")
    width, height = Image.open(overlay).size
    assert width > height > 300  # two rows of an image and two stages


def test_the_likeliest_classes_are_those_of_the_logits():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    first, second = predict.classify(nn.Identity(), logits, 2)
    assert [index for index, _ in first] == [1, 2]
    assert first[0][1] == pytest.approx(float(logits[0].softmax(0)[1]))
    assert second[0][0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top", "0"], "--top must be positive, got 0"),
        ([], r"IMAGE must be an image file, got none\.png: no such file"),
        (["--stage", "1"], "--stage is of the overlay, and needs --overlay OUT.png"),
        (["--overlay", "x.txt"], r"--overlay must end in \.png, .*, got x\.txt"),
        (["--overlay", "none/x.png"], "--overlay must lie in a folder that exists, got none/x.png"),
        (["--overlay", "x.png", "--stage", "3"], "--stage must lie from 1 to 2, got 3"),
        (["--overlay", "x.png", "--stage", "1", "--block", "3"], "--block must lie from 1 to 2"),
        (["--overlay", "x.png", "--query", "56", "0"], "--query must be a pixel of the model's 56"),
    ],
)
def test_predict_refuses_what_the_model_lacks_before_reading_images(words, message, run_dir):
    options = predict.arguments(["none.png", "--model", str(run_dir), *words])
    with pytest.raises(ConfigError, match=message):
        predict.predict(options)


def test_predict_says_what_is_no_model(tmp_path):
    with pytest.raises(ConfigError, match="a model must be a run folder"):
        predict.predict(predict.arguments(["none.png", "--model", str(tmp_path)]))


# -- torch.export and ONNX ------------------------------------------------------------------------


def test_an_exported_program_gives_the_models_logits_for_any_batch(run_dir, tmp_path):
    written = export.export(run_dir, tmp_path / "out", "torch_export", [64])
    assert [path.name for path in written] == ["config.json", "model_64x64.pt2"]
    exported = torch.export.load(written[1])
    assert "focal" not in str(exported.graph)  # no operator of ours
    program, model = exported.module(), load_run(run_dir)
    images = torch.randn(3, 3, 64, 64)
    for count in (1, 3):
        torch.testing.assert_close(
            program(images[:count]), model(images[:count]), atol=1e-5, rtol=1e-5
        )


def test_a_size_that_the_model_cannot_take_is_told(run_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"--img-size must suit the model, got 3: .*large enough"):
        export.export(run_dir, tmp_path / "out", "torch_export", [3])


def test_onnxruntime_gives_the_models_logits_at_two_sizes(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = {"img_size": 56, "depths": [2], "num_heads": [1], "region_sizes": [5], "shift": True}
    model = timm.create_model("focal_micro", num_classes=5, **options).eval()
    images = {"input_size": (3, 56, 56), "mean": (0.0,) * 3, "std": (1.0,) * 3}
    preprocessing = {**images, "interpolation": "bicubic", "crop_pct": 1.0}
    models.describe(model, architecture="focal_micro", options=options, preprocessing=preprocessing)
    models.save(model, tmp_path / "model")
    written = export.export(tmp_path / "model", tmp_path / "out", "onnx", [56, 64])
    assert [path.name for path in written[1:]] == ["model_56x56.onnx", "model_64x64.onnx"]
    for size, file in zip((56, 64), written[1:], strict=True):
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        for count in (1, 3):
            batch = torch.randn(count, 3, size, size)
            (logits,) = session.run(["logits"], {"images": batch.numpy()})
            expected = model(batch).detach()
            torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-5, rtol=1e-5)


# -- torch.hub ------------------------------------------------------------------------------------


def test_torch_hub_has_an_entry_for_every_variant():
    for name in (
        f"focal_{s}{f}" for s in ("tiny", "small", "base", "large") for f in ("", "_conv")
    ):
        with pytest.raises(ValueError, match="pretrained must be the path"):
            torch.hub.load(str(ROOT), name, source="local", pretrained=True)


def test_torch_hub_builds_a_model_from_a_file(run_dir, tmp_path):
    models.save(load_run(run_dir), tmp_path / "out")
    options = {"depths": (2, 1), "num_heads": (1, 2), "region_sizes": (5, 3), "num_classes": 10}
    model: Any = torch.hub.load(
        str(ROOT), "focal_micro", source="local", pretrained=str(tmp_path / "out"), **options
    )
    expected = load_run(run_dir).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


# -- the newcomer's path --------------------------------------------------------------------------


def modules_after(code: str, names: set[str]) -> set[str]:
    """Which of the modules a fresh process has after running `code`."""
    code = f"import sys\n{code}\nprint(*{names!r} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_importing_models_brings_none_of_the_libraries_of_training():
    heavy = {"sklearn", "matplotlib", "hydra", "lightning_fabric", "torchmetrics", "onnx"}
    assert modules_after("import models", heavy) == set()


def test_mistakes_are_told_before_pytorch_is_imported():
    assert modules_after("import train", {"torch", "timm", "hydra"}) == {"hydra"}


def test_training_brings_no_library_that_the_run_does_not_need():
    heavy = {"datasets", "webdataset", "onnx", "onnxscript", "torch"}
    assert modules_after("import training", heavy) == {"torch"}
