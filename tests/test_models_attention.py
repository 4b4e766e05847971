"""The attention module: bias assembly, pooling before or after the projection, padding."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kernels import (
    FocalGeometry,
    FocalLevel,
    PooledMap,
    focal_attention,
    focal_attention_qkvpacked,
)
from models.bias import FocalBias
from models.focal_attention import FocalAttention


def geometry_of(window_size: int, *levels: tuple[int, int], **options: Any) -> FocalGeometry:
    return FocalGeometry(window_size, tuple(FocalLevel(*level) for level in levels), **options)


GEOMETRIES = [
    geometry_of(3, (1, 3)),
    geometry_of(4, (1, 8), (4, 5)),
    geometry_of(4, (1, 4), (4, 3)),
    geometry_of(4, (1, 8), (2, 6), (4, 3)),
    geometry_of(4, (1, 6), (2, 4), (4, 1), (1, 4)),
]


def module(geometry: FocalGeometry, dim: int = 6, num_heads: int = 2, **options: Any) -> Any:
    torch.manual_seed(0)
    attn = FocalAttention(dim, num_heads, geometry, backend="reference", **options).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in attn.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.3 * noise
    return attn


def features(height: int, width: int, dim: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, height, width, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_dense_bias_takes_each_pair_from_its_table(geometry):
    bias: Any = FocalBias(geometry, num_heads=2).double()
    for seed, table in enumerate(bias.parameters()):
        table.data = torch.randn(
            table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    window, dense = geometry.window_size, bias()
    assert dense.shape == (2, window**2, geometry.num_keys)
    slot = 0
    for number, level in enumerate(geometry.levels):
        region, margin, ring_cell = level.region_size, geometry.margin(number), 0
        for ki in range(region):
            for kj in range(region):
                row, col = ki - margin, kj - margin
                inside = 0 <= row < window and 0 <= col < window
                for query in range(window**2):
                    qi, qj = divmod(query, window)
                    if number:
                        table = bias.coarse[number - 1]
                        side = window + region - 1
                        expected = table[:, (qi - ki + region - 1) * side + qj - kj + region - 1]
                    elif inside:
                        side = 2 * window - 1
                        entry = (qi - row + window - 1) * side + qj - col + window - 1
                        expected = bias.window[:, entry]
                    else:
                        expected = bias.ring[:, query, ring_cell]
                    assert torch.equal(dense[:, query, slot], expected), (number, ki, kj, query)
                ring_cell += 0 if inside else 1
                slot += 1


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (7, 10), (3, 5)])
def test_fc_pooling_equals_pooling_features_before_the_projection(height, width, shift, qkv_bias):
    geometry = geometry_of(4, (1, 8), (2, 6), (4, 3), shift=shift)
    attn = module(geometry, qkv_bias=qkv_bias)
    x = features(height, width)
    rows, cols = geometry.padded_size(height, width)
    padded = F.pad(x, (0, 0, 0, cols - width, 0, rows - height))
    query, key, value = attn.qkv(padded).view(2, rows, cols, 3, 2, 3).unbind(3)
    rolled = padded.roll((-shift, -shift), (1, 2))
    maps = []
    for pool, side in zip(attn.pools, (2, 4), strict=True):
        blocks = rolled.reshape(2, rows // side, side, cols // side, side, 6)
        pooled = torch.einsum("bricjd,ij->brcd", blocks, pool.weight) + pool.bias
        projected = attn.qkv(pooled).unflatten(3, (3, 2, 3))
        maps.append(PooledMap(projected[..., 1, :, :], projected[..., 2, :, :]))
    out = focal_attention(
        query, key, value, attn.bias(), geometry=geometry, pooling=maps, backend="reference"
    )
    expected = attn.proj(out[:, :height, :width].flatten(3))
    torch.testing.assert_close(attn(x), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("boundary", ["wrap", "mask"])
def test_conv_pooling_with_equal_channels_is_fc_pooling(shift, boundary):
    geometry = geometry_of(4, (1, 8), (2, 6), (4, 3), boundary=boundary, shift=shift)
    fc, conv = module(geometry, pool="fc"), module(geometry, pool="conv")
    for scalar, depthwise in zip(fc.pools, conv.pools, strict=True):
        depthwise.weight.data = scalar.weight.data.expand_as(depthwise.weight).clone()
        depthwise.bias.data = scalar.bias.data.expand_as(depthwise.bias).clone()
    conv.load_state_dict(
        {name: x for name, x in fc.state_dict().items() if "pools" not in name}, strict=False
    )
    x = features(7, 10)
    torch.testing.assert_close(conv(x), fc(x), atol=1e-12, rtol=1e-12)


def test_mean_pooling_is_fc_pooling_at_its_start():
    geometry = geometry_of(4, (1, 8), (4, 3))
    mean, fc = module(geometry, pool="mean"), module(geometry, pool="fc")
    fc.load_state_dict(mean.state_dict(), strict=False)
    fc.pools[0].weight.data.fill_(1 / 16)
    fc.pools[0].bias.data.zero_()
    x = features(8, 8)
    torch.testing.assert_close(mean(x), fc(x), atol=1e-12, rtol=1e-12)


def test_max_pooling_takes_the_largest_feature_of_a_subwindow():
    geometry = geometry_of(2, (1, 2), (2, 3))
    attn = module(geometry, pool="max")
    x = features(4, 4)
    blocks = x.reshape(2, 2, 2, 2, 2, 6).permute(0, 1, 3, 2, 4, 5).reshape(2, 2, 2, 4, 6)
    projected = attn.qkv(blocks.amax(dim=3)).unflatten(3, (3, 2, 3))
    query, key, value = attn.qkv(x).unflatten(3, (3, 2, 3)).unbind(3)
    out = focal_attention(
        query,
        key,
        value,
        attn.bias(),
        geometry=geometry,
        pooling=[PooledMap(projected[..., 1, :, :], projected[..., 2, :, :])],
        backend="reference",
    )
    torch.testing.assert_close(attn(x), attn.proj(out.flatten(3)), atol=1e-12, rtol=1e-12)


def test_masked_borders_hide_the_padding_of_a_ragged_map():
    # Window-only and fine keys: under "mask" a window sees real tokens alone, so a plain softmax
    # over the tokens of the corner window, cut off at the map's edge, gives the same.
    geometry = geometry_of(4, (1, 4), boundary="mask")
    attn = module(geometry)
    x = features(6, 5)
    corner = x[:, 4:6, 4:5]
    query, key, value = attn.qkv(corner).reshape(2, 2, 3, 2, 3).permute(2, 0, 3, 1, 4)
    bias = attn.bias()[:, [0, 4]][:, :, [0, 4]]  # the two tokens of the window's first column
    weight = (query @ key.transpose(-1, -2) * 3**-0.5 + bias).softmax(dim=-1)
    expected = attn.proj((weight @ value).transpose(1, 2).reshape(2, 2, 6))
    torch.testing.assert_close(attn(x)[:, 4:6, 4], expected, atol=1e-12, rtol=1e-12)


def test_wrapped_borders_attend_the_projected_padding():
    geometry = geometry_of(4, (1, 4), boundary="wrap")
    attn = module(geometry)
    x = features(4, 3)
    whole = attn(F.pad(x, (0, 0, 0, 1)))
    torch.testing.assert_close(attn(x), whole[:, :, :3], atol=1e-12, rtol=1e-12)


def test_the_projection_reaches_the_operator_as_it_is(monkeypatch):
    seen: list[torch.Tensor] = []

    def spy(qkv, *args, **kwargs):
        seen.append(qkv)
        return focal_attention_qkvpacked(qkv, *args, **kwargs)

    monkeypatch.setattr("models.focal_attention.focal_attention_qkvpacked", spy)
    attn, x = module(geometry_of(4, (1, 8), (4, 3))), features(8, 8)
    projected: list[torch.Tensor] = []
    attn.qkv.register_forward_hook(lambda module, inputs, output: projected.append(output))
    attn(x)
    ((qkv,), (output,)) = seen, projected
    assert qkv.data_ptr() == output.data_ptr()
    assert qkv.is_contiguous()
    assert qkv.shape[:4] == (len(x), 8, 8, 3)
