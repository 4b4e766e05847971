"""The tuner and the launch table that it rewrites; nothing is timed."""

import importlib.util
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import tune
from benchmarks.launch_file import read_entries, rewrite
from benchmarks.tune import Bench, RefusedError, neighbours, walk
from benchmarks.workloads import tiny_cases
from kernels import launch_table
from kernels.launch_table import TABLE, Tile
from kernels.ops import INTERPRETED

CPU = torch.device("cpu")
START = Tile(32, 32, 4, 2)
KEY = ("forward", 32, 2, "sm_90")


def fake_compare(best, refuses=()):
    """Time grows with the steps to the best tile; two stages that agree."""

    def cost(tile):
        steps = 0
        for name, choices in tune.CHOICES.items():
            place = choices.index(getattr(tile, name))
            steps += abs(place - choices.index(getattr(best, name)))
        return 1.0 + steps

    def compare(candidate, incumbent):
        if candidate in refuses:
            raise RefusedError("spills 8 registers")
        return [cost(candidate) / cost(incumbent)] * 2

    return compare


def test_neighbours_differ_in_one_number_by_one_step():
    found = neighbours(Tile(64, 16, 4, 1))
    assert found == [
        Tile(32, 16, 4, 1),
        Tile(64, 32, 4, 1),
        Tile(64, 16, 2, 1),
        Tile(64, 16, 8, 1),
        Tile(64, 16, 4, 2),
    ]


def test_the_walk_ends_at_the_fastest_tile():
    best = Tile(64, 128, 2, 4)
    outcome = walk(KEY, START, fake_compare(best), lambda: True)
    assert outcome.after == best
    assert outcome.before == START
    assert outcome.ratio == pytest.approx(1 / 7)
    assert outcome.complete


def test_the_walk_goes_around_refused_tiles_and_names_them():
    refused = Tile(64, 32, 4, 2)
    outcome = walk(KEY, START, fake_compare(refused, {refused}), lambda: True)
    assert outcome.after == START
    assert outcome.refused == [f"{refused}: spills 8 registers"]


def test_a_saving_within_noise_changes_nothing():
    outcome = walk(KEY, START, lambda candidate, incumbent: [1.5, 0.47], lambda: True)
    assert outcome.after == START


def test_the_sum_over_stages_decides():
    def compare(candidate, incumbent):
        return [2.0, 0.5] if candidate.num_stages == 1 else [0.9, 0.9]

    first = walk(KEY, START, compare, iter([True] * 8 + [False]).__next__)
    assert first.after.num_stages == START.num_stages


def test_the_walk_keeps_what_it_found_when_time_is_up():
    left = iter([True] * 10 + [False] * 9)
    outcome = walk(KEY, START, fake_compare(Tile(64, 128, 8, 4)), left.__next__)
    assert outcome.tried == 10
    assert not outcome.complete
    assert outcome.ratio < 1


class FakeBench(Bench):
    """Tiles that spill, compute something else, or serve."""

    def __init__(self):
        self.device, self.calls, self.checkers, self._launches = CPU, [None], [None], {}

    def _launch(self, key, tile, call, checker):
        if tile.num_warps == 1:
            raise ArithmeticError("relative error 3.0e-01 of query")
        compiled = mock.Mock(n_spills=16 if tile.num_warps == 8 else 0)
        return [tune.Launched(mock.MagicMock(), (1,), {}, compiled)]


def test_candidates_that_spill_or_fail_the_check_are_refused():
    bench = FakeBench()
    for warps, reason in ((8, "spills 16 registers"), (1, "ArithmeticError: relative error")):
        with pytest.raises(RefusedError, match=reason):
            bench.compare(KEY, replace(START, num_warps=warps), START)
    assert len(bench.compare(KEY, replace(START, num_warps=2), START)) == 1


def test_a_tile_in_hand_that_spills_is_no_obstacle():
    assert FakeBench().compare(KEY, START, replace(START, num_warps=8))


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on CPU tensors interpreted alone")
def test_the_kernel_is_launched_with_the_candidate_and_the_table_stays():
    tiny, key = tiny_cases()[2], ("forward", 16, 4, "any")
    bench = Bench([tiny], torch.float32, CPU)
    before = dict(TABLE)
    (launches,) = bench.launches(key, Tile(16, 16, 2, 1))
    assert {launch.kernel.__name__ for launch in launches} == {"forward_kernel"}
    assert {launch.arguments["num_warps"] for launch in launches} == {2}
    assert before == TABLE


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on CPU tensors interpreted alone")
def test_a_launcher_that_does_not_read_the_entry_is_noticed():
    bench, key = Bench(tiny_cases()[2:], torch.float32, CPU), ("forward", 16, 4, "sm_90")
    with pytest.raises(RuntimeError, match="does not read"):
        bench.launches(key, Tile(16, 16, 2, 1))


def source():
    return Path(launch_table.__file__).read_text()


ENTRIES = {
    ("forward", 32, 2, "sm_90"): Tile(64, 128, 8, 3),
    ("bias_gradient", 32, 4, "sm_90"): Tile(16, 16, 1, 1),
}
WHERE = ["sm_90: NVIDIA H100 80GB HBM3, 2026-01-01 12:00 UTC", "driver 1, torch 2, triton 3"]


def test_the_table_reads_as_python_reads_it():
    assert read_entries(source()) == TABLE


def test_a_rewritten_table_imports_and_holds_the_new_entries(tmp_path):
    path = tmp_path / "rewritten_table.py"
    path.write_text(rewrite(source(), ENTRIES, WHERE))
    spec = importlib.util.spec_from_file_location("rewritten_table", path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"rewritten_table": module}):
        spec.loader.exec_module(module)
    found = {
        key: (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)
        for key, tile in module.TABLE.items()
    }
    expected = {**TABLE, **ENTRIES}
    assert found == {
        key: (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages)
        for key, tile in expected.items()
    }
    check = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "100", str(path)]
    if importlib.util.find_spec("ruff"):
        assert subprocess.run(check, capture_output=True, check=False).returncode == 0


def test_rewriting_twice_replaces_and_leaves_other_targets_alone():
    other = {("forward", 32, 2, "gfx90a"): Tile(32, 32, 4, 2)}
    first = rewrite(rewrite(source(), other, ["gfx90a: MI250"]), ENTRIES, WHERE)
    assert rewrite(first, {}, WHERE) == first
    newer = {KEY: Tile(32, 64, 4, 2)}
    second = rewrite(first, newer, ["sm_90: later"])
    assert read_entries(second) == {**read_entries(source()), **other, **ENTRIES, **newer}
    assert second.count(WHERE[0]) == 1  # it still holds an entry
    third = rewrite(second, {("bias_gradient", 32, 4, "sm_90"): START}, ["sm_90: last"])
    assert WHERE[0] not in third
    kept = [line for line in source().splitlines() if line in third.splitlines()]
    assert kept == source().splitlines()
    assert "    # gfx90a: MI250\n" in third


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: re.sub(r"\): Tile\(\d+, ", "): Tile(", text, count=1), "an entry or a"),
        (lambda text: text.replace("TABLE: ", "OTHER: "), "must be a dict literal"),
    ],
)
def test_a_table_of_another_form_is_an_error(spoil, message):
    with pytest.raises(ValueError, match=message):
        rewrite(spoil(source()), ENTRIES, WHERE)
