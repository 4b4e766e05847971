"""Machine code as text: its instructions, its loops, and how often each instruction executes.

Reads SASS as ``nvdisasm -g`` or ``cuobjdump -sass`` prints it, and the AMDGCN assembly of LLVM.

**Convention.** A warp's instruction is counted once whenever the warp issues it, predicated off or
not. Where the program forks, the count follows the path that does the most work (products, then
exponentials, then accesses to global memory) and, of those, the shortest: what a program in the
middle of the map does. A subroutine, the rare slow path of a division, is not counted; a `CALL`
that never returns is a jump. A loop counts its trips times the path once through its body. Work
that one elected warp does for all, as tcgen05 products are issued, is counted for every warp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

__all__ = ["Access", "Instruction", "Loop", "Program", "parse_amdgcn", "parse_sass"]


class Access(NamedTuple):
    """What one thread moves between global memory and the chip."""

    store: bool
    bytes: int


# Kinds of SASS instructions by the start of the mnemonic, and what every other one is.
SASS_KINDS = {
    "tensor": ("HMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA"),
    "special": ("MUFU",),
    "global": ("LDG.", "STG.", "LDGSTS.", "UTMALDG", "UTMASTG", "ATOM", "RED."),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM", "UTCCP", "ATOMS"),
    "local": ("LDL", "STL"),
    "shuffle": ("SHFL", "REDUX"),
    "conversion": ("F2F", "I2F", "F2I", "UF2F", "UI2F", "HADD2.F32", "HADD2.BF16"),
    "float": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "FCHK", "HADD2", "HMUL2", "HFMA2",
              "HMNMX", "UFADD", "UFMUL", "UFFMA", "UFSET"),
    "control": ("BRA", "EXIT", "CALL", "RET", "BAR", "BSSY", "BSYNC", "NOP", "WARP", "DEPBAR",
                "LDGDEPBAR", "MEMBAR", "FENCE", "SYNCS", "ARRIVES", "ERRBAR", "CCTL", "UTCBAR",
                "UTCATOMSWS", "UTMACMDFLUSH", "ELECT", "NANOSLEEP", "ACQBULK", "UTMACCTL"),
}  # fmt: skip
GCN_KINDS = {
    "tensor": ("v_mfma", "v_smfmac"),
    "special": ("v_exp_f32", "v_log_f32", "v_rcp", "v_rsq", "v_sqrt"),
    "global": ("global_", "buffer_load", "buffer_store", "flat_", "s_load", "s_buffer_load"),
    "shared": ("ds_read", "ds_write", "ds_load", "ds_store"),
    "local": ("scratch_",),
    "shuffle": ("ds_bpermute", "ds_permute", "ds_swizzle", "v_permlane"),
    "conversion": ("v_cvt",),
    "float": ("v_add_f", "v_sub_f", "v_mul_f", "v_fma", "v_mac_f", "v_max_f", "v_max3_f", "v_pk_",
              "v_min_f", "v_cmp_lt_f", "v_cmp_gt_f", "v_cmp_eq_f", "v_cmp_neq_f", "v_div_",
              "v_ldexp", "v_accvgpr"),
    "control": ("s_cbranch", "s_branch", "s_endpgm", "s_waitcnt", "s_barrier", "s_nop", "s_setprio",
                "s_sleep", "s_swappc", "s_setpc"),
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        opcode: The mnemonic with its modifiers.
        guarded: Whether a predicate may switch it off.
        target: Index of the instruction that it may jump to.
        follows: Whether the next instruction may come after it.
        place: File name and line of the source, if the assembly tells.
    """

    opcode: str
    guarded: bool = False
    target: int | None = None
    follows: bool = True
    place: tuple[str, int] | None = None

    @cached_property
    def kind(self) -> str:
        """The class of the instruction; "integer" is all that has no other."""
        kinds = GCN_KINDS if self.opcode.islower() else SASS_KINDS
        name = self.opcode if self.opcode.islower() else self.opcode + "."
        return next((kind for kind, starts in kinds.items() if name.startswith(starts)), "integer")

    @cached_property
    def exponential(self) -> bool:
        """Whether it takes one power of two per thread."""
        return self.opcode.startswith(("MUFU.EX2", "v_exp_f32"))

    @cached_property
    def multiply_adds(self) -> int | None:
        """Multiply-adds of one warp in a tensor-core instruction; None if the name does not tell.

        A warpgroup's four warps share one product.
        """
        if self.kind != "tensor":
            return 0
        if found := re.match(r"HMMA\.(16)(8)(\d+)", self.opcode):
            rows, cols, depth = map(int, found.groups())
            return rows * cols * depth
        if found := re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)", self.opcode):
            rows, cols, depth = map(int, found.groups())
            return rows * cols * depth // 4
        if found := re.match(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)_?(?:(\d+)b_)?", self.opcode):
            rows, cols, depth = map(int, found.groups()[:3])
            return rows * cols * depth * int(found.group(4) or 1)
        return None

    @cached_property
    def access(self) -> Access | None:
        """The access to global memory, if it is one of a thread."""
        if found := re.match(r"(LDG|STG|LDGSTS)\b(.*)", self.opcode):
            wide = re.search(r"\.(256|128|64)\b", found.group(2))
            narrow = re.search(r"\.[US](8|16)\b", found.group(2))
            bits = int(wide.group(1)) if wide else int(narrow.group(1)) if narrow else 32
            return Access(found.group(1) == "STG", bits // 8)
        if found := re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)", self.opcode):
            return Access(found.group(1) == "store", _gcn_bytes(found.group(2)))
        return None


def _gcn_bytes(suffix: str) -> int:
    """Bytes of `dwordx4`, `ushort`, `b128` and the like."""
    if found := re.match(r"dword(?:x(\d))?", suffix):
        return 4 * int(found.group(1) or 1)
    if found := re.match(r"[bui](8|16|32|64|96|128)", suffix):
        return int(found.group(1)) // 8
    if re.match(r"[us]?short", suffix):
        return 2
    if re.match(r"[us]?byte", suffix):
        return 1
    raise ValueError(f"unknown width of a global access: {suffix}")


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of one kernel in SASS."""
    lines: list[tuple[str, str, str, tuple[str, int] | None]] = []
    starts: dict[str, int] = {}  # addresses and labels
    place = None
    for line in text.splitlines():
        if found := re.match(r'\s*//## File "(.*?)", line (\d+)', line):
            place = (found.group(1), int(found.group(2)))
        elif found := re.match(r"(\.\w+):", line):
            starts[found.group(1)] = len(lines)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([\w.]+)\s*(.*?)\s*;", line):
            starts[f"0x{int(found.group(1), 16):x}"] = len(lines)
            lines.append((found.group(2) or "", found.group(3), found.group(4), place))
    program = []
    for guard, opcode, operands, place in lines:
        target = None
        conditional = bool(guard)
        if opcode.startswith(("BRX", "JMX", "JMP")):
            raise ValueError(f"a jump whose target is not in the text: {opcode} {operands}")
        # Labels with a dollar are functions that the compiler adds, such as traps.
        if opcode.startswith(("BRA", "CALL")) and "`($" not in operands:
            goal = re.search(r"(0x[0-9a-f]+)|`\((\.\w+)\)", operands)
            if goal is None:
                raise ValueError(f"a branch without a target: {operands}")
            target = starts[goal.group(1) or goal.group(2)]
            conditional = conditional or "," in operands
        stops = not conditional and (target is not None or opcode.startswith(("EXIT", "RET")))
        program.append(Instruction(opcode, conditional, target, not stops, place))
    return [_without_callee(program, i) if i.opcode.startswith("CALL") else i for i in program]


def _without_callee(program: Sequence[Instruction], call: Instruction) -> Instruction:
    """A call that comes back is a plain instruction; one that does not is a jump out of line."""
    seen, stack = set(), [call.target]
    while stack:
        at = stack.pop()
        if at is None or at in seen or at >= len(program):
            continue
        seen.add(at)
        here = program[at]
        if here.opcode.startswith("RET"):
            return replace(call, target=None, follows=True)
        stack += [at + 1] if here.follows or here.opcode.startswith("CALL") else []
        stack += [] if here.opcode.startswith("CALL") else [here.target]
    return call


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of one kernel in LLVM's assembly for AMD GPUs."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text))
    lines: list[tuple[str, str, tuple[str, int] | None]] = []
    starts: dict[str, int] = {}
    place = None
    for line in text.splitlines():
        code = line.split(";")[0].rstrip()
        if found := re.match(r"\s+\.loc\s+(\d+) (\d+)", code):
            place = (files[found.group(1)], int(found.group(2)))
        elif found := re.match(r"(\.L\w+):", code):
            starts[found.group(1)] = len(lines)
        elif found := re.match(r"\s+([a-z]\w+)\s*(.*)", code):
            lines.append((found.group(1), found.group(2), place))
            if found.group(1) == "s_code_end":
                break
    program = []
    for opcode, operands, place in lines:
        target = None
        if opcode.startswith(("s_branch", "s_cbranch")):
            target = starts[operands.split()[0]]
        stops = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
        program.append(Instruction(opcode, False, target, not stops, place))
    return program


@dataclass(frozen=True)
class Loop:
    """A natural loop: blocks by index, the header first executed, and the loops directly inside."""

    header: int
    blocks: frozenset[int]
    inner: tuple[Loop, ...]


class _Region(NamedTuple):
    """The whole program, seen as the body of a loop."""

    blocks: frozenset[int]
    inner: tuple[Loop, ...]


class _Path(NamedTuple):
    """A path through some blocks.

    ``work`` holds what paths are chosen by: products, exponentials, accesses to global memory, and
    the length negated; ``counts`` how often each block executes.
    """

    work: tuple[Fraction, ...]
    counts: dict[int, Fraction]

    def plus(self, other: _Path, times: Fraction = Fraction(1)) -> _Path:
        """This path and ``times`` another."""
        work = tuple(mine + times * its for mine, its in zip(self.work, other.work, strict=True))
        counts = dict(self.counts)
        for block, count in other.counts.items():
            counts[block] = counts.get(block, Fraction(0)) + times * count
        return _Path(work, counts)


class Program:
    """The control-flow graph of a list of instructions."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        self.instructions = list(instructions)
        targets = {i.target for i in instructions if i.target is not None}
        breaks = {at + 1 for at, i in enumerate(instructions) if i.target is not None}
        breaks |= {at + 1 for at, i in enumerate(instructions) if not i.follows}
        self.starts = sorted(({0} | targets | breaks) & set(range(len(instructions))))
        index = {start: block for block, start in enumerate(self.starts)}
        self.successors: list[tuple[int, ...]] = []
        for block in range(len(self.starts)):
            last = self.instructions[self.span(block)[-1]]
            after = [] if last.target is None else [index[last.target]]
            if last.follows and block + 1 < len(self.starts):
                after.append(block + 1)
            self.successors.append(tuple(dict.fromkeys(after)))

    def span(self, block: int) -> range:
        """Indices of a block's instructions."""
        ends = [*self.starts[1:], len(self.instructions)]
        return range(self.starts[block], ends[block])

    @cached_property
    def order(self) -> list[int]:
        """Reachable blocks, each before those that it leads to but for the edges of loops."""
        seen, order, stack = {0}, [], [(0, iter(self.successors[0]))]
        while stack:
            block, after = stack[-1]
            following = next((s for s in after if s not in seen), None)
            if following is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.successors[following])))
        return order[::-1]

    @cached_property
    def dominators(self) -> dict[int, frozenset[int]]:
        """The blocks through which every way to a block leads, itself included."""
        everything = frozenset(self.order)
        found = dict.fromkeys(self.order, everything)
        found[0] = frozenset({0})
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for after in self.successors[block]:
                before[after].append(block)
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                new = frozenset.intersection(*(found[b] for b in before[block])) | {block}
                changed = changed or new != found[block]
                found[block] = new
        return found

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The outermost loops, in the order in which they are reached."""
        bodies: dict[int, set[int]] = {}
        for block in self.order:
            for after in self.successors[block]:
                if after in self.dominators[block]:
                    bodies.setdefault(after, {after}).update(self._reaching(block, after))
        position = {block: at for at, block in enumerate(self.order)}
        headers = sorted(bodies, key=position.__getitem__)

        def nest(inside: Sequence[int]) -> tuple[Loop, ...]:
            outer = [h for h in inside if not any(h in bodies[o] for o in inside if o != h)]
            return tuple(
                Loop(h, frozenset(bodies[h]), nest([i for i in inside if i in bodies[h] - {h}]))
                for h in outer
            )

        return nest(headers)

    def _reaching(self, block: int, header: int) -> set[int]:
        """Blocks from which ``block`` is reached without passing ``header``."""
        found, stack = {block, header}, [block]
        while stack:
            here = stack.pop()
            if here == header:
                continue
            for other in self.order:
                if here in self.successors[other] and other not in found:
                    found.add(other)
                    stack.append(other)
        return found

    def executions(self, trips: Mapping[int, Fraction | int]) -> list[Fraction]:
        """How often each instruction executes.

        Args:
            trips: How often each loop's header is reached, by its block. The last trip ends where
                the loop is left, which may be in the middle.
        """
        paths = self._paths(_Region(frozenset(self.order), self.loops), trips)
        counts = [Fraction(0)] * len(self.instructions)
        ends = [path for block, path in paths.items() if not self.successors[block]]
        for block, count in max(ends, key=_work).counts.items():
            for at in self.span(block):
                counts[at] = count
        return counts

    def _step(self, block: int) -> _Path:
        """The path through one block."""
        body = [self.instructions[at] for at in self.span(block)]
        products = sum(i.kind == "tensor" for i in body)
        exponentials = sum(i.exponential for i in body)
        accesses = sum(i.access is not None for i in body)
        numbers = map(Fraction, (products, exponentials, accesses, -len(body)))
        return _Path(tuple(numbers), {block: Fraction(1)})

    def _paths(
        self, region: Loop | _Region, trips: Mapping[int, Fraction | int]
    ) -> dict[int, _Path]:
        """The best path from the start through each block, or each way out of an inner loop."""
        owner = {block: loop for loop in region.inner for block in loop.blocks}
        best: dict[int, _Path] = {}
        for block in self.order:
            loop = owner.get(block)
            if block not in region.blocks or (loop and loop.header != block):
                continue
            ways = [path for before, path in best.items() if block in self.successors[before]]
            if loop is None:
                step = self._step(block)
                best[block] = max((way.plus(step) for way in ways), key=_work, default=step)
                continue
            through = self._paths(loop, trips)
            once = max((p for b, p in through.items() if block in self.successors[b]), key=_work)
            for last, path in through.items():
                if set(self.successors[last]) - loop.blocks:
                    whole = path.plus(once, Fraction(trips[block]) - 1)
                    best[last] = max((way.plus(whole) for way in ways), key=_work, default=whole)
        return best


def _work(path: _Path) -> tuple[Fraction, ...]:
    return path.work
