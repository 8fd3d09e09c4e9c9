"""Products of the tensor cores (mma.sync)."""

from __future__ import annotations

import numpy as np

from .instructions import opcode, unknown
from .kernel import Instruction
from .machine import Action, Gang
from .memory import Array
from .operands import F32, U32, ZERO_REGISTER, conversions, register

_GROUP, _QUAD = np.arange(32) // 4, np.arange(32) % 4
# Of the 16 × 8 result, the element of each of a lane's four registers.
_RESULT = [(_GROUP + 8 * (r // 2), 2 * _QUAD + r % 2) for r in range(4)]


def _registers(g: Gang, first: int, count: int) -> list[Array]:
    if first == ZERO_REGISTER:
        return [np.zeros((g.warps, 32), U32)] * count
    return [g.R[first + r] for r in range(count)]


@opcode("HMMA")
def product(i: Instruction) -> Action:
    """D = A B + C: 16 × K times K × 8, added in float32."""
    d, a, b, c = (register(t) for t in i.operands[:4])
    shape = i.modifiers[0]
    if "F32" not in i.modifiers or not shape.startswith(("16816", "1688", "1684")):
        raise unknown(i)
    tf32 = "TF32" in i.modifiers
    k = 16 if shape.startswith("16816") else 8 if shape.startswith("1688") else 4
    widen = conversions("BF16" in i.modifiers)[0]
    clocks = max(1, k // (4 if tf32 else 8))

    def tf32_operands(g: Gang, left: Array, right: Array) -> None:
        keep = U32(0xFFFFE000)
        for r, v in enumerate(_registers(g, a, k // 2)):
            left[:, _GROUP + 8 * (r % 2), _QUAD + 4 * (r // 2)] = (v & keep).view(F32)
        for r, v in enumerate(_registers(g, b, k // 4)):
            right[:, _QUAD + 4 * r, _GROUP] = (v & keep).view(F32)

    def half_operands(g: Gang, left: Array, right: Array) -> None:
        for r, v in enumerate(_registers(g, a, k // 4)):
            row, column = _GROUP + 8 * (r % 2), 2 * _QUAD + 8 * (r // 2)
            left[:, row, column], left[:, row, column + 1] = widen(v), widen(v >> U32(16))
        for r, v in enumerate(_registers(g, b, k // 8)):
            row = 2 * _QUAD + 8 * r
            right[:, row, _GROUP], right[:, row + 1, _GROUP] = widen(v), widen(v >> U32(16))

    def act(g: Gang, m: Array) -> None:
        left, right = np.zeros((g.warps, 16, k)), np.zeros((g.warps, k, 8))
        (tf32_operands if tf32 else half_operands)(g, left, right)
        total = left @ right
        for r, (row, column) in enumerate(_RESULT):
            if c != ZERO_REGISTER:
                total[:, row, column] += g.R[c + r].view(F32)
        for r, (row, column) in enumerate(_RESULT):
            np.copyto(g.R[d + r], total[:, row, column].astype(F32).view(U32), where=m)
        g.tensor_clocks[m.any(axis=1)] += clocks

    return act


@opcode("MOVM")
def transpose(i: Instruction) -> Action:
    if "MT88" not in i.modifiers:
        raise unknown(i)
    d, a = register(i.operands[0]), register(i.operands[1])

    def act(g: Gang, m: Array) -> None:
        v, matrix = g.R[a], np.zeros((g.warps, 8, 8), U32)
        matrix[:, _GROUP, 2 * _QUAD], matrix[:, _GROUP, 2 * _QUAD + 1] = v & U32(0xFFFF), v >> U32(16)
        matrix = matrix.swapaxes(1, 2)
        np.copyto(g.R[d], matrix[:, _GROUP, 2 * _QUAD] | matrix[:, _GROUP, 2 * _QUAD + 1] << U32(16), where=m)

    return act
