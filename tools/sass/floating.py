"""Arithmetic of float32 and packed halves, and conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .instructions import opcode, unknown
from .integer import COMPARE, combine
from .kernel import Instruction
from .machine import Action, Gang
from .memory import Array
from .operands import (
    F32,
    F64,
    I32,
    I64,
    U32,
    U64,
    conversions,
    float_to_half,
    read,
    read_float,
    read_pair,
    read_pairs,
    read_predicate,
    write,
    write_predicate,
)


@opcode("FADD")
def add(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read_float(i.operands[1]), read_float(i.operands[2])
    return lambda g, m: d(g, m, a(g) + b(g))


@opcode("FMUL")
def multiply(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read_float(i.operands[1]), read_float(i.operands[2])
    return lambda g, m: d(g, m, a(g) * b(g))


@opcode("FFMA")
def multiply_add(i: Instruction) -> Action:
    d, a, b, c = write(i.operands[0]), *(read_float(t) for t in i.operands[1:4])
    return lambda g, m: d(g, m, (a(g).astype(F64) * b(g) + c(g)).astype(F32))


@opcode("FSEL")
def select(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read_float(i.operands[1]), read_float(i.operands[2])
    p = read_predicate(i.operands[3])
    return lambda g, m: d(g, m, np.where(p(g), a(g), b(g)))


def _min_max(x: Array, y: Array, smaller: Array, nan: bool) -> Array:
    low, high = (np.minimum, np.maximum) if nan else (np.fmin, np.fmax)
    return np.where(smaller, low(x, y), high(x, y))


@opcode("FMNMX")
def min_max(i: Instruction) -> Action:
    d, a, b = write(i.operands[0]), read_float(i.operands[1]), read_float(i.operands[2])
    p, nan = read_predicate(i.operands[3]), "NAN" in i.modifiers
    return lambda g, m: d(g, m, _min_max(a(g), b(g), p(g), nan))


@opcode("FSETP")
def compare(i: Instruction) -> Action:
    p, q = write_predicate(i.operands[0]), write_predicate(i.operands[1])
    a, b, c = read_float(i.operands[2]), read_float(i.operands[3]), read_predicate(i.operands[4])
    kind = i.modifiers[0]
    unordered = len(kind) == 3 and kind.endswith("U")
    base = kind[:2] if unordered else kind
    if base not in COMPARE and base not in ("NAN", "NUM"):
        raise unknown(i)

    def act(g: Gang, m: Array) -> None:
        x, y = a(g), b(g)
        none = np.isnan(x) | np.isnan(y)
        v = none if base == "NAN" else ~none if base == "NUM" else COMPARE[base](x, y)
        first, second = combine(i.modifiers, v | none if unordered else v, c(g))
        p(g, m, first)
        q(g, m, second)

    return act


@opcode("FCHK")
def check_division(i: Instruction) -> Action:
    """Whether a quotient needs the slow way."""
    p, a, b = write_predicate(i.operands[0]), read_float(i.operands[-2]), read_float(i.operands[-1])

    def act(g: Gang, m: Array) -> None:
        x, y = np.abs(a(g)), np.abs(b(g))
        p(g, m, ~(((x == 0) | ((x > 1e-30) & (x < 1e30))) & (y > 1e-30) & (y < 1e30)))

    return act


_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "RCP": lambda x: F32(1) / x,
    "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
    "LG2": np.log2,
    "TANH": np.tanh,
}


@opcode("MUFU")
def function(i: Instruction) -> Action:
    if i.modifiers[0] not in _FUNCTIONS:
        raise unknown(i)
    d, a, f = write(i.operands[0]), read_float(i.operands[1]), _FUNCTIONS[i.modifiers[0]]
    return lambda g, m: d(g, m, np.asarray(f(a(g)), F32))


@opcode("I2F", "I2FP")
def from_integer(i: Instruction) -> Action:
    d, a = write(i.operands[0]), read(i.operands[1])
    unsigned, up = "U32" in i.modifiers, "RP" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        bits = a(g)
        exact = bits.astype(F64) if unsigned else bits.view(I32).astype(F64)
        v = exact.astype(F32)
        d(g, m, np.where(v.astype(F64) < exact, np.nextafter(v, F32(np.inf)), v) if up else v)

    return act


_ROUNDINGS: dict[str, Callable[[Array], Array]] = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}


@opcode("F2I")
def to_integer(i: Instruction) -> Action:
    d, a, unsigned = write(i.operands[0]), read_float(i.operands[1]), "U32" in i.modifiers
    rounding = next((f for name, f in _ROUNDINGS.items() if name in i.modifiers), np.rint)

    def act(g: Gang, m: Array) -> None:
        x = np.nan_to_num(rounding(a(g).astype(F64)))
        if unsigned:
            d(g, m, np.clip(x, 0, 2**32 - 1).astype(U64).astype(U32))
        else:
            d(g, m, np.clip(x, -(2**31), 2**31 - 1).astype(I64).astype(I32))

    return act


@opcode("FRND")
def round_to_integer(i: Instruction) -> Action:
    if set(i.modifiers) - {"FTZ", *_ROUNDINGS}:
        raise unknown(i)
    d, a = write(i.operands[0]), read_float(i.operands[1])
    rounding = next((f for name, f in _ROUNDINGS.items() if name in i.modifiers), np.rint)
    return lambda g, m: d(g, m, rounding(a(g)))


@opcode("F2FP")
def pack(i: Instruction) -> Action:
    if "PACK_AB" not in i.modifiers:
        raise unknown(i)
    d, a, b = write(i.operands[0]), read_float(i.operands[1]), read_float(i.operands[2])
    narrow, relu = conversions("BF16" in i.modifiers)[1], "RELU" in i.modifiers

    def act(g: Gang, m: Array) -> None:
        x, y = a(g), b(g)
        if relu:
            x, y = np.maximum(x, F32(0)), np.maximum(y, F32(0))
        d(g, m, (narrow(x) << U32(16)) | narrow(y))

    return act


@opcode("F2F")
def convert(i: Instruction) -> Action:
    d, a = write(i.operands[0]), read_float(i.operands[1])
    if i.modifiers[:2] == ("F16", "F32"):
        return lambda g, m: d(g, m, float_to_half(a(g)))
    if i.modifiers and i.modifiers[0].startswith("TF32"):
        return lambda g, m: d(g, m, (a(g).view(U32) + U32(0x1000)) & U32(0xFFFFE000))
    raise unknown(i)


def _is_bfloat(i: Instruction) -> bool:
    return any(x.startswith("BF16") for x in i.modifiers)


def _packed(i: Instruction, low: Array, high: Array) -> Array:
    """Two float64 or float32 results in one word, rounded once."""
    bfloat = _is_bfloat(i)
    if not bfloat:
        bits = [v.astype(np.float16).view(np.uint16).astype(U32) for v in (low, high)]
    else:
        bits = [conversions(True)[1](v.astype(F32)) for v in (low, high)]
    return (bits[1] << U32(16)) | bits[0]


@opcode("HADD2")
def half_add(i: Instruction) -> Action:
    d = write(i.operands[0])
    if "F32" in i.modifiers:  # a conversion: -0 + x
        a, b = (read_pair(t, _is_bfloat(i)) for t in i.operands[1:3])
        return lambda g, m: d(g, m, a(g)[0] + b(g)[0])
    x, y = read_pairs(i.operands[1:], _is_bfloat(i))

    def act(g: Gang, m: Array) -> None:
        (x0, x1), (y0, y1) = x(g), y(g)
        d(g, m, _packed(i, x0.astype(F64) + y0, x1.astype(F64) + y1))

    return act


@opcode("HMUL2")
def half_multiply(i: Instruction) -> Action:
    d = write(i.operands[0])
    x, y = read_pairs(i.operands[1:], _is_bfloat(i))

    def act(g: Gang, m: Array) -> None:
        (x0, x1), (y0, y1) = x(g), y(g)
        d(g, m, _packed(i, x0 * y0, x1 * y1))

    return act


@opcode("HFMA2")
def half_multiply_add(i: Instruction) -> Action:
    d, relu = write(i.operands[0]), "RELU" in i.modifiers
    x, y, z = read_pairs(i.operands[1:], _is_bfloat(i))

    def act(g: Gang, m: Array) -> None:
        (x0, x1), (y0, y1), (z0, z1) = x(g), y(g), z(g)
        low, high = x0.astype(F64) * y0 + z0, x1.astype(F64) * y1 + z1
        if relu:
            low, high = np.maximum(low, 0), np.maximum(high, 0)
        d(g, m, _packed(i, low, high))

    return act


@opcode("HMNMX2")
def half_min_max(i: Instruction) -> Action:
    d, p, nan = write(i.operands[0]), read_predicate(i.operands[-1]), "NAN" in i.modifiers
    x, y = read_pairs(i.operands[1:-1], _is_bfloat(i))

    def act(g: Gang, m: Array) -> None:
        (x0, x1), (y0, y1), smaller = x(g), y(g), p(g)
        d(g, m, _packed(i, _min_max(x0, y0, smaller, nan), _min_max(x1, y1, smaller, nan)))

    return act
