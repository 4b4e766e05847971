"""The Focal Transformer: four stages of focal self-attention behind timm's model interface.

Paper: Focal Self-attention for Local-Global Interactions in Vision Transformers (NeurIPS 2021,
arXiv 2107.00641), sections 3.1 and 3.3. Origin: written from the paper; weights of the released
code convert without loss (`models.checkpoint`). What differs from the released code: maps are NHWC
and of any size at run time; a stage begins with its downsampling, so a stage's output is its
feature map (as in timm's Swin); attention is one operator with interchangeable backends.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from kernels import BACKENDS, FocalGeometry
from models.blocks import FocalBlock, FocalStage
from models.focal_attention import POOLS, FocalAttention, init_linear
from models.layers import ConvEmbed, LayerNorm, resize_map
from models.settings import (
    Levels,
    PerStage,
    check_settings,
    check_widths,
    map_sizes_of,
    stage_geometries,
)

__all__ = ["FocalTransformer"]


class FocalTransformer(nn.Module):
    """A Focal Transformer for classification, or a backbone for dense prediction.

    Windows, levels and tables are fixed at construction, from ``img_size``; afterwards any image
    size runs. Stage ``i`` has ``embed_dim · 2ⁱ`` channels. "Per stage" means one value for all
    stages or a sequence of one per stage.

    Args:
        img_size: Height and width, or one number, that the geometry is made for.
        patch_size: Side of a patch of the first embedding.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling before the classifier: ``"avg"``, ``"max"``, …, ``""`` for none.
        embed_dim: Channels of the first stage.
        depths: Blocks per stage.
        num_heads: Heads per stage; each divides its stage's channels.
        window_size: Side of a window, per stage.
        focal_levels: Number of levels, 1 for fine keys alone, per stage; None for 2. Coarse level
            k = 1, 2, … pools squares of ``window_size // 2^(k−1)`` tokens over
            ``region + 2^(k−1) − 1`` of them.
        expand_size: Fine tokens attended on each side of the window, per stage; None for 3.
        region_sizes: Region of the first coarse level, per stage; None for 7, 5, 3, 1. With these
            three, a stage whose map at ``img_size`` is not larger than its window takes the shorter
            side of the map as its window and no fine token around it.
        levels: In place of these three, the ``(subwindow_size, region_size)`` pairs of each stage,
            finest first; windows then stay as given.
        pool: ``"fc"``, ``"mean"``, ``"max"`` or ``"conv"``; see `FocalAttention`.
        boundary: ``"wrap"`` (as released) or ``"mask"``; see `kernels.FocalGeometry`.
        shift: Shift the windows of odd blocks by half a window, where more than one spans the map.
        mlp_ratio: Hidden width of the MLP over the channels.
        qkv_bias: Bias of the query, key and value projection.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after the embedding and each projection, and in the MLP.
        attn_drop_rate: Dropout of attention weights.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0.
        conv_embed: Overlapping convolutions for embedding and downsampling.
        layer_scale: Initial value of a learned factor on each residual branch; None for none.
        pre_norm: Normalise the input of each residual branch (as released); False normalises its
            output.
        patch_norm: LayerNorm after the patch embedding.
        abs_pos: Add a learned absolute position embedding, resampled for other image sizes.
        grad_checkpointing: Recompute activations in backward.
        attention_backend: ``"auto"``, ``"reference"``, ``"eager"`` or ``"triton"``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument out of its range, or arguments that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: PerStage = 7,
        focal_levels: PerStage | None = None,
        expand_size: PerStage | None = None,
        region_sizes: PerStage | None = None,
        levels: Levels | None = None,
        pool: str = "fc",
        boundary: str = "wrap",
        shift: bool = False,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        conv_embed: bool = False,
        layer_scale: float | None = None,
        pre_norm: bool = True,
        patch_norm: bool = True,
        abs_pos: bool = False,
        grad_checkpointing: bool = False,
        attention_backend: str = "auto",
    ) -> None:
        super().__init__()
        depths, num_heads, dims = check_widths(embed_dim, depths, num_heads)
        check_settings(
            positive={"patch_size": patch_size, "in_chans": in_chans, "mlp_ratio": mlp_ratio},
            rates={
                "drop_rate": drop_rate,
                "proj_drop_rate": proj_drop_rate,
                "attn_drop_rate": attn_drop_rate,
                "drop_path_rate": drop_path_rate,
            },
            choices={"pool": (pool, POOLS), "attention_backend": (attention_backend, BACKENDS)},
        )
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.embed_dim = embed_dim
        self.num_features = self.head_hidden_size = dims[-1]

        self.patch_embed = ConvEmbed(
            in_chans,
            dims[0],
            stride=patch_size,
            overlap=conv_embed,
            norm=patch_norm,
            channels_last=False,
        )
        downsamples = [
            ConvEmbed(before, after, stride=2, overlap=conv_embed)
            for before, after in pairwise(dims)
        ]
        self.map_sizes = map_sizes_of(img_size, [self.patch_embed, *downsamples])
        geometries = stage_geometries(
            self.map_sizes,
            window_size=window_size,
            focal_levels=focal_levels,
            expand_size=expand_size,
            region_sizes=region_sizes,
            levels=levels,
            boundary=boundary,
            shift=shift,
        )
        self.pos_embed = (
            nn.Parameter(torch.empty(1, *self.map_sizes[0], dims[0])) if abs_pos else None
        )
        self.pos_drop = nn.Dropout(proj_drop_rate)

        rates = torch.linspace(0.0, drop_path_rate, sum(depths), device="cpu")  # also under meta
        drop_path = iter(rates.tolist())
        stages = []
        for stage, (dim, heads) in enumerate(zip(dims, num_heads, strict=True)):
            blocks = [
                FocalBlock(
                    FocalAttention(
                        dim,
                        heads,
                        geometries[stage][block % 2],
                        pool=pool,
                        qkv_bias=qkv_bias,
                        attn_drop=attn_drop_rate,
                        proj_drop=proj_drop_rate,
                        backend=attention_backend,
                    ),
                    dim,
                    mlp_ratio=mlp_ratio,
                    proj_drop=proj_drop_rate,
                    drop_path=next(drop_path),
                    layer_scale=layer_scale,
                    pre_norm=pre_norm,
                )
                for block in range(depths[stage])
            ]
            stages.append(FocalStage(blocks, downsamples[stage - 1] if stage else None))
        self.layers = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": patch_size * 2**stage, "module": f"layers.{stage}"}
            for stage, dim in enumerate(dims)
        ]
        self.norm: nn.Module = LayerNorm(dims[-1])
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self.set_grad_checkpointing(grad_checkpointing)
        self.init_weights()

    @property
    def stages(self) -> list[FocalStage]:
        """The stages that ``layers`` holds."""
        return cast(list[FocalStage], list(self.layers))

    @property
    def geometries(self) -> list[list[FocalGeometry]]:
        """The geometry of each block, stage by stage."""
        return [
            [cast(FocalBlock, block).attn.geometry for block in stage.blocks]
            for stage in self.stages
        ]

    def init_weights(self) -> None:
        """The released initialisation of linear layers; other modules initialise themselves."""
        self.apply(init_linear)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: bias tables and absolute positions."""
        return {
            name
            for name, _ in self.named_parameters()
            if ".attn.bias." in name or name == "pos_embed"
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters into layer groups: by block, or by stage if ``coarse``."""
        stages: Any = r"^layers\.(\d+)"
        blocks: Any = [
            (r"^layers\.(\d+)\.downsample", (0,)),
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed|^pos_embed", "blocks": stages if coarse else blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in backward, block by block, or keep them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or by none where ``num_classes`` is 0."""
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features)
        if isinstance(self.head.fc, nn.Linear):
            init_linear(self.head.fc)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of stages.

        Args:
            x: `[batch, in_chans, height, width]`.
            indices: Stages to return: a list, the last n for an integer, None for all.
            norm: Apply the final norm to the last stage's map.
            stop_early: Run no stage after the last one asked for.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Leave out the final features.

        Returns:
            The maps, or the final features (`[batch, rows, cols, channels]`, normalised) and the
            maps.

        Raises:
            ValueError: Another ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        take, last = feature_take_indices(
            len(self.layers), None if indices is None else _listed(indices)
        )
        x = self._embed(x)
        intermediates = []
        final = len(self.layers) - 1
        stages = self.layers[: last + 1] if stop_early or intermediates_only else self.layers
        for index, stage in enumerate(stages):
            x = stage(x)
            if index in take:
                taken = self.norm(x) if norm and index == final else x
                intermediates.append(
                    taken.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else taken
                )
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == final + 1 else x), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages, norm and head that ``indices`` do not need; gives the stages kept."""
        take, last = feature_take_indices(len(self.layers), _listed(indices))
        pruned = last < len(self.layers) - 1
        self.layers = self.layers[: last + 1]
        if prune_norm or pruned:
            self.norm = nn.Identity()  # sized for the last stage
        if pruned:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        return take

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        size = x.shape[1:3]
        tokens = x.flatten(1, 2)  # three dimensions: see `models.blocks`
        if self.pos_embed is not None:
            tokens = tokens + resize_map(self.pos_embed, *size).flatten(1, 2)
        return self.pos_drop(tokens).unflatten(1, size)

    def forward_features(self, x: Tensor) -> Tensor:
        """`[batch, in_chans, height, width]` to the last map, `[batch, rows, cols, channels]`."""
        return self.norm(self.layers(self._embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map to logits `[batch, num_classes]`, or to what the classifier sees."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, in_chans, height, width]` to logits `[batch, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _listed(indices: int | Sequence[int]) -> int | list[int]:
    return indices if isinstance(indices, int) else list(indices)
