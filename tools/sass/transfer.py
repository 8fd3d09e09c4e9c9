"""Loads, stores, asynchronous copies and atomics; clocks of shared memory and sectors of global memory."""

from __future__ import annotations

import re

import numpy as np

from .instructions import opcode, unknown
from .kernel import Instruction
from .machine import SHARED_BASE, Action, Gang
from .memory import Array, Fault
from .operands import (
    F32,
    I64,
    U32,
    ZERO_REGISTER,
    Read,
    address_parts,
    read,
    read_predicate,
    register,
    without_predicates,
    write,
)

_SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def access_size(i: Instruction) -> int:
    """Bytes a lane moves."""
    return next((_SIZES[x] for x in i.modifiers if x in _SIZES), 4)


# Addresses


def shared_address(text: str) -> Read:
    """``[R4+UR6+0x10]`` as an offset in the block's shared memory."""
    reg, scale, _, uniform, offset = address_parts(text[1:-1])

    def address(g: Gang) -> Array:
        at = np.full((1, 1), offset, I64)
        if reg is not None:
            at = at + g.R[reg].astype(I64) * scale
        if uniform is not None:
            at = at + g.UR[uniform]
        return np.broadcast_to(at & 0xFFFFFFFF, (g.warps, 32))

    return address


def global_address(text: str) -> Read:
    """``desc[UR10][R48.64+0x10]`` or ``[R2.64+UR4+0x8]``."""
    match = re.fullmatch(r"(?:desc\[UR\d+\])?\[([^\]]*)\]", text)
    if match is None:
        raise NotImplementedError(f"address {text}")
    reg, _, wide, uniform, offset = address_parts(match[1])

    def address(g: Gang) -> Array:
        at = np.full((1, 1), offset, I64)
        if reg is not None:
            at = at + g.R[reg]
            if wide:
                at = at + (g.R[reg + 1].astype(I64) << 32)
        if uniform is not None:
            at = at + (g.UR[uniform] + (g.UR[uniform + 1].astype(I64) << 32))
        return np.broadcast_to(at, (g.warps, 32))

    return address


def checked_shared(g: Gang, at: Array, m: Array, size: int) -> Array:
    """Positions in ``g.shared8`` of the lanes' accesses (of an inactive lane, anything)."""
    inside = at[m]
    if inside.size:
        if inside.min() < SHARED_BASE or inside.max() + size > g.shared_size:
            raise Fault(
                f"shared access out of bounds: {inside.min():#x} to {inside.max() + size:#x} of {g.shared_size:#x}"
            )
        if (inside % size).any():
            raise Fault("misaligned shared access")
    return at + g.shared_at


# Costs, which depend on the lanes' addresses among themselves only: each pattern is computed once


_clocks: dict[tuple[int, bytes], Array] = {}
_sectors: dict[tuple[int, bytes], Array] = {}


def _pattern(at: Array, m: Array, unit: int) -> Array:
    """Addresses relative to each warp's lowest, which starts a line of ``unit`` bytes; -1 for inactive lanes."""
    low = np.where(m, at, np.int64(1) << 62).min(axis=1, keepdims=True) // unit * unit
    return np.where(m, at - low, -1).astype(np.int32)


def _remember(memo: dict[tuple[int, bytes], Array], key: tuple[int, bytes], value: Array) -> Array:
    if len(memo) > 20_000:
        memo.clear()
    memo[key] = value
    return value


def count_shared(g: Gang, at: Array, m: Array, size: int) -> None:
    """A bank gives a word a clock. 8-byte accesses go by half warps, 16-byte ones by quarters."""
    pattern = _pattern(at, m, 128)
    key = (size, pattern.tobytes())
    found = _clocks.get(key)
    if found is None:
        found = _remember(_clocks, key, _shared_clocks(pattern, size))
    g.shared_clocks += found
    g.count_shared[g.pc] += int(found.sum())


def _shared_clocks(pattern: Array, size: int) -> Array:
    phases = 1 if size <= 4 else 2 if size == 8 else 4
    warps, lanes = np.nonzero(pattern >= 0)
    group = warps * phases + lanes * phases // 32
    words = pattern[warps, lanes].astype(np.int64) // 4
    keys = np.concatenate([group << 32 | (words + k) for k in range(max(1, size // 4))])
    keys = np.unique(keys)  # lanes that want the same word share it
    banks = np.bincount((keys >> 32) * 32 + (keys & 31), minlength=pattern.shape[0] * phases * 32)
    return banks.reshape(-1, phases, 32).max(axis=2).sum(axis=1)


def count_sectors(g: Gang, at: Array, m: Array, size: int) -> None:
    pattern = _pattern(at, m, 32)
    key = (size, pattern.tobytes())
    found = _sectors.get(key)
    if found is None:
        warps, lanes = np.nonzero(pattern >= 0)
        sectors = pattern[warps, lanes].astype(np.int64) // 32
        keys = np.unique(warps << 32 | sectors)
        found = _remember(_sectors, key, np.bincount(keys >> 32, minlength=pattern.shape[0]))
    g.sectors += found
    g.count_sectors[g.pc] += int(found.sum())


# Bytes


def _views(g: Gang, shared: bool) -> tuple[Array, Array, Array]:
    if shared:
        return g.shared8, g.shared16, g.shared32
    return g.memory.u8, g.memory.u16, g.memory.u32


def _load(g: Gang, shared: bool, at: Array, m: Array, size: int, target: int, signed: bool) -> None:
    """Moves ``size`` bytes from position ``at`` of each active lane into its registers."""
    if target == ZERO_REGISTER:
        return
    bytes_, halves, words = _views(g, shared)
    every = bool(m.all())
    index = at if every else at[m]
    for k in range(max(1, size // 4)):
        if size >= 4:
            value = words[index // 4 + k]
        elif size == 2:
            value = halves[index // 2].astype(U32)
            value = value | (value >> U32(15)) * U32(0xFFFF0000) if signed else value
        else:
            value = bytes_[index].astype(U32)
            value = value | (value >> U32(7)) * U32(0xFFFFFF00) if signed else value
        if every:
            g.R[target + k] = value
        else:
            g.R[target + k][m] = value


def _store(g: Gang, shared: bool, at: Array, m: Array, size: int, source: int) -> None:
    bytes_, halves, words = _views(g, shared)
    index = at[m]
    for k in range(max(1, size // 4)):
        value = g.R[source + k][m] if source != ZERO_REGISTER else np.zeros(len(index), U32)
        if size >= 4:
            words[index // 4 + k] = value
        elif size == 2:
            halves[index // 2] = value.astype(np.uint16)
        else:
            bytes_[index] = value.astype(np.uint8)


# Shared memory


@opcode("LDS")
def load_shared(i: Instruction) -> Action:
    if i.guard == "@!PT":
        return lambda g, m: None
    size, target, address = access_size(i), register(i.operands[0]), shared_address(i.operands[1])
    signed = "S16" in i.modifiers or "S8" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        at = address(g)
        place = checked_shared(g, at, m, size)
        count_shared(g, at, m, size)
        if g.race:
            g.race.access(g, place, m, size, write=False)
        _load(g, True, place, m, size, target, signed)

    return act


@opcode("STS")
def store_shared(i: Instruction) -> Action:
    size, address, source = access_size(i), shared_address(i.operands[0]), register(i.operands[1])

    def act(g: Gang, m: Array) -> None:
        at = address(g)
        place = checked_shared(g, at, m, size)
        count_shared(g, at, m, size)
        if g.race:
            g.race.access(g, place, m, size, write=True)
        _store(g, True, place, m, size, source)

    return act


def _matrices(i: Instruction) -> tuple[int, bool]:
    """How many 8 × 8 matrices, and whether they are transposed."""
    return int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1, "MT88" in i.modifiers


_ROW, _COLUMN = np.arange(32) // 4, np.arange(32) % 4 * 2
"""Where in an 8×8 matrix the two elements of each lane begin."""


def _rows(g: Gang, address: Read, m: Array, count: int, write: bool) -> tuple[Array, list[Array]]:
    """Which warps take part, and where in shared memory, in elements, the matrices' elements lie."""
    at = address(g)
    giving = m & (np.arange(32) < 8 * count)
    place = checked_shared(g, at, giving, 16)
    count_shared(g, at, giving, 16)
    if g.race:
        g.race.access(g, place, giving, 16, write=write)
    active = np.asarray(m.any(axis=1))
    return active, [place[active, 8 * k : 8 * k + 8, None] // 2 + np.arange(8) for k in range(count)]


@opcode("LDSM")
def load_matrices(i: Instruction) -> Action:
    count, transposed = _matrices(i)
    target, address = register(i.operands[0]), shared_address(i.operands[1])

    def act(g: Gang, m: Array) -> None:
        active, places = _rows(g, address, m, count, write=False)
        for k, place in enumerate(places):
            matrix = g.shared16[place].astype(U32)
            if transposed:
                matrix = matrix.swapaxes(1, 2)
            g.R[target + k][active] = matrix[:, _ROW, _COLUMN] | matrix[:, _ROW, _COLUMN + 1] << U32(16)

    return act


@opcode("STSM")
def store_matrices(i: Instruction) -> Action:
    count, transposed = _matrices(i)
    address, source = shared_address(i.operands[0]), register(i.operands[1])

    def act(g: Gang, m: Array) -> None:
        active, places = _rows(g, address, m, count, write=True)
        for k, place in enumerate(places):
            bits = g.R[source + k][active]
            matrix = np.zeros((len(bits), 8, 8), np.uint16)
            matrix[:, _ROW, _COLUMN], matrix[:, _ROW, _COLUMN + 1] = bits & U32(0xFFFF), bits >> U32(16)
            if transposed:
                matrix = matrix.swapaxes(1, 2)
            g.shared16[place] = matrix

    return act


# Global memory


@opcode("LDG", "LD")
def load_global(i: Instruction) -> Action:
    operands = without_predicates(i.operands)
    size, target, address = access_size(i), register(operands[0]), global_address(operands[1])
    signed = "S16" in i.modifiers or "S8" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        at = address(g)
        inside = at[m]
        g.memory.check(inside, size, "load")
        if (inside % size).any():
            raise Fault("misaligned global load")
        g.memory.touch(inside, size, g.memory.read)
        count_sectors(g, at, m, size)
        _load(g, False, at - g.memory.base, m, size, target, signed)

    return act


@opcode("STG", "ST")
def store_global(i: Instruction) -> Action:
    size, address, source = access_size(i), global_address(i.operands[0]), register(i.operands[1])

    def act(g: Gang, m: Array) -> None:
        at = address(g)
        inside = at[m]
        g.memory.check(inside, size, "store")
        if (inside % size).any():
            raise Fault("misaligned global store")
        g.memory.touch(inside, size, g.memory.written)
        count_sectors(g, at, m, size)
        _store(g, False, at - g.memory.base, m, size, source)

    return act


@opcode("LDGSTS")
def copy_to_shared(i: Instruction) -> Action:
    """cp.async. Lanes whose predicate is false write zeros; with ZFILL so do the last bytes of those whose global address
    has its low bits set."""
    size, to, source = access_size(i), shared_address(i.operands[0]), global_address(i.operands[1])
    predicate = read_predicate(i.operands[2]) if len(i.operands) > 2 else None
    fill = "ZFILL" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        at, global_at = to(g), source(g)
        place = checked_shared(g, at, m, size)
        copies = m & predicate(g) if predicate is not None else m
        count_shared(g, at, m, size)
        if g.race:
            g.race.copy(g, place, m, size)
        if copies.any():
            low = global_at[copies] % size
            if low.any() and not fill:
                raise Fault("misaligned cp.async")
            start, valid = global_at[copies] - low, size - low
            g.memory.check(start, valid, "cp.async")
            whole = valid == size
            for length in np.unique(valid):
                g.memory.touch(start[valid == length], int(length), g.memory.read)
            count_sectors(g, global_at, copies, size)
            target, offset = place[copies], start - g.memory.base
            if size >= 4 and whole.all():
                for k in range(size // 4):
                    g.shared32[target // 4 + k] = g.memory.u32[offset // 4 + k]
            else:
                for k in range(size):
                    there = np.where(k < valid, offset + k, offset)
                    g.shared8[target + k] = np.where(k < valid, g.memory.u8[there], 0)
        if (empty := m & ~copies).any():
            for k in range(size):
                g.shared8[place[empty] + k] = 0

    return act


@opcode("ATOMG", "ATOM", "RED", "REDG")
def atomic(i: Instruction) -> Action:
    """Additions, one lane after the other."""
    if "ADD" not in i.modifiers or "64" in i.modifiers:
        raise unknown(i)
    operands = without_predicates(i.operands)
    if i.name.startswith("RED"):
        operands = ["RZ", *operands]
    d, address, source = write(operands[0]), global_address(operands[1]), read(operands[2])
    floating = "F32" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        at, value = address(g), np.broadcast_to(source(g), m.shape)
        g.memory.check(at[m], 4, "atomic")
        if (at[m] % 4).any():
            raise Fault("misaligned atomic")
        g.memory.touch(at[m], 4, g.memory.written)
        count_sectors(g, at, m, 4)
        old = np.zeros(m.shape, U32)
        for warp, lane in zip(*np.nonzero(m), strict=True):
            cell = (at[warp, lane] - g.memory.base) // 4
            old[warp, lane] = g.memory.u32[cell]
            if floating:
                total = g.memory.u32[cell : cell + 1].view(F32) + value[warp, lane : lane + 1].view(F32)
                g.memory.u32[cell : cell + 1] = total.view(U32)
            else:
                g.memory.u32[cell] = (int(g.memory.u32[cell]) + int(value[warp, lane])) & 0xFFFFFFFF
        d(g, m, old)

    return act
