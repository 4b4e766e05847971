"""The attention benchmark, on sizes for a CPU; nothing is timed."""

import itertools
import json
from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks import attention, contenders, contest, timing
from benchmarks.attention import gpu_plans, run_plans
from benchmarks.attention_report import Row, markdown
from benchmarks.codegen import Case
from benchmarks.contenders import CONTENDERS, OURS, draw_call
from benchmarks.contest import Checker, Deadline, DeviceLostError, Plan, measure
from benchmarks.workloads import FORWARD, TRAINING, WORKS, pairs, tiny_cases, useful_work
from kernels import FocalGeometry, FocalLevel
from kernels.ops import INTERPRETED

CPU = torch.device("cpu")


def case(name, window, levels, height, width, boundary="wrap", shift=0, heads=2, batch=2):
    geometry = FocalGeometry(window, tuple(FocalLevel(*x) for x in levels), boundary, shift)
    return Case(name, geometry, height, width, heads, 16, batch)


ODD = [
    *tiny_cases(),
    case("released", 7, ((1, 13), (7, 5)), 30, 23, heads=1, batch=1),
    case("padded and shifted", 3, ((1, 5), (3, 3)), 7, 8, shift=1),
    case("three levels, masked", 4, ((1, 6), (2, 4), (4, 3)), 10, 9, "mask", 1),
    case("masked, smaller than the window", 4, ((1, 6), (4, 3)), 3, 5, "mask"),
]
REPEATED = case("keys repeat", 3, ((1, 11), (3, 3)), 3, 5, shift=2)
EACH_CASE = pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name.replace(" ", "-"))


def dense_attention(query, key, value, score_mod, block_mask, kernel_options):
    """What FlexAttention computes, with gradients on a CPU: only blocks of the mask count."""
    sizes = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    index = torch.meshgrid(*(torch.arange(size) for size in sizes), indexing="ij")
    score = score_mod(query @ key.mT * query.shape[-1] ** -0.5, *index)
    listed = block_mask.to_dense()[0, 0].bool()
    for axis, block in enumerate(block_mask.BLOCK_SIZE):
        listed = listed.repeat_interleave(block, axis)
    return score.masked_fill(~listed, -torch.inf).softmax(-1) @ value


# -- contenders -----------------------------------------------------------------------------------


@EACH_CASE
@pytest.mark.parametrize("name", ["unfold + SDPA", "eager", "FlexAttention"])
def test_contenders_agree_with_the_oracle(odd, name):
    call = draw_call(odd, torch.float64, CPU)
    with mock.patch.object(contenders, "flex_attention", dense_attention):
        assert Checker(call).error(call, CONTENDERS[name](call), TRAINING) < 1e-12


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_itself_agrees_with_the_oracle():
    call = draw_call(ODD[1], torch.float64, CPU)
    assert Checker(call).error(call, CONTENDERS["FlexAttention"](call), FORWARD) < 1e-12


def test_flex_attention_says_that_it_has_one_bias_per_key():
    with pytest.raises(NotImplementedError, match="attends a key twice"):
        CONTENDERS["FlexAttention"](draw_call(REPEATED, torch.float64, CPU))


def test_the_check_covers_the_first_and_the_last_image():
    call = draw_call(replace(ODD[0], batch=3), torch.float64, CPU)
    forward = CONTENDERS["reference"](call)
    for image, caught in ((0, True), (1, False), (2, True)):
        spoilt = torch.zeros(3, 1, 1, 1, 1, dtype=torch.float64)
        spoilt[image] = 1.0
        run = lambda spoilt=spoilt: forward() + spoilt  # noqa: E731
        if caught:
            with pytest.raises(ArithmeticError, match=r"relative error .* of out"):
                Checker(call).error(call, run, FORWARD)
        else:
            Checker(call).error(call, run, FORWARD)


# -- work -----------------------------------------------------------------------------------------


@EACH_CASE
def test_pairs_are_those_that_the_definition_counts(odd):
    assert pairs(odd) == _count_pairs(odd)


def test_a_key_that_a_window_meets_twice_is_one_pair():
    assert pairs(REPEATED) == _count_pairs(REPEATED)


def _count_pairs(odd):
    geometry, size = odd.geometry, (odd.height, odd.width)
    width = geometry.padded_size(*size)[1]
    queries, keys = geometry.query_index(*size).tolist(), geometry.key_index(*size).tolist()
    seam, slots = geometry.seam_mask(*size), geometry.window_key_slots().tolist()
    levels = [level for level, count in enumerate(geometry.keys_per_level) for _ in range(count)]
    total = 0
    for window, row in enumerate(queries):
        for q, token in enumerate(row):
            if token // width >= odd.height or token % width >= odd.width:
                continue
            apart = {slots[k] for k in range(len(slots)) if seam[window, q, k]}
            held = enumerate(zip(levels, keys[window], strict=True))
            total += len({key for slot, key in held if key[1] >= 0 and slot not in apart})
    return total


def test_useful_work_of_one_window_by_hand():
    window = case("window", 2, ((1, 2),), 2, 2, heads=3, batch=5)
    products = 2 * 16 * 5 * 3 * 16  # 16 pairs
    one_map, bias = 5 * 4 * 3 * 16 * 2, 3 * 16 * 2
    assert useful_work(window, torch.float16, FORWARD) == (2 * products, 4 * one_map + bias)
    assert useful_work(window, torch.float16, TRAINING) == (7 * products, 12 * one_map + 3 * bias)


def test_gpu_plans_hold_every_stage_size_and_contender():
    plans = gpu_plans([torch.bfloat16], attention.PIXELS, 128)
    found = {(plan.case.name, name) for plan in plans for name in plan.contenders}
    names = (OURS, "unfold + SDPA", "FlexAttention")
    for stage, pixels, name in itertools.product(range(1, 5), attention.PIXELS, names):
        assert (f"stage {stage}, {pixels} px", name) in found
    assert {name for case_name, name in found if case_name == "stage 1, 224 px"} == set(CONTENDERS)
    assert all(OURS in plan.contenders for plan in plans)
    last = next(plan.case for plan in plans if plan.case.name == "stage 4, 1792 px")
    assert (last.height, last.width, last.batch) == (56, 56, 2)


# -- measuring ------------------------------------------------------------------------------------


def off_by_a_factor(call):
    forward = CONTENDERS["reference"](call)
    return lambda: 1.1 * forward()


def wrong_gradient(call):
    forward = CONTENDERS["reference"](call)

    def run():
        out = forward()
        return out + (call.leaves["bias"].sum() - call.leaves["bias"].detach().sum())

    return run


def broken(call):
    raise RuntimeError("no kernel image\nis available")


def unsupported(call):
    raise NotImplementedError("not on this device")


def run_measure(names, odd=ODD[0], minutes=1.0):
    chosen = {**CONTENDERS, "factor": off_by_a_factor, "gradient": wrong_gradient}
    chosen |= {"broken": broken, "unsupported": unsupported}
    plan = Plan(odd, torch.float32, tuple(names))
    ceilings = {"copy": 1.0, "float32": 1.0}
    rows = measure(plan, CPU, ceilings, Deadline(minutes), chosen, seconds=0.0, min_rounds=2)
    return {(row.work, row.contender): row for row in rows}


def test_a_wrong_contender_is_reported_and_the_others_are_measured():
    names = ("eager", "factor", "gradient", "broken", "unsupported", "unfold + SDPA")
    rows = run_measure(names)
    assert set(rows) == set(itertools.product(WORKS, names))
    for work in WORKS:
        assert rows[work, "factor"].status == "failed"
        assert "relative error 1.0e-01 of out" in rows[work, "factor"].note
        assert rows[work, "broken"].note == "RuntimeError: no kernel image"
        assert rows[work, "unsupported"].status == "unsupported"
        for name in ("eager", "unfold + SDPA"):
            assert rows[work, name].status == "ok"
            assert rows[work, name].milliseconds > 0
            assert rows[work, name].runs == 2
    assert rows[FORWARD, "gradient"].status == "ok"
    assert "of bias" in rows[TRAINING, "gradient"].note
    failed = [row for row in rows.values() if row.status != "ok"]
    assert all(row.milliseconds is None and row.tflops is None for row in failed)


@pytest.mark.skipif(not INTERPRETED, reason="the kernels run on CPU tensors interpreted alone")
def test_our_kernels_are_checked_and_compared():
    rows = run_measure((OURS, "eager"), ODD[2])
    assert all(row.status == "ok" and row.times_ours for row in rows.values())
    assert rows[FORWARD, OURS].times_ours == 1.0


def test_a_backend_that_cannot_run_here_is_unsupported():
    bfloat16 = Plan(ODD[2], torch.bfloat16, (OURS,))
    rows = measure(bfloat16, CPU, {"copy": 1.0, "bfloat16": 1.0}, Deadline(1.0))
    assert [row.status for row in rows] == ["unsupported"] * 2
    assert "triton" in rows[0].note


def test_nothing_starts_after_the_deadline():
    rows = run_measure(("eager", "broken"), minutes=0.0)
    assert {row.status for row in rows.values()} == {"not reached"}


def test_a_contender_that_took_longer_than_what_is_left_is_not_started():
    deadline = Deadline(1.0)
    assert deadline.allows("FlexAttention")
    deadline.note("FlexAttention", 90.0)
    deadline.note("FlexAttention", 1.0)
    assert not deadline.allows("FlexAttention")
    assert deadline.allows("eager")


def fresh_state():
    environment = timing.environment(CPU)
    ceilings = {"copy": 1.0, "float32": 1.0}
    return {"environment": environment, "ceilings": ceilings, "rows": [], "done": 0, "lost": []}


def small_plans(*names):
    return [Plan(odd, torch.float32, names) for odd in ODD[:3]]


def test_the_report_holds_every_case_and_lists_what_was_not_reached(tmp_path):
    state, plans = fresh_state(), small_plans("eager", "reference")
    path, settings = tmp_path / "attention.json", {"seconds": 0.0, "min_rounds": 1}
    run_plans(plans[:1], CPU, Deadline(1.0), path, state, **settings)
    run_plans(plans, CPU, Deadline(0.0), path, state, **settings)
    saved = json.loads(path.read_text())
    assert saved["done"] == 3
    rows = [Row(**row) for row in saved["rows"]]
    expected = itertools.product([p.case.name for p in plans], WORKS, ("eager", "reference"))
    assert {(row.case, row.work, row.contender) for row in rows} == set(expected)
    text = markdown(saved)
    assert "Made on a CPU: the times say nothing" in text
    table, missed = text.split("Not reached in time: ")
    assert table.count("| tiny |") == 4
    assert "tiny, plain windows (float32, reference, forward + backward)" in missed


def test_inputs_that_do_not_fit_are_reported_and_the_other_cases_are_measured(tmp_path):
    state = fresh_state()
    draw, plans = contenders.draw_call, small_plans("eager")

    def too_large_once(odd, *rest):
        if odd == plans[0].case:
            raise torch.OutOfMemoryError("out of memory")
        return draw(odd, *rest)

    with mock.patch.object(contest, "draw_call", too_large_once):
        run_plans(plans, CPU, Deadline(1.0), tmp_path / "a.json", state, seconds=0.0, min_rounds=1)
    assert [row["status"] for row in state["rows"]] == ["failed"] * 2 + ["ok"] * 4


def test_after_a_lost_device_a_fresh_process_goes_on_without_the_culprit(tmp_path):
    state, plans, path = fresh_state(), small_plans("broken", "eager"), tmp_path / "attention.json"
    settings = {"seconds": 0.0, "min_rounds": 1, "contenders": {**CONTENDERS, "broken": broken}}
    for _ in plans:
        with (
            mock.patch.object(contest, "device_lost", return_value=True),
            pytest.raises(DeviceLostError),
        ):
            run_plans(plans, CPU, Deadline(1.0), path, state, **settings)
        state = json.loads(path.read_text())
    run_plans(plans, CPU, Deadline(1.0), path, state, **settings)
    rows = [Row(**row) for row in state["rows"]]
    assert [row.contender for row in rows if row.status == "failed"] == ["broken"] * 6
    assert "broke the GPU's context: RuntimeError: no kernel image" in rows[2].note
    assert sum(row.status == "ok" for row in rows) == 6


def test_processes_share_the_compilations(tmp_path):
    plans, ran = small_plans("eager", "FlexAttention", OURS), []
    one_of_each = {
        name: lambda call, name=name: ran.append((call.case.name, name)) for name in CONTENDERS
    }
    with mock.patch.object(attention, "CONTENDERS", one_of_each):
        for part in ("0/2", "1/2"):
            attention.compile_part([*plans, *plans], part, CPU)
    expected = itertools.product([p.case.name for p in plans], ("FlexAttention", OURS))
    assert sorted(ran) == sorted(expected)


def test_functions_are_timed_in_turns():
    order = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.interleave(functions, CPU, seconds=0.0, min_rounds=3)
    assert order == list("ababab")
    assert {name: t.runs for name, t in timings.items()} == {"a": 3, "b": 3}
