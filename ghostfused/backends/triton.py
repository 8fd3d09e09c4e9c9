"""The Triton kernel as a backend: when it can run and how it is launched. The kernel is in ``triton_kernels.py``."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..spec import Args, GhostArgs, memory_format
from .common import kernel_refusal
from .triton_configs import Cheap, Primary, blocks

try:
    from triton import knobs

    from .triton_kernels import ghost_kernel

    INTERPRETED = knobs.runtime.interpret
    _import_error = None
except ImportError as error:  # Windows, macOS, CPU-only installations
    INTERPRETED = False
    _import_error = f"triton can't be imported ({error})"

_INTERPRETER = "TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU, slowly"
_PARAMETERS = tuple(
    f"{half}_{name}" for half in ("primary", "cheap") for name in ("weight", "bias", "mean", "var", "gamma", "beta", "slope")
)  # fmt: skip
Choice = tuple[Primary, Cheap]
_MAX_PROGRAMS = 2**31 - 1
_MIN_TILE = 32, 8
"""The smallest tile of one program, in pixels and init channels."""


@torch.compiler.assume_constant_result  # Dynamo need not trace into the CUDA runtime
@functools.cache
def unavailable() -> str | None:
    """Why no Triton kernel can run here; None if they can."""
    if _import_error is not None:
        return _import_error
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return f"no GPU ({_INTERPRETER})"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than sm_80"
    return None


def supports(args: Args) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if not isinstance(args, GhostArgs):
        return f"the op {args.op}"
    if not args.x.is_cuda and not INTERPRETED:
        return f"x is on {args.x.device} and Triton needs a GPU ({_INTERPRETER})"
    n, _, h, w = args.x.shape
    if n * -(-h * w // _MIN_TILE[0]) * -(-args.init_channels // _MIN_TILE[1]) > _MAX_PROGRAMS:
        return f"batch {n} at {h}×{w} may need more than {_MAX_PROGRAMS} programs"
    return kernel_refusal(args)


def is_channels_last(t: Tensor) -> bool:
    """Whether ``t``, as ``GhostArgs.new_output`` made it, is channels_last and not contiguous as well."""
    return memory_format(t) == torch.channels_last


def scratch(args: GhostArgs, out: Tensor) -> Tensor:
    """Where x1 goes: the output itself, or a buffer if a gate or a residual make its first half differ from x1."""
    if args.residual is None and args.output_gate is None:
        return out
    shape = (out.shape[0], args.init_channels, *out.shape[2:])
    return torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=memory_format(out))


def _align(*sizes: int) -> int:
    """The largest power of two up to 16 that divides all ``sizes``."""
    return math.gcd(16, *sizes)


def _reach(t: Tensor | None) -> int:
    """The largest offset within an image of ``t``."""
    return 0 if t is None else sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))


def plan(
    args: GhostArgs, out: Tensor, x1: Tensor, primary: bool = True, cheap: bool = True, choice: Choice | None = None
) -> dict[str, Any]:
    """The arguments of ``ghost_kernel`` for a launch of both steps, or of one; ``choice`` replaces the table of blocks."""
    a, (_, cin, h, w) = args, args.x.shape
    nhwc = is_channels_last(out)
    xs = a.x.stride()
    x_unit = "c" if xs[1] == 1 and cin > 1 else "w" if xs[3] == 1 else ""
    x_strides = {"c": (xs[0], xs[2], xs[3]), "w": (xs[0], xs[1], xs[2]), "": xs}[x_unit]
    rs = a.residual.stride() if a.residual is not None else (0, 0, 0, 0)
    gs = a.output_gate.stride() if a.output_gate is not None else (0, 0, 0, 0)
    gate_h, gate_w = a.output_gate.shape[2:] if a.output_gate is not None else (1, 1)
    reach = max(*map(_reach, (a.x, out, a.residual, a.output_gate)), a.primary_weight.numel(), a.cheap_weight.numel())
    # contiguous already in any usual model: then no copy
    parameters = {
        name: t if (t := getattr(a, name)) is None else t.contiguous() for name in (*_PARAMETERS, "input_gate")
    }
    return dict(
        x_ptr=a.x, residual_ptr=a.residual, output_gate_ptr=a.output_gate, x1_ptr=x1, out_ptr=out,
        **{f"{name}_ptr": t for name, t in parameters.items()},
        primary_eps=a.primary_eps, primary_negative_slope=a.primary_negative_slope,
        primary_slope_stride=int(a.primary_slope is not None and a.primary_slope.numel() > 1),
        cheap_eps=a.cheap_eps, cheap_negative_slope=a.cheap_negative_slope,
        cheap_slope_stride=int(a.cheap_slope is not None and a.cheap_slope.numel() > 1),
        H=h, W=w, Cin=cin, Cp=a.init_channels, out_channels=a.out_channels,
        x_sn=xs[0], x_sc=xs[1], x_sh=xs[2], x_sw=xs[3],
        residual_sn=rs[0], residual_sc=rs[1], residual_sh=rs[2], residual_sw=rs[3],
        gate_h=gate_h, gate_w=gate_w, gate_scale_h=gate_h / h, gate_scale_w=gate_w / w,
        gate_sn=gs[0], gate_sc=gs[1], gate_sh=gs[2], gate_sw=gs[3],
        PRIMARY=primary, CHEAP=cheap, RATIO=a.ratio, DW_SIZE=a.dw_size, PRIMARY_ACT=a.primary_act, CHEAP_ACT=a.cheap_act,
        NHWC=nhwc, X_UNIT=x_unit, X_FLAT=h == 1 or xs[2] == w * xs[3],
        RESIDUAL_LIKE_OUT=a.residual is not None and rs == out.stride(),
        X_ALIGN=_align(*x_strides), CIN_ALIGN=_align(cin), CP_ALIGN=_align(a.init_channels),
        OUT_ALIGN=_align(a.out_channels), HW_ALIGN=_align(h * w), INDEX_64=reach >= 2**31,
        PRECISION="tf32" if a.allow_tf32 else "ieee", **blocks(a, nhwc, primary, cheap, choice),
    )  # fmt: skip


def launch(
    args: GhostArgs, out: Tensor, x1: Tensor, primary: bool = True, cheap: bool = True, choice: Choice | None = None
) -> None:
    """Launches both steps, or one."""
    kwargs = plan(args, out, x1, primary, cheap, choice)
    runs = -(-args.x.shape[2] * args.x.shape[3] // kwargs["run"])
    grid = (args.x.shape[0] * runs * -(-args.init_channels // kwargs["BLOCK_N"]),)
    with torch.cuda.device(args.x.device) if args.x.is_cuda else contextlib.nullcontext():
        ghost_kernel[grid](**kwargs)


def forward(args: GhostArgs) -> Tensor:
    """Runs ``args`` in one launch."""
    out = args.new_output()
    if out.numel():
        launch(args, out, scratch(args, out))
    return out


def register(name: str, kernel: Any) -> None:
    """Registers a Triton backend's ``forward``, if Triton is there, for the devices that it runs on."""
    if _import_error is None:
        ops.implement("forward", name, kernel, "CUDA", *(("CPU",) if INTERPRETED else ()))


register("triton", forward)
