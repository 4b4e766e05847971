"""The parts of a stage: a block of attention and MLP, and the blocks with their downsampling.

Paper: arXiv 2107.00641, section 3.1 and figure 2. Origin: written from the paper; MLP, stochastic
depth and layer scale are timm's. What differs from the released code: a stage begins with its
downsampling rather than end with the next one's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath, LayerScale
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_static_value

from models.focal_attention import FocalAttention
from models.layers import ConvEmbed, LayerNorm, Mlp, runs_eagerly_on_cpu
from models.products import part_size

__all__ = ["FocalBlock", "FocalStage"]

# Elements of query, key and value that images taken together may have: 16 MiB in float32. Attention
# works through them in smaller steps itself, and sets up anew each time it is called.
PART_SIZE = 2**22
# Times that a compiler's graph may have the attention of a block, whatever the batch.
COMPILED_PARTS = 4


class FocalBlock(nn.Module):
    """Focal attention and an MLP, each in a residual branch.

    Args:
        attn: The attention module.
        dim: Channels.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        proj_drop: Dropout inside the MLP.
        drop_path: Probability that a branch is skipped for a sample.
        layer_scale: Initial value of a learned factor per channel on each branch; None for none.
        pre_norm: Normalise a branch's input (as released) rather than its output.
    """

    def __init__(
        self,
        attn: FocalAttention,
        dim: int,
        *,
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        pre_norm: bool = True,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.norm1 = LayerNorm(dim)
        self.attn = attn
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, height, width, dim]` to the same shape.

        In evaluation without a gradient, a CPU takes a few images at a time through the block, and
        under a compiler through its attention.
        """
        height, width = x.shape[1:3]
        # Sums are of three dimensions: those of four a compiler takes for NCHW, and lays out anew.
        x = x.flatten(1, 2)
        if not self.training and not torch.is_grad_enabled() and runs_eagerly_on_cpu(x):
            x = self._by_images(x, (height, width))
        else:
            sums = [some + self._attend(some, (height, width)) for some in _compiled_parts(x)]
            x = torch.cat(sums) if len(sums) > 1 else sums[0]
            x = x + self._transform(x)
        return x.unflatten(1, (height, width))

    def _by_images(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        images = _images_at_a_time(x)
        out = torch.empty_like(x)
        for some, result in zip(x.split(images), out.split(images), strict=True):
            torch.add(some, self._attend(some, size), out=result)
            result += self._transform(result)
        return out

    def _attend(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The first branch: tokens `[batch, height · width, dim]` of a map of that ``size``."""
        if self.pre_norm:
            x = self.norm1(x)
        x = self.attn(x.unflatten(1, size)).flatten(1, 2)
        if not self.pre_norm:
            x = self.norm1(x)
        return self.drop_path1(self.ls1(x))

    def _transform(self, x: Tensor) -> Tensor:
        """The second branch."""
        x = self.mlp(self.norm2(x)) if self.pre_norm else self.norm2(self.mlp(x))
        return self.drop_path2(self.ls2(x))


def _images_at_a_time(x: Tensor) -> int:
    """Images of `[batch, tokens, dim]` whose query, key and value are to exist together."""
    batch, tokens, dim = x.shape
    return part_size(batch * tokens, 3 * dim, unit=tokens, size=PART_SIZE) // tokens


def _compiled_parts(x: Tensor) -> Sequence[Tensor]:
    """Images to attend together: all of them, but where a compiler works for a CPU.

    Query, key and value of a whole batch are the largest map there is, which malloc may take from
    the kernel anew each time (docs/performance.md). How many parts a graph has must not follow from
    symbols.
    """
    if (
        x.device.type != "cpu"
        or not torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or not all(has_static_value(size) for size in x.shape)
    ):
        return [x]
    images = max(_images_at_a_time(x), -(-x.shape[0] // COMPILED_PARTS))
    return x.split(images)


class FocalStage(nn.Module):
    """Downsampling (but for the first stage), then blocks that share a map size.

    Args:
        blocks: The blocks.
        downsample: Halves the map beforehand, or None.
    """

    def __init__(self, blocks: Sequence[FocalBlock], downsample: ConvEmbed | None = None) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = nn.Identity() if downsample is None else downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, height, width, in_dim]` to `[batch, rows, cols, dim]`."""
        x = self.downsample(x)
        if self.grad_checkpointing and self.training:
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
