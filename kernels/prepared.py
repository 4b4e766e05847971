"""Launches made many times, without what Triton's own dispatch takes for each.

`kernel[grid](...)` looks at every argument, hashes all constants and finds what it compiled for
them, which takes a host twice as long as what is done here (docs/performance.md). A training step
of a model makes a hundred such launches and more, in which tensors alone change, and with small
batches the host is what a GPU waits for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels.tiles import TokenMap

__all__ = ["PreparedLaunch"]

ALIGNED = 16  # bytes: what Triton compiles a pointer for, if its address is a multiple


class PreparedLaunch:
    """A grid and all that a kernel is launched with but for its tensors.

    The first launch goes through Triton. Later ones take the kernel that it compiled, if tensors
    have the types and alignments of then; everything else that it was compiled for is kept here.

    Args:
        grid: Programs along one to three axes.
        strides: Of the tensors that the kernel takes as a `TokenMap`, by name.
        constants: The other arguments that are no tensors, and options of the compiler.
    """

    def __init__(
        self,
        grid: tuple[int, ...],
        strides: Mapping[str, tuple[int, ...]],
        constants: Mapping[str, Any],
    ) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self._strides = strides
        self._constants = constants
        self._compiled: dict[Any, Any] = {}

    def __call__(self, kernel: Any, **tensors: Any) -> None:
        """Launch on the current device and stream.

        Args:
            kernel: What to launch: always the same, or what stands in for it.
            tensors: Tensors, and tuples of them, by the names of the kernel's arguments.
        """
        arguments = {**self._constants, **tensors}
        for name, strides in self._strides.items():
            arguments[name] = TokenMap(tensors[name], *strides)
        if not isinstance(kernel, JITFunction):  # interpreted, or something that watches launches
            kernel[self.grid](**arguments)
            return
        traits = (driver.active.get_current_device(), *_traits(tensors.values()))
        compiled = self._compiled.get(traits)
        if compiled is None:
            self._compiled[traits] = kernel[self.grid](**arguments)
        else:
            compiled[self.grid](*[arguments[name] for name in kernel.arg_names])


def _traits(values: Iterable[Any]) -> list[Any]:
    """What Triton compiles a kernel for, of all its tensors."""
    traits: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            traits += _traits(value)
        else:
            traits += value.dtype, value.data_ptr() % ALIGNED == 0
            if torch.version.hip:  # instructions for buffers hold 32-bit offsets
                traits.append(value.untyped_storage().nbytes() < 2**31)
    return traits
