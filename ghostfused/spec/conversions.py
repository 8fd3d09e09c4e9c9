"""What users type for an argument, as the ops take it."""

from __future__ import annotations

from torch import Tensor, nn

from .activations import BY_NAME, Act
from .arguments import BatchNorm, Gate
from .checks import _expect

_GATES = {gate.name.lower(): gate for gate in Gate}
_GATE_OF = {gate.value: gate for gate in Gate}
"""Dictionaries for the reason of ``BY_NAME``."""


def activation(
    name: str, act: str | Act, slope_name: str, slope: float | Tensor | None
) -> tuple[int, float, Tensor | None]:
    """(Act, LeakyReLU's slope, PReLU's weight) of an activation; the names are the arguments', for errors."""
    # no errors to catch here and in gate_kind: torch.compile can't trace those of an enum or of a str's method
    kind = BY_NAME.get(act.lower()) if isinstance(act, str) else act
    if not isinstance(kind, Act):
        raise _expect(name, f"one of {[*BY_NAME]}", repr(act))
    if kind == Act.PRELU:
        if not isinstance(slope, Tensor):
            raise TypeError(f"{slope_name}: PReLU expects its weight as a tensor, got {type(slope).__name__}")
        return int(kind), 0.0, slope
    if isinstance(slope, Tensor) or (slope is not None and kind != Act.LEAKY_RELU):
        raise TypeError(f"{slope_name}: expected None with {kind.name.lower()}, got {type(slope).__name__}")
    if slope is not None and not hasattr(slope, "__float__"):
        raise TypeError(f"{slope_name}: expected a number, got {type(slope).__name__} {slope!r}")
    return int(kind), 0.01 if slope is None else float(slope), None


def norm_of(name: str, norm: BatchNorm | nn.Module | None) -> BatchNorm:
    """The stored statistics and affine tensors of ``norm``, all of them None for no norm."""
    if type(norm) is BatchNorm:
        return norm
    if norm is None:
        return _NO_NORM
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise TypeError(
            f"{name}: expected a ghostfused.BatchNorm, an nn.BatchNorm2d or None, got {type(norm).__name__}"
        )
    if norm.running_mean is None:
        raise _expect(name, "a norm that has stored statistics", f"a {type(norm).__name__} without")
    return BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


_NO_NORM = BatchNorm(None, None)


def gate_kind(gate: str | Gate) -> int:
    """The Gate of a squeeze-and-excite block."""
    kind = _GATES.get(gate.lower()) if isinstance(gate, str) else _GATE_OF.get(gate) if isinstance(gate, int) else None
    if kind is None:
        raise _expect("gate", f"one of {[*_GATES]}", repr(gate))
    return int(kind)
