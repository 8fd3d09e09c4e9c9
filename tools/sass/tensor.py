"""Products of the tensor cores (mma.sync)."""

from __future__ import annotations

import re

import numpy as np

from .instructions import opcode, unknown
from .kernel import Instruction
from .machine import SHARED_BASE, Action, Gang
from .memory import Array, Fault
from .operands import F32, U32, ZERO_REGISTER, conversions, is_predicate, register

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


_SWIZZLE = {0: 0, 1: 7, 2: 3, 3: 1}
"""By a descriptor's code, the 16-byte units of a row that change places, as a mask: rows of 16, 128, 64 or 32 bytes."""


def _described(g: Gang, m: Array, first: int, rows: Array, k: int, transposed: bool) -> Array:
    """(warps, rows, k) halves of shared memory that the descriptor in two uniform registers says, K adjacent or, if
    transposed, rows."""
    active = np.asarray(m.any(axis=1)).reshape(-1, 1, 1)
    one = int(active.argmax())  # other warps' registers may hold anything
    low, high = (np.where(active, v[:, :, None], v[one]).astype(np.int64) for v in (g.UR[first], g.UR[first + 1]))
    code = int(high[0, 0, 0]) >> 30
    if code == 0:
        raise NotImplementedError("a matrix descriptor without swizzle")
    row_bytes = 16 * (_SWIZZLE[code] + 1)
    start, group = (low & 0x3FFF) << 4, (high & 0x3FFF) << 4
    rows = rows[:, :, None]
    ks = np.arange(k)
    if transposed:
        next_rows, half = (low >> 16 & 0x3FFF) << 4, row_bytes // 2
        at = start + rows // half * next_rows + ks // 8 * group + ks % 8 * row_bytes + rows % half * 2
    else:
        at = start + rows // 8 * group + rows % 8 * row_bytes + 2 * ks
    at = at ^ ((at >> 7 & _SWIZZLE[code]) << 4)
    if at.min() < SHARED_BASE or at.max() + 2 > g.shared_size:
        where = f"descriptor {int(high[0, 0, 0]):#x}:{int(low[0, 0, 0]):#x}"
        raise Fault(f"{where}: shared access out of bounds: {at.min():#x} to {at.max() + 2:#x} of {g.shared_size:#x}")
    return g.shared16[(at + g.shared_at[:, :, None]) // 2].astype(U32)


@opcode("HGMMA")
def group_product(i: Instruction) -> Action:
    """wgmma: each warp of four has 16 of the 64 rows; A and B are in shared memory, or A in registers."""
    rest = [t for t in i.operands if not is_predicate(t) and not t.startswith("gsb")]
    shape = re.fullmatch(r"64x(\d+)x16", i.modifiers[0])
    if shape is None or "F32" not in i.modifiers or set(i.modifiers[1:]) - {"F32", "BF16"}:
        raise unknown(i)
    n, widen = int(shape[1]), conversions("BF16" in i.modifiers)[0]
    d, c = register(rest[0]), register(rest[-1])
    a = register(rest[1]) if len(rest) == 4 else None
    match = re.fullmatch(r"gdesc\[UR(\d+)\]((?:\.tnsp[AB])*)", rest[-2])
    if match is None or any(t.startswith("UP") for t in i.operands):
        raise unknown(i)
    first, tnsp_a, tnsp_b = int(match[1]), "tnspA" in match[2], "tnspB" in match[2]

    def act(g: Gang, m: Array) -> None:
        if g.race:
            raise NotImplementedError(f"{i.text}: not in the check for races")
        own_rows = g.warp_in_block % 4 * 16 + np.arange(16)
        if a is None:
            left = widen(_described(g, m, first, own_rows, 16, tnsp_a)).astype(np.float64)
        else:
            left = np.zeros((g.warps, 16, 16))
            for r in range(4):
                row, column, v = _GROUP + 8 * (r % 2), 2 * _QUAD + 8 * (r // 2), g.R[a + r]
                left[:, row, column], left[:, row, column + 1] = widen(v), widen(v >> U32(16))
        columns = np.broadcast_to(np.arange(n), (g.warps, n))
        right = widen(_described(g, m, first + 2 if a is None else first, columns, 16, tnsp_b)).astype(np.float64)
        total = left @ right.swapaxes(1, 2)
        for j in range(n // 8):
            for r, (row, column) in enumerate(_RESULT):
                value = total[:, row, 8 * j + column]
                if c != ZERO_REGISTER:
                    value = value + g.R[c + 4 * j + r].view(F32)
                np.copyto(g.R[d + 4 * j + r], value.astype(F32).view(U32), where=m)
        g.tensor_clocks[m.any(axis=1)] += n // 8

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
