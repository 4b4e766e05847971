"""The compiled kernels on a GPU, against the oracle in float64."""

from dataclasses import replace

import pytest
import torch
from cases import (
    INTERPRETED,
    Case,
    assert_precise,
    assert_same,
    attend,
    error_ratios,
    fused,
    make_tensors,
    random_gradient,
    run,
)

from kernels import resolve_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler"),
]

RELEASED = [
    Case("stage 1", 7, ((1, 13), (7, 7)), 56, 56, 3, 32),
    Case("stage 2", 7, ((1, 13), (7, 5)), 28, 28, 6, 32),
    Case("stage 3", 7, ((1, 13), (7, 3)), 14, 14, 12, 32),
    Case("stage 4", 7, ((1, 7), (7, 1)), 7, 7, 24, 32),
]
HARD = [
    Case("padded and shifted", 7, ((1, 13), (7, 5)), 30, 23, 3, 32, shift=3),
    Case("masked", 7, ((1, 13), (7, 5)), 30, 23, 3, 32, 2, "mask", 3, (25, 21)),
    Case("three levels", 8, ((1, 12), (2, 8), (8, 5)), 20, 27, 2, 64, boundary="mask"),
    Case("odd head", 4, ((1, 8), (2, 4)), 9, 10, 5, 49, shift=2),
    Case("keys repeat", 2, ((1, 8), (2, 5)), 5, 3, 2, 16, shift=1),
    Case("dropout", 7, ((1, 13), (7, 3)), 14, 20, 2, 32, dropout_p=0.2),
    Case("ready-made maps", 4, ((1, 6), (2, 4)), 9, 7, 2, 32, ready=(1,)),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


TF32_LOSES = 2**13  # bits of a number: 10 of float32's 23 are left


@DTYPES
@pytest.mark.parametrize("case", RELEASED + HARD, ids=str)
def test_error_is_at_most_twice_the_plain_one(case, dtype):
    # Pooling weights are a few numbers: two draws of them would leave the ratio to chance.
    assert_precise(error_ratios(case, dtype, "triton", "cuda", draws=12))


def test_arguments_that_are_all_1_give_the_same():
    # Two or three keys: errors are a matter of luck, so absolute ones are bounded here.
    case = Case("all ones", 1, ((1, 3), (1, 1)), 1, 1, heads=1, head_dim=1, batch=1)
    tensors = make_tensors(case, torch.float32, "cuda")
    gradient = random_gradient(case, torch.float32, "cuda")
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    expected = run(case, exact, "reference", gradient.double())
    got = {name: x.double() for name, x in run(case, tensors, "triton", gradient).items()}
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_bias_beside_16_bit_maps(dtype):
    assert_precise(error_ratios(RELEASED[1], dtype, "triton", "cuda", torch.float32, 2))


@pytest.mark.parametrize("case", [RELEASED[1], HARD[1]], ids=str)
def test_tf32_error_is_the_plain_one_with_fewer_bits(case):
    ratios = error_ratios(case, torch.float32, "triton", "cuda", draws=2, precision="high")
    assert_precise(ratios, 2 * TF32_LOSES)
    assert min(ratios.values()) > 0.1 * TF32_LOSES, "exact products are no test of TF32"


@DTYPES
@pytest.mark.parametrize("case", [RELEASED[0], HARD[1], HARD[5]], ids=str)
def test_results_do_not_change_from_run_to_run(case, dtype):
    tensors, gradient = make_tensors(case, dtype, "cuda"), random_gradient(case, dtype, "cuda")
    first, second = (run(case, tensors, "triton", gradient, fused) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_captured_graph_replays_on_new_inputs():
    case, dtype = RELEASED[2], torch.float16
    tensors = {name: x.detach() for name, x in make_tensors(case, dtype, "cuda").items()}
    attend(case, tensors, "triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(case, tensors, "triton")
    others = make_tensors(case, dtype, "cuda", seed=1)
    for name, x in tensors.items():
        x.copy_(others[name].detach())
    graph.replay()
    assert torch.equal(out, attend(case, tensors, "triton"))


def test_gradients_are_captured_in_a_graph():
    case, dtype = replace(RELEASED[2], dropout_p=0.1), torch.float16
    tensors, gradient = make_tensors(case, dtype, "cuda"), random_gradient(case, dtype, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run(case, tensors, "triton", gradient)
    torch.cuda.current_stream().wait_stream(stream)
    seed = torch.tensor([1234], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case, tensors, "triton", gradient, dropout_seed=seed)
    graph.replay()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_launch_waits_for_the_gpu_or_copies_to_the_host():
    case = replace(RELEASED[2], dropout_p=0.1)
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    run(case, tensors, "triton", gradient)  # compiles
    seed = torch.tensor([1234], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = run(case, tensors, "triton", gradient, dropout_seed=seed)
        drawn = run(case, tensors, "triton", gradient, dropout_seed=None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = run(case, tensors, "triton", gradient, dropout_seed=seed)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert not torch.equal(drawn["out"], got["out"])


def test_launches_take_memory_from_the_allocator_of_pytorch_alone():
    case = RELEASED[1]
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    run(case, tensors, "triton", gradient)  # compiles, and warms the allocator
    torch.cuda.synchronize()

    def outside() -> int:
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()

    before = outside()
    for _ in range(5):
        run(case, tensors, "triton", gradient)
    torch.cuda.synchronize()
    assert outside() <= before


def test_launches_run_on_the_current_stream():
    case = RELEASED[2]
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    expected = run(case, tensors, "triton", gradient)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The inputs are ready late: a launch on another stream would read them too early.
        late = {name: torch.full_like(x, torch.nan) for name, x in tensors.items()}
        torch.cuda._sleep(50_000_000)
        late = {name: late[name].copy_(x).requires_grad_() for name, x in detached(tensors)}
        got = run(case, late, "triton", gradient)
    stream.synchronize()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def detached(tensors: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    return [(name, x.detach()) for name, x in tensors.items()]


def test_a_batch_beyond_the_limit_of_a_grid_axis_gives_the_same():
    # 65,535 programs fit the second and third axis of a grid.
    batch = 65_536 + 2
    case = Case("many images", 2, ((1, 2), (2, 1)), 2, 2, 1, 16, batch)
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    got = run(case, tensors, "triton", gradient)
    last = replace(case, batch=2)
    ends = {
        name: (x.detach()[-2:] if x.dim() == 5 else x.detach()).double().requires_grad_()
        for name, x in tensors.items()
    }
    expected = run(last, ends, "reference", gradient[-2:].double())
    for name in ("out", "query", "key", "value"):
        torch.testing.assert_close(got[name][-2:].double(), expected[name], atol=1e-2, rtol=1e-2)
    exact = run(
        case,
        {name: x.detach().double().requires_grad_() for name, x in tensors.items()},
        "eager",
        gradient.double(),
    )
    for name in ("bias", "weight_1", "key_offset_1", "value_offset_1"):  # sums over all images
        size = exact[name].abs().max()
        error = (got[name].double() - exact[name]).abs().max()
        assert error <= 1e-2 * size, name


def test_offsets_beyond_32_bits_give_the_same():
    # More than 2³¹ numbers lie between the first row of these views and the last.
    case = Case("far apart", 4, ((1, 8), (4, 3)), 12, 8, 2, 16, 1)
    row = 2**31 // case.height + 2**20
    try:
        storage = torch.empty(row * case.height, dtype=torch.float16, device="cuda")
    except torch.cuda.OutOfMemoryError:
        pytest.skip("needs 5 GB of GPU memory")
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    expected = run(case, tensors, "triton", gradient)
    size = case.width * case.heads * case.head_dim
    far = dict(tensors)
    for index, name in enumerate(("query", "key", "value")):
        strides = (0, row, case.heads * case.head_dim, case.head_dim, 1)
        view = storage.as_strided(case.shape, strides, index * size)
        far[name] = view.copy_(tensors[name].detach()).requires_grad_()
    got = run(case, far, "triton", gradient)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def shifted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same numbers at addresses that are no multiples of 16 bytes."""
    moved = {}
    for name, x in tensors.items():
        storage = x.new_empty(x.numel() + 1)
        moved[name] = storage[1:].view(x.shape).copy_(x.detach()).requires_grad_()
    return moved


def test_other_alignments_after_a_launch_was_prepared_give_the_same():
    case = RELEASED[2]
    tensors = make_tensors(case, torch.float16, "cuda")
    gradient = random_gradient(case, torch.float16, "cuda")
    expected = run(case, tensors, "triton", gradient)
    for moved in (shifted(tensors), tensors, shifted(tensors)):
        got = run(case, moved, "triton", gradient)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_trains_on_the_same_gradients(mode):
    timm = pytest.importorskip("timm")
    pytest.importorskip("models")  # registers the Focal models
    model = timm.create_model("focal_micro", num_classes=10, drop_path_rate=0.0).cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for seed in range(4):  # recorded, then replayed on other images
        torch.manual_seed(seed)
        images = torch.randn(2, 3, 64, 96, device="cuda")
        found = []
        for call in (model, compiled):
            model.zero_grad()
            call(images).square().sum().backward()
            found.append({name: x.grad.clone() for name, x in model.named_parameters()})
        # A window of one token has no bias that matters: its gradient is rounding alone.
        least = 1e-5 * max(x.abs().max() for x in found[0].values())
        for name, expected in found[0].items():
            error = (found[1][name] - expected).abs().max()
            assert error <= 1e-2 * torch.maximum(expected.abs().max(), least), name


def test_auto_is_triton_but_for_float64():
    device = torch.device("cuda")
    assert resolve_backend("auto", device, torch.float16) == "triton"
    assert resolve_backend("auto", device, torch.float64) == "eager"
    with pytest.raises(ValueError, match="float64 has no tensor-core product"):
        resolve_backend("triton", device, torch.float64)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_maps_on_another_device_than_the_current_one_give_the_same(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = HARD[0]
    first = attend(case, make_tensors(case, torch.float32, "cuda:0"), backend)
    second = attend(case, make_tensors(case, torch.float32, "cuda:1"), backend)
    assert torch.equal(first.cpu(), second.cpu())
