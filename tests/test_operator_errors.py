"""What `focal_attention` refuses: one error that names the argument, the rule and the value."""

import pytest
import torch
from cases import Case, make_pooling, make_tensors

from kernels import PooledMap, Pooling, focal_attention, resolve_backend

CASE = Case("errors", 3, ((1, 5), (3, 3)), 4, 5, heads=2, head_dim=4, batch=1)
BACKENDS = ["reference", "eager", "triton", "auto"]
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def arguments(**changes) -> dict:
    tensors = make_tensors(CASE, torch.float32)
    call = {name: tensors[name] for name in ("query", "key", "value", "bias")}
    call |= {"geometry": CASE.geometry, "pooling": make_pooling(CASE, tensors)}
    return call | changes


def refuse(error: type[Exception], text: str, backend: str, **changes) -> None:
    """The call raises ``error`` with ``text``, before any backend runs."""
    call = arguments(**changes)
    with pytest.raises(error, match=text):
        focal_attention(**call, backend=backend)


def test_the_unchanged_call_is_accepted(backend):
    try:
        resolve_backend(backend, torch.device("cpu"), torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    out = focal_attention(**arguments(), backend=backend)
    assert out.shape == CASE.shape


MAP = (1, 4, 5, 2, 4)
ANY = torch.zeros(MAP)


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (None, TypeError, "{} must be a tensor, got NoneType"),
        ([1.0], TypeError, "{} must be a tensor, got list"),
        (ANY[0], ValueError, r"{} must be \[batch, .*\], got \[4, 5, 2, 4\]"),
        (ANY.int(), TypeError, "{} must be floating point, got torch.int32"),
        (ANY.to(torch.complex64), TypeError, "{} must be floating point, got torch.complex64"),
        (ANY[:, :0], ValueError, r"must be positive, got {} \[1, 0, 5, 2, 4\]"),
        (ANY[..., :0], ValueError, r"must be positive, got {} \[1, 4, 5, 2, 0\]"),
    ],
)
def test_a_map_of_the_wrong_kind(name, tensor, error, text, backend):
    refuse(error, text.format(name), backend, **{name: tensor})


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (ANY[:, :3], ValueError, r"{} must have the shape of query, got \[1, 3, 5, 2, 4\] and "),
        (ANY.expand(2, *MAP[1:]), ValueError, r"{} must have the shape of query, got \[2, 4, "),
        (ANY.double(), TypeError, "{} must have the dtype of query, got torch.float64 and "),
        (ANY.to("meta"), ValueError, "{} must be on the device of query, got meta and cpu"),
    ],
)
def test_maps_that_do_not_go_together(name, tensor, error, text, backend):
    refuse(error, text.format(name), backend, **{name: tensor})


@pytest.mark.parametrize(
    ("bias", "error", "text"),
    [
        (None, TypeError, "bias .* must be a tensor, got NoneType"),
        (torch.zeros(9, 34), ValueError, r"bias .* must have shape \[2, 9, 34\], got \[9, 34\]"),
        (torch.zeros(1, 9, 34), ValueError, r"must have shape \[2, 9, 34\], got \[1, 9, 34\]"),
        (torch.zeros(2, 9, 33), ValueError, r"must have shape \[2, 9, 34\], got \[2, 9, 33\]"),
        (torch.zeros(2, 9, 34).double(), TypeError, "bias .* or torch.float32, got torch.float64"),
        (torch.zeros(2, 9, 34).half(), TypeError, "bias .* or torch.float32, got torch.float16"),
        (torch.zeros(2, 9, 34).long(), TypeError, "bias .* or torch.float32, got torch.int64"),
        (torch.zeros(2, 9, 34, device="meta"), ValueError, "bias .* on the device of query"),
    ],
)
def test_a_wrong_bias(bias, error, text, backend):
    refuse(error, text, backend, bias=bias)


@pytest.mark.parametrize("geometry", [None, (3, ((1, 5),)), "focal"])
def test_a_geometry_of_another_type(geometry, backend):
    text = f"geometry must be a FocalGeometry, got {type(geometry).__name__}"
    refuse(TypeError, text, backend, geometry=geometry)


WEIGHT, OFFSET, CELLS = torch.zeros(3, 3), torch.zeros(2, 4), torch.zeros(1, 2, 2, 2, 4)


@pytest.mark.parametrize(
    ("pooling", "error", "text"),
    [
        ([], ValueError, "pooling must have one entry per coarse level, got 0 for 1"),
        ([Pooling(WEIGHT)] * 2, ValueError, "one entry per coarse level, got 2 for 1"),
        ([WEIGHT], TypeError, r"pooling\[0\] must be a Pooling or a PooledMap, got Tensor"),
        (
            [Pooling(torch.zeros(2, 2))],
            ValueError,
            r"pooling\[0\].weight must have shape \[3, 3\], got \[2, 2\]",
        ),
        ([Pooling(torch.zeros(9))], ValueError, r"pooling\[0\].weight .* got \[9\]"),
        ([Pooling(WEIGHT.double())], TypeError, r"pooling\[0\].weight .* got torch.float64"),
        ([Pooling(WEIGHT.to("meta"))], ValueError, r"pooling\[0\].weight .* device of query"),
        ([Pooling(None)], TypeError, r"pooling\[0\].weight must be a tensor, got NoneType"),
        (
            [Pooling(WEIGHT, torch.zeros(8))],
            ValueError,
            r"pooling\[0\].key_offset must have shape \[2, 4\], got \[8\]",
        ),
        (
            [Pooling(WEIGHT, OFFSET, OFFSET.half())],
            TypeError,
            r"pooling\[0\].value_offset .* got torch.float16",
        ),
        (
            [PooledMap(CELLS[:, :1], CELLS)],
            ValueError,
            r"pooling\[0\].key must have shape \[1, 2, 2, 2, 4\], got \[1, 1, 2, 2, 4\]",
        ),
        (
            [PooledMap(CELLS, CELLS[0])],
            ValueError,
            r"pooling\[0\].value must have shape \[1, 2, 2, 2, 4\], got \[2, 2, 2, 4\]",
        ),
        ([PooledMap(CELLS, CELLS.double())], TypeError, r"pooling\[0\].value .* torch.float64"),
        ([PooledMap(CELLS.to("meta"), CELLS)], ValueError, r"pooling\[0\].key .* device of query"),
    ],
)
def test_pooling_that_does_not_fit(pooling, error, text, backend):
    refuse(error, text, backend, pooling=pooling)


def test_a_float32_pooled_map_beside_16_bit_maps(backend):
    half = {name: ANY.half() for name in ("query", "key", "value")}
    text = r"pooling\[0\].key must have the dtype of query, got torch.float32 and torch.float16"
    refuse(TypeError, text, backend, **half, pooling=[PooledMap(CELLS, CELLS)])


@pytest.mark.parametrize("map_size", [(0, 5), (4, 0), (5, 5), (4, 6), (-1, 5)])
def test_a_map_size_beyond_the_map(map_size, backend):
    row, col = map_size
    text = rf"map_size must lie within \(1, 1\) and the map's \(4, 5\), got \({row}, {col}\)"
    refuse(ValueError, text, backend, map_size=map_size)


@pytest.mark.parametrize("map_size", [7, (4,), (4, 5, 1), (3.5, 5), "45"])
def test_a_map_size_that_is_no_pair_of_integers(map_size, backend):
    refuse((TypeError, ValueError), "map_size must", backend, map_size=map_size)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 2.0, float("nan")])
def test_a_dropout_that_is_no_probability(dropout_p, backend):
    text = rf"dropout_p must lie in \[0, 1\), got {dropout_p}"
    refuse(ValueError, text, backend, dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("seed", "text"),
    [
        (torch.zeros(1), r"dropout_seed must be int64 of shape \[1\], got torch.float32 \[1\]"),
        (torch.zeros((), dtype=torch.int64), r"dropout_seed .* got torch.int64 \[\]"),
        (torch.zeros(2, dtype=torch.int64), r"dropout_seed .* got torch.int64 \[2\]"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), "dropout_seed .* device of query"),
    ],
)
def test_a_seed_of_the_wrong_kind(seed, text, backend):
    refuse(ValueError, text, backend, dropout_p=0.5, dropout_seed=seed)


def test_a_seed_that_is_no_tensor(backend):
    refuse(TypeError, "dropout_seed must", backend, dropout_p=0.5, dropout_seed=3)


def test_an_unknown_option(backend):
    refuse(TypeError, "dropout_prob", backend, dropout_prob=0.5)
