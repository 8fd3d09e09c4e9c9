"""Checks of a user's arguments: nothing reaches a kernel unchecked, and each error names the argument."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .activations import Act
from .arguments import (
    DTYPES,
    Args,
    CastArgs,
    DepthwiseArgs,
    Gate,
    GhostArgs,
    GlobalPoolArgs,
    LinearArgs,
    SqueezeExciteArgs,
    Step,
    tensor_names,
)

_FLOATS = (*DTYPES, torch.float64)


def activation(
    name: str, act: str | Act, slope_name: str, slope: float | Tensor | None
) -> tuple[int, float, Tensor | None]:
    """(Act, LeakyReLU's slope, PReLU's weight) of an activation; the names are the arguments', for errors."""
    if isinstance(act, Act):
        kind = act
    else:
        try:
            kind = Act[act.upper()]
        except (KeyError, AttributeError):
            names = [a.name.lower() for a in Act]
            raise ValueError(f"{name}: expected one of {names}, got {act!r}") from None
    if kind == Act.PRELU:
        if not isinstance(slope, Tensor):
            raise TypeError(f"{slope_name}: PReLU expects its weight as a tensor, got {type(slope).__name__}")
        return int(kind), 0.0, slope
    if isinstance(slope, Tensor) or (slope is not None and kind != Act.LEAKY_RELU):
        raise TypeError(f"{slope_name}: expected None with {kind.name.lower()}, got {type(slope).__name__}")
    return int(kind), 0.01 if slope is None else float(slope), None


def gate_kind(gate: str | Gate) -> int:
    """The Gate of a squeeze-and-excite block."""
    try:
        return int(Gate[gate.upper()] if isinstance(gate, str) else Gate(gate))
    except (KeyError, ValueError):
        raise ValueError(f"gate: expected one of {[g.name.lower() for g in Gate]}, got {gate!r}") from None


def _expect(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got}")


def _shape(name: str, t: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(t.shape) != expected:
        raise _expect(name, f"shape {meaning} = {expected}", tuple(t.shape))


def _norm_and_slope(args: GhostArgs | DepthwiseArgs, half: str, channels: int, meaning: str) -> None:
    """``half`` is what the fields' names begin with: "primary_", "cheap_" or nothing."""
    mean, var = getattr(args, f"{half}mean"), getattr(args, f"{half}var")
    if (mean is None) != (var is None):
        raise _expect(f"{half}bn", "both mean and var, or neither", "one of them")
    for field in ("bias", "mean", "var", "gamma", "beta"):
        t = getattr(args, f"{half}{field}")
        if t is not None:
            if mean is None and field != "bias":
                raise _expect(f"{half}{field}", "None without mean and var", "a tensor")
            _shape(f"{half}{field}", t, (channels,), meaning)
    eps = getattr(args, f"{half}eps")
    if not eps >= 0:
        raise _expect(f"{half}eps", "a number that is not negative", eps)
    slope = getattr(args, f"{half}slope")
    if slope is not None and tuple(slope.shape) not in ((1,), (channels,)):
        raise _expect(f"{half}slope", f"shape (1,) or {meaning} = ({channels},)", tuple(slope.shape))


def absent_memory(t: Tensor) -> str | None:
    """Which memory ``t`` should have and hasn't; None if all is there, or nobody can tell, as for a fake or a wrapper."""
    if t.layout != torch.strided:
        return f"expected a dense tensor, got layout {t.layout}"
    if t.is_meta or not t.numel():
        return None
    try:
        stored = t.untyped_storage().nbytes()
        last = (
            t.numel()
            if t.is_contiguous()
            else 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        )
    except (RuntimeError, NotImplementedError):  # those have no storage to ask
        return None
    if stored < (t.storage_offset() + last) * t.element_size():
        return f"expected a storage that holds all of it, got one of {stored} bytes: it has been freed or cut"
    return None


def check_memory(names: Iterable[str], tensors: Iterable[Tensor | None]) -> None:
    """Raises RuntimeError for the first tensor whose memory isn't there, as the extensions' own check does: PyTorch reads
    such a tensor all the same."""
    for name, t in zip(names, tensors, strict=False):
        if t is not None and (absent := absent_memory(t)):
            raise RuntimeError(f"{name}: {absent}")


def validate(args: Args) -> None:
    """Raises ValueError or TypeError for the first argument that doesn't fit; else returns."""
    _tensors(args)
    _CHECKS[type(args)](args)


def dimensions(args: Step) -> None:
    """Raises ValueError or TypeError unless the tensors that every call has have as many dimensions as they should."""
    for name, ndim in _DIMENSIONS[type(args)].items():
        t = getattr(args, name)
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if ndim is not None and t.dim() != ndim:
            raise _expect(name, f"{ndim} dimensions", f"{t.dim()} (shape {tuple(t.shape)})")


def _tensors(args: Args) -> None:
    """Types, dtypes and devices of all tensors; numbers of dimensions of those that can't be None."""
    x = args.x
    dimensions(args)
    if x.dtype not in _FLOATS:
        raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    for name, t in zip(tensor_names(type(args)), args, strict=False):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(t).__name__}")
        if t.device != x.device:
            raise _expect(name, f"x's device {x.device}", t.device)
        if t.dtype != x.dtype and not (t.dtype == torch.float32 and name.endswith(("mean", "var", "gamma", "beta"))):
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")
        # a traced tensor has no memory yet
        if not torch.compiler.is_compiling() and type(t) in (Tensor, nn.Parameter) and (absent := absent_memory(t)):
            raise ValueError(f"{name}: {absent}")
    if x.shape[1] < 1:
        raise _expect("x", "at least one channel", tuple(x.shape))
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise _expect("x", "height and width of at least 1", tuple(x.shape))


def _ghost_module(args: GhostArgs) -> None:
    x, pw, cw = args.x, args.primary_weight, args.cheap_weight
    for name in ("stride", "dilation", "groups", "out_channels"):
        if getattr(args, name) < 1:
            raise _expect(name, "a positive number", getattr(args, name))
    cp, k = pw.shape[0], pw.shape[2]
    if cp < 1:
        raise _expect("primary_weight", "at least one channel", tuple(pw.shape))
    if pw.shape[3] != k or k % 2 == 0:
        raise _expect("primary_weight", "an odd square kernel", f"{k}×{pw.shape[3]}")
    if pw.shape[1] * args.groups != x.shape[1] or cp % args.groups:
        raise _expect(
            "primary_weight",
            f"shape (init_channels, in_channels / groups, k, k) with in_channels = {x.shape[1]}, groups = {args.groups}",
            tuple(pw.shape),
        )
    new, d = cw.shape[0], cw.shape[2]
    if new < cp or new % cp or cw.shape[1] != 1:
        raise _expect(
            "cheap_weight", f"shape (init_channels * (ratio - 1), 1, d, d) with init_channels = {cp}", tuple(cw.shape)
        )
    if cw.shape[3] != d or d % 2 == 0:
        raise _expect("cheap_weight", "an odd square kernel", f"{d}×{cw.shape[3]}")
    if args.out_channels > cp + new:
        raise _expect("out_channels", f"at most init_channels * ratio = {cp + new}", args.out_channels)
    _norm_and_slope(args, "primary_", cp, "(init_channels,)")
    _norm_and_slope(args, "cheap_", new, "(init_channels * (ratio - 1),)")

    if args.input_gate is not None:
        _shape("input_gate", args.input_gate, tuple(x.shape[:2]), "(N, in_channels)")
    shape = args.output_shape()
    if args.residual is not None:
        _shape("residual", args.residual, shape, "of the output")
    gate = args.output_gate
    if gate is not None and (gate.dim() != 4 or tuple(gate.shape[:2]) != shape[:2] or 0 in gate.shape[2:]):
        raise _expect("output_gate", f"shape (N, out_channels, Hg, Wg) with {shape[:2]}", tuple(gate.shape))


def _depthwise(args: DepthwiseArgs) -> None:
    channels, weight = args.x.shape[1], args.weight
    if args.stride < 1:
        raise _expect("stride", "a positive number", args.stride)
    if tuple(weight.shape[:2]) != (channels, 1) or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise _expect("weight", f"shape (C, 1, kh, kw) with C = {channels} and an odd kernel", tuple(weight.shape))
    _norm_and_slope(args, "", channels, "(C,)")


def _squeeze_excite(args: SqueezeExciteArgs) -> None:
    channels, reduced = args.x.shape[1], args.reduce_weight.shape[0]
    for name, sizes, meaning in (
        ("reduce_weight", (reduced, channels), "(R, C)"),
        ("expand_weight", (channels, reduced), "(C, R)"),
    ):
        t = getattr(args, name)
        _shape(name, t[:, :, 0, 0] if t.shape[2:] == (1, 1) else t, sizes, meaning)
    if reduced < 1:
        raise _expect("reduce_weight", "at least one row", tuple(args.reduce_weight.shape))
    for name, size, meaning in (("reduce_bias", reduced, "(R,)"), ("expand_bias", channels, "(C,)")):
        t = getattr(args, name)
        if t is not None:
            _shape(name, t, (size,), meaning)
    if args.act in (Act.LEAKY_RELU, Act.PRELU):
        raise _expect("act", "an activation without a slope", Act(args.act).name.lower())


_CHECKS: dict = {GhostArgs: _ghost_module, DepthwiseArgs: _depthwise, SqueezeExciteArgs: _squeeze_excite}
_DIMENSIONS: dict[type[Step], dict[str, int | None]] = {
    GhostArgs: {"x": 4, "primary_weight": 4, "cheap_weight": 4},
    DepthwiseArgs: {"x": 4, "weight": 4},
    SqueezeExciteArgs: {"x": 4},
    GlobalPoolArgs: {"x": 4},
    LinearArgs: {"x": None, "weight": 2},  # that of a map of one pixel may have 4 or 2
    CastArgs: {"x": None},
}
