"""The model behind timm's interface: sizes at run time, features, groups, training modes."""

import operator
from typing import Any

import pytest
import timm
import torch
from functorch.compile import make_boxed_func
from timm.models._manipulate import group_parameters
from torch._dynamo.backends.common import aot_autograd

import models  # noqa: F401  registers the variants
from models import FocalTransformer

VARIANTS = [
    f"focal_{size}{form}" for size in ("tiny", "small", "base", "large") for form in ("", "_conv")
]


def small_model(**options: Any) -> Any:
    """Two stages on a 20×28 map, then 10×14, in float64 and evaluation mode."""
    settings: dict[str, Any] = {
        "img_size": (40, 56),
        "patch_size": 2,
        "num_classes": 5,
        "embed_dim": 8,
        "depths": (2, 1),
        "num_heads": (1, 2),
        "window_size": 4,
        "expand_size": 2,
        "region_sizes": (5, 3),
        "attention_backend": "reference",
    }
    torch.manual_seed(0)
    return FocalTransformer(**{**settings, **options}).double().eval()


def image(height: int = 40, width: int = 56, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", [*VARIANTS, "focal_micro"])
def test_every_variant_is_registered_with_timm(name):
    assert timm.is_model(name)
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    assert config.classifier == "head.fc"
    assert config.first_conv == "patch_embed.proj"


def test_create_model_takes_the_settings_of_the_contract():
    model: Any = timm.create_model(
        "focal_tiny", num_classes=10, img_size=112, depths=(1, 1, 1, 1), attention_backend="auto"
    )
    assert model.map_sizes == ((28, 28), (14, 14), (7, 7), (3, 3))
    assert model.eval()(torch.randn(1, 3, 112, 112)).shape == (1, 10)


def test_a_misspelled_setting_is_an_error():
    with pytest.raises(TypeError, match="expand_sizes"):
        timm.create_model("focal_micro", expand_sizes=3)


def test_pretrained_weights_are_refused_with_what_to_do_instead():
    with pytest.raises(ValueError, match=r"focal_tiny.*models\.load_weights"):
        timm.create_model("focal_tiny", pretrained=True)


def test_pretrained_weights_are_taken_from_a_file(tmp_path):
    saved = timm.create_model("focal_micro", num_classes=3)
    path = tmp_path / "weights.pt"
    torch.save(saved.state_dict(), path)
    model: Any = timm.create_model(
        "focal_micro", num_classes=3, pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    for name, tensor in saved.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize(("height", "width"), [(40, 56), (39, 57), (64, 24), (8, 50), (4, 4)])
@pytest.mark.parametrize("boundary", ["wrap", "mask"])
def test_any_image_size_runs_in_a_model_made_for_another(height, width, boundary):
    model = small_model(boundary=boundary, shift=True)
    features = model.forward_features(image(height, width, batch=1))
    assert features.shape == (1, height // 2 // 2, width // 2 // 2, 16)
    assert features.isfinite().all()


def test_rows_and_columns_that_fill_no_patch_are_left_out():
    model = small_model()
    whole = image(41, 57)
    assert torch.equal(model(whole), model(whole[:, :, :40, :56]))


def test_overlapping_embedding_rounds_up_and_sees_the_last_row():
    model = small_model(conv_embed=True)
    x = image(42, 56)
    assert model.forward_features(x).shape == (2, 11, 14, 16)
    changed = x.clone()
    changed[:, :, -1] += 1.0
    assert not torch.allclose(model(x), model(changed))


def test_an_image_too_small_for_the_stages_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="large enough for every stage: a 1 by 7 map"):
        small_model()(image(2, 14))


def test_images_of_a_batch_do_not_touch_each_other():
    model = small_model(shift=True)
    x = image(36, 44, batch=3)
    together = model(x)
    apart = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"focal_levels": 1, "expand_size": 0},
        {"focal_levels": 1},
        {"expand_size": 0},
        {"pool": "mean"},
        {"pool": "max", "shift": True},
        {"pool": "conv"},
        {"qkv_bias": False},
        {"conv_embed": True},
        {"pre_norm": False},
        {"layer_scale": 1e-2},
        {"patch_norm": False},
        {"abs_pos": True},
        {"focal_levels": (3, 2)},
    ],
    ids=str,
)
def test_backends_agree_and_every_parameter_gets_a_gradient(options):
    reference = small_model(**options)
    eager = small_model(**options, attention_backend="eager")
    x = image(38, 50)
    losses = [model(x).square().sum() for model in (reference, eager)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-10, rtol=1e-10)
    pairs = zip(reference.named_parameters(), eager.named_parameters(), strict=True)
    for (name, expected), (_, got) in pairs:
        assert expected.grad is not None, name
        assert expected.grad.abs().max() > 0, name
        torch.testing.assert_close(got.grad, expected.grad, atol=1e-10, rtol=1e-8, msg=name)


def test_features_only_gives_the_stages_asked_for_channels_first():
    model: Any = timm.create_model("focal_micro", features_only=True, out_indices=(1, 3))
    maps = model.eval()(torch.randn(2, 3, 70, 61))
    assert [tuple(x.shape) for x in maps] == [(2, 64, 8, 7), (2, 256, 2, 1)]
    assert model.feature_info.channels() == [64, 256]
    assert model.feature_info.reduction() == [8, 32]


def test_features_only_drops_the_stages_behind_the_last_one():
    model: Any = timm.create_model("focal_micro", features_only=True, out_indices=(0, 1))
    assert not any(name.startswith("model.layers.2") for name, _ in model.named_parameters())
    assert [x.shape[1] for x in model.eval()(torch.randn(1, 3, 56, 56))] == [32, 64]


def test_intermediates_are_the_stages_outputs():
    model = small_model()
    x = image()
    features, maps = model.forward_intermediates(x, norm=True, output_fmt="NHWC")
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(maps[-1], features)
    first = model.layers[0](model.patch_embed(x))
    assert torch.equal(maps[0], first)
    (only,) = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert torch.equal(only, first.permute(0, 3, 1, 2))


def test_stopping_early_leaves_the_later_stages_unrun():
    model = small_model()
    model.layers[1].register_forward_hook(lambda *_: pytest.fail("stage 2 ran"))
    features, maps = model.forward_intermediates(image(), indices=[0], stop_early=True)
    assert features.shape == (2, 20, 28, 8)
    assert len(maps) == 1


def test_reset_classifier_changes_the_classes_and_can_remove_the_head():
    model = small_model()
    model.reset_classifier(7)
    assert model(image()).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7
    model.reset_classifier(0, "")
    assert torch.equal(model(image()), model.forward_features(image()))


def test_pre_logits_are_the_averaged_features():
    model = small_model()
    features = model.forward_features(image())
    expected = features.mean(dim=(1, 2))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected)


def test_bias_tables_and_positions_take_no_weight_decay():
    model = small_model(abs_pos=True, focal_levels=(3, 2))
    names = model.no_weight_decay()
    assert names < {name for name, _ in model.named_parameters()}
    assert {"layers.0.blocks.1.attn.bias.ring", "layers.0.blocks.0.attn.bias.coarse.1"} <= names
    assert "pos_embed" in names
    assert not any("pools" in name or name.endswith("weight") for name in names)


@pytest.mark.parametrize("coarse", [False, True])
def test_layer_groups_cover_every_parameter_once_from_stem_to_head(coarse):
    model = small_model(abs_pos=True)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    grouped = [name for names in groups.values() for name in names]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())
    layer = {name: index for index, names in groups.items() for name in names}
    assert layer["patch_embed.proj.weight"] == layer["pos_embed"] == 0
    first, second = (
        layer["layers.0.blocks.0.attn.qkv.weight"],
        layer["layers.0.blocks.1.norm1.bias"],
    )
    assert first == second if coarse else first < second
    assert second < layer["layers.1.downsample.proj.weight"]
    assert layer["layers.1.downsample.proj.weight"] <= layer["layers.1.blocks.0.mlp.fc1.weight"]
    assert layer["head.fc.weight"] == max(groups)


def test_checkpointing_changes_no_gradient():
    kept, recomputed = small_model(shift=True), small_model(shift=True, grad_checkpointing=True)
    assert all(stage.grad_checkpointing for stage in recomputed.stages)
    for model in (kept, recomputed):
        model.train()(image()).square().sum().backward()
    for (name, a), (_, b) in zip(
        kept.named_parameters(), recomputed.named_parameters(), strict=True
    ):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-12, rtol=1e-12, msg=name)


def test_attention_dropout_acts_in_training_alone_and_follows_the_seed():
    model = small_model(attn_drop_rate=0.5)
    x = image()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), small_model()(x))
    model.train()
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(first, model(x))
    torch.manual_seed(3)
    assert torch.equal(first, model(x))


def test_drop_path_grows_linearly_with_depth():
    model = small_model(depths=(3, 2), drop_path_rate=0.2)
    rates = [
        getattr(b.drop_path1, "drop_prob", 0.0) for stage in model.stages for b in stage.blocks
    ]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize("pool", ["fc", "max", "conv"])
def test_autocast_runs_forward_and_backward_near_the_float32_result(pool):
    model = small_model(pool=pool, attention_backend="eager").float()
    x = image().float()
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    logits.float().sum().backward()
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_the_whole_model_runs_in_bfloat16():
    model = small_model(attention_backend="eager").bfloat16()
    logits = model(image().bfloat16())
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_the_model_compiles_as_one_graph():
    model = small_model(depths=(2, 1), shift=True, attention_backend="eager")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = image(38, 50)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-12, rtol=1e-12)


# Of four dimensions: convolutions and what they read, other views, the gradient of the head's mean.
HARMLESS = {
    *("convolution", "convolution_backward", "clone", "_to_copy", "max_pool2d_with_indices"),
    *("view", "permute", "unsqueeze", "expand", "div", "max_pool2d_with_indices_backward"),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"pool": "mean", "layer_scale": 0.1},
        {"pool": "max", "pre_norm": False},
        {"pool": "conv"},
        {"abs_pos": True, "drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_a_graph_computes_on_no_map_of_four_dimensions(options, autocast, fresh_compiler):
    """Inductor takes those of a model with convolutions for NCHW, and puts rows innermost."""
    model = small_model(depths=(2, 1), attention_backend="eager", **options).float().train()
    outputs: list[str] = []

    def keep(graph, _):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and isinstance(value, torch.Tensor) and value.dim() == 4:
                source = node.args[0] if node.target is operator.getitem else node
                outputs.append(str(source.target).split(".")[1])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = compiled(image().float())  # stage 2's map is not of whole windows
    logits.sum().backward()
    assert outputs.count("convolution") > 0
    assert set(outputs) <= HARMLESS
    assert outputs.count("clone") == 1  # of the image
    casts = 2 * outputs.count("convolution_backward") + 1  # no more than convolutions read and give
    assert outputs.count("_to_copy") <= (casts if autocast else 0)


def test_saved_state_holds_parameters_alone():
    model = small_model(abs_pos=True)
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_initial_weights_follow_the_released_initialisation():
    model: Any = timm.create_model("focal_micro")
    attn = model.layers[0].blocks[0].attn
    assert attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert attn.bias.ring.std().item() == pytest.approx(0.02, rel=0.1)
    assert attn.qkv.bias.eq(0).all()
    assert attn.pools[0].weight.eq(1 / 49).all()
    assert attn.pools[0].bias.eq(0).all()
