"""The compiler accepts every kernel for every target without a GPU, and what it makes of them.

The kernels of this process may be interpreted, so child processes compile: the report of
`benchmarks.codegen`, and this file run as a script, which prints one line of JSON per kernel.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from kernels.api import TRITON_INSTALLED

pytestmark = pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")

if TRITON_INSTALLED:
    from benchmarks.compiled import RELEASED
    from benchmarks.floors import distinct_pairs, least
    from benchmarks.limits import TARGETS

ROOT = Path(__file__).parents[1]
NVIDIA = ["sm_80", "sm_90", "sm_100"]
AMD = ["gfx942", "gfx950"]
WITH_PRODUCTS = ["forward_kernel", "gradient_kernel (coarse)", "gradient_kernel (fine)"]
WITHOUT = [
    "bias_kernel",
    "delta_kernel",
    "fold_keys_kernel (coarse)",
    "fold_keys_kernel (fine)",
    "fold_queries_kernel",
    "pool_backward_kernel",
    "pool_kernel",
]
INSIDE = "forward_kernel (pooling inside)"
MOST_PER_PAIR = 24  # executed thread-instructions of forward per distinct query-key pair
FEWEST_WARPS = 8  # resident in a multiprocessor: two blocks of four, four of two


def variants() -> dict:
    """Calls that are hard for a compiler, beside stage 1; made in the child process."""
    from benchmarks.compiled import Case
    from kernels import FocalGeometry

    one = {"height": 1, "width": 1, "heads": 1, "batch": 1}
    cases = [
        RELEASED[1],
        Case("odd head", FocalGeometry(7, ((1, 13), (7, 3)), "mask", 3), 17, 22, 5, 49, 2, 0.1),
        Case("no coarse level", FocalGeometry(7, ((1, 13),), "wrap", 3), 14, 14, 12),
        Case("three levels", FocalGeometry(8, ((1, 12), (2, 8), (8, 5)), "mask"), 20, 24, 2, 64),
        Case("keys repeat", FocalGeometry(2, ((1, 8), (2, 5)), "wrap", 1), 5, 7, 2, dropout_p=0.1),
        # Triton turns arguments that are 1 into constants, which have no methods.
        Case("ones wrapped", FocalGeometry(1, ((1, 3), (1, 1))), **one, dropout_p=0.1),
        Case("ones masked", FocalGeometry(1, ((1, 3), (1, 1)), "mask"), **one),
        Case("ones alone", FocalGeometry(1, ((1, 1),)), **one, head_dim=1),
    ]
    return {case.name: case for case in cases}


def print_rows(names: list[str], dtype: str, target: str) -> None:
    from benchmarks.compiled import compile_launch, distinct, record, resources

    for name in names:
        for launch in distinct(record(variants()[name], getattr(torch, dtype), target)):
            compiled = compile_launch(launch, TARGETS[target])
            registers, spilled, shared = resources(compiled, TARGETS[target])
            text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            row = {
                "case": name,
                "kernel": launch.name,
                "target": target,
                "registers": registers,
                "spilled_bytes": spilled,
                "shared_bytes": shared,
                "tensor cores": "mma" in text or "mfma" in text,
            }
            print(json.dumps(row), flush=True)


def run_compiled(*command: str) -> subprocess.CompletedProcess:
    """A child process in which kernels are compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def compile_rows(names: list[str], dtype: str, target: str) -> list[dict]:
    result = run_compiled(__file__, ",".join(names), dtype, target)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@cache
def report(*arguments: str) -> dict:
    """What the report saves; the compiler's cache makes a second worker's run short."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = ["--jobs", "1", "--json", str(file), *arguments]
        result = run_compiled("-m", "benchmarks.codegen", *options)
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(file.read_text())


def first_stage(target: str) -> list[dict]:
    return report("--targets", target, "--dtypes", "float16", "--stages", "1")["rows"]


def counted_rows(target: str) -> list[dict]:
    """Of every stage for the targets that instructions are counted for, else of the first."""
    if target not in ("sm_80", "sm_90"):
        return first_stage(target)
    stages = ["--stages", "1", "2", "3", "4"]
    return report("--targets", target, "--dtypes", "float16", *stages)["rows"]


def forward_rows(target: str) -> list[dict]:
    """Forward with pooled maps, of `counted_rows`."""
    return [row for row in counted_rows(target) if row["kernel"] == "forward_kernel"]


def check_limits(rows: list[dict]) -> None:
    """Within what a block of the target can have."""
    for row in rows:
        limits = TARGETS[row["target"]]
        assert 0 < row["registers"] <= limits.most_registers, row
        assert 0 <= row["shared_bytes"] <= limits.shared_per_block, row


# -- targets of the released stages --------------------------------------------------------------


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_every_product_of_the_first_stage_is_on_tensor_cores(target):
    rows = first_stage(target)
    # Forward and backward lay out the bias for tiles of their own.
    assert sorted(row["kernel"] for row in rows) == sorted([*WITH_PRODUCTS, *WITHOUT, WITHOUT[0]])
    check_limits(rows)
    for row in rows:
        assert (row["tensor_instructions"] > 0) == (row["kernel"] in WITH_PRODUCTS), row


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_nothing_spills_in_16_bits(target):
    assert not [row for row in counted_rows(target) if row["spilled_bytes"] > 0]


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_two_blocks_of_four_warps_are_resident(target):
    for row in counted_rows(target):
        assert row["warps"] * row["resident_blocks"] >= FEWEST_WARPS, row


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_no_warp_of_the_first_stage_repeats_the_products_of_another(target):
    for row in first_stage(target):
        # The count of tcgen05 products may include those that the last trip does not start.
        assert row["products"] <= (1.125 if target == "sm_100" else 1), row


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_rows_move_in_16_bytes(target):
    rows = [row for row in counted_rows(target) if row["kernel"] != "bias_kernel"]
    assert not [row for row in rows if row["narrow_rows"]]
    assert min(row["row_bytes"] for row in rows) == 16


@pytest.mark.parametrize("target", NVIDIA + AMD)
def test_bias_is_read_in_16_bytes(target):
    read = [row["bias_bytes"] for row in counted_rows(target) if row["kernel"] in WITH_PRODUCTS]
    assert min(read) == 16


def test_forward_takes_warpgroup_products_on_sm_90():
    for row in forward_rows("sm_90"):
        assert all(name.startswith("HGMMA") for name in row["tensor_kind"].split()), row


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_forward_executes_few_instructions_per_pair(target, stage):
    (row,) = [row for row in forward_rows(target) if row["case"] == f"stage {stage}"]
    assert row["per_pair"] <= MOST_PER_PAIR


def test_instructions_per_pair_are_the_executed_ones():
    for row in forward_rows("sm_80"):
        stage = int(row["case"].split()[1])
        pairs = RELEASED[stage].geometry.num_queries * RELEASED[stage].geometry.num_keys
        # One program to a window, with all its pairs.
        assert row["per_pair"] == pytest.approx(32 * row["warps"] * row["executed"] / pairs)
        assert sum(row["kinds"].values()) == pytest.approx(row["executed"])
        assert row["executed"] >= row["kinds"]["tensor"] > 0


def test_pooling_inside_is_reported_where_the_operator_takes_it():
    inside = [row["case"] for row in counted_rows("sm_90") if row["kernel"] == INSIDE]
    assert inside == ["stage 3", "stage 4"]


def test_layer_sums_the_kernels_of_a_pass():
    saved = report("--targets", "sm_90", "--dtypes", "float16", "--stages", "1")
    (layer,) = saved["layers"]
    forward, backward = (
        {row["kernel"]: row["per_pair"] for row in saved["rows"] if row["direction"] == name}
        for name in ("forward", "backward")
    )
    names = {"forward": "forward_kernel", "pooling": "pool_kernel", "bias": "bias_kernel"}
    assert forward == {kernel: layer[name] for name, kernel in names.items()}
    assert layer["backward"] == pytest.approx(sum(backward.values()))
    assert layer["ratio"] == pytest.approx(sum(backward.values()) / sum(forward.values()))


def test_later_stages_do_not_spill_in_bfloat16():
    rows = report("--targets", "sm_90", "--dtypes", "bfloat16", "--stages", "2", "4")["rows"]
    assert len(rows) == 11 + 13  # pooling inside at the last stage
    check_limits(rows)
    assert {row["spilled_bytes"] for row in rows} == {0}


# -- calls that are hard for a compiler ----------------------------------------------------------


def check_rows(rows: list[dict], names: list[str], coarse: list[bool]) -> None:
    """Every kernel is there, within what the target has, on tensor cores."""
    for name, has_coarse in zip(names, coarse, strict=True):
        found = {row["kernel"] for row in rows if row["case"] == name} - {INSIDE}
        expected = WITH_PRODUCTS + WITHOUT
        if not has_coarse:
            expected = [kernel for kernel in expected if "coarse" not in kernel]
            expected = [kernel for kernel in expected if not kernel.startswith("pool")]
        assert found == set(expected)
    check_limits(rows)
    for row in rows:
        assert row["tensor cores"] == (row["kernel"] in [*WITH_PRODUCTS, INSIDE]), row


@pytest.fixture(scope="module")
def float32_rows() -> list[dict]:
    return compile_rows(["stage 1"], "float32", "sm_90")


def test_released_stage_compiles_in_float32(float32_rows):
    # Products in full float32 run outside the tensor cores.
    assert {row["kernel"] for row in float32_rows} == {*WITH_PRODUCTS, *WITHOUT}
    check_limits(float32_rows)


def test_nothing_spills_in_float32(float32_rows):
    assert not [row for row in float32_rows if row["spilled_bytes"] > 0]


HARD = {"odd head": True, "no coarse level": False, "three levels": True, "keys repeat": True}


@pytest.mark.parametrize(
    ("names", "dtype", "target"),
    [
        (["odd head"], "float16", "sm_90"),
        (["no coarse level", "three levels"], "bfloat16", "sm_80"),
        (["keys repeat"], "float16", "gfx942"),
    ],
)
def test_hard_variants_compile(names, dtype, target):
    check_rows(compile_rows(names, dtype, target), names, [HARD[name] for name in names])


@pytest.mark.parametrize(("dtype", "target"), [("float16", "sm_90"), ("float32", "gfx942")])
def test_arguments_that_are_all_1_compile(dtype, target):
    names = {"ones wrapped": True, "ones masked": True, "ones alone": False}
    rows = compile_rows(list(names), dtype, target)
    for row in rows:
        row["tensor cores"] = row["kernel"] in [*WITH_PRODUCTS, INSIDE]
    check_rows(rows, list(names), list(names.values()))
    assert all(row["spilled_bytes"] == 0 for row in rows)


# -- the report ----------------------------------------------------------------------------------


def test_report_saves_rows_layers_floors_versions_and_limits():
    options = ["--targets", "sm_90", "--dtypes", "float16", "--stages", "4", "--batch", "3"]
    saved = report(*options)
    assert {row["target"] for row in saved["rows"]} == set(saved["targets"]) == {"sm_90"}
    assert {row["case"] for row in saved["rows"]} == {"stage 4"}
    assert len(saved["rows"]) == 13
    assert all(row["instructions"] > 0 for row in saved["rows"])
    assert len(saved["layers"]) == 1
    assert saved["versions"]["torch"] == torch.__version__
    passes = {row["direction"]: row for row in saved["floors"]}
    assert list(passes) == ["forward", "forward, pooling inside", "backward"]
    for row in passes.values():
        assert row["batch"] == 3
        costs = row["kernels"].values()
        assert sum(cost["bytes"] for cost in costs) >= row["least_bytes"]
        assert sum(cost["operations"] for cost in costs) >= row["least_operations"]
    workspace = sum(cost["cached_bytes"] for cost in passes["backward"]["kernels"].values())
    # One key tile of 64 rows and one of 16 give a part to each query, and take one from each key.
    written = 2 * 64 + 2 * (64 + 16)
    read = 2 * 64 + 2 * (49 + 1)
    assert workspace == 3 * 24 * (written + read) * 32 * 2


def test_report_refuses_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--stages", "4"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "unset it" in result.stderr


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_floor_counts_the_pairs_that_the_geometry_lists(stage):
    case = RELEASED[stage]
    listed = int((case.geometry.key_index(case.height, case.width) >= 0).sum())
    expected = case.batch * case.heads * case.geometry.num_queries * listed
    assert distinct_pairs(case) == expected


def test_floor_of_the_last_stage_matches_a_hand_count():
    # 8 images of 49 tokens and 24 heads of 32 numbers; each token attends 49 tokens and one cell.
    tokens, pairs, bias = 8 * 49 * 24, 8 * 24 * 49 * 50, 24 * 49 * 50
    assert least(RELEASED[4], torch.float16, "forward") == (
        4 * tokens * 32 * 2 + 2 * bias + 8 * tokens,
        4 * pairs * 32,
    )
    assert least(RELEASED[4], torch.bfloat16, "backward") == (
        8 * tokens * 32 * 2 + (2 + 4) * bias + 8 * tokens,
        10 * pairs * 32,
    )


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "expected"),
    [
        ("sm_90", 4, 32, 0, 16),  # 64 warps
        ("sm_90", 4, 168, 0, 3),  # 16384 registers of a scheduler hold three warps of 168
        ("sm_90", 4, 169, 0, 2),  # registers come in steps of 8 per thread
        ("sm_90", 4, 255, 0, 2),
        ("sm_90", 8, 255, 0, 1),
        ("sm_90", 4, 32, 113 * 1024, 2),  # 1 KiB more for each block
        ("sm_80", 4, 32, 113 * 1024, 1),
        ("sm_90", 1, 16, 0, 32),
        ("gfx942", 4, 128, 0, 4),
        ("gfx942", 4, 257, 0, 1),
        ("gfx942", 4, 64, 33 * 1024, 1),
        ("gfx950", 4, 64, 33 * 1024, 4),
    ],
)
def test_resident_blocks_follow_registers_shared_memory_and_warps(
    target, warps, registers, shared, expected
):
    assert TARGETS[target].resident_blocks(warps, registers, shared) == expected


if __name__ == "__main__":
    print_rows(sys.argv[1].split(","), sys.argv[2], sys.argv[3])
