"""Several processes on one machine: the same numbers as one, and checkpoints in parts."""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import in_processes, srun_environment, torchrun_environment, train

from conf import ConfigError, compose
from training import checkpoint, shards
from training.processes import layout

MOMENTUM = ("trainer.batch_size=8", "trainer.devices=2")
ADAM = (
    "optimizer=adamw",
    "optimizer.base_lr=1e-3",
    "trainer.ema_decay=0.9",
    "trainer.clip_grad=0.5",
    "trainer.checkpoint_every=3",
)

TIMM = (
    ("model=timm", "model.name=test_resnet"),  # BatchNorm has buffers
    ("model=timm", "model.name=test_vit", "+model.kwargs.img_size=32"),
)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def largest_difference(one: Path, other: Path, key: str = "model") -> float:
    a, b = (shards.load(path)[key] for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one process and on two, replicated and sharded, and runs to continue."""
    root = tmp_path_factory.mktemp("runs")

    def on_two() -> None:
        for strategy in ("ddp", "fsdp"):
            train(root / strategy, *MOMENTUM, f"trainer.strategy={strategy}")
            train(
                root / f"{strategy}_adam",
                *ADAM,
                "trainer.batch_size=4",
                "trainer.accumulate=2",
                "trainer.limit_train_batches=8",
                f"trainer.strategy={strategy}",
            )
            for model in TIMM:
                name = model[1].split("=")[1]
                options = (*MOMENTUM, "data.img_size=32", "trainer.epochs=1")
                options += (f"trainer.strategy={strategy}",)
                train(root / f"{strategy}_{name}", *options, model=model)

    train(root / "one", "trainer.batch_size=16")
    train(root / "one_adam", *ADAM, "trainer.batch_size=16")
    in_processes(2, on_two)
    return root


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_same_global_batch(runs: Path, strategy: str) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        assert largest_difference(runs / "one" / name, runs / strategy / name) < 1e-6
    alone, shared = records(runs / "one"), records(runs / strategy)
    assert len(alone) == len(shared)
    for a, b in zip(alone, shared, strict=True):
        assert a["step"] == b["step"]
        for name in {"loss", "train_loss", "val_loss", "grad_norm", "lr"} & a.keys():
            assert b[name] == pytest.approx(a[name], rel=1e-6), name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_an_uneven_validation_set_is_counted_once_per_image(runs: Path, strategy: str) -> None:
    # 37 images in batches of 6: the first process has four, the second three.
    alone, shared = records(runs / "one"), records(runs / strategy)
    for a, b in zip(alone, shared, strict=True):
        for name in {"top1", "train_top1", "val_top1", "val_top5"} & a.keys():
            assert b[name] == a[name], name
    right = alone[-1]["val_top1"] * 37 / 100
    assert right == pytest.approx(round(right), abs=1e-4)


@pytest.mark.parametrize("name", ["adam", "test_resnet", "test_vit"])
def test_sharding_changes_no_number(runs: Path, name: str) -> None:
    # Adam divides by gradients, which for key biases are rounding errors: compared with ddp alone.
    for file, key in (("last.ckpt", "model"), ("best.ckpt", "model"), ("last.ckpt", "ema")):
        pair = (runs / f"{strategy}_{name}" / file for strategy in ("ddp", "fsdp"))
        if key == "model" or name == "adam":
            assert largest_difference(*pair, key) < 1e-6, (file, key)
    a, b = (records(runs / f"{strategy}_{name}")[-1] for strategy in ("ddp", "fsdp"))
    assert a["val_top1"] == b["val_top1"]


def test_a_sharded_checkpoint_has_one_part_for_each_process_and_best_is_a_file(runs: Path) -> None:
    folder = runs / "fsdp_adam"
    for name in ("last.ckpt", "last.1.ckpt"):
        files = sorted(path.name for path in (folder / name).iterdir())
        assert files == ["index.ckpt", "part_0.ckpt", "part_1.ckpt"]
    assert not list(folder.glob("*.tmp"))
    sizes = [(folder / "last.ckpt" / f"part_{rank}.ckpt").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.7 * (runs / "ddp_adam" / "last.ckpt").stat().st_size
    assert checkpoint.load(folder / "best.ckpt")["epoch"] in (1, 2)


@pytest.fixture(scope="module")
def continued(runs: Path) -> Path:
    """`fsdp_adam` continued from its last but one save by other numbers of processes."""
    source = f"resume={runs / 'fsdp_adam' / 'last.1.ckpt'}"
    plain = f"resume={runs / 'ddp_adam' / 'last.1.ckpt'}"

    def go_on(name: str, *options: str) -> None:
        train(runs / name, *ADAM, *options)

    two = ("trainer.batch_size=4", "trainer.accumulate=2", "trainer.limit_train_batches=8")

    def on_two() -> None:
        go_on("two", source, *two, "trainer.strategy=fsdp")
        go_on("two_from_file", plain, *two, "trainer.strategy=fsdp")

    in_processes(2, on_two)
    in_processes(4, lambda: go_on("four", source, "trainer.batch_size=4", "trainer.strategy=fsdp"))
    often = ("trainer.batch_size=16", "trainer.strategy=fsdp", "trainer.checkpoint_every=1")
    in_processes(1, lambda: go_on("one_sharded", source, *often))
    go_on("one_plain", source, "trainer.batch_size=16")
    last = f"resume={runs / 'one_sharded' / 'last.1.ckpt'}"
    in_processes(2, lambda: go_on("two_from_one", last, *two, "trainer.strategy=fsdp"))
    return runs


def test_continuing_a_sharded_run_is_exact(continued: Path) -> None:
    whole, again = (shards.load(continued / name / "last.ckpt") for name in ("fsdp_adam", "two"))
    for key in ("model", "ema"):
        for name, value in whole[key].items():
            assert torch.equal(value, again[key][name]), name
    for index, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, again["optimizer"]["state"][index][name]), (index, name)
    assert whole["best"] == again["best"]
    assert whole["metrics"]["epoch"][0].keys() == again["metrics"]["epoch"][0].keys()


@pytest.mark.parametrize(
    "name", ["one_sharded", "one_plain", "two_from_file", "two_from_one", "four"]
)
def test_a_sharded_checkpoint_loads_on_another_number_of_processes(
    continued: Path, name: str
) -> None:
    for key in ("model", "ema"):
        pair = (continued / run / "last.ckpt" for run in ("fsdp_adam", name))
        assert largest_difference(*pair, key) < 1e-5, key
    assert (continued / name / "last.ckpt").is_dir() == (name != "one_plain")
    assert (
        records(continued / name)[-1]["val_top1"]
        == records(continued / "fsdp_adam")[-1]["val_top1"]
    )


@pytest.fixture
def damaged(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "fsdp", tmp_path / "run")
    return tmp_path / "run"


def test_a_damaged_part_is_found_and_the_checkpoint_before_it_used(
    damaged: Path, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = damaged / "last.ckpt" / "part_1.ckpt"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(bytes(content))
    train(damaged, "trainer.batch_size=16", f"resume={damaged}")
    assert "part_1.ckpt: altered, its SHA-256 does not match; using" in capsys.readouterr().out
    assert (damaged / "last.ckpt.damaged" / "part_1.ckpt").is_file()
    assert largest_difference(damaged / "last.ckpt", runs / "fsdp" / "last.ckpt") < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "index.ckpt").unlink(), r"index\.ckpt: no such file"),
        (lambda path: (path / "part_0.ckpt").unlink(), r"part_0\.ckpt: no such file"),
        (
            lambda path: shutil.copy(
                path.with_name("last.1.ckpt") / "part_0.ckpt", path / "part_0.ckpt"
            ),
            r"part_0\.ckpt is of another checkpoint",
        ),
        (
            lambda path: torch.save({"slices": os.system}, path / "part_0.ckpt"),
            r"part_0\.ckpt: no checksum",
        ),
    ],
    ids=["no index", "no part", "part of another", "foreign part"],
)
def test_a_checkpoint_whose_parts_do_not_belong_together_is_refused(
    damaged: Path, change: Any, message: str
) -> None:
    change(damaged / "last.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match=message):
        shards.load(damaged / "last.ckpt")


def test_a_full_disk_on_one_process_leaves_the_checkpoints_and_the_run_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    original = shards.save_part
    calls = []

    def save_part(path: Path, rank: int, slices: dict[str, torch.Tensor]) -> str:
        calls.append(rank)
        if rank == 1 and len(calls) == 2:  # at the end of the first epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, rank, slices)

    def on_two() -> list[str]:
        shards.save_part = save_part
        train(tmp_path / "run", *MOMENTUM, "trainer.strategy=fsdp", "trainer.checkpoint_every=2")
        return sorted(path.name for path in (tmp_path / "run").iterdir())

    assert in_processes(2, on_two)[0].count("last.ckpt.tmp") == 0
    output = capfd.readouterr().out
    assert output.count("warning: cannot save step 4") == 1
    assert "No space left on device" in output
    steps = [
        checkpoint.load(tmp_path / "run" / name / "index.ckpt")
        for name in ("last.1.ckpt", "last.ckpt")
    ]
    assert [(content["epoch"], content["step"]) for content in steps] == [(1, 2), (2, 0)]


def test_tasks_of_srun_are_one_run_in_the_folder_of_the_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def on_two() -> None:
        # Each process names its folder by its own clock.
        train(tmp_path / f"run_{os.environ['SLURM_PROCID']}", "trainer.batch_size=8")

    in_processes(2, on_two, srun_environment)
    assert capfd.readouterr().out.count("2 x CPU (") == 1
    assert (tmp_path / "run_0" / "last.ckpt").is_file()
    assert not list((tmp_path / "run_1").iterdir())


def test_devices_that_the_starter_did_not_start_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in torchrun_environment(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    settings = compose("trainer.devices=4").trainer
    with pytest.raises(ConfigError, match='must be "auto" or the 2 processes that torchrun'):
        layout(settings)
    with pytest.raises(ConfigError, match="must be 1 or the 1 machines that torchrun"):
        layout(compose("trainer.num_nodes=3").trainer)
    assert layout(compose("trainer.devices=auto").trainer) == (2, 1)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert layout(compose("trainer.devices=2").trainer) == (2, 3)


def test_float16_is_refused_with_sharding() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.precision must be auto, bf16-mixed or 32-tru"):
        compose("trainer.strategy=fsdp", "trainer.precision=16-mixed")
