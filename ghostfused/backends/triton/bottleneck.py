"""The Triton kernels between a bottleneck's Ghost modules: their plans and launches. The kernels are in
``triton_bottleneck_kernels.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...spec import DepthwiseArgs, SqueezeExciteArgs
from .configs import NUM_WARPS, PROGRAMS, SMALL_IMAGE, cheap_blocks
from .launch import align, is_channels_last, launch_kernel, reach, x_strides

_BLOCK_C = 64
"""Channels of a program of either squeeze-and-excite kernel."""
_BLOCK_R = 16, 32
"""Rows of the hidden layer that the first kernel makes at a time, and that the second reads."""
_REGISTERS = 128
"""Of a thread of the unrolled 3×3 convolution of 16-bit maps in channels_last, so that the compiler spills none: left to
itself it may take fewer, for one more block on a multiprocessor."""
_BLOCK_P = 32
_CHUNK = 256, 1024
"""The fewest and the most pixels of which a program takes the mean. More would make chains of sums that round too much."""


def depthwise_plan(args: DepthwiseArgs, out: Tensor) -> dict[str, Any]:
    """The arguments of ``depthwise_kernel``."""
    a, (_, c, oh, ow) = args, out.shape
    kh, kw = a.weight.shape[2:]
    nhwc = is_channels_last(out)
    blocks = cheap_blocks(a.x.element_size(), nhwc, max(kh, kw), c)
    if oh * ow <= SMALL_IMAGE:
        blocks = blocks._replace(BLOCK_P=min(blocks.BLOCK_P, SMALL_IMAGE))
    # contiguous already in any usual model: then no copy
    parameters = {
        f"{name}_ptr": t if (t := getattr(a, name)) is None else t.contiguous()
        for name in ("weight", "bias", "mean", "var", "gamma", "beta", "slope")
    }
    strides = x_strides(a.x)
    del strides["X_FLAT"]
    unrolled = nhwc and (kh, kw) == (3, 3) and a.x.element_size() == 2 and torch.version.hip is None
    return dict(
        x_ptr=a.x, out_ptr=out, **parameters, eps=a.eps, negative_slope=a.negative_slope,
        slope_stride=int(a.slope is not None and a.slope.numel() > 1),
        H=a.x.shape[2], W=a.x.shape[3], C=c, OH=oh, OW=ow, KH=kh, KW=kw, STRIDE=a.stride, ACT=a.act, NHWC=nhwc,
        **strides, C_ALIGN=align(c), OW_ALIGN=align(ow), OUT_ALIGN=align(oh * ow),
        # the corner of a window may lie a few rows outside the image
        INDEX_64=max(reach(a.x) + kh * a.x.stride(2) + kw * a.x.stride(3), reach(out)) >= 2**31,
        **blocks._asdict(), num_warps=NUM_WARPS, **({"maxnreg": _REGISTERS} if unrolled else {}),
    )  # fmt: skip


def depthwise(args: DepthwiseArgs) -> Tensor:
    """Runs ``args`` in one launch."""
    from .bottleneck_kernels import depthwise_kernel

    out = args.new_output()
    if out.numel():
        kwargs = depthwise_plan(args, out)
        n, c, oh, ow = out.shape
        programs = n * -(-oh * ow // kwargs["BLOCK_P"]) * -(-c // kwargs["BLOCK_C"])
        launch_kernel(depthwise_kernel, programs, kwargs, args.x.device)
    return out


def squeeze_plan(args: SqueezeExciteArgs) -> dict[str, Any]:
    """The arguments of ``squeeze_kernel`` but ``parts_ptr``.

    As many images share a program, and with it each read of the weights, as leave a program for each multiprocessor;
    pixels are cut into chunks until there are PROGRAMS.
    """
    a, (n, c, h, w) = args, args.x.shape
    pixels, blocks = h * w, -(-c // _BLOCK_C)
    images = next(i for i in (4, 2, 1) if i == 1 or -(-n // i) * blocks >= PROGRAMS // 4)
    block_p = min(_BLOCK_P // max(images // 2, 1), max(16, 1 << (pixels - 1).bit_length()))
    wanted = -(-PROGRAMS // (-(-n // images) * blocks))
    chunk = min(max(-(-pixels // wanted), _CHUNK[0]), _CHUNK[1])
    return dict(
        x_ptr=a.x, weight_ptr=a.reduce_weight.contiguous(), N=n, H=h, W=w, C=c, R=a.reduce_weight.shape[0],
        chunk=-(-chunk // block_p) * block_p, **x_strides(a.x), C_ALIGN=align(c), P_ALIGN=align(pixels),
        INDEX_64=reach(a.x) >= 2**31, IMAGES=images, BLOCK_P=block_p, BLOCK_C=_BLOCK_C, BLOCK_R=_BLOCK_R[0],
        num_warps=NUM_WARPS,
    )  # fmt: skip


def excite_plan(args: SqueezeExciteArgs, parts: Tensor, out: Tensor, images: int) -> dict[str, Any]:
    """The arguments of ``excite_kernel``."""
    n, count, r = parts.shape
    return {
        "parts_ptr": parts, "reduce_bias_ptr": None if args.reduce_bias is None else args.reduce_bias.contiguous(),
        "weight_ptr": args.expand_weight.contiguous(),
        "bias_ptr": None if args.expand_bias is None else args.expand_bias.contiguous(),
        "out_ptr": out, "N": n, "C": out.shape[1], "R": r, "parts": count, "ACT": args.act, "GATE": args.gate, "R_ALIGN": align(r),
        "IMAGES": images, "BLOCK_C": _BLOCK_C, "BLOCK_R": _BLOCK_R[1], "num_warps": NUM_WARPS,
    }  # fmt: skip


def squeeze_excite(args: SqueezeExciteArgs) -> Tensor:
    """Runs ``args`` in two launches."""
    from .bottleneck_kernels import excite_kernel, squeeze_kernel

    out = args.new_output()
    if out.numel():
        n, c, h, w = args.x.shape
        kwargs = squeeze_plan(args)
        groups, blocks = -(-n // kwargs["IMAGES"]), -(-c // kwargs["BLOCK_C"])
        count = blocks * -(-h * w // kwargs["chunk"])
        parts = torch.empty(n, count, args.reduce_weight.shape[0], dtype=torch.float32, device=out.device)
        launch_kernel(squeeze_kernel, groups * count, kwargs | {"parts_ptr": parts}, out.device)
        launch_kernel(excite_kernel, groups * blocks, excite_plan(args, parts, out, kwargs["IMAGES"]), out.device)
    return out
