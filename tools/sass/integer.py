"""Integer arithmetic, logic and comparisons, for lanes and for warps (the names with a U)."""

from __future__ import annotations

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
    U64,
    Write,
    is_predicate,
    read,
    read_predicate,
    read_wide,
    without_predicates,
    write,
    write_predicate,
    write_wide,
)

LOW = U64(0xFFFFFFFF)
Compare = Callable[[Array, Array], Array]


def low_word(v: Array) -> Array:
    return (v & LOW).astype(U32)


def carries(operands: list[str]) -> tuple[list[Write], int]:
    """The predicates after the destination, and where the sources start."""
    k = 1
    while is_predicate(operands[k]):
        k += 1
    return [write_predicate(t) for t in operands[1:k]], k


@opcode("IADD3", "UIADD3")
def add3(i: Instruction) -> Action:
    d = write(i.operands[0])
    outs, k = carries(i.operands)
    sources = [(read(t.lstrip("-~")), t.startswith("-"), t.startswith("~")) for t in i.operands[k : k + 3]]
    carry = [read_predicate(t) for t in i.operands[k + 3 :]] if "X" in i.modifiers else []
    if "64" in i.modifiers:
        if outs or carry or any(inverted for _, _, inverted in sources):
            raise unknown(i)
        wide = [(read_wide(t.lstrip("-")), t.startswith("-")) for t in i.operands[k : k + 3]]
        pair = write_wide(i.operands[0])
        zero = np.zeros((1, 1), U64)
        return lambda g, m: pair(g, m, sum(((zero - v(g)) if negated else v(g) for v, negated in wide), zero))
    plain = not outs and not carry
    if plain:  # the usual case, in 32 bits
        terms = [read(t) for t in i.operands[k : k + 3]]
        return lambda g, m: d(g, m, terms[0](g) + terms[1](g) + terms[2](g))

    def act(g: Gang, m: Array) -> None:
        total = np.zeros((1, 1), I64)
        for source, negated, inverted in sources:
            x = source(g).astype(I64)
            if negated:
                x = (x ^ 0xFFFFFFFF) + 1
            elif inverted:
                x = x ^ 0xFFFFFFFF
            total = total + x
        for c in carry:
            total = total + c(g)
        d(g, m, (total & 0xFFFFFFFF).astype(U32))
        for n, out in enumerate(outs):
            out(g, m, total >= (n + 1) << 32)

    return act


@opcode("VIADD")
def add(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read(i.operands[1]), read(i.operands[2])
    return lambda g, m: d(g, m, a(g) + b(g))


def _product(x: Array, y: Array, signed: bool) -> Array:
    if signed:
        return (x.view(I32).astype(I64) * y.view(I32).astype(I64)).view(U64)
    return x.astype(U64) * y.astype(U64)


@opcode("IMAD", "UIMAD")
def multiply_add(i: Instruction) -> Action:
    signed = "U32" not in i.modifiers
    outs, k = carries(i.operands)
    a, b = read(i.operands[k]), read(i.operands[k + 1])
    carry = [read_predicate(t) for t in i.operands[k + 3 :]] if "X" in i.modifiers else []
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        c, high = read_wide(i.operands[k + 2]), "HI" in i.modifiers
        d = write(i.operands[0]) if high else write_wide(i.operands[0])

        def wide(g: Gang, m: Array) -> None:
            x = _product(a(g), b(g), signed)
            v = x + c(g)
            over = v < x
            for p in carry:
                v = v + p(g)
                over = over | ((v == 0) & p(g))
            d(g, m, (v >> U64(32)).astype(U32) if high else v)
            for out in outs:
                out(g, m, over)

        return wide
    d, addend = write(i.operands[0]), read(i.operands[k + 2])
    if not outs and not carry:
        return lambda g, m: d(g, m, a(g) * b(g) + addend(g))

    def act(g: Gang, m: Array) -> None:
        v = (a(g) * b(g)).astype(U64) + addend(g)
        for p in carry:
            v = v + p(g)
        d(g, m, low_word(v))
        for out in outs:
            out(g, m, v >> U64(32) != 0)

    return act


@opcode("LEA", "ULEA")
def scaled_add(i: Instruction) -> Action:
    d = write(i.operands[0])
    outs, k = carries(i.operands)
    rest = i.operands[k:]
    carry = None
    if "X" in i.modifiers:
        carry, rest = read_predicate(rest[-1]), rest[:-1]
    extended = "SX32" in i.modifiers
    high = "HI" in i.modifiers
    a, b, shift = read(rest[0]), read(rest[1]), int(rest[-1], 0)
    upper = read(rest[2]) if high and not extended else None

    def act(g: Gang, m: Array) -> None:
        low = a(g)
        if high:
            top = upper(g) if upper is not None else (low.view(I32) >> I32(31)).view(U32)
            v = (((low.astype(U64) | (top.astype(U64) << U64(32))) << U64(shift)) >> U64(32)) + b(g).astype(U64)
        else:
            v = (low << U32(shift)).astype(U64) + b(g).astype(U64)
        if carry is not None:
            v = v + carry(g).astype(U64)
        d(g, m, low_word(v))
        for out in outs:
            out(g, m, v >> U64(32) != 0)

    return act


@opcode("SHF", "USHF")
def shift(i: Instruction) -> Action:
    d, a, s, c = write(i.operands[0]), *(read(t) for t in i.operands[1:4])
    left, high = "L" in i.modifiers, "HI" in i.modifiers
    wide = "U64" in i.modifiers or "S64" in i.modifiers
    signed = "S32" in i.modifiers or "S64" in i.modifiers
    wrap = "W" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        x, y, n = a(g).astype(U64), c(g).astype(U64), s(g).astype(U64)
        n = n & U64(63 if wide else 31) if wrap else np.minimum(n, U64(63 if wide else 32))
        both = x | (y << U64(32))
        if left:
            v = both << n if wide or high else x << n
            v = v >> U64(32) if high else v
        elif high:
            v = (y.astype(U32).view(I32).astype(I64) >> n.astype(I64)).view(U64) if signed else y >> n
        else:
            v = (both.view(I64) >> n.astype(I64)).view(U64) if signed else both >> n
        d(g, m, low_word(v))

    return act


def lookup(table: int, x: Array, y: Array, z: Array) -> Array:
    """A function of three bits, given as its eight values, of each bit."""
    simple: dict[int, Callable[[], Array]] = {
        0xC0: lambda: x & y,
        0xFC: lambda: x | y,
        0x3C: lambda: x ^ y,
        0x33: lambda: ~y,
    }
    if table in simple:
        return simple[table]()
    v = np.zeros(np.broadcast_shapes(x.shape, y.shape, z.shape), x.dtype)
    for k in range(8):
        if table >> k & 1:
            v = v | ((x if k & 4 else ~x) & (y if k & 2 else ~y) & (z if k & 1 else ~z))
    return v


@opcode("LOP3", "ULOP3")
def logic(i: Instruction) -> Action:
    operands, out = i.operands, None
    if is_predicate(operands[0]):
        out, operands = write_predicate(operands[0]), operands[1:]
    d, a, b, c, table = write(operands[0]), *(read(t) for t in operands[1:4]), int(operands[4], 16)

    def act(g: Gang, m: Array) -> None:
        v = lookup(table, a(g), b(g), c(g))
        d(g, m, v)
        if out:
            out(g, m, v != 0)

    return act


@opcode("PLOP3", "UPLOP3")
def predicate_logic(i: Instruction) -> Action:
    p, q = write_predicate(i.operands[0]), write_predicate(i.operands[1])
    a, b, c = (read_predicate(t) for t in i.operands[2:5])
    first, second = int(i.operands[5], 16), int(i.operands[6], 16)

    def act(g: Gang, m: Array) -> None:
        x, y, z = a(g), b(g), c(g)
        v, other = lookup(first, x, y, z), lookup(second, x, y, z)
        p(g, m, v)
        q(g, m, other)

    return act


@opcode("PRMT", "UPRMT")
def permute(i: Instruction) -> Action:
    if i.modifiers:
        raise unknown(i)
    d, a, s, c = write(i.operands[0]), *(read(t) for t in i.operands[1:4])

    def act(g: Gang, m: Array) -> None:
        both, selector = a(g).astype(U64) | (c(g).astype(U64) << U64(32)), s(g)
        v = np.zeros((1, 1), U32)
        for k in range(4):
            n = (selector >> U32(4 * k)) & U32(0xF)
            byte = ((both >> ((n & U32(7)).astype(U64) * U64(8))) & U64(0xFF)).astype(U32)
            if (n & U32(8)).any():
                byte = np.where(n & U32(8), np.where(byte & U32(0x80), U32(0xFF), U32(0)), byte)
            v = v | byte << U32(8 * k)
        d(g, m, v)

    return act


@opcode("SEL", "USEL")
def select(i: Instruction) -> Action:
    d, a, b, p = write(i.operands[0]), read(i.operands[1]), read(i.operands[2]), read_predicate(i.operands[3])
    return lambda g, m: d(g, m, np.where(p(g), a(g), b(g)))


@opcode("VIMNMX", "IMNMX", "UIMNMX", "VIADDMNMX")
def min_max(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read(i.operands[1]), read(i.operands[2])
    added = i.name == "VIADDMNMX"
    c, p = (read(i.operands[3]), read_predicate(i.operands[4])) if added else (None, read_predicate(i.operands[3]))
    signed, relu = "U32" not in i.modifiers, "RELU" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        x, y = (a(g) + b(g), c(g)) if c is not None else (a(g), b(g))
        if signed:
            x, y = x.view(I32), y.view(I32)
        v = np.where(p(g), np.minimum(x, y), np.maximum(x, y))
        d(g, m, np.maximum(v, I32(0)) if relu else v)

    return act


@opcode("SGXT", "USGXT")
def extend(i: Instruction) -> Action:
    """The lowest bits, with their sign or with zeros."""
    if set(i.modifiers) - {"U32"}:
        raise unknown(i)
    d, a, count = write(i.operands[0]), read(i.operands[1]), read(i.operands[2])
    signed = "U32" not in i.modifiers

    def act(g: Gang, m: Array) -> None:
        up = (U32(32) - np.minimum(count(g), U32(32))).astype(U64)
        v = (a(g).astype(U64) << up & LOW).astype(U32)
        down = np.minimum(up, U64(31)).astype(U32)
        d(g, m, (v.view(I32) >> down.astype(I32)).view(U32) if signed else (v.astype(U64) >> up).astype(U32))

    return act


@opcode("IABS")
def absolute(i: Instruction) -> Action:
    d, a = write(i.operands[0]), read(i.operands[1])
    return lambda g, m: d(g, m, np.abs(a(g).view(I32)).view(U32))


COMPARE: dict[str, Compare] = {
    "LT": lambda x, y: x < y,
    "LE": lambda x, y: x <= y,
    "GT": lambda x, y: x > y,
    "GE": lambda x, y: x >= y,
    "EQ": lambda x, y: x == y,
    "NE": lambda x, y: (x < y) | (x > y),  # false for NaN
}


def combine(modifiers: tuple[str, ...], v: Array, c: Array) -> tuple[Array, Array]:
    """A comparison's two results: with ``v``, and with its opposite."""
    if "OR" in modifiers:
        return v | c, ~v | c
    if "XOR" in modifiers:
        return v ^ c, ~v ^ c
    return v & c, ~v & c


@opcode("ISETP", "UISETP")
def compare(i: Instruction) -> Action:
    p, q = write_predicate(i.operands[0]), write_predicate(i.operands[1])
    a, b = read(i.operands[2]), read(i.operands[3])
    c = read_predicate(i.operands[4] if len(i.operands) > 4 else "PT")
    kind = i.modifiers[0]
    test: Compare = COMPARE[kind]
    signed = "U32" not in i.modifiers
    low = read_predicate(i.operands[5]) if "EX" in i.modifiers else None

    def act(g: Gang, m: Array) -> None:
        x, y = a(g), b(g)
        if signed:
            x, y = x.view(I32), y.view(I32)
        v = test(x, y)
        if low is not None:  # of the low words
            if kind == "EQ":
                v = v & low(g)
            elif kind == "NE":
                v = v | low(g)
            else:
                v = (x < y if kind in ("LT", "LE") else x > y) | ((x == y) & low(g))
        first, second = combine(i.modifiers, v, c(g))
        p(g, m, first)
        q(g, m, second)

    return act


@opcode("POPC", "UPOPC")
def ones(i: Instruction) -> Action:
    d, a = write(i.operands[0]), read(i.operands[1])
    return lambda g, m: d(g, m, np.bitwise_count(a(g)).astype(U32))


@opcode("FLO", "UFLO")
def leading(i: Instruction) -> Action:
    if i.modifiers != ("U32",):
        raise unknown(i)
    operands = without_predicates(i.operands)
    d, a = write(operands[0]), read(operands[1])

    def act(g: Gang, m: Array) -> None:
        x = a(g)
        position = np.floor(np.log2(np.maximum(x, 1).astype(np.float64))).astype(I64)
        d(g, m, np.where(x == 0, U32(0xFFFFFFFF), position.astype(U32)))

    return act


@opcode("IDP")
def dot(i: Instruction) -> Action:
    if i.modifiers[:2] != ("2A", "LO") or "U16" not in i.modifiers or "U8" not in i.modifiers:
        raise unknown(i)
    d, a, b, c = write(i.operands[0]), *(read(t) for t in i.operands[1:4])

    def act(g: Gang, m: Array) -> None:
        x, y = a(g), b(g)
        low = (x & U32(0xFFFF)) * (y & U32(0xFF))
        d(g, m, low + (x >> U32(16)) * (y >> U32(8) & U32(0xFF)) + c(g))

    return act
