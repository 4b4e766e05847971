"""Machine code as text is read, its loops found, and trip counts fitted to known totals."""

from dataclasses import replace
from fractions import Fraction

import pytest

pytest.importorskip("triton")

from benchmarks.assembly import Access, Instruction, Program, parse_amdgcn, parse_sass
from benchmarks.trips import Totals, solve_trips
from benchmarks.work import Product, Work

# A loop of 4 products whose last instructions leave it by a call that never returns, as ptxas
# writes it; a guarded store; a subroutine; padding.
SASS = """
.text.kernel:
	//## File "/src/kernels/tiles.py", line 12
        /*0000*/                   S2R R0, SR_TID.X ;                 /* 0x0000000000007919 */
                                                                      /* 0x000e240000002100 */
        /*0010*/                   CALL.REL.NOINC 0xb0 ;
.L_x_1:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64], P0 ;
	//## File "/src/kernels/forward.py", line 7 inlined at "/src/kernels/forward.py", line 9
        /*0030*/                   HMMA.16816.F32 R4, R8, R12, RZ ;
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   MUFU.EX2 R4, R4 ;
        /*0060*/              @!P0 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*0080*/              @!P1 EXIT ;
        /*0090*/                   STG.E.64 [R2.64], R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   MUFU.RCP R1, R2 ;
        /*00c0*/                   RET.REL.NODEC R2 0x20 ;
.L_x_3:
        /*00d0*/                   BRA `(.L_x_3);
        /*00e0*/                   NOP ;
"""
GCN = """
	.file	1 "/src/kernels" "forward.py"
	.type	kernel,@function
kernel:                                 ; @kernel
	s_load_dwordx2 s[4:5], s[0:1], 0x0
	s_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
	s_or_b64 exec, exec, s[2:3]
	s_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	.loc	1 31 4                          ; forward.py:31:4
	global_load_lds_dword v[8:9], off
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]
	s_and_saveexec_b64 s[2:3], vcc
	s_cbranch_execz .LBB0_1
	v_exp_f32_e32 v0, v0
	s_branch .LBB0_1
.LBB0_3:
	global_store_short v[0:1], v2, off
	s_endpgm
.Lfunc_end0:
	.size	kernel, .Lfunc_end0-kernel
	.amdhsa_next_free_vgpr 134
"""


def test_sass_becomes_instructions_with_kinds_places_and_targets():
    program = parse_sass(SASS)
    kinds = [i.kind for i in program]
    assert kinds == [
        *("integer", "control", "global", "tensor", "tensor", "special", "control", "control"),
        *("control", "global", "control", "special", "control", "control", "control"),
    ]
    assert program[2].place == ("/src/kernels/tiles.py", 12)
    assert program[3].place == ("/src/kernels/forward.py", 7)
    # The first call comes back, the second is a jump.
    assert [i.target for i in program if i.opcode.startswith("CALL")] == [None, 8]
    assert [i.follows for i in program[6:9]] == [True, False, True]
    assert program[5].exponential
    assert not program[11].exponential


def test_amdgcn_becomes_instructions_and_no_directives():
    program = parse_amdgcn(GCN)
    assert len(program) == 13
    assert program[-1].opcode == "s_endpgm"
    assert program[4].place == ("forward.py", 31)
    assert [i.access for i in program if i.access] == [
        Access(False, 4),
        Access(False, 16),
        Access(True, 2),
    ]
    assert [i.kind for i in program].count("tensor") == 1


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HGMMA.64x32x16.F32", 64 * 32 * 16 // 4),
        ("v_mfma_f32_32x32x8_f16", 32 * 32 * 8),
        ("v_mfma_f32_4x4x4_16b_f16", 4 * 4 * 4 * 16),
        ("v_mfma_f32_16x16x32_bf16", 16 * 16 * 32),
        ("UTCHMMA", None),
        ("FFMA", 0),
    ],
)
def test_name_of_a_product_tells_its_size(opcode, expected):
    assert Instruction(opcode).multiply_adds == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDG.E", Access(False, 4)),
        ("LDG.E.U16.CONSTANT", Access(False, 2)),
        ("LDG.E.128", Access(False, 16)),
        ("LDG.E.ENL2.256", Access(False, 32)),
        ("LDGSTS.E.BYPASS.LTC128B.128", Access(False, 16)),
        ("STG.E.U8", Access(True, 1)),
        ("LDGDEPBAR", None),
        ("LDS.128", None),
        ("global_load_dwordx3", Access(False, 12)),
        ("buffer_store_dwordx2", Access(True, 8)),
        ("global_load_ushort", Access(False, 2)),
        ("global_load_lds_dwordx4", Access(False, 16)),
        ("ds_read_b128", None),
    ],
)
def test_name_of_an_access_tells_its_width(opcode, expected):
    assert Instruction(opcode).access == expected


def test_unknown_width_of_an_access_is_an_error():
    with pytest.raises(ValueError, match="unknown width"):
        _ = Instruction("global_load_qword").access


def test_indirect_jump_is_an_error():
    with pytest.raises(ValueError, match="BRX"):
        parse_sass("        /*0000*/                   BRX R2 -0x10 ;")


def test_loop_multiplies_what_it_holds_and_nothing_else():
    program = Program(parse_sass(SASS))
    (loop,) = program.loops
    assert [program.instructions[at].kind for at in program.span(loop.header)].count("tensor") == 2
    executions = program.executions({loop.header: 5})
    # The padding and the subroutine never execute; the guarded EXIT lets the store happen.
    assert executions == [1, 1, *[5] * 5, 4, 1, 1, 1, 0, 0, 0, 0]


def test_loop_that_starts_in_its_middle_takes_the_path_with_the_most_work():
    program = Program(parse_amdgcn(GCN))
    (loop,) = program.loops
    executions = program.executions({loop.header: 3})
    by_opcode = {
        instruction.opcode: times
        for instruction, times in zip(program.instructions, executions, strict=True)
    }
    assert by_opcode["v_mfma_f32_32x32x8_f16"] == 3
    assert by_opcode["v_exp_f32_e32"] == 3
    assert by_opcode["s_load_dwordx2"] == by_opcode["s_endpgm"] == 1


def test_nested_loops_multiply():
    inner = Instruction("BRA", guarded=True, target=1)
    outer = Instruction("BRA", guarded=True, target=0)
    program = Program([Instruction("MOV"), Instruction("FADD"), inner, outer, Instruction("EXIT")])
    (loop,) = program.loops
    assert len(loop.inner) == 1
    executions = program.executions({loop.header: 3, loop.inner[0].header: 4})
    assert executions == [3, 12, 12, 3, 1]


def test_of_two_arms_the_one_with_more_work_counts_and_then_the_shorter():
    exits, adds = Instruction("EXIT", follows=False), Instruction("FADD")
    fork = Instruction("BRA", guarded=True, target=4)
    work = Program([fork, adds, adds, exits, Instruction("MUFU.EX2"), exits])
    assert work.executions({}) == [1, 0, 0, 0, 1, 1]
    length = Program([fork, adds, adds, exits, adds, exits])
    assert length.executions({}) == [1, 0, 0, 0, 1, 1]


def totals_of(program: Program, executions: list[Fraction]) -> Totals:
    return Totals.count(program.instructions, executions, 1, 32, lambda instruction: True)


def work(trips: int, products: int, source: int) -> Work:
    """A warp with ``products`` 16x8x16 products and half as many exponentials."""
    return Work(
        loops=((Fraction(source),),),
        products=(Product(16, 8, 16, Fraction(products)),),
        exponentials=Fraction(32 * trips),
        pairs=Fraction(1),
        row_bytes=Fraction(32 * 16 * trips),
    )


# SASS holds two products, one exponential and one load of 16 bytes per trip.
@pytest.mark.parametrize(("source", "trips"), [(6, 6), (12, 6), (7, 6), (5, 6)])
def test_trips_follow_the_source_as_the_compiler_may_have_changed_it(source, trips):
    program = Program(parse_sass(SASS))
    executions, totals = solve_trips(
        program, work(trips, 2 * trips, source), lambda found: totals_of(program, found), True
    )
    assert executions[3] == trips
    assert totals.products(work(trips, 2 * trips, source)) == 1


@pytest.mark.parametrize(("trips", "products", "source"), [(6, 13, 6), (9, 12, 6), (6, 12, 9)])
def test_trips_that_do_not_add_up_are_an_error(trips, products, source):
    program = Program(parse_sass(SASS))
    with pytest.raises(ValueError, match="do not add up"):
        solve_trips(
            program,
            work(trips, products, source),
            lambda found: totals_of(program, found),
            True,
        )


def test_loops_that_the_source_does_not_have_are_an_error():
    program = Program(parse_sass(SASS))
    none = replace(work(1, 2, 1), loops=())
    with pytest.raises(ValueError, match="1 nests of loops with work, in the source 0"):
        solve_trips(program, none, lambda found: totals_of(program, found), True)
