"""Checks of a user's arguments: nothing reaches a kernel unchecked, and each error names the argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .activations import Act
from .arguments import DTYPES, Args, DepthwiseArgs, Gate, GhostArgs, SqueezeExciteArgs
from .program_steps import (
    POOL_KERNEL,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    GateArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    Step,
    UpsampleArgs,
    tensor_names,
)

_FLOATS = (*DTYPES, torch.float64)
_NORM = ("mean", "var", "gamma", "beta")


class ArgumentError(ValueError, RuntimeError):
    """An argument of a call doesn't fit. PyTorch's own layers raise RuntimeError of most such inputs, and ValueError of
    others: whoever catches either catches this."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A tensor is of another dtype than it should be, of which PyTorch's own layers raise RuntimeError."""


def _expect(name: str, expected: str, got: object) -> ArgumentError:
    return ArgumentError(f"{name}: expected {expected}, got {got}")


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
    _activation(args, half)
    eps = getattr(args, f"{half}eps")
    if eps < 0:  # of NaN PyTorch makes NaN
        raise _expect(f"{half}eps", "a number that is not negative", eps)
    slope = getattr(args, f"{half}slope")
    if slope is None and getattr(args, f"{half}act") == Act.PRELU:
        raise _expect(f"{half}slope", "PReLU's weight", None)
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


def validate(args: Step) -> None:
    """Raises ValueError or TypeError for the first argument that doesn't fit; else returns."""
    _validate(args)
    _norm_dtypes(args)


def _validate(args: Step) -> None:
    _tensors(args)
    _CHECKS[type(args)](args)


def _activation(args: Args, half: str) -> None:
    """``half`` is what the fields' names begin with: "primary_", "cheap_" or nothing."""
    act = getattr(args, f"{half}act")
    if not 0 <= act < len(Act):
        raise _expect(f"{half}act", f"the number of an Act, below {len(Act)}", act)


def validate_training(a: GhostArgs) -> None:
    """``validate`` of a Ghost module whose norms take the batch's statistics, so that it has none."""
    _tensors(a)
    for half in ("primary", "cheap"):
        if getattr(a, f"{half}_mean") is not None or getattr(a, f"{half}_var") is not None:
            raise _expect(f"{half}_bn", "no mean and var, which are the batch's", "a tensor")
    # something of the right shape in place of them
    primary, cheap = (w[:, 0, 0, 0] if w.dim() == 4 and w.numel() else w for w in (a.primary_weight, a.cheap_weight))
    _ghost_module(a._replace(primary_mean=primary, primary_var=primary, cheap_mean=cheap, cheap_var=cheap))


def validate_backward(args: Args, grad_output: Tensor, needs_grad: Sequence[bool]) -> None:
    """``validate`` of a backward op's arguments, of which ``args`` are the forward's."""
    _validate(args)
    if not isinstance(args, GhostArgs):  # whose statistics may be the batch's, in float32
        _norm_dtypes(args)
    names = tensor_names(type(args))
    if len(needs_grad) != len(names):
        raise _expect("needs_grad", f"{len(names)} bools, one for each tensor", len(needs_grad))
    for name, needed in zip(names, needs_grad, strict=True):
        if needed and getattr(args, name) is None:
            raise _expect("needs_grad", f"no gradient of {name}, which is None", needed)
    if not isinstance(grad_output, Tensor):  # PyTorch hands None on
        raise TypeError(f"grad_output: expected a Tensor, got {type(grad_output).__name__}")
    _shape("grad_output", grad_output, args.output_shape(), "of the output")
    for what in ("device", "dtype"):
        if getattr(grad_output, what) != getattr(args.x, what):
            raise _expect("grad_output", f"x's {what} {getattr(args.x, what)}", getattr(grad_output, what))
    if absent := absent_memory(grad_output):
        raise ArgumentError(f"grad_output: {absent}")


def dimensions(args: Step) -> None:
    """Raises ValueError or TypeError unless the tensors that every call has have as many dimensions as they should."""
    for name, ndim in _DIMENSIONS[type(args)].items():
        t = getattr(args, name)
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        _not_nested(name, t)  # which has no shape to show
        if ndim is not None and t.dim() != ndim:
            raise _expect(name, f"{ndim} dimensions", f"{t.dim()} (shape {tuple(t.shape)})")


def _not_nested(name: str, t: Tensor) -> None:
    if t.is_nested:
        raise _expect(name, "a dense tensor", "a nested one")


def _tensors(args: Step) -> None:
    """Types, dtypes and devices of all tensors; numbers of dimensions of those that can't be None."""
    x = args.x
    dimensions(args)
    _numbers(args)
    if x.dtype not in _FLOATS:
        raise ArgumentTypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
    for name, t in zip(tensor_names(type(args)), args.tensors, strict=True):
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(t).__name__}")
        _not_nested(name, t)
        if t.device != x.device:
            raise _expect(name, f"x's device {x.device}", t.device)
        if t.dtype != x.dtype and not (t.dtype == torch.float32 and name.endswith(_NORM)):
            raise ArgumentTypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")
        # a traced tensor has no memory yet
        if not torch.compiler.is_compiling() and type(t) in (Tensor, nn.Parameter) and (absent := absent_memory(t)):
            raise ArgumentError(f"{name}: {absent}")
    if x.dim() > 1 and x.shape[1] < 1:
        raise _expect("x", "at least one channel", tuple(x.shape))
    if x.dim() == 4 and (x.shape[2] < 1 or x.shape[3] < 1):
        raise _expect("x", "height and width of at least 1", tuple(x.shape))


def _numbers(args: Step) -> None:
    """Types of what isn't a tensor: NumPy's numbers and a compiler's symbols are numbers too."""
    for name, kind in type(args).__annotations__.items():
        wanted = _NUMBERS.get(kind)
        if wanted is not None and not hasattr(value := getattr(args, name), wanted[0]):
            raise TypeError(f"{name}: expected {wanted[1]}, got {type(value).__name__} {value!r}")


_NUMBERS = {int: ("__index__", "an int"), float: ("__float__", "a number")}


def _norm_dtypes(args: Step) -> None:
    """On a CPU PyTorch's batch_norm takes float32 beside half precision only, and one dtype for all tensors of a norm; on a
    GPU it takes more, and refuses by itself."""
    x = args.x
    if x.device.type != "cpu":
        return
    first: dict[str, tuple[str, Tensor]] = {}
    for name, t in zip(tensor_names(type(args)), args.tensors, strict=True):
        half, _, role = name.rpartition("_")
        if t is None or role not in _NORM:
            continue
        if x.dtype.itemsize > 2 and t.dtype != x.dtype:
            raise ArgumentTypeError(f"{name}: expected x's dtype {x.dtype}, got {t.dtype}")
        before, other = first.setdefault(half, (name, t))
        if t.dtype != other.dtype:
            raise ArgumentTypeError(f"{name}: expected the dtype of {before}, {other.dtype}, got {t.dtype}")


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
    if pw.shape[1] * args.groups != x.shape[1]:
        channels = (
            f"{pw.shape[1] * args.groups} channels, for primary_weight {tuple(pw.shape)} and groups = {args.groups}"
        )
        raise _expect("x", channels, f"{x.shape[1]} (shape {tuple(x.shape)})")
    if cp % args.groups:
        raise _expect("groups", f"a divisor of primary_weight's {cp} channels", args.groups)
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


def _gate_number(args: SqueezeExciteArgs | GateArgs) -> None:
    if not 0 <= args.gate < len(Gate):
        raise _expect("gate", f"the number of a Gate, below {len(Gate)}", args.gate)


def _squeeze_excite(args: SqueezeExciteArgs) -> None:
    for name in ("reduce_weight", "expand_weight"):
        if getattr(args, name).dim() not in (2, 4):
            raise _expect(name, "2 or 4 dimensions", tuple(getattr(args, name).shape))
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
    _activation(args, "")
    _gate_number(args)
    if args.act in (Act.LEAKY_RELU, Act.PRELU):
        raise _expect("act", "an activation without a slope", Act(args.act).name.lower())


def _linear(args: LinearArgs) -> None:
    x, (rows, columns) = args.x, args.weight.shape
    if x.dim() not in (2, 4) or tuple(x.shape[1:]) not in ((columns,), (columns, 1, 1)):
        raise _expect("x", f"shape (N, K) or (N, K, 1, 1) with K = {columns}", tuple(x.shape))
    if args.bias is not None:
        _shape("bias", args.bias, (rows,), "(M,)")


def _cast(args: CastArgs) -> None:
    if args.x.dim() not in (2, 4):
        raise _expect("x", "2 or 4 dimensions", tuple(args.x.shape))
    if not 0 <= args.dtype < len(DTYPES):
        raise _expect("dtype", f"a place in {DTYPES}", args.dtype)


def _concat(args: ConcatArgs) -> None:
    if args.third is None and args.fourth is not None:
        raise _expect("third", "a tensor before the fourth", None)
    n, _, h, w = args.x.shape
    for name, t in zip(tensor_names(ConcatArgs), args.tensors, strict=True):
        if t is not None and (t.dim() != 4 or t.shape[1] < 1 or (t.shape[0], *t.shape[2:]) != (n, h, w)):
            raise _expect(name, f"shape (N, C, H, W) with N, H, W = {n, h, w}", tuple(t.shape))


def _max_pool(args: MaxPoolArgs) -> None:
    if args.kernel % 2 == 0 or not 1 <= args.kernel <= POOL_KERNEL:
        raise _expect("kernel", f"an odd number up to {POOL_KERNEL}", args.kernel)
    if args.stride not in (1, 2):
        raise _expect("stride", "1 or 2", args.stride)


def _avg_pool(args: AvgPoolArgs) -> None:
    if not 1 <= args.kernel <= POOL_KERNEL:
        raise _expect("kernel", f"a number up to {POOL_KERNEL}", args.kernel)
    if min(args.x.shape[2:]) < args.kernel:
        raise _expect("x", f"at least {args.kernel} rows and columns", tuple(args.x.shape))


def _gate(args: GateArgs) -> None:
    if args.x.dim() not in (2, 4):
        raise _expect("x", "2 or 4 dimensions", tuple(args.x.shape))
    _gate_number(args)


def _upsample(args: UpsampleArgs) -> None:
    if not 1 <= args.scale <= POOL_KERNEL:
        raise _expect("scale", f"a number up to {POOL_KERNEL}", args.scale)


_CHECKS: dict = {
    GhostArgs: _ghost_module,
    DepthwiseArgs: _depthwise,
    SqueezeExciteArgs: _squeeze_excite,
    GlobalPoolArgs: lambda args: None,
    LinearArgs: _linear,
    CastArgs: _cast,
    ConcatArgs: _concat,
    MaxPoolArgs: _max_pool,
    AvgPoolArgs: _avg_pool,
    GateArgs: _gate,
    UpsampleArgs: _upsample,
}
# None where there may be 2 or 4, as of a map of one pixel
_DIMENSIONS: dict[type[Step], dict[str, int | None]] = {
    GhostArgs: {"x": 4, "primary_weight": 4, "cheap_weight": 4},
    DepthwiseArgs: {"x": 4, "weight": 4},
    SqueezeExciteArgs: {"x": 4, "reduce_weight": None, "expand_weight": None},
    GlobalPoolArgs: {"x": 4},
    LinearArgs: {"x": None, "weight": 2},
    CastArgs: {"x": None},
    ConcatArgs: {"x": 4, "second": 4},
    MaxPoolArgs: {"x": 4},
    AvgPoolArgs: {"x": 4},
    GateArgs: {"x": None},
    UpsampleArgs: {"x": 4},
}
