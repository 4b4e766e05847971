"""What all stored sources have in common."""

import re
import sys
from pathlib import Path

import pytest
import torch
from sources import (
    built_in,
    hugging_face,
    sample,
    saved,
    table,
    web_dataset,
    write_fashion,
    write_shard,
    write_shards,
)

from conf import compose
from conf.schema import ConfigError, HuggingFaceConfig, WebDatasetConfig
from data import BrokenImages, ImageData, build, train_loader
from data.loading import SeededSamples, TrainBatches

pytest.importorskip("datasets", reason='needs pip install -e ".[data]"')
pytest.importorskip("webdataset", reason='needs pip install -e ".[data]"')
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    return write_fashion(tmp_path)


@pytest.mark.parametrize("module", ["datasets", "webdataset"])
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    config = hugging_face(tmp_path) if module == "datasets" else web_dataset(tmp_path)
    with pytest.raises(ConfigError, match=rf'package {module}, .* pip install -e "\.\[data\]"'):
        build(config)


@pytest.mark.parametrize("source", ["huggingface", "webdataset", "torchvision"])
def test_order_and_augmentation_do_not_depend_on_workers_and_continue_exactly(
    tmp_path: Path, shards: Path, fashion: Path, source: str
) -> None:
    def data() -> ImageData:
        more = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.5}
        if source == "webdataset":
            return build(web_dataset(shards, **more))
        if source == "torchvision":
            return build(built_in(fashion, "fashion_mnist", **more))
        train = table([index % 2 for index in range(12)])
        folder = saved(tmp_path / "set", train=train, validation=table([0, 1]))
        return build(hugging_face(folder, **more))

    train = data().train
    seen = []
    for workers, start in ((0, 0), (2, 0), (2, 2)):
        batches = TrainBatches(len(train), 3, seed=5, repeats=2)
        batches.set_position(1, start)
        loader = train_loader(train, batches, num_workers=workers)
        seen.append([images for images, _ in loader])
    assert len(seen[0]) >= 4
    for start, images in ((0, seen[1]), (2, seen[2])):
        assert torch.equal(torch.stack(images), torch.stack(seen[0][start:]))


def test_the_imagenet_recipe_can_read_any_source() -> None:
    for name, more in (("imagenet_hf", ()), ("imagenet_wds", ("data.train=x", "data.val=x"))):
        data = compose("experiment=imagenet/focal_tiny", f"data={name}", *more).data
        assert isinstance(data, HuggingFaceConfig | WebDatasetConfig)
        augmentation = data.auto_augment, data.color_jitter, data.erase_prob
        assert augmentation == ("rand-m9-mstd0.5-inc1", 0.4, 0.25)


def test_a_broken_image_in_any_source_is_replaced_in_training(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "train-1.tar", [sample(5), sample(6, png=b"broken"), sample(7)])
    folder = saved(tmp_path / "set", train=table([0, 1, 0], broken=(0,)), validation=table([1]))
    for data, index, after in (
        (build(web_dataset(shards)), 6, 7),
        (build(hugging_face(folder)), 0, 1),
    ):
        samples = SeededSamples(data.train, seed=0, max_broken=data.max_broken)
        found = samples[(0, index)]
        assert found.label == data.train[after][1]
        assert len(found.broken) == 1
        assert re.search(r"train-1\.tar/n/0006\.png$|^train\[0\] \(0\.png\)$", found.broken[0][0])
        broken = BrokenImages(data.max_broken)
        broken.add(found.broken)
        assert broken.gather() == 1
