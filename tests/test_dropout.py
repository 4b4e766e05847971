"""Dropout of attention weights: one mask, a function of the seed, for every backend and pass."""

import pytest
import torch
from cases import (
    Case,
    assert_same,
    attend,
    make_tensors,
    needs_interpreter,
    random_gradient,
    run,
)

from kernels import eager
from kernels.dropout import draw_seed, keep_mask, keep_threshold, row_index

BACKENDS = ["reference", "eager", pytest.param("triton", marks=needs_interpreter)]
EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)

WRAP = Case("wrap", 2, ((1, 4), (2, 3)), 3, 5, heads=1, batch=2, shift=1, dropout_p=0.3)
MASK = Case("mask", 3, ((1, 5), (3, 3)), 4, 5, 1, 3, 1, "mask", 1, (4, 4), dropout_p=0.6)


def seed(number: int) -> torch.Tensor:
    return torch.tensor([number])


def mask(number: int, p: float, rows: int = 40, queries: int = 49, keys: int = 50) -> torch.Tensor:
    return keep_mask(seed(number), p, torch.arange(rows), queries, keys)


# -- the mask -------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("number", [0, 1, 2**31 - 2, 2**40 + 3, -5])
def test_weights_are_dropped_at_the_rate(p, number):
    kept = mask(number, p)
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(1 - kept.double().mean().item() - p) < 5 * deviation


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_row_query_and_key_is_dropped_at_the_rate(axis):
    kept = mask(3, 0.3, rows=64).double()
    rates = 1 - kept.mean(dim=[a for a in range(3) if a != axis])
    deviation = (0.3 * 0.7 * kept.shape[axis] / kept.numel()) ** 0.5
    assert (rates - 0.3).abs().max() < 5 * deviation


def test_neighbouring_entries_are_independent():
    kept = mask(7, 0.5, rows=64).double() * 2 - 1
    pairs = {
        "seed": (kept, mask(8, 0.5, rows=64).double() * 2 - 1),
        "row": (kept[1:], kept[:-1]),
        "query": (kept[:, 1:], kept[:, :-1]),
        "key": (kept[:, :, 1:], kept[:, :, :-1]),
        "diagonal": (kept[:, 1:, 1:], kept[:, :-1, :-1]),
    }
    for name, (first, second) in pairs.items():
        assert (first * second).mean().abs() < 5 * first.numel() ** -0.5, name


def test_an_entry_depends_on_its_own_place_alone():
    whole = mask(5, 0.4)
    assert torch.equal(keep_mask(seed(5), 0.4, torch.tensor([[31], [2]]), 49, 50)[0, 0], whole[31])
    assert torch.equal(whole, mask(5, 0.4))
    assert not torch.equal(whole, mask(6, 0.4))


def test_a_weight_dropped_at_a_low_rate_is_dropped_at_a_higher_one():
    assert (mask(5, 0.1) >= mask(5, 0.4)).all()


def test_rows_number_every_image_window_and_head():
    rows = row_index(torch.arange(3), torch.arange(4), 4, 5)
    assert rows.flatten().tolist() == list(range(60))
    part = row_index(torch.arange(1, 3), torch.arange(2, 4), 4, 5)
    assert torch.equal(part, rows[1:3, 2:4])


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (0.5, 2**31), (1 - 1e-12, 2**32 - 1)])
def test_the_threshold_stays_within_32_bits(p, threshold):
    assert keep_threshold(p) == threshold


def test_drawn_seeds_follow_the_generator():
    torch.manual_seed(3)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(first, draw_seed(torch.device("cpu")))
    assert not torch.equal(first, second)
    assert first.shape == (1,)
    assert first.dtype == torch.int64


# -- the operator ---------------------------------------------------------------------------------


def test_the_oracle_applies_the_mask_to_the_weights():
    # One-hot values: the output is the weights themselves.
    single = Case("weights", 2, ((1, 2),), 2, 2, heads=1, head_dim=4, batch=1, dropout_p=0.5)
    tensors = make_tensors(single)
    tensors["value"] = torch.eye(4, dtype=torch.float64).view(1, 2, 2, 1, 4)
    plain = attend(single, tensors, "reference", dropout_p=0.0).view(4, 4)
    kept = keep_mask(seed(1234), 0.5, torch.zeros(1, dtype=torch.int64), 4, 4)[0]
    got = attend(single, tensors, "reference").view(4, 4)
    assert 0 < kept.sum() < 16
    torch.testing.assert_close(got, plain * kept * 2, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("case", [WRAP, MASK], ids=str)
@pytest.mark.parametrize("number", [2**33 + 17, -1])
def test_backends_agree_for_the_same_seed(case, backend, number):
    tensors, gradient = make_tensors(case), random_gradient(case)
    expected = run(case, tensors, "reference", gradient, dropout_seed=seed(number))
    assert_same(run(case, tensors, backend, gradient, dropout_seed=seed(number)), expected)


@pytest.mark.parametrize("budget", [1, 600, 1500])
def test_bands_and_groups_of_images_drop_the_same(budget, monkeypatch):
    monkeypatch.setitem(eager.SCORES_PER_STEP, "cpu", budget)
    eager._bands.cache_clear()
    tensors, gradient = make_tensors(WRAP), random_gradient(WRAP)
    got = run(WRAP, tensors, "eager", gradient)
    eager._bands.cache_clear()
    assert_same(got, run(WRAP, tensors, "reference", gradient))


@EVERY_BACKEND
def test_probability_zero_changes_nothing(backend):
    tensors = make_tensors(WRAP)
    plain = attend(WRAP, tensors, "reference", dropout_p=0.0, dropout_seed=None)
    for options in ({"dropout_p": 0.0}, {"dropout_p": 0.0, "dropout_seed": None}):
        got = attend(WRAP, tensors, backend, **options)
        torch.testing.assert_close(got, plain, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_the_mean_over_seeds_is_the_plain_output(backend):
    tensors = {name: x.detach() for name, x in make_tensors(WRAP).items()}
    plain = attend(WRAP, tensors, "reference", dropout_p=0.0)
    outs = torch.stack(
        [attend(WRAP, tensors, backend, dropout_seed=seed(number)) for number in range(400)]
    )
    error = (outs.mean(dim=0) - plain) / (outs.std(dim=0) / 20)  # in standard errors
    assert error.abs().mean() < 1.0
    assert error.abs().max() < 5.0


@EVERY_BACKEND
def test_gradients_agree_with_finite_differences(backend):
    case = Case("small", 2, ((1, 2), (2, 1)), 2, 3, 1, 1, 1, shift=1, dropout_p=0.4)
    tensors = make_tensors(case)
    names = list(tensors)

    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return attend(case, dict(zip(names, inputs, strict=True)), backend)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), fast_mode=True)


@EVERY_BACKEND
def test_without_a_seed_the_generator_decides(backend):
    case = Case("drawn", 2, ((1, 2), (2, 1)), 2, 3, heads=1, batch=1)
    tensors = {name: x.detach() for name, x in make_tensors(case).items()}

    def call() -> torch.Tensor:
        return attend(case, tensors, backend, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(first, call())
    assert not torch.equal(first, second)


@EVERY_BACKEND
def test_value_gradient_uses_the_mask_of_forward(backend):
    # A linear map of the values: with dropout too, <out, g> = <value, gradient of value>.
    case = Case("linear", 2, ((1, 4),), 3, 3, heads=1, batch=1, dropout_p=0.5)
    tensors, gradient = make_tensors(case), random_gradient(case)
    result = run(case, tensors, backend, gradient)
    left = (result["out"] * gradient).sum()
    right = (tensors["value"].detach() * result["value"]).sum()
    torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
