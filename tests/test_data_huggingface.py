"""Hugging Face data sets: local folders, the cache, wrong inputs."""

import re
from pathlib import Path

import pytest
from sources import assert_image, hugging_face, parquet, pixels, saved, table

from conf.schema import ConfigError
from data import BrokenImageError, build

datasets = pytest.importorskip("datasets", reason='needs pip install -e ".[data]"')
pytestmark = pytest.mark.usefixtures("own_cache")


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
