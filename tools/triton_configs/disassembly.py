"""What a compiled kernel is made of: resources and instruction counts, from SASS."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence

from ..sass.build import nvidia_tool

KINDS = ("LDG", "STG", "LDS", "STS", "LDGSTS", "HMMA", "FFMA", "local")
"""Counted by themselves. HMMA: any tensor-core product; LDS: ldmatrix too; local: loads and stores of local memory."""
_SYNONYMS = {"HGMMA": "HMMA", "LDSM": "LDS", "STSM": "STS", "LDL": "local", "STL": "local"}


@dataclasses.dataclass(frozen=True)
class Loop:
    start: int
    end: int
    inner: tuple[Loop, ...]


@dataclasses.dataclass(frozen=True)
class Sass:
    """One kernel's machine code."""

    instructions: list[tuple[int, str, int | None]]
    """(address, kind, a branch's target)"""
    registers: int
    spill_bytes: int

    def loops(self) -> tuple[Loop, ...]:
        """The loops as a forest: a branch backwards closes one."""
        spans: dict[int, int] = {}
        for address, kind, to in self.instructions:
            if kind == "BRA" and to is not None and to < address:
                spans[to] = max(address, spans.get(to, 0))
        return _forest(sorted(spans.items(), key=lambda span: (span[0], -span[1])))

    def counts(self, trips: Sequence[Sequence[float]]) -> dict[str, float]:
        """Instructions by kind that one thread issues, "total" among them.

        ``trips``: for each outermost loop in order, how often it runs and, where it has one, how often the loop
        inside runs. What lies outside the loops, out-of-line subroutines included, counts once; so does what the compiler made
        of an inner loop that it unrolled.

        Raises:
            ValueError: the code has other loops than ``trips`` says (the compiler split one).
        """
        weights: list[tuple[Loop, float]] = []

        def weigh(loops: tuple[Loop, ...], nests: Sequence[Sequence[float]], outer: float) -> None:
            if len(loops) != len(nests):
                raise ValueError(f"{len(loops)} loops side by side, expected {len(nests)}")
            for loop, (n, *inner) in zip(loops, nests, strict=True):
                weights.append((loop, outer * n))
                weigh(loop.inner, [inner] if inner and loop.inner else [], outer * n)

        weigh(self.loops(), trips, 1)
        out: dict[str, float] = collections.defaultdict(float)
        for address, kind, _ in self.instructions:
            weight = next((n for loop, n in reversed(weights) if loop.start <= address <= loop.end), 1)
            out[kind] += weight
            out["total"] += weight
        return out


def _forest(spans: list[tuple[int, int]]) -> tuple[Loop, ...]:
    out = []
    while spans:
        (start, end), rest = spans[0], spans[1:]
        out.append(Loop(start, end, _forest([s for s in rest if s[1] <= end])))
        spans = [s for s in rest if s[1] > end]
    return tuple(out)


_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([A-Z0-9_]+)(.*?);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def disassemble(cubin: bytes) -> Sass:
    """The only kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        text = run([str(nvidia_tool("cuobjdump")), "-sass", file.name]).stdout
        usage = _USAGE.search(run([str(nvidia_tool("cuobjdump")), "-res-usage", file.name]).stdout)
    instructions = []
    for line in text.splitlines():
        if m := _LINE.match(line):
            to = re.search(r"0x([0-9a-f]+)", m[3]) if m[2] == "BRA" else None
            instructions.append((int(m[1], 16), _SYNONYMS.get(m[2], m[2]), int(to[1], 16) if to else None))
    if usage is None or not instructions:
        raise RuntimeError("cuobjdump printed no kernel")
    return Sass(instructions, int(usage[1]), int(usage[2]) + int(usage[3]))
