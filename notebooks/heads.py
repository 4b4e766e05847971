"""Training small models for their attention, and attention maps by head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from conf.compose import compose
from models.attention_maps import attention_map
from training.run import run
from training.trained import load_run

__all__ = ["deit_attention", "draw_heads", "focal_attention_heads", "train"]

DOUBLINGS = 3  # of even attention, at which the colours end


def train(folder: Path, *overrides: str) -> tuple[nn.Module, float]:
    """What `python train.py OVERRIDES logger=none` does.

    Args:
        folder: Where the run goes; must be empty.
        overrides: Settings.

    Returns:
        The model of the best epoch in evaluation mode, and its top-1 on the test images, percent.
    """
    folder.mkdir(parents=True)
    result = run(compose(*overrides, "logger=none"), folder)
    return load_run(folder), result["top1"]


def focal_attention_heads(
    model: Any, image: Tensor, query: tuple[int, int], *, stage: int = 0, block: int = -1
) -> Tensor:
    """`[heads, rows, cols]`: where the query's attention goes; see `models.attention_maps`."""
    return attention_map(model, image[None], stage=stage, block=block, query=query)


@torch.no_grad()
def deit_attention(model: Any, image: Tensor, query: tuple[int, int], *, block: int = -1) -> Tensor:
    """Where the attention of one token of a timm vision transformer goes.

    Args:
        model: A `timm.models.VisionTransformer` in evaluation mode.
        image: `[channels, height, width]`.
        query: Row and column of the patch that attends.
        block: Which block; negative counts from the last.

    Returns:
        `[heads, rows, cols]` over the patches; what goes to the class token is left out.
    """
    attention = model.blocks[block].attn
    rows, cols = model.patch_embed.grid_size
    seen: list[Tensor] = []
    hook = attention.attn_drop.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fused, attention.fused_attn = attention.fused_attn, False  # so that the weights exist
    try:
        model.forward_features(image[None])
    finally:
        hook.remove()
        attention.fused_attn = fused
    first = model.num_prefix_tokens
    weights = seen[0][0, :, first + query[0] * cols + query[1], first:]
    return weights.unflatten(1, (rows, cols))


def draw_heads(
    panels: Sequence[Axes], weights: Tensor, query: tuple[int, int], name: str
) -> AxesImage:
    """One map per head: attention to each token over even attention, in doublings."""
    even = weights * weights[0].numel()
    for head, (axes, shown) in enumerate(zip(panels, even, strict=True), start=1):
        image = axes.imshow(
            shown.clamp(min=2.0**-DOUBLINGS).log2().numpy(),
            cmap="PuOr_r",
            vmin=-DOUBLINGS,
            vmax=DOUBLINGS,
        )
        axes.plot(query[1], query[0], "o", color="white", markeredgecolor="black", markersize=4)
        axes.set_title(f"{name}, head {head}")
        axes.set_axis_off()
    return image


def add_scale(figure: Figure, image: AxesImage, panels: Sequence[Axes]) -> None:
    """The colour bar of `draw_heads`."""
    steps = range(-DOUBLINGS, DOUBLINGS + 1)
    bar = figure.colorbar(image, ax=list(panels), ticks=list(steps), shrink=0.8)
    bar.set_ticklabels([f"1/{2**-step}" if step < 0 else f"{2**step}" for step in steps])
    bar.set_label("attention to a token, relative to even attention")
