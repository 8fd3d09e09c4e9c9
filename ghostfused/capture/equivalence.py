"""Whether a program computes what its model does: both run, on the example and on random numbers."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ..numerics import relative_error, rounded_anew

Inputs = tuple[Tensor, ...]

_SAME = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far two ways of computing a network may differ, relative to the largest output: ten times what their rounding makes
but in networks that enlarge it."""
_FACTOR = 4  # of what the rounding of the inputs makes of the model's own outputs


def calls(inputs: Inputs, dynamic_batch: bool) -> list[Inputs]:
    """What to run on: ``inputs``, and random numbers, of other batches too if they may come."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(x: Tensor, batch: int | None) -> Tensor:
        if not x.is_floating_point():
            return x if batch is None or x.dim() == 0 else x[:1].expand(batch, *x.shape[1:]).contiguous()
        shape = x.shape if batch is None or x.dim() == 0 else (batch, *x.shape[1:])
        return torch.empty(shape, dtype=x.dtype).normal_(generator=generator)

    return [
        inputs,
        *(tuple(random(x, batch) for x in inputs) for batch in ((None, 1, 3) if dynamic_batch else (None,))),
    ]


def computes_the_same(
    program: Callable[..., Any], model: Callable[..., Any], call: Inputs, rounds_to: torch.dtype
) -> bool:
    """A network may enlarge what rounding makes: where the outputs differ by more than others' do, they may differ by a few
    times what the model's own do on inputs that differ by less than rounding. ``rounds_to``: the coarsest type on the way.
    """

    def limit(expected: Any) -> float:
        return max(_SAME.get(t, 1e-9) for t in (expected.dtype, rounds_to)) if isinstance(expected, Tensor) else 1e-9

    def anew(x: Tensor) -> list[Tensor]:
        return rounded_anew(x, 4, dtype=rounds_to) if x.is_floating_point() else [x] * 4

    def outputs(run: Callable[..., Any], inputs: Inputs) -> list[Any]:
        return pytree.tree_leaves(run(*(x.clone() for x in inputs)))

    def differences(pairs: list[tuple[list[Any], list[Any]]]) -> list[float]:
        """Of each output, the median."""
        each = [[_difference(*pair) for pair in zip(*both, strict=True)] for both in pairs]
        return [statistics.median(column) for column in zip(*each, strict=True)]

    expected, out = outputs(model, call), outputs(program, call)
    if len(out) != len(expected) or not all(map(_is_like, out, expected)):
        return False
    if all(d < limit(e) for d, e in zip(differences([(out, expected)]), expected, strict=True)):
        return True
    again = outputs(model, call)
    if not all(_is_like(a, e) and _difference(a, e) < limit(e) for a, e in zip(again, expected, strict=True)):
        return False  # it draws random numbers, or remembers
    near = list(zip(*map(anew, call), strict=True))
    theirs = [outputs(model, each) for each in near]
    ours = [outputs(program, each) for each in near]
    if not all(_is_like(*pair) for both in zip(ours, theirs, strict=True) for pair in zip(*both, strict=True)):
        return False
    own = differences([(each, expected) for each in theirs])
    found = differences([(out, expected), *zip(ours, theirs, strict=True)])
    return all(f < max(limit(e), _FACTOR * o) for f, o, e in zip(found, own, expected, strict=True))


def _is_like(out: Any, expected: Any) -> bool:
    """Of the same kind, and equal where nothing is rounded."""
    if not isinstance(out, Tensor) or not isinstance(expected, Tensor):
        return type(out) is type(expected) and out == expected
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return False
    if not expected.is_floating_point():
        return torch.equal(out, expected)
    return torch.equal(out.isfinite(), expected.isfinite())


def _difference(out: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor) or not expected.is_floating_point():
        return 0.0
    finite = expected.isfinite()
    return relative_error(out[finite], expected[finite]) if finite.any() else 0.0


def in_range(program: Callable[..., Any], exact: Callable[..., Any], inputs: Inputs, dtype: torch.dtype) -> None:
    """Raises ValueError if numbers of ``exact``, a network of float32, are too large for ``program``'s ``dtype``."""
    pairs = zip(pytree.tree_leaves(program(*inputs)), pytree.tree_leaves(exact(*inputs)), strict=True)
    if not all(_is_like(*pair) for pair in pairs):
        raise ValueError(f"dtype: expected a type that holds all numbers of the network, got {dtype}")
