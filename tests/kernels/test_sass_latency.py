"""The timing model of one SM: what it makes of instructions whose times are plain."""

from __future__ import annotations

import pytest

from tools.sass import latency
from tools.sass.kernel import Instruction, split_operands
from tools.sass.latency import L2_BYTES, LATENCY, Sm, Static, Step, Trace, pipe_of, registers_of

L2 = LATENCY["l2"]


def instruction(text: str, pc: int = 0) -> Instruction:
    guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    opcode, _, operands = rest.partition(" ")
    name, *modifiers = opcode.split(".")
    return Instruction(pc, guard, name, tuple(modifiers), split_operands(operands), (), text)


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("IADD3 R4, P0, R2, UR4, RZ", "R4 P0", "R2 UR4"),
        ("@!P1 IADD3.X R5, R3, UR5, RZ, P0, !PT", "R5", "P1 R3 UR5 P0"),
        ("ISETP.GE.AND P3, PT, R14, R19, PT", "P3", "R14 R19"),
        ("LDG.E.128 R8, desc[UR12][R2.64+0x10]", "R8 R9 R10 R11", "UR12 R2 R3"),
        ("STG.E.64 desc[UR12][R2.64], R8", "", "UR12 R2 R3 R8 R9"),
        ("LDSM.16.M88.4 R20, [R6+UR4]", "R20 R21 R22 R23", "R6 UR4"),
        ("STS.128 [R6], R8", "", "R6 R8 R9 R10 R11"),
        ("HMMA.16816.F32 R4, R8, R12, R4", "R4 R5 R6 R7", "R8 R9 R10 R11 R12 R13 R4 R5 R6 R7"),
        ("IMAD.WIDE.U32 R2, R4, 0x10, R6", "R2 R3", "R4 R6 R7"),
        ("SHFL.BFLY PT, R5, R6, 0x1, 0x1f", "R5", "R6"),
        ("BRA 0x100", "", ""),
    ],
)
def test_registers(text, written, read):
    wrote, reads = registers_of(instruction(text))
    assert sorted(wrote) == sorted(written.split())
    assert sorted(reads) == sorted(read.split())


def test_pipes():
    kinds = {"FFMA R1, R2, R3, R4": "fma", "HMMA.16816.F32 R4, R8, R12, R4": "tensor", "LDS R1, [R2]": "memory"}
    kinds |= {
        "MUFU.RSQ R1, R2": "special",
        "BRA 0x100": "control",
        "@!PT LDS RZ, [RZ]": "control",
        "R2UR UR4, R2": "uniform",
    }
    assert {text: pipe_of(instruction(text)) for text in kinds} == kinds


PROGRAM = {
    0: Static("LDG", "memory", 24, ("R1",), ("R0",), 0),
    1: Static("LDG", "memory", 24, ("R2",), ("R1",), 0),
    2: Static("LDG", "memory", 24, ("R3",), ("R0",), 0),
    3: Static("FADD", "fma", 4, ("R4",), ("R1", "R2", "R3"), 0),
    4: Static("BAR", "control", 1, (), (), 0),
    5: Static("STG", "memory", 24, (), ("R4",), 0),
    6: Static("LDGSTS", "memory", 24, (), ("R0",), 0),
    7: Static("LDGDEPBAR", "control", 1, (), (), 0),
    8: Static("DEPBAR", "control", 1, (), (), 1),
    9: Static("DEPBAR", "control", 1, (), (), 0),
}  # fmt: skip


def clocks(*warps: list[int], blocks: int = 1, resident: int = 1) -> float:
    trace = Trace(len(warps))
    trace.steps = [
        [Step(pc, 0, 4 if PROGRAM[pc].name in ("LDG", "STG", "LDGSTS") else 0) for pc in warp] for warp in warps
    ]
    return Sm(PROGRAM, trace, blocks, resident).run()


def test_loads_that_depend_on_each_other_take_their_times_together():
    """The kind of chain that the model is for: of loads that don't, the last takes as long as both."""
    apart, chained = clocks([0, 2, 3]), clocks([0, 1, 3])
    assert apart == pytest.approx(L2, rel=0.2)
    assert chained - apart == pytest.approx(L2, rel=0.1)


def test_a_barrier_waits_for_the_slowest_warp():
    alone = clocks([0, 1, 3])
    assert clocks([0, 1, 3, 4, 5], [4, 5]) > alone
    assert clocks([4, 5], [4, 5]) < L2


def test_warps_that_have_left_are_not_waited_for():
    assert clocks([0, 3, 4, 5], [0]) < 2 * L2


def test_blocks_that_are_not_resident_wait():
    one = clocks([0, 3])
    assert clocks([0, 3], blocks=3, resident=3) < 1.5 * one
    assert clocks([0, 3], blocks=3, resident=1) > 3 * one


def test_bytes_take_time():
    many = 400
    assert clocks([0] * many) >= many * 4 * 32 / L2_BYTES


def test_copies_are_waited_for_by_group():
    """DEPBAR lets as many groups go on as it says."""
    one_left, none_left = clocks([6, 7, 6, 7, 8]), clocks([6, 7, 6, 7, 9])
    assert L2 < one_left < none_left < 2 * L2


def test_issue_is_four_a_clock():
    many = 1000
    for warps in (4, 8):
        assert clocks(*[[3] * many] * warps) >= warps * many / latency.SCHEDULERS
