"""Classify images: `python predict.py IMAGE... --model RUN_DIR`; see `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

from conf import ConfigError
from data import BrokenImageError
from data.images import load_rgb
from export import read_model
from models import FocalTransformer
from models.attention_maps import attention_map
from models.blocks import FocalBlock

PICTURES = (".png", ".jpg", ".pdf", ".svg")
DOUBLINGS = 3  # of even attention, at which the colours of an overlay end


def class_names(model: nn.Module) -> list[str]:
    """One readable name per class: the model's own, ImageNet's synsets in words, or numbers."""
    config: Any = model.pretrained_cfg
    names = config.get("label_names")
    imagenet = ImageNetInfo()
    if names is None:
        return [f"class {index}" for index in range(config["num_classes"])]
    if list(names) == imagenet.label_names():
        return [imagenet.index_to_description(index) for index in range(len(names))]
    return list(names)


@torch.inference_mode()
def classify(model: nn.Module, images: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """The `top` likeliest classes of each of `[batch, channels, height, width]` images.

    Returns:
        For each image `(class, probability)` pairs, the likeliest first.
    """
    values, indices = model(images).softmax(dim=1).topk(top, dim=1)
    return [
        list(zip(index, value, strict=True))
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
    ]


def visible(model: nn.Module, image: Tensor) -> Tensor:
    """The picture that the model sees, `[height, width, 3]` from 0 to 1."""
    config: Any = model.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (image * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)


def draw_overlay(
    path: Path,
    model: FocalTransformer,
    images: Sequence[Tensor],
    titles: Sequence[str],
    *,
    stages: Sequence[int],
    block: int,
    query: tuple[int, int] | None,
    head: int | None,
) -> None:
    """Draw the images, a row each, and beside them where the attention of a block goes.

    Args:
        path: The picture to write.
        model: The model.
        images: `[channels, height, width]` each, as the model wants them.
        titles: A line for each image.
        stages: The stages to show, a column each.
        block: Which block of these stages.
        query: Row and column of the pixel whose token attends; None for the mean over all tokens.
        head: Which head; None for the mean over the heads.
    """
    from matplotlib.figure import Figure  # a prediction without a picture does without it

    columns = 1 + len(stages)
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    for row, (image, title) in enumerate(zip(images, titles, strict=True)):
        picture = visible(model, image)
        height, width = picture.shape[:2]
        grid[row, 0].imshow(picture.numpy())
        grid[row, 0].set_title(title, fontsize=9)
        for axes, stage in zip(grid[row, 1:], stages, strict=True):
            side = model.feature_info[stage]["reduction"]
            token = None if query is None else (query[0] // side, query[1] // side)
            weights = attention_map(model, image[None], stage=stage, block=block, query=token)
            shown = weights.mean(dim=0) if head is None else weights[head]
            rows, cols = -(-height // side), -(-width // side)  # without the padding to windows
            even = shown * shown.numel()  # 1 where attention is even
            axes.imshow(picture.mean(dim=2).numpy(), cmap="gray", vmin=0, vmax=1)
            scale = axes.imshow(
                even[:rows, :cols].clamp(min=2.0**-DOUBLINGS).log2().numpy(),
                extent=(0, cols * side, rows * side, 0),
                cmap="coolwarm",
                vmin=-DOUBLINGS,
                vmax=DOUBLINGS,
                alpha=0.6,
                interpolation="nearest",
            )
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.set_title(f"stage {stage + 1}", fontsize=9)
            if query is not None:
                axes.plot(query[1], query[0], "c+", markersize=10, markeredgewidth=2)
    for axes in grid.flat:
        axes.set_axis_off()
    steps = range(-DOUBLINGS, DOUBLINGS + 1)
    bar = figure.colorbar(scale, ax=grid, ticks=steps, shrink=0.8)
    bar.set_ticklabels([f"1/{2**-n}" if n < 0 else f"{2**n}" for n in steps])
    bar.set_label("attention to a token\nrelative to even attention")
    figure.savefig(path, dpi=120)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Classify images with a trained model.")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument(
        "--model", required=True, type=Path, help="a run folder, a checkpoint or an exported folder"
    )
    parser.add_argument("--top", type=int, default=5, help="classes to print (5)")
    parser.add_argument("--overlay", type=Path, metavar="OUT.png", help="draw where attention goes")
    parser.add_argument("--stage", type=int, help="stage of the overlay, from 1 (all stages)")
    parser.add_argument("--block", type=int, default=0, help="its block, from 1 (the last)")
    parser.add_argument("--head", type=int, help="its head, from 1 (the mean of all)")
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        metavar=("ROW", "COL"),
        help="pixel of the model's input that attends (the mean over all of them)",
    )
    return parser.parse_args(words)


def check(options: argparse.Namespace, model: nn.Module) -> None:
    """Refuse what the model cannot do, before any image is read.

    Raises:
        ConfigError: An option out of its range; names it, the rule and the value.
    """
    config: Any = model.pretrained_cfg
    if options.top < 1:
        raise ConfigError(f"--top must be positive, got {options.top}")
    if options.overlay is None:
        for name in ("stage", "block", "head", "query"):
            if getattr(options, name):
                raise ConfigError(f"--{name} is of the overlay, and needs --overlay OUT.png")
        return
    if options.overlay.suffix not in PICTURES:
        raise ConfigError(f"--overlay must end in {', '.join(PICTURES)}, got {options.overlay}")
    if not options.overlay.parent.is_dir():
        raise ConfigError(f"--overlay must lie in a folder that exists, got {options.overlay}")
    if not isinstance(model, FocalTransformer):
        raise ConfigError(
            f"--overlay needs a model with focal attention, got {config['architecture']}"
        )
    stages = model.stages
    if options.stage is not None and 1 <= options.stage <= len(stages):
        stages = [stages[options.stage - 1]]
    limits = {
        "stage": len(model.stages),
        "block": min(len(stage.blocks) for stage in stages),
        "head": min(cast(FocalBlock, stage.blocks[0]).attn.num_heads for stage in stages),
    }
    for name, most in limits.items():
        value = getattr(options, name)
        if value is not None and not (1 <= value <= most or (name == "block" and value == 0)):
            raise ConfigError(f"--{name} must lie from 1 to {most}, got {value}")
    _, height, width = config["input_size"]
    if options.query is not None:
        row, col = options.query
        if not (0 <= row < height and 0 <= col < width):
            raise ConfigError(
                f"--query must be a pixel of the model's {height} by {width} input, got {row} {col}"
            )


def predict(options: argparse.Namespace) -> None:
    """Print the likeliest classes of each image and draw the overlay asked for.

    Raises:
        ConfigError: The model cannot be read or lacks what an option wants.
        BrokenImageError: A file is no image.
    """
    model = read_model(options.model)
    check(options, model)
    missing = [str(path) for path in options.images if not path.is_file()]
    if missing:
        raise ConfigError(f"IMAGE must be an image file, got {', '.join(missing)}: no such file")
    transform: Any = create_transform(**resolve_model_data_config(model))
    config: Any = model.pretrained_cfg
    images = [_channels(transform(load_rgb(str(path))), config) for path in options.images]
    names = class_names(model)
    results = classify(model, torch.stack(images), min(options.top, len(names)))
    table = Table(title=f"{config['architecture']} ({options.model})", title_justify="left")
    for column in ("image", "class", "probability"):
        table.add_column(column, justify="right" if column == "probability" else "left")
    for path, pairs in zip(options.images, results, strict=True):
        for place, (index, probability) in enumerate(pairs):
            table.add_row(
                "" if place else str(path),
                names[index],
                f"{100 * probability:.2f} %",
                end_section=place == len(pairs) - 1,
            )
    console = Console(highlight=False)
    console.print(table)
    if options.overlay is not None:
        assert isinstance(model, FocalTransformer)  # checked
        draw_overlay(
            options.overlay,
            model,
            images,
            [
                f"{path.name}: {names[pairs[0][0]]}"
                for path, pairs in zip(options.images, results, strict=True)
            ],
            stages=(range(len(model.stages)) if options.stage is None else [options.stage - 1]),
            block=options.block - 1,
            query=None if options.query is None else tuple(options.query),
            head=None if options.head is None else options.head - 1,
        )
        console.print(f"overlay in {options.overlay}", markup=False)


def _channels(image: Tensor, config: dict[str, Any]) -> Tensor:
    """The image with as many channels as the model takes: colour, or its mean."""
    return image if config["input_size"][0] == 3 else image.mean(dim=0, keepdim=True)


if __name__ == "__main__":
    try:
        predict(arguments())
    except (ConfigError, BrokenImageError) as error:
        raise SystemExit(f"error: {error}") from error
