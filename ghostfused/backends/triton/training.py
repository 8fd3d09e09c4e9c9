"""Training in Triton: how the kernels of ``triton_training_{forward,backward}.py`` are launched."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ...spec import GhostArgs, memory_format
from ...spec.takes import COMMON, form_refusal
from .. import triton
from ..training_step import KERNELS, TrainingKernels
from .configs import PROGRAMS, blocks, precision
from .launch import is_channels_last, reach

_CONV_TILE = 256
_STATISTICS_TILE = 2048
"""Elements of a tile, of the kernels with a depthwise convolution and of the first one; more would spill registers."""
_HALF = ("bias", "mean", "var", "gamma", "beta", "slope")


_EPS = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
"""The least and the greatest: a batch's variance, which comes of a sum over its pixels, is at most as large, and added to it."""


def supports(a: GhostArgs) -> str | None:
    """Why the kernels can't train ``a``; None if they can."""
    reason = triton.supports(a) or form_refusal(a, COMMON)  # of the windows that the forward takes, the 1×1 alone
    for name in ("primary_eps", "cheap_eps"):
        if reason is None and not _EPS[0] <= getattr(a, name) <= _EPS[1]:
            reason = f"{name} {getattr(a, name)} (the kernels take {_EPS[0]:.3g} to {_EPS[1]:.3g})"
    if reason is None and not torch.compiler.is_compiling():
        _, _, height, width = a.output_shape()
        channels = max(a.out_channels, a.init_channels, a.cheap_weight.shape[0])
        if max(reach(a.x), reach(a.residual), reach(a.output_gate), channels * height * width) >= 2**31:
            reason = "an image of more than 2³¹ elements"
    return reason


class _Launch:
    """The arguments that all kernels share, and the grid.

    The layout is x's: a map of one channel, y1 say, lies the same in either, and tells nothing of the others.
    """

    def __init__(self, a: GhostArgs, like: Tensor, channel_blocks: int, tile: int):
        n, _, h, w = like.shape
        self.a, self.device = a, like.device
        tiles = n * -(-h * w // tile)
        # each row of programs walks through consecutive tiles, so that about PROGRAMS programs run
        per_row = max(-(-tiles * channel_blocks // PROGRAMS), 1)
        self.rows = -(-tiles // per_row)
        self.grid = (self.rows * channel_blocks,)
        self.shared = {"N": n, "HW": h * w, "W": w, "per_row": per_row, "NHWC": is_channels_last(a.x)}

    def __call__(self, kernel: Any, **arguments: Any) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            kernel[self.grid](**self.shared, **arguments)

    def partial(self, *shape: int) -> Tensor:
        """A buffer of one row for each row of programs."""
        return torch.empty((self.rows, *shape), dtype=torch.float32, device=self.device)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _half(a: GhostArgs, half: str, slope: bool = True) -> dict[str, Any]:
    """The norm and the activation of one half, as kernel arguments."""
    names = _HALF if slope else _HALF[:-1]
    arguments: dict[str, Any] = {f"{half}_{n}_ptr": _contiguous(getattr(a, f"{half}_{n}")) for n in names}
    arguments[f"{half}_eps"] = getattr(a, f"{half}_eps")
    if slope:
        weight = getattr(a, f"{half}_slope")
        arguments[f"{half}_slope_stride"] = int(weight is not None and weight.numel() > 1)
        arguments[f"{half}_negative_slope"] = getattr(a, f"{half}_negative_slope")
        arguments[f"{half.upper()}_ACT"] = getattr(a, f"{half}_act")
    return arguments


def _gate(a: GhostArgs, like: Tensor) -> dict[str, Any]:
    gate, (h, w) = a.output_gate, like.shape[2:]
    gate_h, gate_w = gate.shape[2:] if gate is not None else (1, 1)
    sn, sc, sh, sw = gate.stride() if gate is not None else (0, 0, 0, 0)
    return {
        "output_gate_ptr": gate, "gate_h": gate_h, "gate_w": gate_w, "gate_scale_h": gate_h / h, "gate_scale_w": gate_w / w,
        "gate_sn": sn, "gate_sc": sc, "gate_sh": sh, "gate_sw": sw,
    }  # fmt: skip


def _elementwise_blocks(a: GhostArgs, most: int = 1024) -> dict[str, Any]:
    """Pixels and channels of a tile, as for the forward kernel's depthwise conv, but of ``most`` elements at most."""
    chosen = blocks(a, is_channels_last(a.x), primary=False, patches=False)
    chosen["BLOCK_P"] = min(chosen["BLOCK_P"], most // chosen["BLOCK_C"])
    return {name: chosen[name] for name in ("BLOCK_P", "BLOCK_C", "num_warps")}


def _statistics(channels: int, launch: _Launch, channel_blocks: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(kernel arguments, mean, var)"""
    mean, var = (torch.empty(channels, dtype=torch.float32, device=launch.device) for _ in range(2))
    counter = torch.zeros(channel_blocks, dtype=torch.int32, device=launch.device)
    partial = launch.partial(3, channels)
    return {"partial_ptr": partial, "counter_ptr": counter, "mean_ptr": mean, "var_ptr": var}, mean, var


def _empty_statistics(channels: int, out: Tensor) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(2, channels, dtype=torch.float32, device=out.device)
    return zeros[0].clone(), zeros[1].clone()


def primary_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    from .training_forward import primary_statistics_kernel

    cp, (_, cin, h, w) = a.init_channels, a.x.shape
    if out.numel() == 0:
        return _empty_statistics(cp, out)
    chosen = blocks(a, is_channels_last(a.x), cheap=False)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "ONE_K", "num_warps", "num_stages")
    chosen["BLOCK_M"] = min(chosen["BLOCK_M"], _STATISTICS_TILE // chosen["BLOCK_N"])
    channel_blocks = -(-cp // chosen["BLOCK_N"])
    launch = _Launch(a, out, channel_blocks, chosen["BLOCK_M"])
    arguments, mean, var = _statistics(cp, launch, channel_blocks)
    sn, sc, sh, sw = a.x.stride()
    launch(
        primary_statistics_kernel, **arguments, x_ptr=a.x, weight_ptr=a.primary_weight.contiguous(),
        input_gate_ptr=_contiguous(a.input_gate), out_ptr=out, Cin=cin, Cp=cp, out_channels=a.out_channels,
        x_sn=sn, x_sc=sc, x_sh=sh, x_sw=sw, rows=launch.rows, X_FLAT=h == 1 or sh == w * sw,
        PRECISION=precision(a), **{name: chosen[name] for name in names},
    )  # fmt: skip
    return mean, var


def cheap_statistics(a: GhostArgs, out: Tensor) -> tuple[Tensor, Tensor]:
    from .training_forward import cheap_statistics_kernel

    new = a.cheap_weight.shape[0]
    if out.numel() == 0:
        return _empty_statistics(new, out)
    chosen = _elementwise_blocks(a, _CONV_TILE)
    channel_blocks = -(-new // chosen["BLOCK_C"])
    launch = _Launch(a, out, channel_blocks, chosen["BLOCK_P"])
    arguments, mean, var = _statistics(new, launch, channel_blocks)
    launch(
        cheap_statistics_kernel, **arguments, **_half(a, "primary"), **chosen,
        weight_ptr=a.cheap_weight.contiguous(), out_ptr=out, Cp=a.init_channels, new=new, out_channels=a.out_channels,
        rows=launch.rows, RATIO=a.ratio, DW_SIZE=a.dw_size,
    )  # fmt: skip
    return mean, var


def normalize(a: GhostArgs, out: Tensor) -> None:
    from .training_forward import normalize_kernel

    if out.numel() == 0:
        return
    chosen = _elementwise_blocks(a)
    cp, block = a.init_channels, chosen["BLOCK_C"]
    sn, sc, sh, sw = a.residual.stride() if a.residual is not None else (0, 0, 0, 0)
    _Launch(a, out, -(-cp // block) + -(-(a.out_channels - cp) // block), chosen["BLOCK_P"])(
        normalize_kernel, **_half(a, "primary"), **_half(a, "cheap"), **_gate(a, out), **chosen,
        residual_ptr=a.residual, out_ptr=out, Cp=cp, out_channels=a.out_channels,
        residual_sn=sn, residual_sc=sc, residual_sh=sh, residual_sw=sw,
    )  # fmt: skip


def cheap_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, batch_statistics: bool, sums: bool, product: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from .training_backward import cheap_backward_kernel

    new = a.cheap_weight.shape[0]
    dz2 = _like(a, y1, new)
    y2 = _like(a, y1, new) if batch_statistics else None
    if y1.numel() == 0:
        return dz2, y2, _zeros(y1, 3, new) if sums else None
    chosen = _elementwise_blocks(a, _CONV_TILE)
    launch = _Launch(a, y1, -(-new // chosen["BLOCK_C"]), chosen["BLOCK_P"])
    partial = launch.partial(3, new) if sums else None
    launch(
        cheap_backward_kernel, **_half(a, "primary"), **_half(a, "cheap"), **_gate(a, y1), **chosen,
        grad_ptr=grad, y1_ptr=y1, weight_ptr=a.cheap_weight.contiguous(), dz2_ptr=dz2, y2_ptr=y2, product_ptr=product,
        partial_ptr=partial, Cp=a.init_channels, new=new, out_channels=a.out_channels, RATIO=a.ratio, DW_SIZE=a.dw_size,
        BATCH=batch_statistics,
    )  # fmt: skip
    return dz2, y2, None if partial is None else partial.sum(0)


def primary_backward(
    a: GhostArgs, grad: Tensor, y1: Tensor, dz2: Tensor | None, y2: Tensor | None, means2: Tensor | None,
    batch_statistics: bool, primary: bool, sums: bool, weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    from .training_backward import primary_backward_kernel

    cp, new, d = a.init_channels, a.cheap_weight.shape[0], a.dw_size
    per_channel = new // cp * d * d
    dz1 = torch.empty_like(y1) if primary else None
    if y1.numel() == 0:
        dw = torch.zeros_like(a.cheap_weight) if weight else None
        return dz1, _zeros(y1, 3, cp) if sums else None, dw
    chosen = _elementwise_blocks(a, _CONV_TILE)
    launch = _Launch(a, y1, -(-cp // chosen["BLOCK_C"]), chosen["BLOCK_P"])
    partial = launch.partial(3, cp) if sums else None
    weight_partial = launch.partial(per_channel, cp) if weight else None
    launch(
        primary_backward_kernel, **_half(a, "primary"), **_half(a, "cheap", slope=False), **_gate(a, y1), **chosen,
        grad_ptr=grad, y1_ptr=y1, dz2_ptr=dz2, y2_ptr=y2, means2_ptr=_contiguous(means2),
        weight_ptr=a.cheap_weight.contiguous(), dz1_ptr=dz1, partial_ptr=partial, weight_partial_ptr=weight_partial,
        Cp=cp, new=new, out_channels=a.out_channels, RATIO=1 if dz2 is None else a.ratio, DW_SIZE=d, BATCH=batch_statistics,
        WEIGHTS=1 << (per_channel - 1).bit_length(),
    )  # fmt: skip
    dw = None if weight_partial is None else weight_partial.sum(0).T.reshape(a.cheap_weight.shape)
    return dz1, None if partial is None else partial.sum(0), dw


def normalize_backward(a: GhostArgs, dz1: Tensor, y1: Tensor, means1: Tensor) -> None:
    from .training_backward import normalize_backward_kernel

    if y1.numel() == 0:
        return
    chosen = _elementwise_blocks(a)
    _Launch(a, y1, -(-a.init_channels // chosen["BLOCK_C"]), chosen["BLOCK_P"])(
        normalize_backward_kernel, **_half(a, "primary", slope=False), **chosen,
        dz1_ptr=dz1, y1_ptr=y1, means1_ptr=means1.contiguous(), Cp=a.init_channels,
    )  # fmt: skip


def _like(a: GhostArgs, y1: Tensor, channels: int) -> Tensor:
    """Uninitialized maps beside y1."""
    shape = (y1.shape[0], channels, *y1.shape[2:])
    return torch.empty(shape, dtype=y1.dtype, device=y1.device, memory_format=memory_format(a.x))


def _zeros(y1: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=y1.device)


KERNELS["triton"] = TrainingKernels(
    supports, primary_statistics, cheap_statistics, normalize, cheap_backward, primary_backward, normalize_backward
)
