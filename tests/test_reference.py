"""The oracle itself, checked by a loop over single queries that shares no code with it."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ODD, Case, attend, cases, make_tensors, random_gradient, run
from hypothesis import given, settings

from kernels import FocalGeometry, PooledMap, Pooling, focal_attention
from kernels.reference import pad_to_windows, pool_map


class NaiveAttention:
    """Focal attention one query and one key at a time, from the definition (paper, section 3.2)."""

    def __init__(self, case: Case, tensors: dict[str, torch.Tensor]) -> None:
        self.case = case
        self.arrays = {name: x.detach().numpy() for name, x in tensors.items()}
        self.sides = tuple(math.ceil(n / case.window) * case.window for n in case.shape[1:3])
        self.real = case.map_size or (case.height, case.width)

    def token(self, which: str, batch: int, row: int, col: int, head: int) -> np.ndarray:
        """Key or value at a place of the padded map, zero beyond its storage."""
        if row >= self.case.height or col >= self.case.width:
            return np.zeros(self.case.head_dim)
        return self.arrays[which][batch, row, col, head]

    def unroll(self, place: tuple[int, int]) -> tuple[int, int]:
        return tuple(
            (p + self.case.shift) % side for p, side in zip(place, self.sides, strict=True)
        )

    def beyond(self, place: tuple[int, int]) -> bool:
        return not all(0 <= p < side for p, side in zip(place, self.sides, strict=True))

    def padding(self, tokens: list[tuple[int, int]]) -> bool:
        """Whether none of the tokens is real."""
        return not any(row < self.real[0] and col < self.real[1] for row, col in tokens)

    def fine_key(self, which, batch, head, place, query, window):
        """The key at a place of the rolled map, or None."""
        case = self.case
        if case.boundary == "mask" and (self.beyond(place) or self.padding([self.unroll(place)])):
            return None
        if all(
            w * case.window <= p < (w + 1) * case.window for p, w in zip(place, window, strict=True)
        ):
            seam = [side - case.shift for side in self.sides]
            if any((p >= s) != (q >= s) for p, q, s in zip(place, query, seam, strict=True)):
                return None
        return self.token(which, batch, *self.unroll(place), head)

    def coarse_key(self, which, batch, head, level, cell):
        """A pooled cell of the rolled map, or None."""
        sub = self.case.levels[level][0]
        tokens = [(cell[0] * sub + i, cell[1] * sub + j) for i in range(sub) for j in range(sub)]
        if any(self.beyond(token) for token in tokens):
            return None
        tokens = [self.unroll(token) for token in tokens]
        if self.case.boundary == "mask" and self.padding(tokens):
            return None
        if level in self.case.ready:
            return self.arrays[f"coarse_{which}_{level}"][batch, cell[0], cell[1], head]
        weights = self.arrays[f"weight_{level}"].flatten()
        pooled = sum(
            weight * self.token(which, batch, row, col, head)
            for weight, (row, col) in zip(weights, tokens, strict=True)
        )
        offset = self.arrays.get(f"{which}_offset_{level}")
        return pooled if offset is None else pooled + offset[head]

    def keys(self, which: str, batch: int, head: int, query: tuple[int, int]) -> list:
        """Every key of a query of the rolled map in canonical order, None where there is none."""
        case, found = self.case, []
        window = tuple(q // case.window for q in query)
        for level, (sub, region) in enumerate(case.levels):
            cells = case.window // sub
            start = [w * cells - (region - cells) // 2 for w in window]
            for i, j in itertools.product(range(region), repeat=2):
                place = (start[0] + i, start[1] + j)
                if level == 0:
                    found.append(self.fine_key(which, batch, head, place, query, window))
                else:
                    found.append(self.coarse_key(which, batch, head, level, place))
        return found

    def __call__(self) -> torch.Tensor:
        case = self.case
        out = np.full(case.shape, np.nan)
        for batch, head in itertools.product(range(case.batch), range(case.heads)):
            for place in itertools.product(*(range(side) for side in self.sides)):
                row, col = self.unroll(place)
                if row >= case.height or col >= case.width:
                    continue
                q = self.arrays["query"][batch, row, col, head]
                slot = (place[0] % case.window) * case.window + place[1] % case.window
                bias = self.arrays["bias"][head, slot]
                keys = self.keys("key", batch, head, place)
                values = self.keys("value", batch, head, place)
                assert len(keys) == len(bias)
                total, weighted = 0.0, np.zeros(case.head_dim)
                for k, v, b in zip(keys, values, bias, strict=True):
                    if k is not None:
                        weight = math.exp(float(q @ k) / math.sqrt(case.head_dim) + b)
                        total += weight
                        weighted += weight * v
                out[batch, row, col, head] = weighted / total if total else 0.0
        return torch.from_numpy(out)


def check(case: Case) -> None:
    tensors = make_tensors(case)
    expected = NaiveAttention(case, tensors)()
    got = attend(case, tensors, "reference")
    torch.testing.assert_close(got.detach(), expected, atol=1e-12, rtol=1e-12)


@ODD
def test_oracle_is_the_sum_over_single_keys(case):
    check(case)


@settings(max_examples=25, deadline=None)
@given(cases(largest_window=4, largest_side=6))
def test_oracle_is_the_sum_over_single_keys_for_any_geometry(case):
    check(case)


def test_released_stage_is_the_sum_over_single_keys():
    check(Case("stage 2", 7, ((1, 13), (7, 5)), 14, 9, heads=1, head_dim=2, batch=1, shift=3))


def test_scale_multiplies_the_scores_alone():
    case = Case("scaled", 3, ((1, 5), (3, 3)), 4, 5)
    tensors = make_tensors(case)
    got = attend(case, tensors, "reference", scale=0.3)
    tensors["query"] = tensors["query"] * 0.3 * math.sqrt(case.head_dim)
    torch.testing.assert_close(got, attend(case, tensors, "reference"), atol=1e-12, rtol=1e-12)


# -- queries without any key ----------------------------------------------------------------------

# In the bottom windows of a 3 × 7 map of which 2 × 3 tokens are real no key is left.
EMPTY = Case("no key", 2, ((1, 2), (2, 1)), 5, 7, boundary="mask", map_size=(2, 3))


def test_a_query_without_any_key_gives_zeros_and_no_gradient():
    tensors = make_tensors(EMPTY)
    result = run(EMPTY, tensors, "reference", random_gradient(EMPTY))
    assert (result["out"][:, 2:] == 0).all()
    assert (result["out"][:, :, 4:] == 0).all()
    assert (result["out"][:, :2, :3] != 0).all()
    assert all(tensor.isfinite().all() for tensor in result.values())
    assert (result["query"][:, 2:] == 0).all()
    assert (result["key"][:, 2:] == 0).all()


def test_minus_infinity_in_the_bias_excludes_a_key():
    case = Case("bias", 2, ((1, 4),), 4, 4, heads=1)
    tensors = make_tensors(case)
    with torch.no_grad():
        tensors["bias"][:, 1, :] = -torch.inf
        tensors["bias"][:, 0, 1:] = -torch.inf
    out = attend(case, tensors, "reference").detach()
    # Query 0 of a window attends its first key alone, up and left of the window, around the edge.
    value = tensors["value"].detach().roll((1, 1), dims=(1, 2))
    torch.testing.assert_close(out[:, ::2, ::2], value[:, ::2, ::2])


# -- pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fc", "mean"])
def test_pooling_commutes_with_projection(kind):
    # Equation 1 pools features and projects them; the operator pools projected keys.
    geometry, heads, head_dim, channels = FocalGeometry(4, ((1, 6), (2, 4))), 2, 3, 5
    features = torch.randn(2, 8, 4, channels, dtype=torch.float64)
    linear = torch.nn.Linear(channels, heads * head_dim, dtype=torch.float64)
    if kind == "fc":
        weight, beta = torch.randn(2, 2, dtype=torch.float64), 0.7
    else:
        weight, beta = torch.full((2, 2), 0.25, dtype=torch.float64), 0.0
    cells = features.unflatten(1, (4, 2)).unflatten(3, (2, 2))  # [batch, row, i, col, j, channel]
    pooled_features = torch.einsum("bricjx,ij->brcx", cells, weight) + beta
    expected = linear(pooled_features).unflatten(-1, (heads, head_dim))

    projected = linear(features).unflatten(-1, (heads, head_dim))
    offset = (1 - weight.sum()) * linear.bias + beta * linear.weight.sum(dim=1)
    got = pool_map(projected, weight, offset.view(heads, head_dim))
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    assert got.shape[1:3] == geometry.map_cells(1, 8, 4)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_ready_made_mean_is_the_same_as_mean_pooling(shift):
    case = Case("mean", 4, ((1, 6), (4, 3)), 7, 9, shift=shift)
    tensors = make_tensors(case)
    query, key, value, bias = (tensors[n].detach() for n in ("query", "key", "value", "bias"))

    def pooled(x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, (0, 0, 0, 0, 0, 3, 0, 1)).roll((-shift, -shift), dims=(1, 2))
        flat = padded.flatten(3).movedim(-1, 1)
        return F.avg_pool2d(flat, 4).movedim(1, -1).unflatten(-1, (2, 4))

    mean = Pooling(torch.full((4, 4), 1 / 16, dtype=torch.float64))
    out = [
        focal_attention(
            query, key, value, bias, geometry=case.geometry, pooling=[entry], backend="reference"
        )
        for entry in (mean, PooledMap(pooled(key), pooled(value)))
    ]
    torch.testing.assert_close(*out, atol=1e-12, rtol=1e-12)


# -- arguments ------------------------------------------------------------------------------------


def test_an_empty_batch_gives_an_empty_map():
    case = Case("empty", 3, ((1, 5), (3, 3)), 4, 5, batch=0)
    tensors = make_tensors(case)
    result = run(case, tensors, "reference", random_gradient(case))
    assert result["out"].shape == case.shape
    assert all((result[name] == 0).all() for name in ("bias", "weight_1", "key_offset_1"))


def test_a_map_of_whole_windows_is_not_padded():
    x = torch.randn(1, 6, 9, 1, 2)
    assert torch.equal(pad_to_windows(x, FocalGeometry(3, ((1, 3),))), x)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_training_works_after_inference_mode(backend):
    # Index tables are kept from call to call: none may be bound to inference mode.
    case = Case("inference", 3, ((1, 5), (3, 3)), 4, 11, shift=1)
    tensors = make_tensors(case)
    with torch.inference_mode():
        attend(case, tensors, backend)
    result = run(case, tensors, backend, random_gradient(case))
    assert all(tensor.isfinite().all() for tensor in result.values())


def test_a_fake_call_leaves_no_fake_tables_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    case = Case("fake", 3, ((1, 5), (3, 3)), 4, 13)
    with FakeTensorMode():
        fake = {name: torch.empty(x.shape) for name, x in make_tensors(case).items()}
        assert attend(case, fake, "reference").shape == case.shape
    check(case)
