"""The fuzzer passes over the backends, and notices backends that are slightly wrong."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import INTERPRETED, Case, needs_interpreter

from benchmarks import fuzz
from kernels import focal_attention

eager = partial(focal_attention, backend="eager")


@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        pytest.param("triton", marks=needs_interpreter),
    ],
)
def test_no_backend_is_wrong_in_a_short_run(backend, capsys):
    count = {"eager": "60", "triton": "5"}[backend]
    code = fuzz.main(["--cases", count, "--seed", "3", "--backends", backend])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert f"{backend:8} float64" in printed


def keys_shifted(query, key, value, bias, **options):
    return eager(query, key.roll(1, dims=2), value, bias, **options)


def values_rounded(query, key, value, bias, **options):
    return eager(query, key, value.to(torch.bfloat16).to(value.dtype), bias, **options)


def bias_gradient_dropped(query, key, value, bias, **options):
    return eager(query, key, value, bias.detach() + 0 * bias.clamp(min=-1e4), **options)


def strides_ignored(query, key, value, bias, **options):
    if query.numel() and query.stride() != query.contiguous().stride():
        query = query.as_strided(query.shape, query.contiguous().stride(), query.storage_offset())
    return eager(query, key, value, bias, **options)


def half_accumulated(query, key, value, bias, **options):
    # Three roundings to 8 bits in place of 11.
    out = eager(query, key, value, bias, **options)
    return (out / 3).to(torch.bfloat16).to(out.dtype) * 3 if out.dtype == torch.float16 else out


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (keys_shifted, "float64"),
        (values_rounded, "float64"),
        (bias_gradient_dropped, "float64"),
        (strides_ignored, "float64"),
        (half_accumulated, "float16"),
        (keys_shifted, "float32"),
    ],
)
def test_a_planted_error_is_found_and_printed_so_that_it_can_be_replayed(
    wrong, dtype, monkeypatch, capsys
):
    monkeypatch.setitem(fuzz.BACKENDS, "eager", wrong)
    arguments = ["--cases", "100", "--seed", "1", "--backends", "eager", "--dtypes", dtype]
    assert fuzz.main(arguments) == 1
    printed = capsys.readouterr().out
    (line,) = (x for x in printed.splitlines() if x.startswith("reproduce: "))
    call = line.split("--replay ")[1].strip('"')
    assert fuzz.main(["--replay", call, "--backends", "eager"]) == 1
    monkeypatch.setitem(fuzz.BACKENDS, "eager", eager)
    assert fuzz.main(["--replay", call, "--backends", "eager"]) == 0


def test_errors_that_are_too_large_on_average_alone_are_found(monkeypatch):
    def noisy(query, key, value, bias, **options):
        out = eager(query, key, value, bias, **options)
        noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        return out * (1 + 2.0**-21 * noise.to(out.dtype))  # four roundings

    case = Case("many", 2, ((1, 2),), 4, 4, heads=1, batch=1)
    for backend, imprecise in ((eager, False), (noisy, True)):
        monkeypatch.setitem(fuzz.BACKENDS, "eager", backend)
        fuzzer = fuzz.Fuzzer(["eager"])
        for seed in range(fuzz.ENOUGH):
            fuzzer.check(fuzz.Call(replace(case), "float32", seed=seed))
        assert (("eager", "float32", "out") in fuzzer.imprecise()) == imprecise


def test_a_backend_that_cannot_run_is_counted_as_skipped():
    fuzzer = fuzz.Fuzzer(["triton"])
    if INTERPRETED:
        assert fuzzer.usable("bfloat16") == []
        assert "bfloat16 products wrongly" in fuzzer.skipped["triton", "bfloat16"]
    else:
        assert fuzzer.usable("float64") == []
        assert ("triton", "float64") in fuzzer.skipped
