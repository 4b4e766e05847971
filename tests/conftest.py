"""Test session settings: Triton's interpreter, so that the real kernels run on a CPU."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

# Triton reads it when a kernel is decorated: set before anything imports the kernels. On a machine
# with a GPU the same tests run compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        from benchmarks.interpreter import patch_once_per_launch

        patch_once_per_launch()
    # One worker per core shares the machine with others; more threads each would only contend.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    # The first backward starts a thread for every device, the one that fake tensors pretend to have
    # included, and after that no forked process can compute gradients: let it come before them.
    torch.ones(1, requires_grad=True).sum().backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu"):  # no keyword: a folder of the checkout may be called gpu
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_plans() -> None:
    """Launches planned in one test, under its patches perhaps, serve no other."""
    if (pooling := sys.modules.get("kernels.pooling")) is not None:
        from kernels import backward, forward

        for plan in (forward.forward_plan, backward.backward_plan, pooling.pool_plan):
            plan.cache_clear()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Graphs compiled in one test, under its patches perhaps, serve no other."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's library keeps to the test's folder and off the network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # whatever a test does
    datasets.disable_progress_bars()
