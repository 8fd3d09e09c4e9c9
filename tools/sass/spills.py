"""Local memory, where registers are spilled to."""

from __future__ import annotations

import numpy as np

from .instructions import opcode
from .kernel import Instruction
from .machine import Action, Gang
from .memory import Array
from .operands import U32, address_parts, read, register, write
from .transfer import access_size


def _local(i: Instruction, text: str) -> tuple[int, int]:
    """The first word, and how many."""
    return address_parts(text[1:-1])[4] // 4, max(1, access_size(i) // 4)


def _local_words(g: Gang, count: int) -> Array:
    if len(g.local) < count:
        more = np.full((count - len(g.local), g.warps, 32), 0xFFFFFFFF, U32)
        g.local = np.concatenate([g.local, more])
    return g.local


@opcode("STL")
def store_local(i: Instruction) -> Action:
    first, count = _local(i, i.operands[0])
    sources = [read("RZ" if i.operands[1] == "RZ" else f"R{register(i.operands[1]) + k}") for k in range(count)]

    def act(g: Gang, m: Array) -> None:
        words = _local_words(g, first + count)
        for k, source in enumerate(sources):
            np.copyto(words[first + k], source(g), where=m)

    return act


@opcode("LDL")
def load_local(i: Instruction) -> Action:
    first, count = _local(i, i.operands[1])
    targets = [write(f"R{register(i.operands[0]) + k}") for k in range(count)]

    def act(g: Gang, m: Array) -> None:
        words = _local_words(g, first + count)
        for k, target in enumerate(targets):
            target(g, m, words[first + k])

    return act
