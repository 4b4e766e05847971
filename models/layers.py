"""Convolutional embeddings of the Focal Transformer.

Paper: Focal Self-attention for Local-Global Interactions in Vision Transformers (NeurIPS 2021,
arXiv 2107.00641), section 3.1. Origin: written from the paper; MLP, stochastic depth and layer
scale are timm's. What differs: feature maps stay NHWC between blocks and any input size is
accepted, where the released code takes one size alone.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvEmbed"]


class ConvEmbed(nn.Module):
    """A strided convolution and a LayerNorm: the patch embedding, and each stage's downsampling.

    Without ``overlap`` the patches tile the map, and rows or columns at the right and bottom that
    do not fill a patch are left out, as in the released code (a 7×7 map becomes 3×3). With
    ``overlap`` (the released "conv embedding") the kernel is ``2 * stride - 1`` and the padding
    ``stride // 2``: 7×7 stride 4 for the image, 3×3 stride 2 between stages.

    Args:
        in_chans: Channels in.
        out_chans: Channels out.
        stride: Side of a patch.
        overlap: Let neighbouring patches overlap.
        norm: Follow the convolution by a LayerNorm.
        channels_last: The input is NHWC, not NCHW. The output is NHWC in both cases.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        *,
        stride: int,
        overlap: bool = False,
        norm: bool = True,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.channels_last = channels_last
        kernel, padding = (2 * stride - 1, stride // 2) if overlap else (stride, 0)
        self.proj = nn.Conv2d(in_chans, out_chans, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(out_chans) if norm else nn.Identity()

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns made from ``height × width``; 0 where the map is too small."""
        kernel, stride, padding = (
            int(x[0]) for x in (self.proj.kernel_size, self.proj.stride, self.proj.padding)
        )
        rows, cols = (
            max((x + 2 * int(padding) - kernel) // stride + 1, 0) for x in (height, width)
        )
        return rows, cols

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: `[batch, height, width, in_chans]`, or `[batch, in_chans, height, width]`.

        Returns:
            `[batch, rows, cols, out_chans]`.

        Raises:
            ValueError: The map is smaller than one patch.
        """
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        height, width = x.shape[2:]
        if 0 in self.output_size(height, width):
            raise ValueError(
                f"the input must be large enough for every stage: a {height} by {width} map does "
                f"not hold one patch of side {self.proj.stride[0]}"
            )
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def resize_map(x: Tensor, height: int, width: int) -> Tensor:
    """`[1, rows, cols, channels]` resampled to ``height × width`` (absolute positions)."""
    if x.shape[1:3] == (height, width):
        return x
    resized = F.interpolate(
        x.permute(0, 3, 1, 2), (height, width), mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)
