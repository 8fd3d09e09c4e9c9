"""The Triton kernel as a backend: when it can run, how it is launched."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..spec import GhostArgs
from .common import kernel_refusal
from .triton_configs import config

try:
    import triton
    from triton import knobs

    from .triton_kernels import ghost_kernel

    INTERPRETED = knobs.runtime.interpret
    _import_error = None
except ImportError as error:
    INTERPRETED = False
    _import_error = f"triton can't be imported ({error})"

_MAX_GRID = 2**31 - 1


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """Why no Triton kernel can run here; None if they can."""
    if _import_error is not None:
        return _import_error
    if not INTERPRETED and not torch.cuda.is_available():
        return "no GPU (set TRITON_INTERPRET=1 before the start of Python to run the kernels, slowly, on the CPU)"
    return None


def supports(args: GhostArgs) -> str | None:
    """Why the kernel can't run ``args``; None if it can."""
    reason = unavailable()
    if reason is not None:
        return reason
    if not args.x.is_cuda and not INTERPRETED:
        return (
            f"x is on {args.x.device} (Triton needs a GPU; TRITON_INTERPRET=1, set before the start of Python, "
            "runs the kernels, slowly, on the CPU)"
        )
    return kernel_refusal(args)


def _align(*sizes: int) -> int:
    """The power of two, at most 16, that divides all ``sizes``."""
    return math.gcd(16, *sizes)


def _reach(t: Tensor | None) -> int:
    """The largest offset within one image of ``t``."""
    return 0 if t is None else sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))


def plan(args: GhostArgs, out: Tensor, x1: Tensor, primary: bool = True, cheap: bool = True) -> dict[str, Any]:
    """``ghost_kernel``'s arguments for a launch of both steps or of one."""
    a = args
    _, cin, h, w = a.x.shape
    nhwc = not out.is_contiguous() and out.stride(1) == 1
    xs = a.x.stride()
    unit = "c" if xs[1] == 1 and cin > 1 else "w" if xs[3] == 1 else ""
    flat = h == 1 or xs[2] == w * xs[3]
    strides = {"c": (xs[0], xs[2], xs[3]), "w": (xs[0], xs[1], xs[2]), "": xs}[unit]
    residual, gate = a.residual, a.output_gate
    rs = (0, 0, 0, 0) if residual is None else residual.stride()
    gs = (0, 0, 0, 0) if gate is None else gate.stride()
    gh, gw = (1, 1) if gate is None else gate.shape[2:]
    reach = max(map(_reach, (a.x, out, residual, gate)))
    per_channel = {half: t is not None and t.numel() > 1 for half, t in
                   (("PRIMARY", a.primary_slope), ("CHEAP", a.cheap_slope))}  # fmt: skip
    blocks = config(a, nhwc)
    # the parameters are contiguous in any real model: no copy
    parameters = {
        f"{name}_ptr": t if (t := getattr(a, name)) is None else t.contiguous()
        for name in (*(n for n in a._fields if n.startswith(("primary_", "cheap_")) and n.endswith(
            ("_weight", "_bias", "_mean", "_var", "_gamma", "_beta")
        )), "primary_slope", "cheap_slope", "input_gate")
    }  # fmt: skip
    return dict(
        x_ptr=a.x, residual_ptr=residual, output_gate_ptr=gate, x1_ptr=x1, out_ptr=out, **parameters,
        primary_eps=a.primary_eps, primary_negative_slope=a.primary_negative_slope,
        cheap_eps=a.cheap_eps, cheap_negative_slope=a.cheap_negative_slope, gate_scale_h=gh / h, gate_scale_w=gw / w,
        H=h, W=w, Cin=cin, Cp=a.init_channels, out_channels=a.out_channels,
        x_sn=xs[0], x_sc=xs[1], x_sh=xs[2], x_sw=xs[3],
        residual_sn=rs[0], residual_sc=rs[1], residual_sh=rs[2], residual_sw=rs[3],
        gate_h=gh, gate_w=gw, gate_sn=gs[0], gate_sc=gs[1], gate_sh=gs[2], gate_sw=gs[3],
        PRIMARY=primary, CHEAP=cheap, RATIO=a.ratio, DW_SIZE=a.dw_size, PRIMARY_ACT=a.primary_act, CHEAP_ACT=a.cheap_act,
        PRIMARY_SLOPES=per_channel["PRIMARY"], CHEAP_SLOPES=per_channel["CHEAP"],
        NHWC=nhwc, X_UNIT=unit, X_FLAT=flat, RESIDUAL_LIKE_OUT=residual is not None and rs == out.stride(),
        X_ALIGN=_align(*strides), CIN_ALIGN=_align(cin), CP_ALIGN=_align(a.init_channels), OUT_ALIGN=_align(a.out_channels),
        HW_ALIGN=_align(h * w), INDEX_64=reach >= 2**31, PRECISION="tf32" if a.allow_tf32 else "ieee", **blocks,
    )  # fmt: skip


def launch(args: GhostArgs, out: Tensor, x1: Tensor, primary: bool = True, cheap: bool = True) -> None:
    kwargs = plan(args, out, x1, primary, cheap)
    n, hw = args.x.shape[0], args.x.shape[2] * args.x.shape[3]
    grid = (n * triton.cdiv(hw, kwargs["run"]) * triton.cdiv(args.init_channels, kwargs["BLOCK_N"]),)
    ghost_kernel[grid](**kwargs)


def forward(args: GhostArgs) -> Tensor:
    """Runs ``args`` in one launch."""
    out = args.new_output()
    if out.numel():
        x1 = scratch(args, out)
        launch(args, out, x1)
    return out


def scratch(args: GhostArgs, out: Tensor) -> Tensor:
    """Where x1 goes: the output's first half, or a buffer if a gate or a residual make that half differ from x1."""
    if args.residual is None and args.output_gate is None:
        return out
    n, _, h, w = out.shape
    nhwc = not out.is_contiguous() and out.stride(1) == 1
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    return torch.empty((n, args.init_channels, h, w), dtype=out.dtype, device=out.device, memory_format=memory_format)


if _import_error is None:
    ops.implement("triton", forward, "CUDA", *(("CPU",) if INTERPRETED else ()))
