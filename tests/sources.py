"""Tiny data sets in the formats of every source."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conf.schema import HuggingFaceConfig, TorchvisionConfig, WebDatasetConfig

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3, "crop_pct": 1.0}


def pixels(seed: int, size: tuple[int, ...] = (32, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size, dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def assert_image(image: torch.Tensor, expected: np.ndarray) -> None:
    """At 32 pixels with `PLAIN` an evaluation image is the stored one."""
    if expected.ndim == 2:
        expected = expected[..., None].repeat(3, axis=-1)
    assert torch.allclose(image, torch.tensor(expected).permute(2, 0, 1) / 255, atol=1e-6)


def table(labels: list, *, first: int = 0, kind: object = None, broken: tuple[int, ...] = ()):
    import datasets  # an extra

    stored = [
        {"bytes": b"broken" if index in broken else png(first + index), "path": f"{index}.png"}
        for index in range(len(labels))
    ]
    kind = kind or datasets.ClassLabel(names=["cat", "dog"])
    # The label comes first and another column between: order must not matter.
    features = {"label": kind, "id": datasets.Value("int64"), "image": datasets.Image()}
    columns = {"label": labels, "id": list(range(len(labels))), "image": stored}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def hugging_face(path: Path | str, **options: object) -> HuggingFaceConfig:
    return HuggingFaceConfig("hf", 32, path=str(path), **PLAIN | options)  # type: ignore[arg-type]


def saved(folder: Path, **splits: object) -> Path:
    import datasets

    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def parquet(folder: Path, **splits) -> Path:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}.parquet"))
    return folder


def write_shard(path: Path, samples: Iterator[dict] | list[dict]) -> None:
    import webdataset  # an extra

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def sample(index: int, label: object = None, **more: object) -> dict:
    label = index % 3 if label is None else label
    return {"__key__": f"n/{index:04d}", "png": png(index), "cls": str(label).encode(), **more}


def web_dataset(root: Path, **options: object) -> WebDatasetConfig:
    paths = {"train": f"{root}/train-{{0..2}}.tar", "val": f"{root}/val-{{0..1}}.tar"}
    return WebDatasetConfig("wds", 32, **PLAIN | paths | options)  # type: ignore[arg-type]


def write_shards(root: Path) -> Path:
    """Training shards of 5, 5 and 2 images, evaluation shards of 4 and 1."""
    for name, indices in {
        "train-0": range(5),
        "train-1": range(5, 10),
        "train-2": range(10, 12),
        "val-0": range(20, 24),
        "val-1": range(24, 25),
    }.items():
        write_shard(root / f"{name}.tar", [sample(index) for index in indices])
    return root


def built_in(root: Path, dataset: str, **options: object) -> TorchvisionConfig:
    return TorchvisionConfig("tv", 32, dataset=dataset, root=str(root), **PLAIN | options)  # type: ignore[arg-type]


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_fashion(root: Path) -> Path:
    """A Fashion-MNIST of 20 and 10 images."""
    for split, count in (("train", 20), ("t10k", 10)):
        raw = root / "FashionMNIST" / "raw"
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels(count, (count, 32, 32)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    return root
