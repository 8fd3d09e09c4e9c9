"""Operands of instructions: functions of a gang that read or write arrays over (warps, lanes) or, if uniform, (warps, 1)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import Array

if TYPE_CHECKING:
    from .machine import Gang

Read = Callable[["Gang"], Array]
Write = Callable[["Gang", Array, Array], None]
"""(gang, mask, value)"""
U32, I32, F32, U64, I64, F64 = np.uint32, np.int32, np.float32, np.uint64, np.int64, np.float64
ZERO_REGISTER = 255


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


def register(text: str) -> int:
    return ZERO_REGISTER if text == "RZ" else int(text[1:])


def filled(value: int) -> Array:
    return np.full((1, 1), value & 0xFFFFFFFF, U32)


def first_lane(value: Array, mask: Array) -> Array:
    """Of each warp, the value in its first active lane."""
    if value.shape[-1] == 1:
        return value
    return np.take_along_axis(np.broadcast_to(value, mask.shape), mask.argmax(axis=1)[:, None], axis=1)


def address_parts(inner: str) -> tuple[int | None, int, bool, int | None, int]:
    """``R4.64+UR6+0x10`` → register, its scale, whether it is of 64 bits, uniform register, offset."""
    reg, scale, wide, uniform, offset = None, 1, False, None, 0
    for part in re.findall(r"[+-]?[^+-]+", inner.replace(" ", "")):
        sign, p = -1 if part[0] == "-" else 1, part.lstrip("+-")
        if p.startswith("UR"):
            match = re.match(r"UR(\d+)", p)
            uniform = int(match[1]) if match else None
        elif p.startswith("R"):
            name, _, suffix = p.partition(".")
            reg = None if name == "RZ" else register(name)
            wide = "64" in suffix
            if match := re.search(r"X(\d+)", suffix):
                scale = int(match[1])
        else:
            offset += sign * int(p, 16)
    return reg, scale, wide, uniform, offset


def constant(text: str) -> Read | None:
    """A 32-bit word ``c[0x0][0x470]`` or ``c[0x0][UR4+0x10]``; None if the text is something else."""
    match = re.fullmatch(r"c\[(0x[0-9a-f]+)\]\[([^\]]*)\]", text)
    if match is None:
        return None
    bank = int(match[1], 16)
    reg, _, _, uniform, offset = address_parts(match[2])
    if reg is not None:
        raise NotImplementedError(f"operand {text}")
    if uniform is None:
        return lambda g: g.constant(bank, offset)

    def indexed(g: Gang) -> Array:
        return g.banks[bank].view(U32)[(g.UR[uniform].astype(I64) + offset) // 4]

    return indexed


def read(text: str) -> Read:
    """A 32-bit operand's bits."""
    negated, body = text.startswith("-"), text.lstrip("-")
    inverted, body = body.startswith("~"), body.lstrip("~")
    absolute, body = "|" in body, body.replace("|", "")
    if re.fullmatch(r"0x[0-9a-f]+|\d+", body):
        value = int(body, 0)
        fixed = filled(~value if inverted else -value if negated else value)
        return lambda g: fixed
    source: Read | None
    if body in ("RZ", "URZ"):
        zero = filled(0)
        source = lambda g: zero  # noqa: E731
    elif match := re.fullmatch(r"(U?)R(\d+)", body):
        i = int(match[2])
        source = (lambda g: g.UR[i]) if match[1] else (lambda g: g.R[i])
    else:
        source = constant(body)
    if source is None:
        raise NotImplementedError(f"operand {text}")
    plain: Read = source
    if absolute:
        magnitude = plain
        plain = lambda g: np.abs(magnitude(g).view(I32)).view(U32)  # noqa: E731
    if inverted:
        return lambda g: ~plain(g)
    if negated:
        return lambda g: U32(0) - plain(g)
    return plain


def _literal(text: str) -> float | None:
    body = text.lstrip("+")
    if body in ("INF", "QNAN", "SNAN"):
        return float("inf") if body == "INF" else float("nan")
    return float(body) if re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", body) else None


def read_float(text: str) -> Read:
    """A float32 operand, with its sign and | |."""
    negated, body = text.startswith("-"), text.lstrip("-")
    absolute, body = "|" in body, body.replace("|", "")
    if not body.startswith("0x") and (value := _literal(body)) is not None:
        value = abs(value) if absolute else value
        fixed = np.full((1, 1), -value if negated else value, F32)
        return lambda g: fixed
    source = read(body)
    if absolute:
        return (lambda g: -np.abs(source(g).view(F32))) if negated else (lambda g: np.abs(source(g).view(F32)))
    return (lambda g: -source(g).view(F32)) if negated else (lambda g: source(g).view(F32))


def read_wide(text: str) -> Read:
    """A 64-bit operand: a pair of registers, of words of a constant bank, or a number."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text) or text in ("RZ", "URZ"):
        fixed = np.full((1, 1), 0 if text.endswith("Z") else int(text, 0) & 0xFFFFFFFFFFFFFFFF, U64)
        return lambda g: fixed
    if match := re.fullmatch(r"(U?)R(\d+)", text):
        low, high = read(text), read(f"{match[1]}R{int(match[2]) + 1}")
    elif match := re.fullmatch(r"(c\[0x[0-9a-f]+\])\[(0x[0-9a-f]+)\]", text):
        low, high = read(text), read(f"{match[1]}[{int(match[2], 16) + 4:#x}]")
    else:
        raise NotImplementedError(f"64-bit operand {text}")
    return lambda g: low(g).astype(U64) | (high(g).astype(U64) << U64(32))


def write(text: str) -> Write:
    """A 32-bit destination."""
    if text in ("RZ", "URZ"):
        return lambda g, m, v: None
    if text.startswith("UR"):
        i = int(text[2:])

        def uniform(g: Gang, m: Array, v: Array) -> None:
            np.copyto(g.UR[i], first_lane(v.view(U32), m), where=m.any(axis=1, keepdims=True))

        return uniform
    i = register(text)

    def lanes(g: Gang, m: Array, v: Array) -> None:
        np.copyto(g.R[i], v if v.dtype == U32 else v.view(U32), where=m)

    return lanes


def write_wide(text: str) -> Write:
    """A 64-bit destination."""
    if text in ("RZ", "URZ"):
        return lambda g, m, v: None
    prefix = text.rstrip("0123456789")
    low, high = write(text), write(f"{prefix}{int(text[len(prefix) :]) + 1}")

    def pair(g: Gang, m: Array, v: Array) -> None:
        low(g, m, (v & U64(0xFFFFFFFF)).astype(U32))
        high(g, m, (v >> U64(32)).astype(U32))

    return pair


def read_predicate(text: str) -> Read:
    negated, body = text.startswith("!"), text.lstrip("!")
    i = 7 if body.endswith("T") else int(body[-1])
    if body[0] == "U":
        return (lambda g: ~g.UP[i]) if negated else (lambda g: g.UP[i])
    return (lambda g: ~g.P[i]) if negated else (lambda g: g.P[i])


def write_predicate(text: str) -> Write:
    if text in ("PT", "UPT"):
        return lambda g, m, v: None
    i = int(text[-1])
    if text[0] == "U":
        return lambda g, m, v: np.copyto(g.UP[i], first_lane(v, m), where=m.any(axis=1, keepdims=True))
    return lambda g, m, v: np.copyto(g.P[i], v, where=m)


def without_predicates(operands: list[str]) -> list[str]:
    return [t for t in operands if not is_predicate(t)]


# Packed halves


def half_to_float(bits: Array) -> Array:
    """The low half of each word."""
    return (bits & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F32)


def float_to_half(value: Array) -> Array:
    return value.astype(np.float16).view(np.uint16).astype(U32)


def bfloat_to_float(bits: Array) -> Array:
    return ((bits & U32(0xFFFF)) << U32(16)).view(F32)


def float_to_bfloat(value: Array) -> Array:
    bits = value.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(value), U32(0x7FFF), rounded) & U32(0xFFFF)


def conversions(bfloat: bool) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    return (bfloat_to_float, float_to_bfloat) if bfloat else (half_to_float, float_to_half)


ReadPair = Callable[["Gang"], tuple[Array, Array]]


def read_pair(text: str, bfloat: bool) -> ReadPair:
    """A packed operand's low and high value, with its swizzle."""
    negated, body = text.startswith("-"), text.lstrip("-")
    absolute, body = "|" in body, body.replace("|", "")
    base, _, swizzle = body.partition(".")
    widen, source = conversions(bfloat)[0], read(base)

    def pair(g: Gang) -> tuple[Array, Array]:
        bits = source(g)
        if swizzle == "H0_H0":
            low = high = widen(bits)
        elif swizzle == "H1_H1":
            low = high = widen(bits >> U32(16))
        elif swizzle == "F32":
            low = high = bits.view(F32)
        else:
            low, high = widen(bits), widen(bits >> U32(16))
        if absolute:
            low, high = np.abs(low), np.abs(high)
        return (-low, -high) if negated else (low, high)

    return pair


def read_pairs(operands: list[str], bfloat: bool) -> list[ReadPair]:
    """All packed operands; an immediate is two numbers in the text, the high one first."""
    out: list[ReadPair] = []
    k = 0

    def number(text: str) -> float | None:
        value = _literal(text.lstrip("-"))
        return None if value is None else -value if text.startswith("-") else value

    while k < len(operands):
        high = number(operands[k])
        low = number(operands[k + 1]) if high is not None and k + 1 < len(operands) else None
        if high is not None and low is not None:
            fixed = np.full((1, 1), low, F32), np.full((1, 1), high, F32)
            out.append(lambda g, fixed=fixed: fixed)  # type: ignore[misc]
            k += 2
        else:
            out.append(read_pair(operands[k], bfloat))
            k += 1
    return out
