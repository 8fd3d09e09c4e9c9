"""Branches, barriers, moves, special registers, and what lanes of a warp tell each other."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .instructions import opcode, unknown
from .kernel import Instruction
from .machine import Action, Gang
from .memory import Array
from .operands import (
    I32,
    I64,
    U32,
    Read,
    address_parts,
    filled,
    first_lane,
    is_predicate,
    read,
    read_predicate,
    register,
    without_predicates,
    write,
    write_predicate,
)

SHARED_WINDOW = 0x7E0000000000
"""Where generic addresses of shared memory start."""


def conditional(*names: str) -> Callable:
    """Registers a maker for instructions that decide where lanes go on. Their first operands may be predicates: the lanes
    for which one is false go on behind the instruction."""

    def register(maker: Callable[[Instruction, list[str]], Action]) -> Callable:
        def make(i: Instruction) -> Action:
            count = next((k for k, t in enumerate(i.operands) if not is_predicate(t)), len(i.operands))
            conditions = [read_predicate(t) for t in i.operands[:count]]
            action = maker(i, i.operands[count:])
            if not conditions:
                return action

            def act(g: Gang, m: Array) -> None:
                taken = m
                for condition in conditions:
                    taken = taken & condition(g)
                g.go_on(i.pc + 16, m & ~taken)
                action(g, taken)

            return act

        return opcode(*names)(make)

    return register


@opcode(
    "NOP", "MEMBAR", "ERRBAR", "CCTL", "YIELD", "ACQBULK", "PREEXIT", "NANOSLEEP", "CGAERRBAR", "FENCE", "WARPGROUP"
)
def nothing(i: Instruction) -> Action:
    """Memory is in order here, and nothing takes time."""
    return lambda g, m: None


def _barrier_register(text: str) -> int:
    if not re.fullmatch(r"B\d+", text):
        raise NotImplementedError(f"operand {text}")
    return int(text[1:])


@opcode("BSSY")
def will_meet(i: Instruction) -> Action:
    """The lanes that are here will meet at the register's BSYNC."""
    number = _barrier_register(i.operands[0])

    def act(g: Gang, m: Array) -> None:
        np.copyto(g.convergence[number], m, where=m.any(axis=1, keepdims=True))

    return act


@conditional("BSYNC")
def meet(i: Instruction, operands: list[str]) -> Action:
    number = _barrier_register(operands[0])
    return lambda g, m: g.meet(i.pc + 16, m, g.convergence[number])


@conditional("BREAK")
def will_not_meet(i: Instruction, operands: list[str]) -> Action:
    number = _barrier_register(operands[0])

    def act(g: Gang, m: Array) -> None:
        g.convergence[number] &= ~m
        g.let_meet(m)
        g.go_on(i.pc + 16, m)

    return act


@conditional("WARPSYNC")
def meet_all(i: Instruction, operands: list[str]) -> Action:
    """Of the lanes that a mask names, or all."""
    names = read(operands[0]) if operands else None

    def act(g: Gang, m: Array) -> None:
        expected = g.alive
        if names is not None:
            expected = expected & (first_lane(names(g), m) >> g.lane & U32(1)).astype(bool)
        g.meet(i.pc + 16, m, expected)

    return act


@opcode("BMOV")
def move_barrier_register(i: Instruction) -> Action:
    """To or from a register, as a mask of lanes."""
    to, source = i.operands
    clears = "CLEAR" in i.modifiers
    if to.startswith("B"):
        number, a = _barrier_register(to), read(source)

        def restore(g: Gang, m: Array) -> None:
            lanes = (first_lane(a(g), m) >> g.lane & U32(1)).astype(bool)
            np.copyto(g.convergence[number], lanes, where=m.any(axis=1, keepdims=True))

        return restore
    d, number = write(to), _barrier_register(source)

    def save(g: Gang, m: Array) -> None:
        bits = (g.convergence[number].astype(U32) << g.lane).sum(axis=1, keepdims=True).astype(U32)
        d(g, m, bits)
        if clears:
            g.convergence[number] &= ~m.any(axis=1, keepdims=True)

    return save


@opcode("LDGDEPBAR")
def commit_copies(i: Instruction) -> Action:
    return lambda g, m: g.race.commit(g, m) if g.race else None


@opcode("DEPBAR")
def wait_for_copies(i: Instruction) -> Action:
    pending = int(i.operands[1], 0) if len(i.operands) > 1 and "LE" in i.modifiers else 0
    return lambda g, m: g.race.wait(g, m, pending) if g.race else None


@conditional("BRA", "JMP", "CALL")
def branch(i: Instruction, operands: list[str]) -> Action:
    """A call's return address is in a register. With DIV, warps go there of which other lanes are active than a mask
    names."""
    if set(i.modifiers) - {"U", "DIV", "REL", "ABS", "NOINC"}:
        raise unknown(i)
    target = int(operands[-1], 16)
    if "DIV" not in i.modifiers:
        return lambda g, m: g.go_on(target, m)
    names = read(operands[0])

    def act(g: Gang, m: Array) -> None:
        named = (names(g) >> g.lane & U32(1)).astype(bool)
        diverged = m & (m != named).any(axis=1, keepdims=True)
        g.go_on(target, diverged)
        g.go_on(i.pc + 16, m & ~diverged)

    return act


def _scatter(g: Gang, m: Array, targets: Array) -> None:
    for target in np.unique(targets[m]):
        g.go_on(int(target), m & (targets == target))


@conditional("BRX", "RET")
def indirect(i: Instruction, operands: list[str]) -> Action:
    match = re.match(r"(R\d+)(?:\.\w+)? (-?0x[0-9a-f]+)", operands[0])
    if match is None:
        raise unknown(i)
    source = read(match[1])
    base = int(match[2], 16) + i.pc + 16 if i.name == "BRX" else 0
    return lambda g, m: _scatter(g, m, source(g).view(I32).astype(I64) + base)


@conditional("EXIT")
def leave(i: Instruction, operands: list[str]) -> Action:
    def act(g: Gang, m: Array) -> None:
        g.alive &= ~m
        if g.meeting:
            g.let_meet()

    return act


@opcode("BAR")
def barrier(i: Instruction) -> Action:
    wait = "SYNC" in i.modifiers
    if not wait and "ARV" not in i.modifiers:
        raise unknown(i)
    number, count = read(i.operands[0]), read(i.operands[1]) if len(i.operands) > 1 else None

    def act(g: Gang, m: Array) -> None:
        if not m.any():
            return
        which = np.broadcast_to(number(g), m.shape)
        threads = None if count is None else int(np.broadcast_to(count(g), m.shape)[m][0])
        for n in np.unique(which[m]):
            g.arrive(int(n), threads, m & (which == n), i.pc + 16, wait)

    return act


@opcode("MOV", "UMOV")
def move(i: Instruction) -> Action:
    d, a = write(i.operands[0]), read(i.operands[1])
    return lambda g, m: d(g, m, a(g))


@opcode("CS2R")
def clear(i: Instruction) -> Action:
    if i.operands[1] != "SRZ":
        raise unknown(i)
    first, zero = register(i.operands[0]), filled(0)
    targets = [write(f"R{first + k}") for k in range(1 if "32" in i.modifiers else 2)]

    def act(g: Gang, m: Array) -> None:
        for target in targets:
            target(g, m, zero)

    return act


def _block_index(axis: int) -> Read:
    def index(g: Gang) -> Array:
        x, y, _ = g.launch.grid
        linear = g.blocks[g.block_of][:, None]
        return (linear % x if axis == 0 else linear // x % y if axis == 1 else linear // (x * y)).astype(U32)

    return index


def _thread_index(axis: int) -> Read:
    def index(g: Gang) -> Array:
        x, y, _ = g.launch.block
        t = g.thread
        return t % U32(x) if axis == 0 else t // U32(x) % U32(y) if axis == 1 else t // U32(x * y)

    return index


SPECIAL: dict[str, Read] = {
    "SR_TID.X": _thread_index(0),
    "SR_TID.Y": _thread_index(1),
    "SR_TID.Z": _thread_index(2),
    "SR_CTAID.X": _block_index(0),
    "SR_CTAID.Y": _block_index(1),
    "SR_CTAID.Z": _block_index(2),
    "SR_LANEID": lambda g: g.lane,
    "SR_CgaCtaId": lambda g: filled(0),
    "SR_SWINHI": lambda g: filled(SHARED_WINDOW >> 32),
    "SR_LTMASK": lambda g: (np.uint64(1) << g.lane.astype(np.uint64)).astype(U32) - U32(1),
}


@opcode("S2R", "S2UR")
def special(i: Instruction) -> Action:
    if i.operands[1] not in SPECIAL:
        raise unknown(i)
    d, source = write(i.operands[0]), SPECIAL[i.operands[1]]
    return lambda g, m: d(g, m, source(g))


@opcode("R2UR")
def to_uniform(i: Instruction) -> Action:
    operands = without_predicates(i.operands)
    d, a = write(operands[0]), read(operands[1])
    return lambda g, m: d(g, m, first_lane(a(g), m))


@opcode("P2R")
def pack_predicates(i: Instruction) -> Action:
    if i.modifiers:
        raise unknown(i)
    d, a, kept = write(i.operands[0]), read(i.operands[2]), U32(int(i.operands[3], 0))

    def act(g: Gang, m: Array) -> None:
        bits = np.zeros(m.shape, U32)
        for k in range(7):
            bits |= g.P[k].astype(U32) << U32(k)
        d(g, m, (bits & kept) | (a(g) & ~kept))

    return act


@opcode("R2P")
def unpack_predicates(i: Instruction) -> Action:
    if i.modifiers:
        raise unknown(i)
    a, kept = read(i.operands[1]), int(i.operands[2], 0)

    def act(g: Gang, m: Array) -> None:
        bits = a(g)
        for k in range(7):
            if kept >> k & 1:
                np.copyto(g.P[k], (bits >> U32(k) & U32(1)).astype(bool), where=m)

    return act


@opcode("LDC", "ULDC")
def load_constant(i: Instruction) -> Action:
    match = re.fullmatch(r"c\[(0x[0-9a-f]+)\]\[([^\]]*)\]", i.operands[1])
    if match is None:
        raise unknown(i)
    bank = int(match[1], 16)
    reg, _, _, uniform, offset = address_parts(match[2])
    sizes = {"U8": 1, "U16": 2, "64": 8}
    size = next((sizes[x] for x in i.modifiers if x in sizes), 4)
    if set(i.modifiers) - {*sizes, "32"}:
        raise unknown(i)
    prefix = "UR" if i.operands[0].startswith("UR") else "R"
    if i.operands[0] in ("RZ", "URZ"):
        return lambda g, m: None
    first = int(i.operands[0][len(prefix) :])
    targets = [write(f"{prefix}{first + k}") for k in range(max(1, size // 4))]

    def act(g: Gang, m: Array) -> None:
        if reg is None and uniform is None and size >= 4:
            for k, target in enumerate(targets):
                target(g, m, g.constant(bank, offset + 4 * k))
            return
        at = np.full((1, 1), offset, I64)
        if reg is not None:
            at = at + g.R[reg].view(I32)
        if uniform is not None:
            at = at + g.UR[uniform]
        raw = g.banks[bank]
        at = np.where(m.any(axis=1, keepdims=True) if at.shape[-1] == 1 else m, at, 0)
        for k, target in enumerate(targets):
            value = sum(raw[at + 4 * k + byte].astype(U32) << U32(8 * byte) for byte in range(min(size, 4)))
            target(g, m, np.asarray(value, U32))

    return act


# Between lanes


@opcode("SHFL")
def shuffle(i: Instruction) -> Action:
    p, d = write_predicate(i.operands[0]), write(i.operands[1])
    a, b, c = (read(t) for t in i.operands[2:5])
    mode = i.modifiers[0]

    def act(g: Gang, m: Array) -> None:
        lane = np.arange(32)[None, :]
        y, z = b(g).astype(I64), c(g).astype(I64)
        clamp, segment = z & 31, (z >> 8) & 31
        high, low = (lane & segment) | (clamp & ~segment), lane & segment
        if mode == "IDX":
            j = (y & ~segment & 31) | low
            ok = j <= high
        elif mode == "UP":
            j = lane - (y & 31)
            ok = j >= high
        else:
            j = lane + (y & 31) if mode == "DOWN" else lane ^ (y & 31)
            ok = j <= high
        j = np.broadcast_to(np.where(ok, j, lane) & 31, m.shape)
        d(g, m, np.take_along_axis(np.broadcast_to(a(g), m.shape), j, axis=1))
        p(g, m, np.broadcast_to(ok, m.shape))

    return act


@opcode("VOTE", "VOTEU")
def vote(i: Instruction) -> Action:
    source = read_predicate(i.operands[-1])
    mode = i.modifiers[0]
    if mode not in ("ALL", "ANY", "EQ"):
        raise unknown(i)
    predicates = [write_predicate(t) for t in i.operands[:-1] if is_predicate(t)]
    registers = [write(t) for t in i.operands[:-1] if not is_predicate(t)]

    def act(g: Gang, m: Array) -> None:
        value = np.broadcast_to(source(g), m.shape)
        some, every = (value & m).any(axis=1, keepdims=True), (value | ~m).all(axis=1, keepdims=True)
        result = some if mode == "ANY" else every if mode == "ALL" else every | ~some
        ballot = ((value & m).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(axis=1, keepdims=True)
        for p in predicates:
            p(g, m, result)
        for d in registers:
            d(g, m, ballot.astype(U32))

    return act
