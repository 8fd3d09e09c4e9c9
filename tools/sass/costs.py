"""What counted launches cost at an H100's rates, as times that no GPU has taken, and by part of the source."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from pathlib import Path

import numpy as np

from .kernel import Instruction, Kernel
from .machine import Counts, Launch
from .memory import Memory

SMS, CLOCK, SCHEDULERS, DRAM = 132, 1.83e9, 4, 3.35e12
"""Of an H100 SXM: clocks a second, instructions an SM issues in one, bytes a second (the data sheet's)."""
TIMES = ("issue_us", "issue_mean_us", "shared_us", "shared_mean_us", "hmma_us", "dram_us")


@dataclasses.dataclass
class LaunchCost:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    blocks_run: int
    issue_us: float
    """Warp instructions of the busiest block × ⌈blocks / SMs⌉ / (4 × clock)."""
    issue_mean_us: float
    """The same by the mean of the blocks that were run."""
    shared_us: float
    """Clocks of shared memory, of the busiest block in that respect."""
    shared_mean_us: float
    hmma_us: float
    read_bytes: int
    written_bytes: int
    """That the launch touches, each once."""
    stored_sectors: int
    ideal_sectors: int
    instructions: int
    """Warp instructions of the whole grid, by the mean of the blocks that were run."""
    parts: dict[str, float]
    """Shares of the instructions."""

    @property
    def dram_us(self) -> float:
        return (self.read_bytes + self.written_bytes) / DRAM * 1e6


def cost_of(launch: Launch, counts: Counts, memory: Memory) -> LaunchCost:
    """Of a launch of which some blocks were run, since ``memory.forget()``."""
    kernel = launch.kernel
    run = len(counts.block_instructions)
    waves = math.ceil(launch.blocks / SMS)
    instructions = sum(counts.block_instructions)
    stored = sum(n for pc, n in counts.sectors.items() if kernel.instructions[pc].name in ("STG", "ST"))
    written = sum(2 * int(seen.sum()) for seen in memory.written.values())
    return LaunchCost(
        kernel=str(kernel),
        grid=launch.grid,
        threads=launch.threads,
        shared_bytes=launch.shared + kernel.static_shared,
        registers=kernel.registers,
        stack_bytes=kernel.stack,
        blocks_run=run,
        issue_us=max(counts.block_instructions) * waves / SCHEDULERS / CLOCK * 1e6,
        issue_mean_us=instructions / run * waves / SCHEDULERS / CLOCK * 1e6,
        shared_us=max(counts.block_shared) * waves / CLOCK * 1e6,
        shared_mean_us=sum(counts.block_shared) / run * waves / CLOCK * 1e6,
        hmma_us=max(counts.block_tensor) * waves / CLOCK * 1e6,
        read_bytes=_touched(launch, run, memory, memory.read),
        written_bytes=_touched(launch, run, memory, memory.written),
        stored_sectors=stored,
        ideal_sectors=math.ceil(written / 32),
        instructions=round(instructions / run * launch.blocks),
        parts=parts(kernel, counts),
    )


def _touched(launch: Launch, run: int, memory: Memory, seen: dict[int, np.ndarray]) -> int:
    """Bytes that all blocks touch: those that the blocks which were run did, for all, but no more than a tensor has."""
    sizes = dict(zip(memory.starts.tolist(), (memory.ends - memory.starts).tolist(), strict=True))
    touched = (min(sizes[start], 2 * int(pairs.sum()) * launch.blocks / run) for start, pairs in seen.items())
    return round(sum(touched))


def parts(kernel: Kernel, counts: Counts) -> dict[str, float]:
    """Shares of the instructions by file and function, the largest first."""
    total = sum(counts.instructions.values())
    found: collections.Counter[str] = collections.Counter()
    for pc, n in counts.instructions.items():
        found[part(kernel.instructions[pc])] += n
    return {name: round(n / total, 4) for name, n in found.most_common()}


def part(instruction: Instruction) -> str:
    """The innermost function of a kernel family (a folder of csrc/cuda); what all families share counts where it is
    used."""
    frames = [(path, line) for path, line in instruction.source if "/csrc/" in path]
    family = next((f for f in frames if Path(f[0]).parent.parent.name == "cuda"), frames[0] if frames else None)
    if family is None:
        return "no source line"
    path, line = family
    name = _functions(path)[line - 1] if line <= len(_functions(path)) else ""
    return f"{Path(path).name}:{name or line}"


@functools.cache
def _functions(path: str) -> list[str]:
    """For each line of a source file, the function around it, as the indentation tells."""
    names, current, pending = [], "", False
    for line in Path(path).read_text().splitlines():
        if re.match(r" {0,2}[A-Za-z_]", line) or pending:
            found = [n for n in re.findall(r"(\w+)\(", line) if n not in _NO_NAMES]
            declares = "__device__" in line or "__global__" in line or pending
            pending = declares and not found
            if declares and found:
                current = found[0]
        names.append(current)
    return names


_NO_NAMES = {"__launch_bounds__", "sizeof", "alignof", "decltype", "static_assert", "__align__"}
