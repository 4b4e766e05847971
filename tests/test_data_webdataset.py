"""WebDataset shards read by index."""

import gzip
import tarfile
from pathlib import Path

import pytest
from sources import assert_image, pixels, sample, web_dataset, write_shard, write_shards

from conf.schema import ConfigError
from data import build, eval_loader

webdataset = pytest.importorskip("webdataset", reason='needs pip install -e ".[data]"')


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards")


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
        ({"image_keys": ["jpg"]}, r"shards with KEY.{jpg} next to KEY.cls .*has cls, png"),
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
