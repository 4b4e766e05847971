"""torchvision's built-in sets from a local root or with download."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import assert_image, built_in, pixels, write_fashion, write_idx
from torchvision.datasets import CIFAR10, CIFAR100

from conf.schema import ConfigError
from data import BrokenImageError, build


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    return write_fashion(tmp_path)


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
