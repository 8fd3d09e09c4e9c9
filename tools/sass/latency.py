"""A timing model of one SM: the warps of its blocks in order, four schedulers, pipes, shared memory, and caches of fixed latency.

What each warp executes is what the simulator ran. **The model has never been compared with a GPU**: it ranks variants of a kernel, and its
times are no predictions. It has no launch, no L1 and no DRAM: at batch 1 what a kernel reads is in L2, from the kernel before or
from the forward before. So it is for grids of a few waves alone.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import NamedTuple

from .costs import CLOCK, SCHEDULERS, SMS
from .kernel import Instruction, Kernel
from .machine import CONTROL, Gang, Launch, compiled
from .memory import Array, Memory
from .transfer import access_size

LATENCY = {
    "alu": 5, "fma": 4, "wide": 5, "half": 6, "convert": 6, "special": 20, "tensor": 33, "uniform": 8,
    "shared": 28, "matrix": 32, "constant": 30, "lanes": 24, "l2": 260, "barrier": 10, "control": 1,
}  # fmt: skip
"""Clocks until a result can be used. All numbers of this file but an SM's sizes are assumptions."""
INTERVAL = {
    "alu": 2, "fma": 1, "wide": 2, "half": 1, "convert": 2, "special": 8, "tensor": 8, "uniform": 2, "memory": 2,
}  # fmt: skip
"""Clocks between two instructions of one kind on a scheduler."""
L2_BYTES, STORE_BYTES, BLOCK_START = 40.0, 40.0, 100
"""Bytes a clock of one SM, and clocks until a block takes another one's place."""
REGISTERS, WARPS, SHARED = 65536, 64, 233472
"""Of an SM of an H100: 32-bit registers, warps, bytes."""

_FLOATS = {"FFMA", "FADD", "FMUL"}
_HALVES = {"HFMA2", "HMUL2", "HADD2", "HMNMX2"}
_SPECIAL = {"MUFU", "I2F", "F2I", "F2F"}
_CONTROL = CONTROL | {"BSSY", "NOP", "DEPBAR", "LDGDEPBAR", "MEMBAR"}
_STORES = {"STS", "STG", "ST", "STL", "STSM"}
_LOADS = {"LDG", "LDS", "LD", "LDL", "LDSM"}
_MEMORY = _STORES | _LOADS | {"LDGSTS", "LDC", "SHFL", "S2R", "S2UR", "MOVM", "ATOMS", "RED"}


class Static(NamedTuple):
    """What of an instruction doesn't depend on who executes it."""

    name: str
    pipe: str
    latency: int
    written: tuple[str, ...]
    read: tuple[str, ...]
    groups_left: int
    """Of DEPBAR: groups of asynchronous copies that may be under way afterwards."""


class Step(NamedTuple):
    """An instruction that a warp executed."""

    pc: int
    shared: int
    """Clocks of shared memory."""
    sectors: int
    """32-byte sectors of global memory."""


def pipe_of(i: Instruction) -> str:
    if i.name in _CONTROL or i.guard == "@!PT":
        return "control"
    if i.name in _MEMORY:
        return "memory"
    if i.name in _FLOATS:
        return "fma"
    if i.name.startswith("IMAD"):
        return "wide"
    if i.name == "HMMA":
        return "tensor"
    if i.name in _HALVES:
        return "half"
    if i.name in ("F2FP", "I2FP"):
        return "convert"
    if i.name in _SPECIAL:
        return "special"
    return "uniform" if i.name.startswith("U") or i.name in ("R2UR", "VOTEU") else "alu"


def _names(operand: str, count: int = 1) -> list[str]:
    """The registers of an operand, of which the first is followed by ``count`` - 1 more."""
    found = []
    for kind, number, wide in re.findall(r"\b(UR|R|UP|P)(\d+)\b(\.64)?", operand):
        found += [f"{kind}{int(number) + k}" for k in range(max(count, 2 if wide else 1))]
    return found


def _count(i: Instruction) -> int:
    """Registers that a lane loads or stores: of LDSM and STSM one for each matrix."""
    if i.name in ("LDSM", "STSM"):
        return int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1
    return max(1, access_size(i) // 4)


def registers_of(i: Instruction) -> tuple[list[str], list[str]]:
    """The registers and predicates that it writes, and those that it reads."""
    written: list[str] = []
    read = _names(i.guard)
    operands = list(i.operands)
    if i.name in _STORES or i.name == "RED":
        values = [r for o in operands[1:] for r in _names(o, _count(i))]
        return written, read + _names(operands[0]) + values
    if i.name in _CONTROL or i.name == "LDGSTS" or not operands:
        return written, read + [r for o in operands for r in _names(o)]
    counts = [1] * len(operands)
    if i.name == "HMMA":
        whole = i.modifiers[0].startswith("16816") or (i.modifiers[0] == "1688" and "TF32" in i.modifiers)
        counts[:4] = [4, *((4, 2) if whole else (2, 1)), 4]
    elif i.name in _LOADS:
        counts[0] = _count(i)
    elif "WIDE" in i.modifiers:
        counts[0] = 2
        counts[-1] = 2 if operands[-1].startswith("R") else 1
    elif i.name in ("LDC", "ULDC", "CS2R") and ("64" in i.modifiers or (i.name == "CS2R" and "32" not in i.modifiers)):
        counts[0] = 2
    targets = 2 if i.name == "SHFL" else 1
    if targets == 1:  # predicates that follow the first operand are results too
        while targets < len(operands) - 1 and re.fullmatch(r"U?P(\d|T)", operands[targets]):
            targets += 1
    for k, (operand, count) in enumerate(zip(operands, counts, strict=True)):
        (written if k < targets else read).extend(_names(operand, count))
    return written, read


def statics(kernel: Kernel) -> dict[int, Static]:
    found = {}
    for pc, i in kernel.instructions.items():
        pipe = pipe_of(i)
        kind = (
            "matrix" if i.name == "LDSM" else "constant" if i.name == "LDC" else "lanes" if pipe == "memory" else pipe
        )
        written, read = registers_of(i)
        left = int(i.operands[1], 16) if i.name == "DEPBAR" and len(i.operands) > 1 else 0
        found[pc] = Static(i.name, pipe, LATENCY[kind], tuple(written), tuple(read), left)
    return found


class Trace:
    """What the warps of one block execute. A gang of one block fills it."""

    def __init__(self, warps: int) -> None:
        self.steps: list[list[Step]] = [[] for _ in range(warps)]

    def note(self, gang: Gang, active: Array, shared: Array, sectors: Array) -> None:
        """An instruction of the warps ``active``; clocks and sectors are each warp's until now, and before."""
        clocks, asked = gang.shared_clocks - shared, gang.sectors - sectors
        for w in active.nonzero()[0].tolist():
            self.steps[w].append(Step(gang.pc, int(clocks[w]), int(asked[w])))


def trace_of(launch: Launch, block: int, memory: Memory) -> Trace:
    gang = Gang(launch, [block], memory)
    gang.trace = trace = Trace(gang.warps)
    gang.run(compiled(launch.kernel))
    return trace


def microseconds(launch: Launch, memory: Memory) -> float:
    """The model's time of a launch: of the SM that has the most blocks, which all do what the middle one does."""
    blocks, warps = math.ceil(launch.blocks / SMS), math.ceil(launch.threads / 32)
    registers = math.ceil(launch.kernel.registers / 8) * 8 * 32 * warps
    shared = launch.shared + launch.kernel.static_shared + 1024
    resident = max(1, min(REGISTERS // registers, SHARED // shared, WARPS // warps, 32, blocks))
    trace = trace_of(launch, launch.blocks // 2, memory)
    return Sm(statics(launch.kernel), trace, blocks, resident).run() / CLOCK * 1e6


@dataclasses.dataclass(eq=False)
class _Warp:
    steps: list[Step]
    block: _Block
    at: int = 0
    ready: float = 0.0
    """When it can issue its next instruction; infinite at a barrier."""
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    """By register, when it has its value."""
    copies: float = 0.0
    """When the copies of the open group are done."""
    groups: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Block:
    waiting: list[_Warp] = dataclasses.field(default_factory=list)
    alive: int = 0


class Sm:
    """Runs ``blocks`` blocks, ``resident`` at a time, all as ``trace`` says."""

    def __init__(self, instructions: dict[int, Static], trace: Trace, blocks: int, resident: int) -> None:
        self.instructions, self.trace = instructions, trace
        self.waiting_blocks = blocks
        self.schedulers: list[list[_Warp]] = [[] for _ in range(SCHEDULERS)]
        self.pipes: list[dict[str, float]] = [collections.defaultdict(float) for _ in range(SCHEDULERS)]
        self.data_path = self.l2 = self.stores = 0.0
        self.dealt = 0
        for _ in range(min(resident, blocks)):
            self.start_block(0)

    def start_block(self, now: float) -> None:
        self.waiting_blocks -= 1
        block = _Block(alive=len(self.trace.steps))
        for steps in self.trace.steps:
            warp = _Warp(steps, block)
            self.schedulers[self.dealt % SCHEDULERS].append(warp)
            self.dealt += 1
            warp.ready = self.ready(warp, now + 20)

    def ready(self, warp: _Warp, now: float) -> float:
        """When what the next instruction reads and overwrites is there."""
        static = self.instructions[warp.steps[warp.at].pc]
        waits = [warp.results[r] for r in (*static.read, *static.written) if r in warp.results]
        if static.name == "DEPBAR":
            waits += warp.groups[: max(0, len(warp.groups) - static.groups_left)]
        return max([now, *waits])

    def run(self) -> float:
        """Clocks."""
        now = 0.0
        while any(self.schedulers):
            issued, soonest = False, math.inf
            for warps, pipes in zip(self.schedulers, self.pipes, strict=True):
                for warp in warps:
                    pipe = self.instructions[warp.steps[warp.at].pc].pipe
                    at = max(warp.ready, pipes[pipe])
                    if at <= now:
                        pipes[pipe] = now + INTERVAL.get(pipe, 1)
                        self.issue(warp, now)
                        issued = True
                        break
                    soonest = min(soonest, at)
            now = now + 1 if issued else max(now + 1, math.ceil(soonest))
        return max(now, self.stores)

    def issue(self, warp: _Warp, now: float) -> None:
        step = warp.steps[warp.at]
        static = self.instructions[step.pc]
        done = self.memory(warp, static, step, now) if static.pipe == "memory" else now + static.latency
        for register in static.written:
            warp.results[register] = done
        if static.name == "LDGDEPBAR":
            warp.groups.append(max(warp.copies, now))
            warp.copies = 0.0
        warp.at += 1
        if warp.at == len(warp.steps):
            self.leave(warp, now)
        elif static.name == "BAR":
            warp.ready = math.inf
            warp.block.waiting.append(warp)
        else:
            warp.ready = self.ready(warp, now + 1)
        self.release(warp.block, now)

    def memory(self, warp: _Warp, static: Static, step: Step, now: float) -> float:
        """When an access is done."""
        if step.shared and static.name != "LDGSTS":
            self.data_path = max(now, self.data_path) + step.shared
            return self.data_path + LATENCY["matrix" if static.name == "LDSM" else "shared"]
        if not step.sectors:
            return now + static.latency
        self.data_path = max(now, self.data_path) + step.sectors / 4
        if static.name in _STORES:
            self.stores = max(now, self.stores) + step.sectors * 32 / STORE_BYTES
            return now + 1
        self.l2 = max(now, self.l2) + step.sectors * 32 / L2_BYTES
        done = self.l2 + LATENCY["l2"]
        if static.name == "LDGSTS":
            warp.copies = max(warp.copies, done)
        return done

    def leave(self, warp: _Warp, now: float) -> None:
        next(warps for warps in self.schedulers if warp in warps).remove(warp)
        warp.block.alive -= 1
        if not warp.block.alive and self.waiting_blocks:
            self.start_block(now + BLOCK_START)

    def release(self, block: _Block, now: float) -> None:
        """Lets a block's warps go on when all that live have come to the barrier."""
        if block.waiting and len(block.waiting) == block.alive:
            for warp in block.waiting:
                warp.ready = self.ready(warp, now + LATENCY["barrier"])
            block.waiting.clear()
