"""What a multiprocessor of each target holds, and how many blocks of a kernel fit in it.

Sources: for NVIDIA the CUDA C++ Programming Guide, table "Technical Specifications per Compute
Capability", and `cuda_occupancy.h` of the CUDA toolkit (registers come to a warp in steps of 256,
shared memory in steps of 128 bytes and 1 KiB beside what a block asks for). For AMD the CDNA 3 and
CDNA 4 instruction set guides and LLVM's AMDGPU usage guide: a compute unit has four SIMDs with 512
vector registers per lane, accumulation registers included, in steps of 8.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

__all__ = ["TARGETS", "Target"]

PARTITIONS = 4  # warp schedulers of a multiprocessor, SIMDs of a compute unit


@dataclass(frozen=True)
class Target:
    """A GPU architecture.

    Args:
        gpu: As Triton names it.
        registers: 32-bit registers of a partition, all lanes together.
        register_step: Registers come to a warp in multiples of this many.
        most_registers: Of one thread.
        warps: Resident in a partition at most.
        blocks: Resident in a multiprocessor at most.
        shared: Bytes of shared memory of a multiprocessor.
        shared_per_block: Bytes that a block can ask for.
        shared_reserved: Bytes that each block takes beside what it asks for.
        shared_step: Shared memory comes in multiples of this many bytes.
    """

    gpu: GPUTarget
    registers: int
    register_step: int
    most_registers: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    shared_reserved: int
    shared_step: int

    @property
    def lanes(self) -> int:
        """Threads of a warp."""
        return self.gpu.warp_size

    def resident_blocks(self, warps: int, registers: int, shared: int) -> int:
        """Blocks that a multiprocessor holds at once.

        Args:
            warps: Of a block.
            registers: Of a thread.
            shared: Bytes of a block.
        """
        per_warp = -(-registers * self.lanes // self.register_step) * self.register_step
        by_registers = PARTITIONS * min(self.warps, self.registers // per_warp) // warps
        per_block = -(-shared // self.shared_step) * self.shared_step + self.shared_reserved
        by_shared = self.shared // per_block if per_block else self.blocks
        return min(by_registers, by_shared, self.blocks)


def _nvidia(capability: int, shared_kib: int) -> Target:
    return Target(
        GPUTarget("cuda", capability, 32),
        registers=65536 // PARTITIONS,
        register_step=256,
        most_registers=255,
        warps=64 // PARTITIONS,
        blocks=32,
        shared=shared_kib * 1024,
        shared_per_block=(shared_kib - 1) * 1024,
        shared_reserved=1024,
        shared_step=128,
    )


def _amd(name: str, shared_kib: int) -> Target:
    return Target(
        GPUTarget("hip", name, 64),
        registers=512 * 64,
        register_step=8 * 64,
        most_registers=512,
        warps=8,
        blocks=32,
        shared=shared_kib * 1024,
        shared_per_block=shared_kib * 1024,
        shared_reserved=0,
        shared_step=512,
    )


TARGETS = {
    "sm_80": _nvidia(80, 164),
    "sm_90": _nvidia(90, 228),
    "sm_100": _nvidia(100, 228),
    "gfx942": _amd("gfx942", 64),
    "gfx950": _amd("gfx950", 160),
}
