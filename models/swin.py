"""A Swin Transformer's weights under our names: the start the paper gives its largest model.

Origin: the parameter names and shapes of Microsoft's and timm's Swin checkpoints. What differs from
Swin, and so keeps its initialisation: the ring, the coarse levels and the pooling. Downsampling
norms come before the projection in Swin and after it here, so only the projection is taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from models.official import BUFFERS

__all__ = ["is_swin", "rename_swin"]


def is_swin(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are a Swin Transformer's parameters (the first version's)."""
    return any(name.endswith(".downsample.reduction.weight") for name in state_dict)


def rename_swin(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Swin state dict, timm's or Microsoft's, has in common with ours, under our names."""
    # Microsoft's stages end with the downsampling, timm's begin with it, as ours do.
    step = 1 if "layers.0.downsample.reduction.weight" in state_dict else 0
    renamed = {}
    for name, tensor in state_dict.items():
        if any(buffer in name for buffer in BUFFERS) or ".downsample.norm." in name:
            continue
        merging = re.fullmatch(r"layers\.(\d+)\.downsample\.reduction\.weight", name)
        if merging:
            renamed[f"layers.{int(merging[1]) + step}.downsample.proj.weight"] = _as_conv(tensor)
        elif name.endswith(".attn.relative_position_bias_table"):
            table = name.removesuffix("relative_position_bias_table") + "bias.window"
            renamed[table] = tensor.t()
        else:
            renamed[re.sub(r"^head\.(?=weight|bias)", "head.fc.", name)] = tensor
    return renamed


def _as_conv(reduction: Tensor) -> Tensor:
    """Patch merging `[out, 4 · in]` as a 2×2 convolution: its inputs go down the columns first."""
    out_chans, merged = reduction.shape
    return reduction.view(out_chans, 2, 2, merged // 4).permute(0, 3, 2, 1).contiguous()
