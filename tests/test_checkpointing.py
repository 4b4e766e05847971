"""Checkpoints that are damaged, hostile or do not fit on the disk."""

import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import TINY, assert_same, trainer

from conf import ConfigError, compose
from training import NotSavedError, checkpoint
from training.records import Records, RunFolder

OPTIONS = (
    *TINY,
    "trainer.epochs=2",
    "trainer.batch_size=8",
    "trainer.limit_train_batches=4",
    "trainer.limit_val_batches=1",
    "trainer.ema_decay=0.9",
    "trainer.checkpoint_every=1",
    "trainer.log_every=1",
)
train = trainer(OPTIONS)
CONTENT = {"model": {"weight": torch.arange(20_000.0)}, "epoch": 3}


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.ckpt")["ema"]


def test_a_checkpoint_is_an_ordinary_pytorch_file(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "best.ckpt", CONTENT)
    content = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])  # type: ignore[index]


def test_any_altered_byte_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, CONTENT)
    whole = path.read_bytes()
    places = torch.randint(len(whole), (60,)).tolist()
    for place in [0, len(whole) - 1, len(whole) - 75, len(whole) - 73, *places]:
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(checkpoint.CheckpointError, match=r"altered|no checksum"):
            checkpoint.load(path)


def test_any_cut_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, CONTENT)
    whole = path.read_bytes()
    for size in [0, 1, 72, 73, 74, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(checkpoint.CheckpointError, match=r"altered|no checksum"):
            checkpoint.load(path)


class Attack:
    """Would make a file if it were unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.target,))


def test_code_in_a_checkpoint_with_a_right_checksum_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "attacked"
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.save(folder / "last.ckpt", {"optimizer": Attack(target)})
    with pytest.raises(ConfigError, match=r"cannot read .*last\.ckpt: Weights only load failed"):
        train(tmp_path / "new", f"resume={folder / 'last.ckpt'}")
    torch.save({"model": Attack(target)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"finetune: .*weights\.pth"):
        train(tmp_path / "tuned", f"finetune={tmp_path / 'weights.pth'}")
    with pytest.raises(ConfigError, match=r"distillation\.weights=.*weights\.pth"):
        train(
            tmp_path / "taught",
            "distillation.teacher=test_resnet",
            f"distillation.weights={tmp_path / 'weights.pth'}",
        )
    assert not target.exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not disturbed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.mark.parametrize("damage", ["cut off", "altered", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_used_with_a_warning(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = tmp_path / "run"
    train(folder, "trainer.epochs=1", "schedule=constant")
    last = folder / "last.ckpt"
    if damage == "missing":
        last.unlink()
    else:
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content if damage == "altered" else content[:-1000])
    step = checkpoint.load(folder / "last.1.ckpt")["step"]
    capsys.readouterr()
    train(folder, "schedule=constant", f"resume={folder}")
    printed = capsys.readouterr().out
    reason = {"cut off": "no checksum at its end", "missing": "no such file"}.get(damage, damage)
    assert f"warning: cannot read {last}: {reason}" in printed
    assert f"using {folder / 'last.1.ckpt'}" in printed
    assert f"continuing {folder / 'last.1.ckpt'} at step {step}" in printed
    assert (folder / "last.ckpt.damaged").exists() == (damage != "missing")
    train(tmp_path / "whole", "schedule=constant")
    assert_same(final_weights(folder), final_weights(tmp_path / "whole"))


def test_without_a_good_checkpoint_the_error_names_every_file_and_its_fault(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "trainer.epochs=1")
    for name in ("last.ckpt", "last.1.ckpt"):
        (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"last\.ckpt: no checksum.*last\.1\.ckpt: no checksum"):
        train(folder, f"resume={folder}")


def test_the_file_before_stays_when_the_newest_is_replaced(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.ckpt", tmp_path / "last.1.ckpt"
    for epoch in range(3):
        checkpoint.save(last, {"epoch": epoch}, previous=previous)
    assert checkpoint.load(last)["epoch"] == 2
    assert checkpoint.load(previous)["epoch"] == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """How many bytes a file may have: a write beyond them fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0, 100, 10_000, 79_000])
def test_a_save_without_room_raises_the_reason_and_leaves_the_old_file(
    tmp_path: Path, room: int
) -> None:
    path, previous = tmp_path / "last.ckpt", tmp_path / "last.1.ckpt"
    for epoch in range(2):
        checkpoint.save(path, {**CONTENT, "epoch": epoch}, previous=previous)
    with (
        pytest.raises(OSError) as error,  # noqa: PT011  (the number is looked at)
        largest_file(room),
    ):
        checkpoint.save(path, {**CONTENT, "epoch": 2}, previous=previous)
    assert error.value.errno == errno.EFBIG
    assert checkpoint.load(path)["epoch"] == 1
    assert checkpoint.load(previous)["epoch"] == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.1.ckpt", "last.ckpt"]


def full_between(patch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let the disk be full during the saves `first` to `last`, counted from 1 over all files."""
    original, count = checkpoint._Writer.write, 0

    def begin(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        save(*args, **options)

    def write(self: checkpoint._Writer, data: bytes) -> int:
        if first <= count <= last:
            self.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise self.error
        return original(self, data)

    save = checkpoint.save
    patch.setattr(checkpoint, "save", begin)
    patch.setattr(checkpoint._Writer, "write", write)


# Saves: three inside the first epoch, its best and its last, three inside the second, ...
@pytest.mark.parametrize(("first", "last"), [(1, 2), (2, 5), (4, 4), (5, 5), (4, 7)])
def test_a_disk_that_is_full_for_a_while_costs_nothing(
    tmp_path: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    first: int,
    last: int,
) -> None:
    full_between(monkeypatch, first, last)
    train(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "warning: cannot save step" in printed
    assert "No space left on device; older checkpoints are as they were; the run goes on" in printed
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (checkpoint.load(folder / name) for folder in (tmp_path / "run", finished))
        assert ours["best"] == theirs["best"]
        assert_same(ours["model"], theirs["model"])
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_whose_end_cannot_be_saved_says_so_and_continues_exactly_later(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_between(patch, 7, 99)
        with pytest.raises(NotSavedError, match=r"No space left.*make room and continue.*resume="):
            train(folder)
    train(folder, f"resume={folder}")
    assert_same(final_weights(folder), final_weights(finished))
    assert (folder / "metrics.jsonl").read_text().count("\n") == 10


def test_a_line_without_room_is_kept_and_written_later(tmp_path: Path) -> None:
    warnings: list[str] = []
    records = Records(
        tmp_path,
        name="x",
        logger=compose("logger=none").logger,
        config={},
        warn=warnings.append,
    )
    records.write("train", 1, {"loss": 1.0})
    size = (tmp_path / "metrics.jsonl").stat().st_size
    with largest_file(size + 10):  # room for a part of a line
        records.write("train", 2, {"loss": 2.0})
        with pytest.raises(OSError, match="too large"):
            records.sync()
    records.write("train", 3, {"loss": 3.0})
    records.close()
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [text[-4:-1] for text in texts] == ["1.0", "2.0", "3.0"]
    assert len(warnings) == 1
    assert "will try again" in warnings[0]


def test_a_run_on_a_disk_that_fills_up_keeps_its_checkpoints(tmp_path: Path) -> None:
    """A real small file system, where that may be had."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        folder = disk / "run"
        train(folder, "trainer.epochs=1", "schedule=constant")
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        (disk / "other").write_bytes(b"x" * (free - 50_000))
        with pytest.raises(NotSavedError, match="No space left on device"):
            train(folder, "schedule=constant", f"resume={folder}")
        assert checkpoint.load(folder / "last.ckpt")["epoch"] == 1
        (disk / "other").unlink()
        train(folder, "schedule=constant", f"resume={folder}")
        result = final_weights(folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    train(tmp_path / "whole", "schedule=constant")
    assert_same(result, final_weights(tmp_path / "whole"))


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "trainer.epochs=1")
    ready, tell = os.pipe()
    process = os.fork()
    if not process:
        held = RunFolder(folder)
        os.write(tell, b".")
        signal.pause()
        held.close()
        os._exit(0)
    try:
        os.read(ready, 1)
        before = (folder / "metrics.jsonl").read_text()
        with pytest.raises(ConfigError, match="must be a folder that no other process writes to"):
            train(folder, f"resume={folder}", "trainer.epochs=3")
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    assert (folder / "metrics.jsonl").read_text() == before
    train(folder, f"resume={folder}")  # the lock has ended with the process
