"""From settings to the geometry of each stage, and the errors of settings that do not fit."""

from typing import Any

import pytest
import timm
import torch

from kernels import FocalGeometry
from models import FocalTransformer


def geometries(**options) -> list[FocalGeometry]:
    """The geometry of each stage's first block."""
    model = FocalTransformer(
        **{"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), **options}
    )
    return [blocks[0] for blocks in model.geometries]


def levels(geometry: FocalGeometry) -> list[tuple[int, int]]:
    return [(level.subwindow_size, level.region_size) for level in geometry.levels]


def test_defaults_are_the_released_levels_at_224():
    stages = geometries()
    assert [levels(stage) for stage in stages] == [
        [(1, 13), (7, 7)],
        [(1, 13), (7, 5)],
        [(1, 13), (7, 3)],
        [(1, 7), (7, 1)],
    ]
    assert [stage.num_keys for stage in stages] == [218, 194, 178, 50]


def test_a_stage_not_larger_than_its_window_shrinks_to_the_shorter_side_and_has_no_ring():
    stages = geometries(img_size=(96, 160), shift=True)
    assert [stage.window_size for stage in stages] == [7, 7, 6, 3]
    assert levels(stages[2]) == [(1, 6), (6, 3)]
    assert levels(stages[3]) == [(1, 3), (3, 1)]


def test_each_further_focal_level_halves_the_subwindow_and_widens_the_region():
    stages = geometries(window_size=8, focal_levels=(4, 3, 2, 1), region_sizes=(7, 5, 3, 1))
    assert levels(stages[0]) == [(1, 14), (8, 7), (4, 8), (2, 10)]
    assert levels(stages[1]) == [(1, 14), (8, 5), (4, 6)]
    assert levels(stages[2]) == [(1, 14), (8, 3)]
    assert levels(stages[3]) == [(1, 7)]


def test_the_full_form_gives_the_paper_s_illustration():
    illustration = ((1, 8), (2, 6), (4, 5))
    (stage,) = geometries(
        img_size=80, depths=(1,), num_heads=(1,), window_size=4, levels=[illustration]
    )
    assert levels(stage) == list(illustration)


def test_the_full_form_keeps_its_windows_on_small_maps():
    stages = geometries(
        img_size=28, depths=(1,), num_heads=(1,), window_size=8, levels=[[(1, 12), (8, 1)]]
    )
    assert stages[0].window_size == 8
    assert levels(stages[0]) == [(1, 12), (8, 1)]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_levels_run(count):
    given = [(1, 14), (2, 8), (4, 6), (8, 3)][:count]
    model = FocalTransformer(
        img_size=32,
        patch_size=2,
        num_classes=2,
        embed_dim=8,
        depths=(1,),
        num_heads=(2,),
        window_size=8,
        levels=[given],
        attention_backend="eager",
    )
    assert model(torch.randn(1, 3, 30, 46)).shape == (1, 2)


def test_only_odd_blocks_of_stages_with_several_windows_are_shifted():
    model = FocalTransformer(
        img_size=112, embed_dim=8, depths=(3, 2, 2, 2), num_heads=(1, 1, 1, 1), shift=True
    )
    shifts = [[geometry.shift for geometry in blocks] for blocks in model.geometries]
    assert shifts == [[0, 3, 0], [0, 3], [0, 0], [0, 0]]


def test_settings_of_a_variant_can_be_overridden():
    model: Any = timm.create_model("focal_micro", window_size=4, expand_size=2, boundary="mask")
    assert levels(model.geometries[0][0]) == [(1, 8), (4, 7)]
    assert model.geometries[0][0].boundary == "mask"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"window_size": (7, 7)},
            ValueError,
            r"window_size must be one value or one per stage \(4",
        ),
        ({"window_size": 0}, ValueError, "window_size must be at least 1, got 0"),
        ({"window_size": 7.0}, TypeError, "window_size must be an integer"),
        ({"focal_levels": 0}, ValueError, "focal_levels must be at least 1, got 0"),
        ({"focal_levels": 3}, ValueError, r"stage 1 \(map 56 by 56\).*subwindow_size=3"),
        ({"focal_levels": 6, "window_size": 8}, ValueError, "focal_levels must leave"),
        ({"expand_size": -1}, ValueError, "expand_size must be at least 0, got -1"),
        ({"region_sizes": (7, 5, 3)}, ValueError, "region_sizes must be one value or one per"),
        ({"region_sizes": 4}, ValueError, "stage 1.*region_size=4"),
        ({"levels": [[(1, 7)]] * 4, "expand_size": 3}, ValueError, "levels says all that expand"),
        ({"levels": [[(1, 7)]] * 3}, ValueError, "levels must list the levels of each of the 4"),
        ({"levels": [1, 2, 3, 4]}, TypeError, "levels must hold a list of levels per stage"),
        ({"levels": [[(1, 6)]] * 4}, ValueError, "stage 1.*region_size=6"),
        ({"levels": [[(7, 7)]] * 4}, ValueError, "subwindow_size must be 1, got 7"),
        ({"boundary": "reflect"}, ValueError, "boundary must be one of .* got 'reflect'"),
        ({"pool": "avg"}, ValueError, "pool must be one of .* got 'avg'"),
        ({"attention_backend": "cuda"}, ValueError, "attention_backend must be one of .*'cuda'"),
        ({"depths": ()}, ValueError, "depths must hold at least one positive number"),
        ({"depths": (1, 0, 1, 1)}, ValueError, "depths must hold .* got"),
        ({"num_heads": (1, 1)}, ValueError, "num_heads must hold one value per stage"),
        ({"num_heads": (3, 1, 1, 1)}, ValueError, "num_heads must divide the channels"),
        ({"embed_dim": 0}, ValueError, "embed_dim must be positive, got 0"),
        ({"patch_size": 0}, ValueError, "patch_size must be positive, got 0"),
        ({"mlp_ratio": -1.0}, ValueError, "mlp_ratio must be positive"),
        ({"drop_path_rate": 1.0}, ValueError, r"drop_path_rate must lie in \[0, 1\), got 1.0"),
        ({"attn_drop_rate": -0.1}, ValueError, "attn_drop_rate must lie in"),
        ({"img_size": 16}, ValueError, "img_size must leave every stage a map: stage 4 of 4"),
        ({"img_size": (1, 2, 3)}, ValueError, "img_size must be one number or"),
        ({"depths": (1,) * 5, "num_heads": (1,) * 5}, ValueError, "region_sizes must be one"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_named_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        geometries(**options)
