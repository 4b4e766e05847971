"""Data sources besides the embedded and the folder of images, from tiny sets in their formats."""

import gzip
import hashlib
import io
import pickle
import re
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

from conf import compose
from conf.schema import ConfigError, HuggingFaceConfig, TorchvisionConfig, WebDatasetConfig
from data import BrokenImageError, BrokenImages, ImageData, build, eval_loader, train_loader
from data.loading import SeededSamples, TrainBatches

datasets = pytest.importorskip("datasets", reason='needs pip install -e ".[data]"')
webdataset = pytest.importorskip("webdataset", reason='needs pip install -e ".[data]"')

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


# Hugging Face


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # whatever a test does
    datasets.disable_progress_bars()


def table(labels: list, *, first: int = 0, kind: object = None, broken: tuple[int, ...] = ()):
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
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def parquet(folder: Path, **splits) -> Path:
    folder.mkdir()
    for name, split in splits.items():
        split.to_parquet(str(folder / f"{name}.parquet"))
    return folder


@pytest.mark.parametrize("write", [saved, parquet])
def test_hugging_face_folders_are_read_memory_mapped(tmp_path: Path, write) -> None:
    folder = write(tmp_path / "set", train=table([0, 1, 0]), validation=table([1, 0], first=9))
    data = build(hugging_face(folder))
    assert data.class_names == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (3, 2)
    assert data.train[0][0].shape == (3, 32, 32)
    image, label = data.val[0]
    assert_image(image, pixels(9))
    assert label == 1
    files = data.train.table.cache_files  # type: ignore[attr-defined]
    assert files[0]["filename"].endswith(".arrow")


def test_a_name_is_looked_up_in_the_cache_alone(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "pets", train=table([0, 1]), validation=table([1, 0]))
    build(hugging_face(folder))  # fills the cache under the folder's name
    assert len(build(hugging_face("pets")).train) == 2
    with pytest.raises(ConfigError, match=r"data\.path must name a data set in the local"):
        build(hugging_face("someone/unknown"))


def test_nothing_is_asked_of_the_hub_without_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def load(path: str, subset: str | None) -> None:
        seen.append((path, subset, datasets.config.HF_HUB_OFFLINE))
        raise OSError("unreachable")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for download in (False, True):
        with pytest.raises(ConfigError, match=r"data\.path must name .*OSError: unreachable"):
            build(hugging_face("a/b", subset="small", download=download))
    assert seen == [("a/b", "small", True), ("a/b", "small", False)]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_columns_without_class_names_are_classes_by_sorted_value(tmp_path: Path) -> None:
    kind = datasets.Value("string")
    train, val = table(["dog", "ant", "cat"], kind=kind), table(["cat"], kind=kind)
    data = build(hugging_face(saved(tmp_path / "set", train=train, validation=val)))
    assert data.class_names == ("ant", "cat", "dog")
    assert [data.train[index][1] for index in range(3)] == [2, 0, 1]
    unknown = saved(tmp_path / "other", train=train, validation=table(["cow"], kind=kind))
    with pytest.raises(ConfigError, match=r"data\.val_split must hold classes .* also has cow"):
        build(hugging_face(unknown))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_split": "test"}, "data.val_split must be one of train, validation, the splits of"),
        ({"image_column": "img"}, "data.image_column must be one of label, id, image, the columns"),
        ({"label_column": "cls"}, "data.label_column must be one of label, id, image, the columns"),
        ({"image_column": "id"}, "data.image_column must hold images, encoded or as paths; id of"),
    ],
)
def test_wrong_names_in_a_hugging_face_set_are_told_with_what_is_there(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    folder = saved(tmp_path / "set", train=table([0, 1]), validation=table([1]))
    with pytest.raises(ConfigError, match=re.escape(message)):
        build(hugging_face(folder, **options))


def test_folders_that_are_no_hugging_face_set_say_what_they_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path must be a folder .*/nowhere: no such"):
        build(hugging_face(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data.path must be a folder made by .*holds nothing"):
        build(hugging_face(tmp_path / "empty"))
    table([0]).save_to_disk(str(tmp_path / "single"))
    with pytest.raises(ConfigError, match="is a single split: give the folder that DatasetDict"):
        build(hugging_face(tmp_path / "single"))


def test_labels_that_are_no_class_are_refused(tmp_path: Path) -> None:
    cases = {
        "unlabelled": (table([-1, -1]), "data.label_column must give labels from 0 to 1; .*-1"),
        "null": (table([0, None]), "data.label_column must hold a label in every row"),
        "other": (
            table([0], kind=datasets.ClassLabel(names=["dog", "cat"])),
            "data.label_column must have the same classes in both splits",
        ),
    }
    for name, (val, message) in cases.items():
        folder = saved(tmp_path / name, train=table([0, 1]), validation=val)
        with pytest.raises(ConfigError, match=message):
            build(hugging_face(folder))


def test_an_empty_split_is_told(tmp_path: Path) -> None:
    folder = parquet(tmp_path / "set", train=table([0, 1]), validation=table([]))
    with pytest.raises(ConfigError, match=r'"validation" corresponds to no data'):
        build(hugging_face(folder))


def test_a_broken_hugging_face_image_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set", train=table([0, 1], broken=(1,)), validation=table([1]))
    with pytest.raises(BrokenImageError, match=r"train\[1\] \(1\.png\): no image format"):
        build(hugging_face(folder)).train[1]


# WebDataset


def write_shard(path: Path, samples: Iterator[dict] | list[dict]) -> None:
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


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Training shards of 5, 5 and 2 images, evaluation shards of 4 and 1."""
    root = tmp_path / "shards"
    for name, indices in {
        "train-0": range(5),
        "train-1": range(5, 10),
        "train-2": range(10, 12),
        "val-0": range(20, 24),
        "val-1": range(24, 25),
    }.items():
        write_shard(root / f"{name}.tar", [sample(index) for index in indices])
    return root


def test_shards_are_read_by_index(shards: Path) -> None:
    data = build(web_dataset(shards))
    assert (len(data.train), len(data.val), data.num_classes) == (12, 5, 3)
    for index in (4, 0, 3):
        image, label = data.val[index]
        assert_image(image, pixels(20 + index))
        assert label == (20 + index) % 3
    assert [data.train[index][1] for index in range(12)] == [index % 3 for index in range(12)]


def test_the_library_reads_the_same_samples_in_the_same_order(shards: Path) -> None:
    val = build(web_dataset(shards)).val
    stream = webdataset.WebDataset(f"{shards}/val-{{0..1}}.tar", shardshuffle=False)
    for index, expected in enumerate(stream.decode("rgb8")):
        assert_image(val[index][0], expected["png"])
        assert val[index][1] == expected["cls"]
    assert index == 4


def test_uneven_shards_are_seen_once_over_all_processes(shards: Path) -> None:
    data = build(web_dataset(shards))
    labels: list[int] = []
    for rank in range(2):
        for _, batch in eval_loader(data.val, 2, rank=rank, world_size=2):
            labels += batch.tolist()
    assert sorted(labels) == sorted(index % 3 for index in range(20, 25))


def test_an_index_is_kept_and_made_anew_for_a_changed_shard(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = web_dataset(shards, index_dir=str(tmp_path / "index"))
    build(config)
    assert len(list((tmp_path / "index").iterdir())) == 5
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # nothing but the kept indices can be read
        assert build(config).train[7][1] == 7 % 3
    write_shard(shards / "val-1.tar", [sample(30), sample(31)])
    assert len(build(config).val) == 6


def test_files_about_a_shard_and_other_parts_of_a_sample_are_passed_over(shards: Path) -> None:
    more = {"json": {"a": 1}, "jpg.txt": b"x"}
    write_shard(shards / "val-1.tar", [sample(24, **more)])
    with tarfile.open(shards / "val-1.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("__meta__"))
        tar.addfile(tarfile.TarInfo("README"))
    assert len(build(web_dataset(shards)).val) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "{0}/train-{{0..4}}.tar"}, "missing: .*train-3.tar, .*train-4.tar; .* holds: "),
        ({"val": "{0}/none/x.tar"}, "data.val must be a pattern of tar files .* no such folder"),
        ({"val": "https://a.b/x.tar"}, "data.val must be a pattern of local files"),
        (
            {"image_keys": ["jpg"]},
            r"shards with KEY.{jpg} next to KEY.cls .*has cls, png",
        ),
        ({"label_key": "txt"}, r"next to KEY.txt \(data.image_keys, data.label_key\); n/0000 in"),
        ({"label_key": "png"}, r"data.label_key must name a whole number as text; n/0000.png in"),
        ({"num_classes": 2}, r"data.train must give labels from 0 to 1; .* also has 2"),
    ],
)
def test_wrong_shards_are_told_with_what_is_there(
    shards: Path, options: dict, message: str
) -> None:
    filled = {
        key: value.format(shards) if isinstance(value, str) else value
        for key, value in options.items()
    }
    with pytest.raises(ConfigError, match=message):
        build(web_dataset(shards, **filled))


def test_damaged_empty_and_compressed_shards_are_named(shards: Path) -> None:
    shard = shards / "val-0.tar"
    whole = shard.read_bytes()
    for content in (whole[:5000], b"no tar" * 200, gzip.compress(whole)):
        shard.write_bytes(content)
        with pytest.raises(ConfigError, match=r"data.val must lead to whole, uncompressed tar.*-0"):
            build(web_dataset(shards))
    for name in ("val-0", "val-1"):
        write_shard(shards / f"{name}.tar", [])
    with pytest.raises(ConfigError, match=r"data.val must lead to images; .* has none"):
        build(web_dataset(shards))
    write_shard(shards / "val-0.tar", [sample(1), sample(1)])
    with pytest.raises(ConfigError, match=r"data.val must lead to shards with .* duplicate"):
        build(web_dataset(shards))


def test_a_class_missing_in_evaluation_is_a_warning(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shard(shards / "val-0.tar", [sample(1, label=0)])
    write_shard(shards / "val-1.tar", [sample(1, label=2)])
    build(web_dataset(shards))
    assert "has no image of 1 of the 3 classes: labels 1" in caplog.text


# torchvision


def built_in(root: Path, dataset: str, **options: object) -> TorchvisionConfig:
    return TorchvisionConfig("tv", 32, dataset=dataset, root=str(root), **PLAIN | options)  # type: ignore[arg-type]


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    for split, count in (("train", 20), ("t10k", 10)):
        raw = tmp_path / "FashionMNIST" / "raw"
        write_idx(raw / f"{split}-images-idx3-ubyte", pixels(count, (count, 32, 32)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    return tmp_path


def test_fashion_mnist_is_read_in_three_channels(fashion: Path) -> None:
    data = build(built_in(fashion, "fashion_mnist"))
    assert (len(data.train), len(data.val), data.num_classes) == (20, 10, 10)
    assert data.class_names[1] == "Trouser"
    image, label = data.val[3]
    assert_image(image, pixels(10, (10, 32, 32))[3])
    assert label == 3
    assert data.train[0][0].shape == (3, 32, 32)


def test_damaged_idx_files_are_told(fashion: Path) -> None:
    raw = fashion / "FashionMNIST" / "raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(7))
    with pytest.raises(ConfigError, match=r"one label per image; .* has 10 images and 7 labels"):
        build(built_in(fashion, "fashion_mnist"))
    write_idx(raw / "t10k-labels-idx1-ubyte", np.arange(10) + 1)
    with pytest.raises(ConfigError, match=r"must give labels from 0 to 9; .* also has 10"):
        build(built_in(fashion, "fashion_mnist"))
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"data.root must hold FashionMNIST/raw/"):
        build(built_in(fashion, "fashion_mnist"))


@pytest.mark.parametrize(("name", "kind"), [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_cifar_is_read_from_torchvisions_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type
) -> None:
    folder = tmp_path / kind.base_folder  # type: ignore[attr-defined]
    folder.mkdir()
    classes = int(name.removeprefix("cifar"))

    def write(file: str, content: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    label_key = "labels" if name == "cifar10" else "fine_labels"
    for split in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, split):
            rows = pixels(len(file), (classes, 3 * 32 * 32))
            sums.append([file, write(file, {"data": rows, label_key: list(range(classes))})])
        monkeypatch.setattr(kind, split, sums)
    meta = dict(kind.meta)  # type: ignore[attr-defined]
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"c{i}" for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", meta)

    data = build(built_in(tmp_path, name))
    test_file = kind.test_list[0][0]  # type: ignore[attr-defined]
    assert (len(data.val), data.class_names[-1]) == (classes, f"c{classes - 1}")
    expected = pixels(len(test_file), (classes, 3, 32, 32))[7].transpose(1, 2, 0)
    assert_image(data.val[7][0], expected)
    assert data.val[7][1] == 7

    (folder / test_file).write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=rf"data.root must hold {kind.base_folder}.*corrupted"):  # type: ignore[attr-defined]
        build(built_in(tmp_path, name))


def test_imagenette_is_read_and_its_broken_images_named(tmp_path: Path) -> None:
    root = tmp_path / "imagenette2-160"
    for split in ("train", "val"):
        for index, wnid in enumerate(("n01440764", "n02102040")):
            (root / split / wnid).mkdir(parents=True)
            Image.fromarray(pixels(index)).save(root / split / wnid / "0.JPEG")
    data = build(built_in(tmp_path, "imagenette_160"))
    assert data.class_names == ("tench", "English springer")
    assert data.val[1][1] == 1
    (root / "train/n01440764/0.JPEG").write_bytes(b"")
    with pytest.raises(BrokenImageError, match=r"n01440764/0\.JPEG: no image format"):
        data.train[0]
    (root / "val/n02102040/0.JPEG").unlink()
    (root / "val/n02102040").rmdir()
    with pytest.raises(ConfigError, match=r"the same classes in both splits .* English springer"):
        build(built_in(tmp_path, "imagenette_160"))


def test_a_missing_built_in_set_says_what_was_expected_and_found(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(
        ConfigError,
        match=r"must hold imagenette2-320/\{train,val\}/<class>/\*\.JPEG .* it holds other; "
        r"data\.download=true downloads it",
    ):
        build(built_in(tmp_path, "imagenette_320"))
    with pytest.raises(ConfigError, match=r"MNIST/raw/.*there is no such folder"):
        build(built_in(tmp_path / "nowhere", "mnist"))
    with pytest.raises(ConfigError, match=r"data\.dataset must be one of cifar10, .* got 'svhn'"):
        build(built_in(tmp_path, "svhn"))


def test_download_happens_on_request_alone_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fail(self: CIFAR10) -> None:
        asked.append(self.root)
        raise OSError("unreachable")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(ConfigError, match=r"data.download=true downloads it"):
        build(built_in(tmp_path, "cifar10"))
    assert not asked
    with pytest.raises(ConfigError, match=r"the download failed \(OSError: unreachable\)"):
        build(built_in(tmp_path / "new", "cifar10", download=True))
    assert asked == [str(tmp_path / "new")]


# All


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
