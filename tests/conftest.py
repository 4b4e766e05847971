"""Test session settings: Triton's interpreter, so that the real kernels run on a CPU."""

import os

import torch

# Triton reads it when a kernel is decorated: set before anything imports the kernels. On a machine
# with a GPU the same tests run compiled.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch_once_per_launch()
    # One worker per core shares the machine with others; more threads each would only contend.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def _patch_once_per_launch() -> None:
    """Halve the interpreter's time: it replaces Triton's language anew at every nested call.

    Once per launch and module is enough, for the replacement lasts as long as the launch.
    """
    from triton.runtime import interpreter

    patch_language, run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_unless_done(fn):
        module = id(fn.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch_language(fn)

    def run_with_fresh_patches(self, *args, **kwargs):
        patched.clear()
        return run_grid(self, *args, **kwargs)

    interpreter._patch_lang = patch_unless_done
    interpreter.GridExecutor.__call__ = run_with_fresh_patches


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
