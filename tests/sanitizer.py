"""A sanitizer for Triton kernels under the interpreter: every access is checked, lane by lane.

    with Sanitizer(protected=inputs) as sanitizer:
        ...  # launch kernels
    assert not sanitizer.findings

Each pointer argument of a launch is given a tag in the upper 16 bits of its address, which pointer
arithmetic carries along. So an access is known by the argument that it was computed from, and it
must hit an element of that very tensor's view: not the gaps that its strides leave, not another
tensor that happens to lie there. Accesses that break a rule are reported and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton.runtime import interpreter

TAG_SHIFT = 48  # addresses of a process lie below
ADDRESS = np.uint64((1 << TAG_SHIFT) - 1)
LARGEST_MAP = 2**26  # elements; of longer views the ends alone are checked
NOBODY, SEVERAL = -1, -2


@dataclass(frozen=True)
class Finding:
    """One access that breaks a rule.

    Args:
        kernel: Name of the kernel.
        argument: Name of the pointer argument that the address was computed from.
        rule: What is wrong.
        program: Indices of the program.
        offset: First such element, counted from the argument's first.
        lanes: Lanes of the access that break the rule.
    """

    kernel: str
    argument: str
    rule: str
    program: tuple[int, int, int]
    offset: float
    lanes: int


class Argument:
    """The elements of one tensor of a launch, and who touched them."""

    def __init__(self, name: str, tensor: torch.Tensor, protected: bool) -> None:
        self.name, self.protected = name, protected
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        sizes = zip(tensor.shape, tensor.stride(), strict=True)
        self.span = 1 + sum((n - 1) * stride for n, stride in sizes) if tensor.numel() else 0
        self.members = self.writer = self.reader = self.values = None
        if self.span <= LARGEST_MAP:
            self.members = np.zeros(self.span, dtype=bool)
            np.lib.stride_tricks.as_strided(self.members, tensor.shape, tensor.stride())[...] = True
            self.writer = np.full(self.span, NOBODY, dtype=np.int64)
            self.reader = np.full(self.span, NOBODY, dtype=np.int64)

    def outside(self, offset: np.ndarray) -> np.ndarray:
        """Which byte offsets are no element of the view."""
        index, rest = offset // self.itemsize, offset % self.itemsize
        wrong = (rest != 0) | (index < 0) | (index >= self.span)
        if self.members is not None and self.span:
            wrong |= ~self.members[index.clip(0, self.span - 1)]
        return wrong

    def read(self, index: np.ndarray, program: int) -> np.ndarray:
        """Note a read; which elements another program wrote in the same launch."""
        if self.writer is None:
            return np.zeros(index.shape, dtype=bool)
        seen = self.reader[index]
        self.reader[index] = np.where((seen == NOBODY) | (seen == program), program, SEVERAL)
        return (self.writer[index] != NOBODY) & (self.writer[index] != program)

    def write(self, index: np.ndarray, values: np.ndarray, program: int) -> dict[str, np.ndarray]:
        """Note a write; which elements other programs read, or wrote with another value."""
        if self.writer is None:
            return {}
        if self.values is None:
            self.values = np.zeros(self.span, dtype=values.dtype)
        writer, reader = self.writer[index], self.reader[index]
        elsewhere = (writer != NOBODY) & (writer != program)
        same = (self.values[index] == values) | (
            (values != values) & (self.values != self.values)[index]
        )
        self.writer[index], self.values[index] = program, values
        return {
            "two programs write different values": elsewhere & ~same,
            "written while another program reads": (reader != NOBODY) & (reader != program),
        }


@dataclass
class Sanitizer:
    """Checks every launch inside its context.

    Args:
        protected: Tensors that no kernel may write; any view of them counts.
    """

    protected: Iterable[torch.Tensor] = ()
    findings: list[Finding] = field(default_factory=list)
    launches: Counter = field(default_factory=Counter)  # by kernel
    accesses: int = 0  # lanes checked

    def __enter__(self) -> Sanitizer:
        self._storages = {x.untyped_storage().data_ptr() for x in self.protected}
        self._arguments: list[Argument] = []
        self._names: dict[int, int] = {}
        self._kernel = ""
        executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
        self._call, self._init_args = executor.__call__, executor._init_args_hst
        self._convert = interpreter._implicit_cvt
        self._load, self._store = builder.create_masked_load, builder.create_masked_store
        wrap = self._wrapped
        self._patches = [
            mock.patch.object(executor, "__call__", wrap(self._run_grid)),
            mock.patch.object(executor, "_init_args_hst", wrap(self._take_arguments)),
            mock.patch.object(interpreter, "_implicit_cvt", self._tag),
            mock.patch.object(builder, "create_masked_load", wrap(self._checked_load)),
            mock.patch.object(builder, "create_masked_store", wrap(self._checked_store)),
            mock.patch.object(builder, "create_atomic_rmw", wrap(self._refuse)),
            mock.patch.object(builder, "create_atomic_cas", wrap(self._refuse)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    @staticmethod
    def _wrapped(method: Any) -> Any:
        """A plain function, so that it binds to the object that it is patched into."""
        return lambda owner, *args, **kwargs: method(owner, *args, **kwargs)

    # -- launches -------------------------------------------------------------------------------

    def _run_grid(self, executor: Any, *args: Any, **kwargs: Any) -> None:
        self._arguments, self._names, self._kernel = [], {}, executor.fn.__name__
        self._call(executor, *args, **kwargs)
        self.launches[self._kernel] += 1

    def _take_arguments(self, executor: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._init_args(executor, args, kwargs)
        named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        for name, value in named.items():
            for tensor in _tensors(value):
                protected = tensor.untyped_storage().data_ptr() in self._storages
                self._names[id(tensor)] = len(self._arguments)
                self._arguments.append(Argument(name, tensor, protected))
        return args, kwargs

    def _tag(self, value: Any) -> Any:
        converted = self._convert(value)
        if id(value) in self._names and hasattr(value, "data_ptr"):
            tag = np.uint64(self._names[id(value)] + 1)
            converted.handle.data = converted.handle.data | (tag << np.uint64(TAG_SHIFT))
        return converted

    # -- accesses -------------------------------------------------------------------------------

    def _checked_load(self, builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        allowed = mask.data.copy()
        for argument, _, index, program in self._locate(builder, ptrs, allowed, "read"):
            late = argument.read(index, program)
            self._report(builder, argument, "read of what another program writes", index, late)
        return self._load(builder, _stripped(ptrs), _masked(mask, allowed), *rest)

    def _checked_store(self, builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        allowed = mask.data.copy()
        values = np.broadcast_to(value.data, ptrs.data.shape)
        for argument, lanes, index, program in self._locate(builder, ptrs, allowed, "write"):
            if argument.protected:
                everywhere = np.ones(index.shape, dtype=bool)
                self._report(builder, argument, "write to an input", index, everywhere)
                allowed[lanes] = False
                continue
            for rule, wrong in argument.write(index, values[lanes], program).items():
                self._report(builder, argument, rule, index, wrong)
        return self._store(builder, _stripped(ptrs), value, _masked(mask, allowed), *rest)

    def _refuse(self, builder: Any, *_: Any) -> Any:
        raise NotImplementedError("the sanitizer knows no atomics")

    def _locate(
        self, builder: Any, ptrs: Any, allowed: np.ndarray, what: str
    ) -> Iterator[tuple[Argument, tuple, np.ndarray, int]]:
        """Argument by argument: lanes of an access, the elements they hit, the program.

        Lanes beyond the argument's view are reported and cleared in ``allowed``.
        """
        (x, y, z), (_, y_size, z_size) = builder.grid_idx, builder.grid_dim
        program = (x * y_size + y) * z_size + z
        self.accesses += int(allowed.sum())
        tags = ptrs.data >> np.uint64(TAG_SHIFT)
        for tag in np.unique(tags[allowed]):
            lanes = np.nonzero(allowed & (tags == tag))
            address = (ptrs.data[lanes] & ADDRESS).astype(np.int64)
            if not 1 <= tag <= len(self._arguments):
                allowed[lanes] = False
                finding = Finding(self._kernel, "?", f"{what} through no argument", (x, y, z), 0, 1)
                self.findings.append(finding)
                continue
            argument = self._arguments[int(tag) - 1]
            offset = address - argument.base
            wrong = argument.outside(offset)
            index = offset // argument.itemsize
            self._report(builder, argument, f"{what} out of bounds", index, wrong)
            allowed[tuple(axis[wrong] for axis in lanes)] = False
            inside = tuple(axis[~wrong] for axis in lanes)
            yield argument, inside, index[~wrong], program

    def _report(
        self, builder: Any, argument: Argument, rule: str, index: np.ndarray, wrong: np.ndarray
    ) -> None:
        if wrong.any():
            program, first = tuple(builder.grid_idx), int(index[wrong][0])
            count = int(wrong.sum())
            self.findings.append(Finding(self._kernel, argument.name, rule, program, first, count))


def _tensors(value: Any) -> Iterator[Any]:
    if hasattr(value, "data_ptr"):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _stripped(ptrs: Any) -> Any:
    return interpreter.TensorHandle(ptrs.data & ADDRESS, ptrs.dtype)


def _masked(mask: Any, allowed: np.ndarray) -> Any:
    return interpreter.TensorHandle(allowed, mask.dtype)
