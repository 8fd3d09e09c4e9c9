"""Finds races for shared memory: two warps touch a byte, one of them writes, and no barrier orders them.

Each warp has a clock that its barriers advance, and knows how far it has seen the others' (vector clocks), so that what is
found doesn't depend on the order in which the simulator runs warps. A cp.async is a write that ends when its warp waits for
its group: until then nobody may touch those bytes, its own warp included.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np

from .costs import part
from .kernel import Kernel
from .machine import Gang, Launch, compiled
from .memory import Array, Memory

_PENDING = 1 << 30


def _active(m: Array) -> list[int]:
    """Warps with a lane in ``m``."""
    return np.flatnonzero(m.any(axis=1)).tolist()


def check_races(launch: Launch, blocks: Iterable[int], memory: Memory) -> list[str]:
    """Runs ``blocks`` one by one, and describes each pair of instructions that race."""
    program, found = compiled(launch.kernel), set[tuple[str, int, int]]()
    for block in blocks:
        gang = Gang(launch, [block], memory)
        gang.race = race = RaceCheck(gang.warps, len(gang.shared8))
        gang.run(program)
        found |= set(race.found)
    return [_describe(launch.kernel, *race) for race in sorted(found)]


def _describe(kernel: Kernel, kind: str, pc: int, earlier: int) -> str:
    here, there = kernel.instructions[pc], kernel.instructions[earlier]
    return f"{kernel}: {kind}: {here.text} ({part(here)}) at {pc:#x}, {there.text} ({part(there)}) at {earlier:#x}"


class RaceCheck:
    """What one block's warps have done; a gang of one block only."""

    def __init__(self, warps: int, shared_bytes: int) -> None:
        self.found: collections.Counter[tuple[str, int, int]] = collections.Counter()
        """(kind, address of the instruction, address of the earlier one): how often."""
        self._seen = np.zeros((warps, warps), np.int64)
        """``_seen[a, b]``: the last of b's clocks that a barrier has ordered before what a does now."""
        self._clock = np.ones(warps, np.int64)
        self._writer = np.full(shared_bytes, -1, np.int64)
        self._write_clock = np.zeros(shared_bytes, np.int64)
        self._write_pc = np.zeros(shared_bytes, np.int64)
        self._read_clock = np.zeros((warps, shared_bytes), np.int64)
        self._read_pc = np.zeros((warps, shared_bytes), np.int64)
        self._open: list[list[Array]] = [[] for _ in range(warps)]
        self._groups: list[list[list[Array]]] = [[] for _ in range(warps)]
        self._arrivals: dict[int, tuple[Array, Array]] = {}

    def _bytes(self, place: Array, m: Array, warp: int, size: int) -> Array:
        return np.unique(place[warp][m[warp]][:, None] + np.arange(size)) if m[warp].any() else np.empty(0, np.int64)

    def _note(self, kind: str, pc: int, earlier: Array) -> None:
        for other in np.unique(earlier):
            self.found[kind, pc, int(other)] += 1

    def access(self, g: Gang, place: Array, m: Array, size: int, write: bool, copies: bool = False) -> None:
        for warp in _active(m):
            at = self._bytes(place, m, warp, size)
            writer, clock = self._writer[at], self._write_clock[at]
            unseen = (writer >= 0) & (clock > np.where(writer == warp, self._clock[warp], self._seen[warp, writer]))
            if unseen.any():
                self._note("write after write" if write else "read after write", g.pc, self._write_pc[at][unseen])
            if not write:
                self._read_clock[warp, at] = self._clock[warp]
                self._read_pc[warp, at] = g.pc
                continue
            for other in range(len(self._clock)):
                late = self._read_clock[other, at] > self._seen[warp, other]
                if other != warp and late.any():
                    self._note("write after read", g.pc, self._read_pc[other, at][late])
            self._writer[at], self._write_pc[at] = warp, g.pc
            self._write_clock[at] = _PENDING if copies else self._clock[warp]

    def copy(self, g: Gang, place: Array, m: Array, size: int) -> None:
        """A cp.async."""
        self.access(g, place, m, size, write=True, copies=True)
        for warp in _active(m):
            self._open[warp].append(self._bytes(place, m, warp, size))

    def commit(self, g: Gang, m: Array) -> None:
        for warp in _active(m):
            self._groups[warp].append(self._open[warp])
            self._open[warp] = []

    def wait(self, g: Gang, m: Array, pending: int) -> None:
        """All groups but the last ``pending`` are there."""
        for warp in _active(m):
            groups = self._groups[warp]
            done, self._groups[warp] = groups[: len(groups) - pending], groups[max(0, len(groups) - pending) :]
            for at in (at for group in done for at in group):
                mine = at[(self._writer[at] == warp) & (self._write_clock[at] == _PENDING)]
                self._write_clock[mine] = self._clock[warp]

    def arrive(self, barrier: int, warps: Array, wait: bool) -> None:
        known, waits = self._arrivals.get(barrier, (np.zeros(len(warps), np.int64), np.zeros(len(warps), bool)))
        for warp in _active(warps[:, None]):
            known = np.maximum(known, self._seen[warp])
            known[warp] = max(known[warp], self._clock[warp])
            self._clock[warp] += 1
        self._arrivals[barrier] = known, waits | (warps & wait)

    def release(self, barrier: int) -> None:
        known, waits = self._arrivals.pop(barrier)
        self._seen[waits] = np.maximum(self._seen[waits], known)
