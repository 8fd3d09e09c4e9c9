"""Executes a kernel's machine code: the warps of some of its blocks in lockstep, as arrays over warps and lanes.

A warp's lanes that are at different addresses go on at the lowest one, and wait for each other where the code says so
(BSYNC, WARPSYNC); warps do the same, which only makes each step of Python's cover many of them. Counts are a GPU's all the same: an instruction counts once for each warp that has
a lane at it. Memory is real: the results can be compared with a reference, without which no count is worth anything.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np

from .kernel import PARAMETERS_AT, Instruction, Kernel
from .memory import Array, Fault, Memory

if TYPE_CHECKING:
    from .latency import Trace  # which import this
    from .race import RaceCheck

Action = Callable[["Gang", Array], object]
"""Executes an instruction for the lanes of a mask."""
SHARED_BASE = 0x400
"""sm_90 keeps the first KiB of a block's shared memory."""
_END = 1 << 62


@dataclasses.dataclass
class Launch:
    """What the host asked for."""

    kernel: Kernel
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    """Dynamic shared memory in bytes."""
    parameters: bytes

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]


@dataclasses.dataclass
class Counts:
    """What was issued: sums by address, and by block."""

    instructions: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    lanes: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    shared: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """Clocks of the shared memory, bank conflicts included."""
    sectors: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    """32-byte sectors that accesses of global memory ask for."""
    block_instructions: list[int] = dataclasses.field(default_factory=list)
    block_shared: list[int] = dataclasses.field(default_factory=list)
    block_tensor: list[int] = dataclasses.field(default_factory=list)
    """Clocks of an SM's tensor cores."""

    def add(self, other: Counts) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, list):
                mine += theirs
            else:
                mine.update(theirs)


class Gang:
    """The state of the warps of ``blocks`` (indices in the grid) of a launch."""

    def __init__(self, launch: Launch, blocks: Iterable[int], memory: Memory) -> None:
        kernel = launch.kernel
        self.launch, self.kernel, self.memory = launch, kernel, memory
        self.race: RaceCheck | None = None
        self.trace: Trace | None = None
        self.blocks = np.array(list(blocks), np.int64)
        per_block = (launch.threads + 31) // 32
        self.warps_per_block = per_block
        self.warps = warps = len(self.blocks) * per_block
        self.block_of = np.repeat(np.arange(len(self.blocks)), per_block)
        """By warp, the position in ``blocks``."""
        self.R = np.zeros((256, warps, 32), np.uint32)
        self.P = np.zeros((8, warps, 32), bool)
        self.UR = np.zeros((64, warps, 1), np.uint32)
        self.UP = np.zeros((8, warps, 1), bool)
        self.P[7] = self.UP[7] = True
        self.lane = np.arange(32, dtype=np.uint32)[None, :]
        self.warp_in_block = (np.arange(warps) % per_block)[:, None]
        self.thread = (self.warp_in_block * 32 + self.lane).astype(np.uint32)
        # Shared memory: all blocks' in one array, each behind bytes that nobody may touch.
        self.shared_size = SHARED_BASE + launch.shared + max(0, kernel.static_shared - SHARED_BASE)
        self.shared_pitch = (self.shared_size + 127) // 128 * 128
        self.shared8 = np.full(len(self.blocks) * self.shared_pitch, 0xFF, np.uint8)
        self.shared16, self.shared32 = self.shared8.view(np.uint16), self.shared8.view(np.uint32)
        self.shared_at = (self.block_of * self.shared_pitch)[:, None]
        self.local = np.zeros((0, warps, 32), np.uint32)
        bank = np.zeros(max(0x2000, PARAMETERS_AT + len(launch.parameters) + 64), np.uint8)
        bank[0:12].view(np.uint32)[:] = launch.block
        bank[12:24].view(np.uint32)[:] = launch.grid
        bank[0x28:0x2C].view(np.uint32)[:] = 0x00FFFFF0  # the stack's end
        bank[PARAMETERS_AT : PARAMETERS_AT + len(launch.parameters)] = np.frombuffer(launch.parameters, np.uint8)
        self.banks = {0: bank}
        for number, raw in kernel.constants.items():
            if number != 0:
                self.banks[number] = np.frombuffer(raw + bytes(16 - len(raw) % 4), np.uint8)
        self._constants: dict[tuple[int, int], Array] = {}
        self.pc = 0
        # What was counted.
        self.count_instructions: collections.Counter[int] = collections.Counter()
        self.count_lanes: collections.Counter[int] = collections.Counter()
        self.count_shared: collections.Counter[int] = collections.Counter()
        self.count_sectors: collections.Counter[int] = collections.Counter()
        self.issued = np.zeros(warps, np.int64)
        self.shared_clocks = np.zeros(warps, np.int64)
        self.tensor_clocks = np.zeros(warps, np.int64)
        self.sectors = np.zeros(warps, np.int64)
        self.convergence = np.zeros((16, warps, 32), bool)
        """The lanes that each of a warp's barrier registers names (BSSY)."""
        self.meeting: dict[int, tuple[Array, Array]] = {}
        """By the address where they go on: lanes that wait for others of their warp, and all that are to meet there."""
        # Lanes that run, by address, and those that wait: by (barrier, address after it).
        started = self.thread < launch.threads
        self.alive = started.copy()
        self.groups: dict[int, Array] = {min(kernel.instructions): started}
        self.waiting: dict[tuple[int, int], Array] = {}
        self.arrived: dict[int, Array] = {}
        """By barrier, how many threads of each block have arrived."""
        self.counted: set[int] = set()
        """Barriers that are of a number of threads, not of the whole block."""

    def constant(self, bank: int, at: int) -> Array:
        """A 32-bit word of a constant bank."""
        found = self._constants.get((bank, at))
        if found is None:
            found = self.banks[bank][at : at + 4].view(np.uint32).reshape(1, 1)
            self._constants[bank, at] = found
        return found

    def go_on(self, pc: int, mask: Array) -> None:
        """Lanes of ``mask`` continue at ``pc``."""
        if mask.any():
            self.groups[pc] = self.groups[pc] | mask if pc in self.groups else mask

    # Lanes of a warp

    def meet(self, pc: int, mask: Array, expected: Array) -> None:
        """Lanes of ``mask`` go on at ``pc`` when all ``expected`` ones of their warp have come, or left the kernel."""
        waiting, all_expected = self.meeting.pop(pc, (np.zeros_like(mask), np.zeros_like(mask)))
        self.meeting[pc] = waiting | mask, all_expected | (expected & mask.any(axis=1, keepdims=True))
        self.let_meet()

    def let_meet(self, left: Array | None = None) -> None:
        """Lets warps go on whose lanes have all come; those of ``left`` aren't waited for any more."""
        for pc, (waiting, expected) in list(self.meeting.items()):
            expected = expected & self.alive if left is None else expected & ~left
            complete = ~(expected & ~waiting).any(axis=1, keepdims=True)
            rest = waiting & ~complete
            self.go_on(pc, waiting & complete)
            if rest.any():
                self.meeting[pc] = rest, expected & ~complete
            else:
                del self.meeting[pc]

    # Barriers

    def arrive(self, barrier: int, threads: int | None, mask: Array, pc: int, wait: bool) -> None:
        """Lanes of ``mask`` arrive at a barrier of so many threads (None: all of the block) and continue at ``pc``."""
        warps: Array = np.any(mask, axis=1)
        count = np.bincount(self.block_of, weights=np.where(warps, 32, 0), minlength=len(self.blocks)).astype(np.int64)
        self.arrived[barrier] = self.arrived.get(barrier, np.zeros(len(self.blocks), np.int64)) + count
        if self.race:
            self.race.arrive(barrier, warps, wait)
        if wait:
            key = (barrier, pc)
            self.waiting[key] = self.waiting[key] | mask if key in self.waiting else mask
        else:
            self.go_on(pc, mask)
        if threads is not None:
            self.counted.add(barrier)
            self.release(barrier, self.arrived[barrier] >= threads)

    def release(self, barrier: int, blocks: Array) -> None:
        """Lets the lanes of ``blocks`` that wait at ``barrier`` go on."""
        if not blocks.any():
            return
        lanes = blocks[self.block_of][:, None]
        self.arrived[barrier] = np.where(blocks, 0, self.arrived[barrier])
        if self.race:
            self.race.release(barrier)
        for key in [k for k in self.waiting if k[0] == barrier]:
            waiting = self.waiting.pop(key)
            self.go_on(key[1], waiting & lanes)
            if (rest := waiting & ~lanes).any():
                self.waiting[key] = rest

    def release_whole_blocks(self) -> None:
        """When nobody runs: barriers at which all living threads of a block have arrived."""
        idle = True
        for barrier in {key[0] for key in self.waiting} - self.counted:
            waits = np.zeros_like(self.alive)
            for key, mask in self.waiting.items():
                if key[0] == barrier:
                    waits |= mask
            missing = (self.alive & ~waits).any(axis=1)
            complete = np.bincount(self.block_of, weights=missing, minlength=len(self.blocks)) == 0
            complete &= np.bincount(self.block_of, weights=waits.any(axis=1), minlength=len(self.blocks)) > 0
            idle &= not complete.any()
            self.release(barrier, complete)
        if idle:
            raise Fault(f"{self.kernel}: threads wait at a barrier that others never reach")

    # Execution

    def run(self, program: dict[int, tuple[Instruction, Action]], limit: int = 20_000_000) -> None:
        with np.errstate(all="ignore"):  # infinities and NaN are values
            self._run(program, limit)

    def _run(self, program: dict[int, tuple[Instruction, Action]], limit: int) -> None:
        groups = self.groups
        while groups or self.waiting or self.meeting:
            if not groups:
                self.release_whole_blocks()
                continue
            pc = min(groups)
            mask = groups.pop(pc)
            next_pc = min(groups, default=_END)
            active: Array = np.any(mask, axis=1)
            warps, steps = int(active.sum()), 0
            going = True
            while going:
                instruction, action = program[pc]
                steps += 1
                self.count_instructions[pc] += warps
                taken = guarded(self, instruction.guard, mask)
                self.count_lanes[pc] += int(np.count_nonzero(taken))
                self.pc = pc
                before = (self.shared_clocks.copy(), self.sectors.copy()) if self.trace else None
                if taken is mask or taken.any():
                    action(self, taken)
                if self.trace and before:
                    self.trace.note(self, active, *before)
                pc += 16
                if instruction.name in CONTROL:
                    self.go_on(pc, mask & ~taken)
                    going = False
                elif pc >= next_pc:
                    self.go_on(pc, mask)
                    going = False
            self.issued[active] += steps
            limit -= steps
            if limit < 0:
                raise Fault(f"{self.kernel}: an endless loop")

    def counts(self) -> Counts:
        def by_block(warps: Array) -> list[int]:
            return [int(n) for n in np.bincount(self.block_of, weights=warps, minlength=len(self.blocks))]

        return Counts(
            self.count_instructions,
            self.count_lanes,
            self.count_shared,
            self.count_sectors,
            by_block(self.issued),
            by_block(self.shared_clocks),
            by_block(self.tensor_clocks),
        )


CONTROL = {"BRA", "BRX", "JMP", "CALL", "RET", "EXIT", "BAR", "BSYNC", "WARPSYNC", "BREAK"}
"""These say where lanes go on; the rest goes on at the next instruction."""


def guarded(gang: Gang, guard: str, mask: Array) -> Array:
    """The lanes of ``mask`` for which a predicate like ``@!P0`` holds."""
    if not guard:
        return mask
    negated = guard[1] == "!"
    name = guard.lstrip("@!")
    file = gang.UP if name[0] == "U" else gang.P
    value = file[7 if name.endswith("T") else int(name[-1])]
    return mask & (~value if negated else value)


def compiled(kernel: Kernel) -> dict[int, tuple[Instruction, Action]]:
    """What each instruction does. One that isn't known fails when it is reached."""
    from .instructions import action_of  # which imports this

    found = _programs.get(kernel.name)
    if found is None or found[0] is not kernel:
        found = (kernel, {pc: (i, action_of(i)) for pc, i in kernel.instructions.items()})
        _programs[kernel.name] = found
    return found[1]


_programs: dict[str, tuple[Kernel, dict[int, tuple[Instruction, Action]]]] = {}


def execute(launch: Launch, blocks: Iterable[int], memory: Memory, gang_warps: int = 64) -> Counts:
    """Runs ``blocks`` of a launch, about ``gang_warps`` warps at a time."""
    program, total = compiled(launch.kernel), Counts()
    wanted = list(blocks)
    step = max(1, gang_warps // ((launch.threads + 31) // 32))
    for i in range(0, len(wanted), step):
        gang = Gang(launch, wanted[i : i + step], memory)
        gang.run(program)
        total.add(gang.counts())
    return total
