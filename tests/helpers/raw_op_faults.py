"""A call of a raw op, and what may be wrong with it, drawn by seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghostfused.spec.checks import absent_memory

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 4, 5, 8, 31, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, -1e-9, 0.0, 1e-5, 0.5, 1e300)
LONG = (2**31 - 1, 2**31, 2**33, 2**40)
"""Sizes of a dimension that no kernel takes."""


class Call(NamedTuple):
    op: str
    arguments: list
    names: list[str]


def _cut(rng: random.Random, t: Tensor) -> Tensor:
    """Its storage is freed, or has lost some bytes at the end."""
    t = t.clone()
    t.untyped_storage().resize_(0 if rng.random() < 0.5 else max(t.untyped_storage().nbytes() - rng.randint(1, 64), 0))
    return t


def _resized(rng: random.Random, t: Tensor) -> Tensor:
    if not t.dim():
        return t
    sizes, d = list(t.shape), rng.randrange(t.dim())
    sizes[d] = max(sizes[d] + rng.choice((-2, -1, 1, 2, 7)), 0)
    return torch.randn(sizes).to(t.dtype)


def _expanded(rng: random.Random, t: Tensor) -> Tensor:
    """One number everywhere, along one dimension as many as no kernel takes, or as many as there were."""
    sizes = list(t.shape)
    if sizes and rng.random() < 0.5:
        sizes[rng.randrange(len(sizes))] = rng.choice(LONG)
    try:
        return torch.ones((), dtype=t.dtype).expand(sizes)
    except RuntimeError:  # more elements than PyTorch counts
        return t


def _strided(rng: random.Random, t: Tensor) -> Tensor:
    """The same numbers with gaps between them, in any order of dimensions, and any stride where the size is one."""
    order = rng.sample(range(t.dim()), t.dim())
    strides, step = [0] * t.dim(), rng.choice((1, 2))
    for d in order:
        strides[d] = rng.choice((2**62, 2**40, 0)) if t.shape[d] == 1 else step
        step *= t.shape[d] if t.numel() else 1  # beside a size of 0 another may be more than memory holds
    buffer = torch.zeros(step + 5, dtype=t.dtype)
    return buffer.as_strided(t.shape, strides, rng.randint(0, 4)).copy_(t)


TENSOR_FAULTS: list[Callable[[random.Random, Tensor], Any]] = [
    _cut,
    _resized,
    _expanded,
    _strided,
    lambda rng, t: t.to(rng.choice((*DTYPES, torch.float64, torch.int32, torch.complex64, torch.bool))),
    lambda rng, t: t.to("meta"),
    lambda rng, t: t.to_sparse(),
    lambda rng, t: t.unsqueeze(rng.randint(0, t.dim())),
    lambda rng, t: t[0] if t.dim() and t.shape[0] else t,
    lambda rng, t: t.transpose(0, -1) if t.dim() else t,
    lambda rng, t: torch._neg_view(t) if t.is_floating_point() else t,
    lambda rng, t: t.reshape(-1)[:0],
    lambda rng, t: None,
]


def _damage_list(rng: random.Random, values: list, fault: Callable[[Any], Any]) -> None:
    """Changes, drops, repeats or swaps some of ``values``, or cuts them short."""
    at, other = (rng.randrange(len(values)) if values else 0 for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0 or not values:
        values.insert(at, fault(values[at] if values else None))
    elif kind == 1:
        del values[at : len(values) if rng.random() < 0.3 else at + 1]
    elif kind == 2:
        values[at], values[other] = values[other], values[at]
    else:
        values[at] = fault(values[at])


def _near(rng: random.Random, value: int | None) -> int:
    """Another number, near ``value`` more often than not."""
    return rng.choice(INTS) if value is None or rng.random() < 0.3 else value + rng.choice((-3, -2, -1, 1, 2, 4))


def damage(rng: random.Random, call: Call) -> None:
    """One fault in one of its arguments."""

    def tensor_fault(t: Tensor | None) -> Tensor | None:
        if t is None:
            t = torch.ones(3)
        # PyTorch itself can't touch memory that isn't there, or so much of it
        untouchable = t.is_meta or absent_memory(t) or t.numel() >= min(LONG)
        return t if untouchable else rng.choice(TENSOR_FAULTS)(rng, t)

    def list_fault(t: Tensor | None) -> Tensor:
        changed = tensor_fault(t)
        return torch.ones(2, 1) if changed is None else changed

    at = rng.randrange(len(call.arguments))
    value = call.arguments[at]
    if call.names[at] == "tensors":
        _damage_list(rng, value, list_fault)
    elif call.names[at] == "code":
        _damage_list(rng, value, lambda number: _near(rng, number))
    elif call.names[at] == "numbers":
        _damage_list(rng, value, lambda _: rng.choice(FLOATS))
    elif value is None or isinstance(value, Tensor):
        call.arguments[at] = tensor_fault(value)
    elif isinstance(value, bool):
        call.arguments[at] = not value
    elif isinstance(value, int):
        call.arguments[at] = _near(rng, value)
    else:
        call.arguments[at] = rng.choice(FLOATS)
