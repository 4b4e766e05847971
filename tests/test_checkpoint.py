"""Loading weights: ours, the released code's, Swin's; other windows and classes; bad files."""

import pickle
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_golden import Golden

from models import FocalTransformer, load_weights
from models.checkpoint import convert_official, from_swin
from models.official import fold_ring


def tiny_model(**options: Any) -> Any:
    """A two-stage model on a 16×16 map, then 8×8."""
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 2,
        "num_classes": 3,
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (2, 2),
        "window_size": 4,
        "expand_size": 2,
        "region_sizes": (3, 1),
        "attention_backend": "eager",
    }
    return FocalTransformer(**{**settings, **options}).eval()


def same(model: Any, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".safetensors", "bare"),
        (".safetensors", "module."),
        (".pt", "bare"),
        (".pth", "model"),
        (".ckpt", "state_dict"),
        (".bin", "_orig_mod."),
    ],
)
def test_our_own_files_load_whole_and_without_a_note(tmp_path, suffix, wrap):
    state = tiny_model().state_dict()
    saved: Any = state
    if wrap.endswith("."):
        saved = {f"{wrap}{name}": x for name, x in state.items()}
    elif wrap != "bare":
        saved = {wrap: state, "epoch": 3}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(saved, path)
    else:
        torch.save(saved, path)
    model = tiny_model()
    assert load_weights(model, path) == []
    assert same(model, state)


class Payload:
    """Leaves a file behind when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_a_file_with_code_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"model": tiny_model().state_dict(), "config": Payload(str(victim))}, path)
    with pytest.raises(ValueError, match=r"evil\.pt.*more than tensors"):
        load_weights(tiny_model(), path)
    path.write_bytes(pickle.dumps(Payload(str(victim)), protocol=2))
    with pytest.raises(ValueError, match=r"evil\.pt"):
        load_weights(tiny_model(), path)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.pt", None, "no such file"),
        ("weights.npz", b"x", r"suffix must be .* got '\.npz'"),
        ("garbage.pt", b"not a checkpoint", "PyTorch"),
        ("empty.pth", b"", "PyTorch"),
        ("garbage.safetensors", b"not a checkpoint", "not a safetensors file"),
        ("empty.safetensors", b"", "not a safetensors file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        load_weights(tiny_model(), path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"fc.weight": torch.zeros(2)}, "neither a Focal Transformer's nor a Swin"),
        ({"model": [1, 2]}, "must map names to tensors, got list for 'model'"),
        ({}, "must map names to tensors"),
        (torch.zeros(3), "must map names to tensors, got Tensor"),
    ],
    ids=["other", "list", "empty", "tensor"],
)
def test_content_that_is_no_state_dict_of_ours_is_named(tmp_path, content, reason):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=reason):
        load_weights(tiny_model(), path)


def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "wide.pt"
    torch.save(tiny_model(embed_dim=16).state_dict(), path)
    model = tiny_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"wide\.pt: the weights are of another model"):
        load_weights(model, path)
    assert same(model, before)


# -- other windows, levels and classes ------------------------------------------------------------


def reload(tmp_path: Any, source: Any, target: Any) -> list[str]:
    path = tmp_path / "weights.pt"
    torch.save(source.state_dict(), path)
    return load_weights(target, path)


def test_a_classifier_of_another_size_keeps_its_initialisation_with_a_note(tmp_path):
    source, target = tiny_model(), tiny_model(num_classes=7)
    fresh = target.head.fc.weight.clone()
    notes = reload(tmp_path, source, target)
    assert torch.equal(target.head.fc.weight, fresh)
    assert notes == [
        "head.fc.bias: of another shape, keeps its initialisation",
        "head.fc.weight: of another shape, keeps its initialisation",
    ]
    assert torch.equal(target.norm.weight, source.norm.weight)


def test_a_model_without_a_head_takes_all_else(tmp_path):
    notes = reload(tmp_path, tiny_model(), tiny_model(num_classes=0))
    assert notes == [
        "head.fc.bias: not in the model, left out",
        "head.fc.weight: not in the model, left out",
    ]


def test_levels_the_file_lacks_are_noted_and_the_rest_loaded(tmp_path):
    source, target = tiny_model(focal_levels=1, expand_size=0), tiny_model()
    notes = reload(tmp_path, source, target)
    assert (
        "layers.*.blocks.*.attn.bias.ring: not in the file, keeps its initialisation (2 tensors)"
        in notes
    )
    assert len(notes) == 4
    notes = reload(tmp_path, target, source)
    assert "layers.*.blocks.*.attn.bias.ring: not in the model, left out (2 tensors)" in notes


def test_constant_tables_and_pooling_keep_their_meaning_at_another_window(tmp_path):
    source = tiny_model()
    for name, parameter in source.named_parameters():
        if ".bias." in name:
            parameter.data.fill_(0.7)
        elif "pools.0.weight" in name:
            parameter.data.fill_(1 / 16)
    target = tiny_model(window_size=6, expand_size=3, region_sizes=(5, 3))
    notes = reload(tmp_path, source, target)
    assert len(notes) == 4
    assert all("resized for other windows, levels or maps" in note for note in notes)
    attn = target.layers[0].blocks[0].attn
    for table in attn.bias.parameters():
        torch.testing.assert_close(table, torch.full_like(table, 0.7))
    torch.testing.assert_close(attn.pools[0].weight, torch.full((6, 6), 1 / 36))


def test_a_resized_ring_continues_the_window_table_it_surrounds(tmp_path):
    # A bias that is linear in the key's row offset stays so, away from the clamped outer border.
    source, target = tiny_model(), tiny_model(expand_size=3)
    attn, window, region = source.layers[0].blocks[0].attn, 4, 8
    row = (
        torch.arange(region)[None, :] - 2 - torch.arange(window).repeat_interleave(window)[:, None]
    )
    dense = row[:, :, None].expand(-1, -1, region).reshape(16, region**2).float()
    cell = torch.arange(region)
    inner = ((cell >= 2) & (cell < 6))[:, None] & ((cell >= 2) & (cell < 6))[None]
    attn.bias.ring.data = dense[:, ~inner.flatten()].expand(2, -1, -1).clone()
    offsets = -(torch.arange(7) - 3).float()  # the table is indexed by query minus key
    attn.bias.window.data = offsets.repeat_interleave(7).expand(2, -1).clone()
    assert torch.equal(attn.bias()[0, :, :64], dense)
    reload(tmp_path, source, target)
    got = target.layers[0].blocks[0].attn.bias()[0, :, :100].view(16, 10, 10)
    step = got[:, 2:8, 0] - got[:, 1:7, 0]  # a column of the ring: 8 rows spread over 10
    torch.testing.assert_close(step, torch.full_like(step, 0.8))


@pytest.mark.parametrize("table", ["window", "coarse.0"])
def test_a_table_that_is_no_square_is_refused(tmp_path, table):
    state = tiny_model().state_dict()
    name = f"layers.0.blocks.0.attn.bias.{table}"
    state[name] = torch.zeros(2, 50)
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=rf"{name} is \[2, 50\]"):
        load_weights(tiny_model(), path)


def test_a_file_without_a_window_table_is_refused_even_if_its_ring_needs_it(tmp_path):
    state = tiny_model().state_dict()
    del state["layers.0.blocks.0.attn.bias.window"]
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"layers\.0\.blocks\.0\.attn\.bias\.window is missing"):
        load_weights(tiny_model(expand_size=3), path)


def test_absolute_positions_are_resampled_for_another_image_size(tmp_path):
    source, target = tiny_model(abs_pos=True), tiny_model(abs_pos=True, img_size=(48, 40))
    source.pos_embed.data.fill_(0.3)
    notes = reload(tmp_path, source, target)
    assert notes == ["pos_embed: resized for other windows, levels or maps"]
    torch.testing.assert_close(target.pos_embed, torch.full((1, 24, 20, 8), 0.3))


# -- the released code's files --------------------------------------------------------------------


@pytest.mark.parametrize(("window", "expand"), [(7, 3), (4, 2), (5, 1), (6, 2)])
def test_a_folded_ring_weighs_each_cell_as_all_its_rolled_copies_together(window, expand):
    # Coordinates of a larger map, rolled as the features are: the oracle of which token a slot
    # holds.
    side = 3 * window
    token = torch.arange(side**2).view(side, side)
    inside = torch.zeros(side, side, dtype=torch.bool)
    inside[window : 2 * window, window : 2 * window] = True
    tokens = []
    for shifts in ((-expand, -expand), (-expand, expand), (expand, -expand), (expand, expand)):
        slots = token.roll(shifts, (0, 1))[window : 2 * window, window : 2 * window].flatten()
        tokens.append(slots[~inside.flatten()[slots]])
    entries = torch.cat(tokens)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 2, window**2, len(entries), generator=generator, dtype=torch.float64)
    weight = torch.zeros(2, window**2, side**2, dtype=torch.float64)
    weight.index_add_(2, entries, table[0].exp())
    cells = weight.sum(dim=(0, 1)).nonzero().flatten()
    assert len(cells) == (window + 2 * expand) ** 2 - window**2
    torch.testing.assert_close(fold_ring(table).exp(), weight[:, :, cells])


@pytest.mark.parametrize("expand", [4, 6])
def test_a_ring_with_holes_is_refused(expand):
    entries = 4 * (49 - (7 - expand) ** 2)
    with pytest.raises(
        ValueError, match=f"at most half the window.*expand_size {expand}, window 7"
    ):
        fold_ring(torch.zeros(1, 1, 49, entries))


def test_a_ring_of_no_expansion_s_size_is_refused():
    with pytest.raises(ValueError, match=r"got shape \[1, 1, 49, 131\]"):
        fold_ring(torch.zeros(1, 1, 49, 131))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("small_112", "eager")


def test_official_index_buffers_are_left_out(golden):
    plain = convert_official(golden.official, golden.model)
    buffers = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49),
        "layers.0.blocks.0.attn.relative_position_index_0": torch.zeros(49, 49),
        "layers.0.blocks.0.attn.valid_ind_rolled": torch.zeros(132),
        "layers.0.blocks.0.attn_mask": torch.zeros(16, 49, 49),
    }
    wrapped = {"model": {**golden.official, **buffers}}
    converted = convert_official(wrapped, golden.model)  # type: ignore[arg-type]
    assert converted.keys() == plain.keys()
    assert all(torch.equal(converted[name], plain[name]) for name in plain)


def test_conversion_names_what_is_missing_unexpected_or_of_another_shape(golden):
    state = dict(golden.official)
    del state["layers.2.blocks.1.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"missing layers\.2\.blocks\.1\.mlp\.fc1\.bias"):
        convert_official(state, golden.model)
    with pytest.raises(ValueError, match="unexpected extra"):
        convert_official({**golden.official, "extra": torch.zeros(1)}, golden.model)
    with pytest.raises(
        ValueError, match=r"head\.fc\.weight has shape \[5, 192\], the model \[10, 192"
    ):
        convert_official({**golden.official, "head.weight": torch.zeros(5, 192)}, golden.model)


def test_a_subwindow_that_does_not_divide_the_window_is_refused(golden):
    state = {**golden.official, "layers.0.blocks.0.pool_layers.1.weight": torch.zeros(1, 9)}
    with pytest.raises(ValueError, match=r"sub-window \(3\) must divide the window \(7\)"):
        convert_official(state, golden.model)


def test_an_official_file_loads_as_its_conversion(tmp_path, golden):
    path = tmp_path / "official.pth"
    torch.save({"model": golden.official}, path)
    model = Golden("small_112", "eager").model
    assert load_weights(model, path) == []
    assert same(model, convert_official(golden.official, golden.model))


def test_official_positions_and_layer_scale_convert():
    model = tiny_model(
        img_size=(32, 24), abs_pos=True, layer_scale=0.1, focal_levels=1, expand_size=0
    )
    state = {}
    for name, x in model.state_dict().items():
        official = name.replace("layers.1.downsample", "layers.0.downsample")
        official = official.replace("head.fc.", "head.").replace("pos_embed", "absolute_pos_embed")
        official = official.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")
        official = official.replace("bias.window", "relative_position_bias_table")
        if official == "absolute_pos_embed":
            x = x.flatten(1, 2)
        state[official] = x.t() if official.endswith("bias_table") else x
    assert same(model, convert_official(state, model))


# -- Swin -----------------------------------------------------------------------------------------


def swin(**options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        **{
            "img_size": 112,
            "embed_dim": 16,
            "depths": (2, 1),
            "num_heads": (2, 4),
            "num_classes": 5,
            **options,
        },
    ).eval()


def focal(**options: Any) -> Any:
    return FocalTransformer(
        **{
            "img_size": 112,
            "embed_dim": 16,
            "depths": (2, 1),
            "num_heads": (2, 4),
            "num_classes": 5,
            **options,
        }
    ).eval()


def test_a_window_only_model_from_swin_computes_swin_s_first_stage():
    # Shifted windows and all: an independent implementation of this partial model.
    source, model = swin().double(), focal(focal_levels=1, expand_size=0, shift=True).double()
    model.load_state_dict(from_swin(source.state_dict(), model), strict=False)
    x = torch.randn(2, 3, 112, 112, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = source.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    got = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_the_merging_of_swin_becomes_the_same_linear_map_as_a_convolution():
    source, model = swin(), focal()
    fitted = from_swin(source.state_dict(), model)
    x = torch.randn(1, 6, 4, 16, generator=torch.Generator().manual_seed(0))
    merge = source.layers[1].downsample
    merge.norm = torch.nn.Identity()
    kernel = fitted["layers.1.downsample.proj.weight"]
    got = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), kernel, stride=2).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, merge(x))


def test_microsoft_s_names_give_the_same_as_timm_s():
    state = swin().state_dict()
    renamed = {}
    for name, x in state.items():
        name = name.replace("layers.1.downsample", "layers.0.downsample")
        renamed[name.replace("head.fc.", "head.")] = x
    model = focal()
    ours, theirs = from_swin(state, model), from_swin({"model": renamed}, model)  # type: ignore[dict-item]
    assert ours.keys() == theirs.keys()
    assert "head.fc.weight" in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_swin_file_loads_with_notes_on_what_it_lacks(tmp_path):
    source, model = swin(num_classes=9), focal(window_size=9, region_sizes=(5, 3))
    notes = reload(tmp_path, source, model)
    assert torch.equal(
        model.layers[1].blocks[0].attn.qkv.weight, source.layers[1].blocks[0].attn.qkv.weight
    )
    text = "\n".join(notes)
    for part in (
        "downsampling norms",
        "attn.bias.ring: not in the file",
        "attn.pools.0.weight: not in the file",
        "attn.bias.window: resized",
        "head.fc.weight: of another shape",
        "downsample.norm.weight: not in the file",
    ):
        assert part in text


def test_what_is_no_swin_or_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="must be a Swin Transformer's"):
        from_swin(focal().state_dict(), focal())
    state = {"layers.0.downsample.reduction.weight": torch.zeros(6, 12)}
    with pytest.raises(ValueError, match="got none that fits"):
        from_swin(state, focal())
