"""The flow of control in one kernel's SASS: basic blocks, loops, and what the longest and shortest ways through issue."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import re
from collections.abc import Callable, Iterable, Set

_FUNCTION = re.compile(r"^\s*Function : (\S+)")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)([^;]*);")
_FP32 = ("FFMA", "FMUL", "FADD")
# Integer, compare, select and shift: half the lanes of FFMA on sm_80 and sm_90 (CUDA programming guide, arithmetic
# throughput). IMAD shares the pipe of FFMA at half its rate, so it counts as two of them.
_ALU = ("IADD3", "LOP3", "ISETP", "SEL", "SHF", "LEA", "FSETP", "FSEL", "FMNMX", "PRMT", "PLOP3", "VIADD", "VIADDMNMX",
        "VIMNMX", "IMNMX", "IABS", "F2FP")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def bits(self) -> int:
        """The width of a load or store."""
        parts = self.opcode.split(".")
        return next((int(w.lstrip("US")) for w in parts if w in ("8", "16", "64", "128", "U8", "S8", "U16", "S16")), 32)

    @property
    def kind(self) -> str:
        """The name, with the width for loads and stores."""
        if self.name in ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL"):
            return f"{self.name}.{self.bits}"
        return self.name

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None

    def costs(self) -> collections.Counter[str]:
        """Issue slots, lanes by pipe (in warp instructions) and clocks of shared memory, without bank conflicts."""
        c = collections.Counter(issue=1)
        if self.predicate == "@!PT ":  # ptxas puts "@!PT LDS RZ" before cp.async: a slot, no access
            return c
        c["fp32"] = (self.name in _FP32) + 2 * (self.name == "IMAD")
        c["alu"] = int(self.name in _ALU)
        c["tensor"] = int(self.name == "HMMA")
        if self.name in ("LDS", "STS", "LDGSTS"):
            c["shared"] = max(1, self.bits // 32)
        elif self.name == "LDSM":
            c["shared"] = 4
        return c


def parse(text: str) -> dict[str, list[Instruction]]:
    """``cuobjdump -sass`` by function."""
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if m := _FUNCTION.match(line):
            current = functions.setdefault(m[1], [])
        elif m := _LINE.match(line):
            current.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()))
    return functions


def static_counts(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions by kind; accesses of shared memory that can never run ("@!PT") don't count."""
    return dict(collections.Counter(i.kind for i in code if i.predicate != "@!PT "))


@dataclasses.dataclass(frozen=True)
class Loop:
    head: int  # addresses: the first instruction, the branch backwards
    latch: int
    counts: collections.Counter[str]

    def has(self, kind: str) -> bool:
        return self.counts[kind] > 0

    def inside(self, other: Loop) -> bool:
        return self != other and other.head <= self.head and self.latch <= other.latch


class Flow:
    """Basic blocks of ``code``. Blocks for which ``cold`` holds are never entered."""

    def __init__(self, code: list[Instruction], cold: Callable[[list[Instruction]], bool] = lambda _: False) -> None:
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        jumps = ("BRA", "EXIT", "RET", "BRX", "BAR")
        starts |= {b.address for a, b in itertools.pairwise(code) if a.name in jumps}
        self.code, self.blocks = code, dict[int, list[Instruction]]()
        for i in code:
            if i.address in starts:
                block = self.blocks[i.address] = []
            block.append(i)
        order = list(self.blocks)
        self.next = dict[int, list[int]]()
        for start, following in zip(order, [*order[1:], None], strict=True):
            last, to = self.blocks[start][-1], []
            if last.target is not None:
                to.append(last.target)
            # an indirect branch (which cp.async.wait_group to take) falls through, its ways being alike
            always = last.name in ("BRA", "EXIT", "RET") and not last.predicate and "UP" not in last.operands
            always = always and not re.match(r"!?P\d", last.operands)
            if not always and following is not None:
                to.append(following)
            self.next[start] = to
        self.cold = {start for start, block in self.blocks.items() if cold(block)}
        spans: dict[int, int] = {}
        for i in code:
            if i.target is not None and i.target < i.address:
                spans[i.target] = max(i.address, spans.get(i.target, 0))
        self.loops = [
            Loop(head, latch, collections.Counter(i.kind for i in code if head <= i.address <= latch))
            for head, latch in sorted(spans.items())
        ]

    def block_of(self, address: int) -> int:
        return max(start for start in self.blocks if start <= address)

    def cost(self, start: int) -> collections.Counter[str]:
        return sum((i.costs() for i in self.blocks[start]), collections.Counter())

    def between(self, begin: int, end: int) -> collections.Counter[str]:
        """The shortest way from the block at address ``begin`` to that at ``end``, both left out."""
        source, goal = self.block_of(begin), self.block_of(end)
        best: dict[int, tuple[int, int | None]] = {}
        queue: list[tuple[int, int, int | None]] = [(0, to, None) for to in self.next[source] if to not in self.cold]
        heapq.heapify(queue)
        while queue:
            length, block, came = heapq.heappop(queue)
            if block in best:
                continue
            best[block] = length, came
            if block == goal:
                total: collections.Counter[str] = collections.Counter()
                while came is not None:
                    total += self.cost(came)
                    came = best[came][1]
                return total
            for to in self.next[block]:
                if to not in self.cold and to not in best:
                    heapq.heappush(queue, (length + len(self.blocks[block]), to, block))
        raise ValueError(f"no way from {begin:#x} to {end:#x}")

    def with_any(self, *kinds: str) -> set[int]:
        """The blocks with an instruction of one of these kinds or names."""
        return {start for start, block in self.blocks.items() if any(i.kind in kinds or i.name in kinds for i in block)}

    def longest(self, begin: int, end: int, avoid: Set[int] = frozenset()) -> collections.Counter[str]:
        """The longest way from the block at ``begin`` to that at ``end`` that never goes back, both included."""
        first, last = self.block_of(begin), self.block_of(end)
        best: dict[int, collections.Counter[str]] = {first: self.cost(first)}
        for block in sorted(b for b in self.blocks if first <= b <= last):
            if block not in best:
                continue
            for to in self.next[block]:
                if block < to <= last and to not in self.cold and to not in avoid:
                    way = best[block] + self.cost(to)
                    if to not in best or way["issue"] > best[to]["issue"]:
                        best[to] = way
        if last not in best:
            raise ValueError(f"no way forward from {begin:#x} to {end:#x}")
        return best[last]

    def body(self, loop: Loop, avoid: Set[int] = frozenset()) -> collections.Counter[str]:
        """One round of an innermost loop by the longest way."""
        return self.longest(loop.head, loop.latch, avoid)

    def short_body(self, loop: Loop) -> collections.Counter[str]:
        """One round by the shortest way."""
        head, latch = self.block_of(loop.head), self.block_of(loop.latch)
        ends = self.cost(head) if head == latch else self.cost(head) + self.cost(latch)
        return ends if head == latch else ends + self.between(loop.head, loop.latch)
