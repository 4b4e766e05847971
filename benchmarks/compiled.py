"""Kernels compiled as the launchers would launch them, for GPUs that need not be present.

Launches are recorded rather than run: the launchers are called on tensors without memory ("meta"),
so that a kernel is compiled with exactly the arguments, alignment and constants of a real call.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import ASTSource

from benchmarks.assembly import Program, parse_amdgcn, parse_sass
from benchmarks.limits import Target
from benchmarks.work import Launch
from kernels import FocalGeometry, FocalLevel, backward, bias_layout, forward, pooling
from kernels import launch as launchers
from kernels.launch import Problem, pools_inline
from kernels.pooling import PoolProblem
from kernels.tiles import Pool

__all__ = [
    "KERNELS",
    "RELEASED",
    "Case",
    "compile_launch",
    "disassemble",
    "distinct",
    "record",
    "resources",
]

KERNELS = {
    module: tuple(name for name in vars(module) if name.endswith("_kernel"))
    for module in (bias_layout, pooling, forward, backward)
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A call of the operator whose kernels are compiled."""

    name: str
    geometry: FocalGeometry
    height: int
    width: int
    heads: int
    head_dim: int = 32
    batch: int = 8
    dropout_p: float = 0.0


# The released geometries: stages 1 to 4 of Focal-Tiny at 224 pixels (paper, table 1).
RELEASED = {
    1: Case("stage 1", FocalGeometry(7, (FocalLevel(1, 13), FocalLevel(7, 7))), 56, 56, 3),
    2: Case("stage 2", FocalGeometry(7, (FocalLevel(1, 13), FocalLevel(7, 5))), 28, 28, 6),
    3: Case("stage 3", FocalGeometry(7, (FocalLevel(1, 13), FocalLevel(7, 3))), 14, 14, 12),
    4: Case("stage 4", FocalGeometry(7, (FocalLevel(1, 7), FocalLevel(7, 1))), 7, 7, 24),
}


class _Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, direction: str, launches: list[Launch]) -> None:
        self.kernel, self.direction, self.launches = kernel, direction, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launches.append(
            Launch(self.kernel, grid, arguments, self.direction)
        )


@contextmanager
def recording(target: str, direction: str) -> Iterator[list[Launch]]:
    """Within it, the launchers record what they would launch on a target in one pass."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launchers, "device_target", return_value=target))
        for module, names in KERNELS.items():
            for name in names:
                recorder = _Recorder(getattr(module, name), direction, launches)
                stack.enter_context(mock.patch.object(module, name, recorder))
        yield launches


def record(case: Case, dtype: torch.dtype, target: str) -> list[Launch]:
    """Every launch of a forward and a backward pass, with q, k, v as views of a fused qkv.

    Where `pools_inline` would pool inside forward, that variant is launched as well, at the end.
    """
    geometry, heads, head_dim = case.geometry, case.heads, case.head_dim
    map_size = (case.height, case.width)
    qkv = torch.empty(case.batch, *map_size, 3, heads, head_dim, dtype=dtype, device="meta")
    query, key, value = qkv.unbind(3)
    bias = torch.empty(heads, geometry.num_queries, geometry.num_keys, device="meta")
    none = query.new_empty(case.batch, 0, heads, head_dim)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if case.dropout_p else None
    cells = geometry.coarse_starts(*map_size)[-1]
    packed = query.new_empty(2, case.batch, cells, heads, head_dim)
    coarse = packed[0], packed[1]
    pools, poolings = [], []
    with recording(target, "forward") as launches:
        for level in range(1, len(geometry.levels)):
            shape = tuple(key.shape)
            poolings.append(PoolProblem(geometry, shape, dtype, target, level))
            weight = torch.empty(geometry.levels[level].subwindow_size ** 2, device="meta")
            offset = torch.empty(heads, head_dim, dtype=dtype, device="meta")
            pools.append(Pool(weight, offset, offset))
            pooling.launch_pool(key, value, pools[-1], coarse, poolings[-1])
        attention = Problem(
            geometry=geometry,
            query_shape=tuple(query.shape),
            dtype=dtype,
            scale=head_dim**-0.5,
            map_size=map_size,
            dropout_p=case.dropout_p,
            target=target,
        )
        out, stats = forward.launch_forward(query, key, value, bias, coarse, (), seed, attention)
    with recording(target, "backward") as found:
        grad_maps, _, grad_coarse = backward.launch_backward(
            out, query, key, value, bias, out, stats, coarse, seed, attention
        )
        grads = grad_maps[:, :, :, 1], grad_maps[:, :, :, 2]
        for problem, pool in zip(poolings, pools, strict=True):
            weight = pool.weight_ptr
            pooling.launch_pool_backward(key, value, weight, grad_coarse, grads, problem)
    launches += found
    if pools and pools_inline(geometry, query.shape):
        inside = replace(attention, inline=True)
        with recording(target, "forward, pooling inside") as found:
            forward.launch_forward(
                query, key, value, bias, (none, none), tuple(pools), seed, inside
            )
        launches += found
    return launches


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """One launch of each kernel, level and pass: rounds over other images run the same code."""
    found: dict[Any, Launch] = {}
    for launch in launches:
        found.setdefault((launch.direction, launch.kernel, launch.arguments.get("L")), launch)
    return list(found.values())


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile a recorded launch for a target, specialised as the run-time compiler would do it."""
    names = launch.kernel.arg_names
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    signature = {}
    constant_names = {p.name for p in launch.kernel.params if p.is_constexpr}
    for index, name in enumerate(names):
        value = launch.arguments[name]
        if name in constant_names:
            constants[(index,)] = value
            signature[name] = "constexpr"
        else:
            signature[name] = _specialise(value, (index,), constants, attributes)
    options = {k: v for k, v in launch.arguments.items() if k not in names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target.gpu, options=options)


def _specialise(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """The type of an argument; notes what is 1, and what 16 divides, as Triton does."""
    if isinstance(value, tuple):
        parts = [
            _specialise(part, (*path, i), constants, attributes) for i, part in enumerate(value)
        ]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]  # PyTorch aligns its allocations
        return "*" + triton.runtime.jit.type_canonicalisation_dict[str(value.dtype).split(".")[1]]
    if isinstance(value, int):
        if value == 1:
            constants[path] = 1
            return "constexpr"
        if value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"no rule for a kernel argument of type {type(value).__name__}")


def resources(compiled: Any, target: Target) -> tuple[int, int, int]:
    """Registers per thread, spilled bytes, shared memory in bytes."""
    shared = compiled.metadata.shared
    if target.gpu.backend == "hip":
        found = re.findall(r"\.(\w+):\s+(\d+)\n", compiled.asm["amdgcn"])
        counts = {key: int(number) for key, number in found}
        # Scalar registers spill into lanes of vector registers, not into memory.
        spilled = max(4 * counts["vgpr_spill_count"], counts["private_segment_fixed_size"])
        return counts["vgpr_count"], spilled, shared
    text = _run_tool(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], shared


def _run_tool(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool of Triton's wheel prints about a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(compiled: Any, target: Target) -> Program:
    """The machine code of a kernel."""
    if target.gpu.backend == "hip":
        return Program(parse_amdgcn(compiled.asm["amdgcn"]))
    text = _run_tool(compiled.asm["cubin"], "nvdisasm", "--print-line-info", "--print-code")
    return Program(parse_sass(text))
