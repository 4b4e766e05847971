"""What the compiler makes of the kernels, for GPUs that need not be present.

    python -m benchmarks.codegen                        # every kernel, stage 1 to 4, four targets
    python -m benchmarks.codegen --targets sm_90 --dtypes float16 --stages 1

Launches are recorded rather than run: the launchers are called on tensors without memory ("meta"),
so that a kernel is compiled with exactly the arguments, alignment and constants of a real call. For
each one the table gives registers per thread, spilled bytes, and shared memory; ``--json`` saves
it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import FocalGeometry, FocalLevel, backward, forward, pooling
from kernels.launch import PoolProblem, Problem

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
KERNELS = {
    pooling: ("pool_kernel", "pool_backward_kernel"),
    forward: ("forward_kernel",),
    backward: ("query_gradient_kernel", "bias_gradient_kernel", "key_gradient_kernel"),
}


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


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the kernel and its keyword arguments."""

    kernel: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the report."""

    case: str
    kernel: str
    dtype: str
    target: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


class _Recorder:
    """Stands in for a kernel and keeps what it would have been launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments))


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, the launchers record instead of launching."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module, names in KERNELS.items():
            for name in names:
                recorder = _Recorder(getattr(module, name), launches)
                stack.enter_context(mock.patch.object(module, name, recorder))
        yield launches


def record(case: Case, dtype: torch.dtype) -> list[Launch]:
    """Every launch of a forward and a backward pass, with q, k, v as views of a fused qkv."""
    geometry, heads, head_dim = case.geometry, case.heads, case.head_dim
    map_size = (case.height, case.width)
    qkv = torch.empty(case.batch, *map_size, 3, heads, head_dim, dtype=dtype, device="meta")
    query, key, value = qkv.unbind(3)
    bias = torch.empty(heads, geometry.num_queries, geometry.num_keys, device="meta")
    with recording() as launches:
        coarse_keys, coarse_values = [], []
        for level in range(1, len(geometry.levels)):
            problem = PoolProblem(geometry, tuple(key.shape), dtype, level)
            side = geometry.levels[level].subwindow_size
            weight = torch.empty(side, side, device="meta")
            pooled = pooling.launch_pool(key, value, weight, None, None, problem)
            pooling.launch_pool_backward(*pooled, key, value, weight, problem)
            coarse_keys.append(pooled[0])
            coarse_values.append(pooled[1])
        none = query.new_empty(case.batch, 0, heads, head_dim)
        seed = torch.empty(1, dtype=torch.int64, device="meta") if case.dropout_p else None
        attention = Problem(
            geometry=geometry,
            query_shape=tuple(query.shape),
            dtype=dtype,
            coarse_key=torch.cat([none, *coarse_keys], dim=1),
            coarse_value=torch.cat([none, *coarse_values], dim=1),
            scale=head_dim**-0.5,
            map_size=map_size,
            dropout_p=case.dropout_p,
            dropout_seed=seed,
        )
        out, stats = forward.launch_forward(query, key, value, bias, attention)
        backward.launch_backward(out, query, key, value, bias, out, stats, attention)
    return launches


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
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
    return triton.compile(source, target=target, options=options)


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


def resources(compiled: Any, target: GPUTarget) -> tuple[int, int, int]:
    """Registers per thread, spilled bytes, shared memory in bytes."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text))
        registers, spills = int(counts["vgpr_count"]), 4 * int(counts["vgpr_spill_count"])
        return registers, spills, compiled.metadata.shared
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], compiled.metadata.shared


def report(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], targets: Sequence[str]
) -> Iterator[Row]:
    """Compile every launch of every case; one row each."""
    for case in cases:
        for dtype in dtypes:
            launches = record(case, dtype)
            for target in targets:
                for launch in launches:
                    compiled = compile_launch(launch, TARGETS[target])
                    usage = resources(compiled, TARGETS[target])
                    name = launch.kernel.__name__
                    if "FINE" in launch.arguments:
                        name += " (fine)" if launch.arguments["FINE"] else " (coarse)"
                    yield Row(case.name, name, str(dtype).split(".")[1], target, *usage)


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--dtypes", nargs="+", default=["float16"], choices=["float16", "bfloat16", "float32"]
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=RELEASED, default=list(RELEASED))
    parser.add_argument("--json", type=Path, help="save the rows to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 replaces the compiler: unset it")
    table = Table("case", "kernel", "dtype", "target", "registers", "spilled B", "shared B")
    rows = []
    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    cases = [RELEASED[stage] for stage in arguments.stages]
    for row in report(cases, dtypes, arguments.targets):
        rows.append(asdict(row))
        table.add_row(*(str(value) for value in rows[-1].values()))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
