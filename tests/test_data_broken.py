"""Images that cannot be decoded: named, counted, left out, and refused above the limit."""

import io
import json
import logging
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from conf import compose
from conf.schema import ConfigError, ImageFolderConfig
from data import BrokenImageError, BrokenImages, ImageData, build, eval_loader, train_loader
from data.images import decode_rgb
from data.loading import TrainBatches
from training import run

COUNT = 8


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def image_folder(root: Path, *, broken: tuple[int, ...] = (), val_broken: tuple[int, ...] = ()):
    """Two classes of `COUNT` / 2 images, each of one brightness, so that one can tell them."""
    for split, damaged in (("train", broken), ("val", val_broken)):
        for index in range(COUNT):
            path = root / split / ("cat" if index < COUNT // 2 else "dog") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (20 * index,) * 3).save(path)
            if index in damaged:
                path.write_bytes(b"no image")
    return root


def load(root: Path, max_broken: int = 3) -> ImageData:
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3, "min_crop_area": 1.0}
    return build(
        ImageFolderConfig("images", 32, root=str(root), max_broken=max_broken, **plain)  # type: ignore[arg-type]
    )


def numbers(images: torch.Tensor) -> list[int]:
    """Which images a batch holds."""
    return (images.mean((1, 2, 3)) * 255 / 20).round().int().tolist()


def epochs(data: ImageData, broken: BrokenImages, *, workers: int = 0) -> list[list[int]]:
    """The images of two epochs of two batches."""
    batches = TrainBatches(COUNT, COUNT // 2, seed=0)
    loader = train_loader(data.train, batches, broken=broken, num_workers=workers)
    seen = []
    for epoch in range(2):
        batches.set_position(epoch)
        seen += [numbers(images) for images, _ in loader]
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_training_takes_the_next_good_image_and_counts_a_broken_one_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    whole = epochs(load(image_folder(tmp_path / "whole")), BrokenImages())
    data = load(image_folder(tmp_path / "damaged", broken=(2, 3, 7)))
    broken = BrokenImages(data.max_broken)
    seen = epochs(data, broken, workers=workers)
    instead = {2: 4, 3: 4, 7: 0}
    assert seen == [[instead.get(number, number) for number in batch] for batch in whole]
    assert sorted(Path(name).name for name in broken.found) == ["2.png", "3.png", "7.png"]
    warnings = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert re.search(r"broken image \(1 of at most 3\): .*/\d\.png: no image format", warnings[0])


def test_evaluation_leaves_broken_images_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = load(image_folder(tmp_path, val_broken=(1, 4, 5)))
    broken = BrokenImages(data.max_broken)
    seen = [numbers(images) for images, _ in eval_loader(data.val, 2, broken=broken)]
    assert seen == [[0], [2, 3], [6, 7]]
    assert [broken.gather(), broken.gather()] == [3, 3]
    assert caplog.text.count("broken images so far: 3 of at most 3") == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_more_broken_images_than_allowed_are_an_error_that_names_them(
    tmp_path: Path, workers: int
) -> None:
    data = load(image_folder(tmp_path, broken=(2, 3, 7)), max_broken=2)
    message = r"data\.max_broken must be .* got 2; broken so far:\n.*\.png: no image"
    with pytest.raises(ConfigError, match=message) as error:
        epochs(data, BrokenImages(data.max_broken), workers=workers)
    for index in (2, 3, 7):
        assert f"{index}.png" in str(error.value)


def test_training_and_evaluation_share_the_limit(tmp_path: Path) -> None:
    data = load(image_folder(tmp_path, broken=(0,), val_broken=(1,)), max_broken=1)
    broken = BrokenImages(data.max_broken)
    epochs(data, broken)
    with pytest.raises(ConfigError, match=r"train/cat/0\.png(.|\n)*val/cat/1\.png"):
        list(eval_loader(data.val, 4, broken=broken))


def test_without_a_limit_the_first_broken_image_is_an_error(tmp_path: Path) -> None:
    data = load(image_folder(tmp_path, broken=(5,)), max_broken=0)
    with pytest.raises(ConfigError, match=r"got 0; broken so far:\n  .*dog/5\.png"):
        epochs(data, BrokenImages(data.max_broken))


def test_a_set_without_any_good_image_is_an_error(tmp_path: Path) -> None:
    data = load(image_folder(tmp_path, broken=tuple(range(COUNT))), max_broken=100)
    with pytest.raises(ConfigError, match="none of the 8 training images can be decoded"):
        epochs(data, BrokenImages(data.max_broken))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"plain text",
        encoded("PNG")[:500],
        encoded("JPEG")[:500],
        encoded("PNG").replace(b"IDAT", b"IDXX"),
        b"GIF89a",
        encoded("TIFF")[:20],
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "other chunk", "GIF header", "TIFF header"],
)
def test_every_kind_of_damage_names_the_image(content: bytes) -> None:
    with pytest.raises(BrokenImageError, match=r"^cannot decode the image here\.png: ."):
        decode_rgb(content, "here.png")


def test_a_file_that_vanished_is_a_broken_image(tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError, match=r"gone\.png: FileNotFoundError"):
        decode_rgb(tmp_path / "gone.png", "gone.png")


def _process(rank: int, store: str, results: "multiprocessing.Queue") -> None:
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    broken = BrokenImages(2)
    broken.add([("of both", "damaged")])
    if rank == 1:
        broken.add([("of 1", "damaged")])
    counts = [broken.gather()]
    broken.limit = 1
    try:
        broken.gather()
    except ConfigError as error:
        counts.append("of 1" in str(error))
    results.put(counts)
    dist.destroy_process_group()


def test_processes_count_together_and_an_image_met_by_several_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = [(rank, f"file://{tmp_path}/store", results) for rank in range(2)]
    processes = [context.Process(target=_process, args=args) for args in arguments]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [[2, True]] * 2
    for process in processes:
        process.join()


def test_a_run_counts_broken_images_in_its_records(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", broken=(3,), val_broken=(5,))
    options = (
        "model=focal_micro",
        "model.depths=[1,1]",
        "model.num_heads=[1,2]",
        "model.region_sizes=[5,3]",
        "data=imagefolder",
        f"data.root={root}",
        "data.img_size=28",
        "data.num_workers=0",
        "data.repeated_aug=2",
        "logger=none",
        "schedule.warmup_epochs=0",
        "trainer.epochs=2",
        "trainer.batch_size=8",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
    )
    folder = tmp_path / "run"
    folder.mkdir()
    run(compose(*options), folder)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counts = [line["train_broken_images"] for line in records if line["kind"] == "epoch"]
    assert counts[-1] >= 1
