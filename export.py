"""Export a trained model: `python export.py RUN_DIR`; see `--help`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import models
from conf import ConfigError
from models.focal_attention import FocalAttention
from models.loading import CONFIG

FORMATS = ("safetensors", "torch_export", "onnx")


def read_model(path: Path) -> nn.Module:
    """The model of a run folder, of a checkpoint in it, or of an exported folder.

    Raises:
        ConfigError: It is none of these, or cannot be read.
    """
    if path.suffix == ".safetensors" or (path / CONFIG).is_file():
        try:
            return models.load(path)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if path.suffix != ".ckpt" and not (path / "best.ckpt").is_file():
        raise ConfigError(
            "a model must be a run folder (with best.ckpt), a checkpoint or an exported folder "
            f"(with {CONFIG}), got {path}"
        )
    from training.trained import load_run  # brings all of training: only where it is needed

    return load_run(path)


def set_backend(model: nn.Module, backend: str) -> None:
    """Have all focal attention of a model done by one backend."""
    for module in model.modules():
        if isinstance(module, FocalAttention):
            module.backend = backend


def export_program(model: nn.Module, size: tuple[int, int]) -> torch.export.ExportedProgram:
    """The model as one graph of plain PyTorch operators, for images of one size, any number.

    Attention is the oracle's: the graph then holds no operator of this project, and runs where
    this project is not installed.

    Args:
        model: A model in evaluation mode; its backend is changed.
        size: Height and width of the images.
    """
    set_backend(model, "reference")
    config: Any = model.pretrained_cfg
    images = torch.zeros(2, config["input_size"][0], *size)  # of 1, the batch would be taken fixed
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    with torch.enable_grad():  # without, layers take a CPU's own product, an operator of theirs
        return torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)


def export_onnx(model: nn.Module, size: tuple[int, int], file: Path) -> None:
    """Write the model as ONNX: ``images`` `[batch, channels, height, width]` to ``logits``.

    Args:
        model: A model in evaluation mode; its backend is changed.
        size: Height and width of the images.
        file: What to write.

    Raises:
        ConfigError: The packages for it are not installed.
    """
    try:
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        raise ConfigError(
            f'--format onnx needs packages that are missing here: pip install -e ".[export]" '
            f"({error})"
        ) from error
    # It logs a line for each split of each block, of nothing that a user could change.
    logging.getLogger("onnxscript.optimizer._constant_folding").setLevel(logging.ERROR)
    program = torch.onnx.export(
        export_program(model, size),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None  # as no file was given
    program.save(str(file))


def export(path: Path, output: Path, form: str, sizes: Sequence[int]) -> list[Path]:
    """Write a trained model in one format, and beside it what a user must know about it.

    Args:
        path: A run folder, a checkpoint or an exported folder.
        output: The folder to write to.
        form: One of ``FORMATS``.
        sizes: Sides of the images, a file for each; ignored for safetensors, empty for the model's
            own size.

    Returns:
        The files written.

    Raises:
        ConfigError: The model cannot be read, or an argument breaks a rule.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format must be one of {', '.join(FORMATS)}, got {form!r}")
    if any(size < 1 for size in sizes):
        raise ConfigError(f"--img-size must be positive, got {list(sizes)}")
    model = read_model(path)
    models.save(model, output, weights=form == "safetensors")
    if form == "safetensors":
        return [output / models.loading.WEIGHTS, output / CONFIG]
    config: Any = model.pretrained_cfg
    written = [output / CONFIG]
    for height, width in [(size, size) for size in sizes] or [config["input_size"][1:]]:
        ending = "onnx" if form == "onnx" else "pt2"
        written.append(output / f"model_{height}x{width}.{ending}")
        try:
            if form == "onnx":
                export_onnx(model, (height, width), written[-1])
            else:
                torch.export.save(export_program(model, (height, width)), written[-1])
        except ValueError as error:  # the model's own, of images too small for it
            raise ConfigError(f"--img-size must suit the model, got {height}: {error}") from error
    return written


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Export a trained model.")
    parser.add_argument("path", type=Path, metavar="RUN_DIR", help="or a checkpoint, or a folder")
    parser.add_argument("--format", default="safetensors", choices=FORMATS)
    parser.add_argument("--output", type=Path, metavar="DIR", help="RUN_DIR/export")
    parser.add_argument(
        "--img-size", type=int, nargs="+", default=[], metavar="N", help="a file for each side"
    )
    options = parser.parse_args(words)
    folder = options.path if options.path.is_dir() else options.path.parent
    try:
        written = export(
            options.path, options.output or folder / "export", options.format, options.img_size
        )
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    for file in written:
        print(f"{file}  {file.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
