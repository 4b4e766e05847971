"""Data sources and loaders."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conf.schema import ConfigError, DataConfig, DigitsConfig, ImageFolderConfig, SyntheticConfig
from data import build, eval_loader, train_loader
from data.loading import EvalIndices, SeededSamples, TrainBatches


def digits(**options: float) -> DigitsConfig:
    return DigitsConfig(name="digits", img_size=28, **options)  # type: ignore[arg-type]


def image_folder(root: Path, **options: object) -> ImageFolderConfig:
    return ImageFolderConfig(name="imagefolder", img_size=32, root=str(root), **options)  # type: ignore[arg-type]


def make_images(root: Path, classes: dict[str, list[str]]) -> Path:
    """Write two images per class of each split."""
    generator = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_digits_split_is_fixed_stratified_and_disjoint() -> None:
    data, again = build(digits()), build(digits())
    assert (len(data.train), len(data.val), data.num_classes, data.in_chans) == (1437, 360, 10, 3)
    assert data.train.labels == again.train.labels  # type: ignore[attr-defined]
    counts = np.bincount(data.val.labels)  # type: ignore[attr-defined]
    assert counts.min() >= 35
    assert counts.max() <= 37


def test_digits_keep_their_content_when_resized() -> None:
    data = build(digits(rotate=0, scale=0, translate=0))
    image, label = data.train[0]
    assert image.shape == (3, 28, 28)
    assert image.dtype == torch.float32
    source = data.train.images[0] + data.train.background  # type: ignore[attr-defined]
    expected = torch.nn.functional.interpolate(source[None, None], size=28, mode="bilinear")
    # grid_sample fades to the background over the outer half pixel, interpolate repeats the edge
    assert torch.allclose(image[0, 2:-2, 2:-2], expected[0, 0, 2:-2, 2:-2], atol=1e-5)
    assert label == data.train.labels[0]  # type: ignore[attr-defined]


def test_only_training_digits_are_augmented() -> None:
    data = build(digits())
    assert not torch.equal(data.train[0][0], data.train[0][0])
    assert torch.equal(data.val[0][0], data.val[0][0])


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    samples = SeededSamples(build(digits()).train, seed=3)
    first = samples[(1, 5)][0]
    torch.rand(7)
    assert torch.equal(samples[(1, 5)][0], first)
    assert not torch.equal(samples[(2, 5)][0], first)
    assert not torch.equal(SeededSamples(samples.dataset, seed=4)[(1, 5)][0], first)


def test_loading_a_sample_leaves_the_global_generators_alone() -> None:
    samples = SeededSamples(build(digits()).train, seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    samples[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_batches_are_the_same_with_and_without_worker_processes() -> None:
    dataset = build(digits()).train
    seen = []
    for workers in (0, 2):
        batches = TrainBatches(len(dataset), 16, seed=0, limit=3)
        loader = train_loader(dataset, batches, num_workers=workers)
        for epoch in (0, 1):
            batches.set_position(epoch)
            seen.append(torch.stack([images for images, _ in loader]))
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0], seen[1])


def test_each_epoch_has_its_own_order_and_no_repeats() -> None:
    batches = TrainBatches(100, 8, seed=0)
    orders = []
    for epoch in (0, 1):
        batches.set_position(epoch)
        keys = [key for batch in batches for key in batch]
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
    assert len(batches) == 12
    assert len(set(orders[0])) == 96
    assert orders[0] != orders[1]


def test_an_epoch_can_start_at_any_batch() -> None:
    batches = TrainBatches(100, 8, seed=0)
    batches.set_position(4)
    whole = list(batches)
    batches.set_position(4, start=5)
    assert list(batches) == whole[5:]


def test_processes_share_the_global_batches_of_one_process() -> None:
    one = list(TrainBatches(100, 12, seed=0))
    ranks = [list(TrainBatches(100, 4, seed=0, rank=rank, world_size=3)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == one


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_covers_every_index_once_over_all_processes(world_size: int) -> None:
    shares = [list(EvalIndices(10, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(10))


def test_evaluation_keeps_the_incomplete_last_batch() -> None:
    loader = eval_loader(build(digits()).val, 100)
    assert [len(labels) for _, labels in loader] == [100, 100, 100, 60]


def test_image_folder_reads_both_splits(tmp_path: Path) -> None:
    root = make_images(tmp_path, {"train": ["cat", "dog"], "val": ["cat", "dog"]})
    data = build(image_folder(root, auto_augment="rand-m9-mstd0.5-inc1", erase_prob=1.0))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (4, 4)
    assert data.train[3][0].shape == (3, 32, 32)
    assert data.val[3][0].shape == (3, 32, 32)
    assert data.val[3][1] == 1
    samples = SeededSamples(data.train, seed=0)
    assert torch.equal(samples[(0, 1)][0], samples[(0, 1)][0])


def test_image_folder_evaluation_crops_the_centre_of_the_resized_image(tmp_path: Path) -> None:
    root = make_images(tmp_path, {"train": ["a"], "val": ["a"]})
    data = build(image_folder(root, crop_pct=0.8, mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0]))
    with Image.open(root / "val/a/0.png") as image:  # the short side of 40 stays 40 = 32 / 0.8
        pixels = torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    assert torch.allclose(data.val[0][0], pixels[:, 4:36, 8:40], atol=1e-3)


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    root = make_images(tmp_path, {"train": ["cat"], "val": ["cat"]})
    (root / "train/cat/0.png").write_bytes(b"not an image")
    data = build(image_folder(root))
    with pytest.raises(RuntimeError, match=r"cannot decode the image .*cat/0\.png"):
        data.train[0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "has no train and no val folder, it holds no folders"),
        ({"training": ["a"]}, "has no train and no val folder, it holds training"),
        ({"train": ["a"]}, "has no val folder, it holds train"),
        ({"train": ["a"], "val": []}, "has no class folders in it"),
        ({"train": ["a", "b"], "val": ["a"]}, "must hold the same classes; only in one: b"),
    ],
)
def test_a_wrongly_laid_out_folder_says_what_was_expected_and_found(
    tmp_path: Path, classes: dict[str, list[str]], message: str
) -> None:
    for split in classes:
        (tmp_path / split).mkdir()
    make_images(tmp_path, classes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(image_folder(tmp_path))


def test_a_class_folder_without_images_is_named(tmp_path: Path) -> None:
    root = make_images(tmp_path, {"train": ["a"], "val": ["a"]})
    for split in ("train", "val"):
        (root / split / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.root must hold .*classes empty"):
        build(image_folder(root))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.root must be a folder .*nowhere: no such folder"):
        build(image_folder(tmp_path / "nowhere"))


def test_synthetic_images_have_the_sizes_asked_for() -> None:
    config = SyntheticConfig("synthetic", 24, num_classes=7, in_chans=2, train_size=100, val_size=3)
    data = build(config)
    assert (len(data.train), len(data.val), data.num_classes) == (100, 3, 7)
    image, label = data.train[99]
    assert image.shape == (2, 24, 24)
    assert 0 <= label < 7


def test_a_source_without_a_builder_is_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be one of .* got DataConfig"):
        build(DataConfig(name="x", img_size=8))


def test_repeated_augmentation_puts_differing_copies_into_one_batch() -> None:
    dataset = build(digits()).train
    batches = TrainBatches(len(dataset), 12, seed=0, repeats=3)
    assert len(batches) == len(TrainBatches(len(dataset), 12, seed=0))
    images, labels = next(iter(train_loader(dataset, batches)))
    copies = images.unflatten(0, (4, 3))
    assert labels.view(4, 3).eq(labels[::3, None]).all()
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (copies[:, one] - copies[:, other]).abs().amax((1, 2, 3)).min() > 0.1
    batches.set_position(1)
    assert not torch.equal(next(iter(train_loader(dataset, batches)))[0], images)


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_augmentation_keeps_order_processes_and_continuing(repeats: int) -> None:
    single = [key[1] for batch in TrainBatches(100, 12, seed=0) for key in batch]
    one = TrainBatches(100, 12, seed=0, repeats=repeats)
    keys = [key for batch in one for key in batch]
    assert keys == [
        (0, index, copy) for index in single[: len(keys) // repeats] for copy in range(repeats)
    ]
    ranks = [
        list(TrainBatches(100, 4, seed=0, rank=rank, world_size=3, repeats=repeats))
        for rank in range(3)
    ]
    assert [a + b + c for a, b, c in zip(*ranks, strict=True)] == list(one)
    whole = list(one)
    one.set_position(0, start=3)
    assert list(one) == whole[3:]


def test_a_policy_that_timm_does_not_know_is_told(tmp_path: Path) -> None:
    root = make_images(tmp_path, {"train": ["a"], "val": ["a"]})
    with pytest.raises(ConfigError, match=r"data\.auto_augment must be a policy .* got 'rand-q9'"):
        build(image_folder(root, auto_augment="rand-q9"))
