"""Launches that are prepared once: when Triton's own dispatch is asked, and what it is given."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from triton.runtime.jit import JITFunction

from kernels import prepared
from kernels.prepared import PreparedLaunch
from kernels.tiles import Pool, TokenMap

GRID, STRIDES = (3, 2), (8, 4, 2, 1)


class Kernel:
    """A compiled kernel's stand-in: counts compilations and keeps what is launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.compiled, self.launches = 0, 0, []
        self.jit = mock.MagicMock(spec=JITFunction, arg_names=["x_ptr", "tokens", "SIDE", "pools"])
        self.jit.__getitem__.side_effect = lambda grid: lambda **kw: self._compile(grid, kw)
        driver = mock.Mock()
        driver.active.get_current_device.side_effect = lambda: self.device
        monkeypatch.setattr(prepared, "driver", driver)

    def _compile(self, grid, arguments):
        self.compiled += 1
        self.launches.append((grid, [arguments[name] for name in self.jit.arg_names]))
        compiled, number = mock.MagicMock(), self.compiled
        compiled.__getitem__.side_effect = lambda grid: (
            lambda *args: self.launches.append((grid, [*args], number))
        )
        return compiled


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def tensors() -> dict:
    x, tokens, weight = (torch.zeros(24) for _ in range(3))
    return {"x_ptr": x, "tokens": tokens, "pools": (Pool(weight, weight, weight),)}


def prepare() -> PreparedLaunch:
    return PreparedLaunch(GRID, {"tokens": STRIDES}, {"SIDE": 7, "num_warps": 4})


def test_later_launches_take_what_the_first_compiled_with_their_own_tensors(kernel):
    launch, first, second = prepare(), tensors(), tensors()
    launch(kernel.jit, **first)
    launch(kernel.jit, **second)
    assert kernel.compiled == 1
    (grid, given), (grid_again, given_again, compiled) = kernel.launches
    assert grid == grid_again == (3, 2, 1)
    assert compiled == 1
    for arguments, own in ((given, first), (given_again, second)):
        assert arguments[0] is own["x_ptr"]
        assert arguments[1] == TokenMap(own["tokens"], *STRIDES)
        assert arguments[2] == 7
        assert arguments[3] is own["pools"]


@pytest.mark.parametrize(
    "other",
    [
        {"x_ptr": torch.zeros(24, dtype=torch.float16)},
        {"x_ptr": torch.zeros(24)[1:]},
        {"tokens": torch.zeros(24)[1:]},
        {"pools": (Pool(torch.zeros(4), torch.zeros(4)[1:], torch.zeros(4)),)},
    ],
    ids=["type", "alignment", "alignment of a map", "alignment inside a tuple"],
)
def test_tensors_of_another_kind_are_compiled_for(kernel, other):
    launch = prepare()
    launch(kernel.jit, **tensors())
    launch(kernel.jit, **{**tensors(), **other})
    assert kernel.compiled == 2
    launch(kernel.jit, **{**tensors(), **other})
    launch(kernel.jit, **tensors())
    assert [launched[2] for launched in kernel.launches[2:]] == [2, 1]


def test_each_device_has_its_own(kernel):
    launch = prepare()
    launch(kernel.jit, **tensors())
    kernel.device = 1
    launch(kernel.jit, **tensors())
    assert kernel.compiled == 2


def test_a_storage_beyond_32_bits_counts_on_amd_alone(kernel, monkeypatch):
    large = {**tensors(), "x_ptr": mock.Mock(dtype=torch.float32)}
    large["x_ptr"].data_ptr.return_value = 0
    large["x_ptr"].untyped_storage().nbytes.return_value = 2**31
    for hip, compiled in ((None, 1), ("6.4", 2)):
        monkeypatch.setattr(torch.version, "hip", hip)
        kernel.compiled, launch = 0, prepare()
        launch(kernel.jit, **tensors())
        launch(kernel.jit, **large)
        assert kernel.compiled == compiled


def test_what_stands_in_for_a_kernel_sees_every_launch_by_name(kernel):
    seen: list = []
    watcher = mock.MagicMock()
    watcher.__getitem__.side_effect = lambda grid: lambda **kw: seen.append((grid, kw))
    launch = prepare()
    launch(kernel.jit, **tensors())
    launch(kernel.jit, **tensors())
    launch(watcher, **tensors())
    launch(watcher, **tensors())
    assert len(seen) == 2
    assert seen[0][0] == (3, 2, 1)
    assert {"SIDE": 7, "num_warps": 4}.items() <= seen[0][1].items()
