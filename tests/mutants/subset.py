"""Runs small cases of some kernels under ptx-on-cpu: ``subset.py KERNEL…``; exit status 1 and the case's name if one fails.

Each shape is one that the tests in tests/kernels have too, or a like one.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import training_runtime
from cuda_runtime import general_only, planned_for
from kernel_backends import Backend

from ghostfused.backends.extension import op
from ghostfused.spec import Args, GhostArgs
from ghostfused.testing import (
    Case,
    DepthwiseCase,
    SqueezeExciteCase,
    judge,
    make_args,
    make_depthwise,
    make_squeeze_excite,
)
from ghostfused.testing.judge_training import judge_training

CUDA = Backend("cuda")
SM_COUNTS = (1, 132)
"""Few SMs mean large tiles, many mean many small blocks."""

SHAPES: dict[str, dict[str, Any]] = {
    "every kernel": {"in_channels": 20, "height": 9, "width": 11, "out_channels": 24},
    "pipeline": {"in_channels": 200, "height": 7, "width": 7, "out_channels": 40},
    "tiles": {"in_channels": 72, "height": 12, "width": 20, "out_channels": 24},
    "strips": {"in_channels": 8, "height": 15, "width": 11, "out_channels": 64},
    "wide": {"in_channels": 8, "height": 17, "width": 97, "out_channels": 24},
    "channel blocks": {"in_channels": 5, "height": 5, "width": 6, "out_channels": 200},
    "channel tail": {"in_channels": 33, "height": 8, "width": 16, "out_channels": 66},
    "gates": {
        "batch": 2, "in_channels": 200, "height": 9, "width": 6, "out_channels": 24,
        "input_gate": True, "residual": True, "output_gate": True,
    },
    "float32 norm": {
        "in_channels": 8, "height": 5, "width": 6, "out_channels": 16,
        "norm_dtype": torch.float32, "primary_norm": "bn+bias",
    },
    "one slope": {
        "in_channels": 12, "height": 6, "width": 5, "out_channels": 20,
        "act_primary": "prelu", "act_cheap": "prelu", "cheap_norm": "bn_no_affine",
    },
    "unaligned": {"batch": 2, "in_channels": 16, "height": 8, "width": 8, "out_channels": 32, "residual": True},
}  # fmt: skip


NHWC: dict[str, dict[str, Any]] = {
    "one tile": {"in_channels": 16, "height": 16, "width": 16, "out_channels": 16},
    "fours": {"in_channels": 72, "height": 12, "width": 20, "out_channels": 72},
    "odd rows": {"in_channels": 40, "height": 11, "width": 13, "out_channels": 68, "init_channels": 36},
    "images": {"batch": 5, "in_channels": 24, "height": 9, "width": 11, "out_channels": 40},
    "warps": {"in_channels": 24, "height": 14, "width": 14, "out_channels": 240},
    "long K": {"in_channels": 136, "height": 7, "width": 7, "out_channels": 40},
    "longer K": {
        "in_channels": 520, "height": 8, "width": 8, "out_channels": 24,
        "norm_dtype": torch.float32, "primary_norm": "bn+bias",
    },
}  # fmt: skip
"""For the channels_last kernel's variants."""
VARIANTS: dict[str, dict[str, Any]] = {
    "dw3_none": {"act_primary": "none", "act_cheap": "none"},
    "dw3": {},
    "dw3_relu": {},
    "dw3_any": {"act_primary": "prelu", "per_channel_slope": True, "residual": True, "output_gate": True},
    "dw1_any": {"act_primary": "prelu", "per_channel_slope": True, "residual": True},
    "dw5_any": {"dw_size": 5, "act_cheap": "silu", "residual": True, "output_gate": True},
}

NCHW: dict[str, list[tuple[int, int, int, int, int]]] = {  # batch, Cin, H, W, Cp
    "w8": [(1, 16, 16, 16, 3), (1, 24, 15, 56, 20), (2, 72, 9, 24, 36)],
    "w4": [(1, 40, 21, 28, 20), (2, 80, 8, 12, 60)],
    "w14": [(1, 240, 14, 14, 20), (2, 24, 14, 14, 46)],
    "w7": [(2, 160, 7, 7, 24), (1, 336, 7, 7, 80), (2, 32, 7, 7, 120)],
}
"""For the NCHW kernel's maps."""
WINDOWS: dict[str, dict[str, Any]] = {
    "stride 2": {"in_channels": 10, "height": 19, "width": 24, "init_channels": 20, "stride": 2},
    "stride 1": {"in_channels": 9, "height": 9, "width": 12, "init_channels": 18},
    "dilation": {"in_channels": 6, "height": 9, "width": 8, "init_channels": 5, "dilation": 2},
    "parts": {"in_channels": 150, "height": 10, "width": 16, "init_channels": 20, "stride": 2},
}
"""For its 3×3 primary convs."""
DEPTHWISE = {
    "odd": {"channels": 20, "height": 7, "width": 9, "norm": "bn+bias"},
    "blocks": {"channels": 144, "height": 12, "width": 13, "batch": 2},
    "planes": {"channels": 3, "height": 60, "width": 76, "act": "prelu", "per_channel_slope": True},
}
SQUEEZE_EXCITE = {
    "images": {"batch": 6, "channels": 136, "reduced": 40, "height": 5, "width": 7},
    "chunks": {"channels": 20, "reduced": 300, "height": 24, "width": 24, "gate": "sigmoid"},
}


def cases(kernel: str) -> dict[str, Args]:
    """By name, arguments for which ``kernel`` is what runs; after squeeze, excite runs too."""
    path, kind, *rest = kernel.split("_")
    common = {"dtype": torch.float32 if path == "tf32" else getattr(torch, path), "layout": rest[-1]}
    if kind == "squeeze":
        return {
            name: make_squeeze_excite(SqueezeExciteCase(**shape, **common)) for name, shape in SQUEEZE_EXCITE.items()
        }
    if kind == "depthwise":
        size, stride = int(rest[0].removeprefix("w")), int(rest[1].removeprefix("s"))
        common |= {"kernel": (5 if size == 1 else size, size), "stride": stride}
        return {name: make_depthwise(DepthwiseCase(**shape, **common)) for name, shape in DEPTHWISE.items()}
    if kind == "nhwc":
        variant = VARIANTS["_".join(rest)] | ({"allow_tf32": True} if path == "tf32" else {})
        variant |= {"batch": 1, "dtype": common["dtype"], "layout": "nhwc"}
        no_ghosts = rest[0] == "dw1"
        plain = {
            name: make_args(Case(**variant | shape | ({"init_channels": shape["out_channels"]} if no_ghosts else {})))
            for name, shape in NHWC.items()
        }
        gate = {"in_channels": 72, "height": 9, "width": 8, "out_channels": 40, "input_gate": True, "batch": 2}
        gated = Case(**variant | gate | ({"init_channels": 40} if no_ghosts else {}))
        # in fp32 and TF32 a gate takes the kernel for everything
        return plain | ({"input gate": make_args(gated)} if rest != ["dw3"] else {})
    if kind == "nchw" and rest[:1] == ["window"]:
        form = {"batch": 1, "kernel_size": 3, "dtype": common["dtype"], "dw_size": int(rest[1].removeprefix("dw"))}
        return {
            name: make_args(Case(out_channels=2 * shape["init_channels"], **shape, **form))
            for name, shape in WINDOWS.items()
        }
    if kind == "nchw" and rest:
        name = "_".join(rest[1:])
        variant = VARIANTS["dw3_relu" if name == "dw3" else name]
        common |= {"layout": "nchw", "input_gate": "residual" in variant, "allow_tf32": path == "tf32"}
        return {
            f"{cin} → {init}, {height}×{width}": make_args(
                Case(batch, cin, height, width, 2 * init - cut, init_channels=init, **variant, **common)
            )
            for batch, cin, height, width, init in NCHW[rest[0]]
            for cut in (0, 8 if width == 7 else 2)
        }
    return {name: arguments(name, kernel) for name in SHAPES}


def arguments(name: str, kernel: str) -> GhostArgs:
    """A Ghost module of the shape ``name``, such that ``kernel`` is what runs."""
    path, dw, layout = kernel.split("_")
    shape = {"batch": 1, "dtype": getattr(torch, path), "layout": layout, **SHAPES[name]}
    if dw == "any":
        shape |= {"ratio": 3, "out_channels": shape["out_channels"] * 3 // 2}
    else:
        shape["dw_size"] = int(dw.removeprefix("dw"))
    args = make_args(Case(**shape))
    if name == "unaligned":  # to more than one element
        shifted: dict[str, Any] = {}
        for tensor in ("x", "primary_weight", "residual"):
            t = getattr(args, tensor)
            buffer = torch.zeros(t.numel() + 1, dtype=t.dtype)
            shifted[tensor] = buffer[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
        args = args._replace(**shifted)
    return args


TRAINING: dict[str, dict[str, Any]] = {
    "inputs": {"height": 7, "width": 9, "out_channels": 13, "input_gate": True, "residual": True, "output_gate": True},
    "rows": {"batch": 3, "in_channels": 5, "height": 17, "width": 16, "out_channels": 10},
    "ratio": {"height": 5, "width": 6, "out_channels": 13, "ratio": 3},
    "no weights": {"height": 5, "width": 6, "out_channels": 13, "primary_norm": "bn_no_affine"},
}

STRIPS: dict[str, dict[str, Any]] = {
    "tails": {"in_channels": 40, "height": 20, "width": 14, "out_channels": 24},
    "images": {"batch": 10, "in_channels": 72, "height": 2, "width": 7, "out_channels": 48},
    "channel blocks": {"in_channels": 8, "height": 3, "width": 7, "out_channels": 536},
    "float32 norm": {"in_channels": 8, "height": 6, "width": 7, "out_channels": 24, "norm_dtype": torch.float32},
}
MASKED: dict[str, dict[str, Any]] = {
    "rows": {"batch": 3, "in_channels": 8, "height": 9, "width": 9, "out_channels": 24},
    "pixels": {"batch": 2, "in_channels": 8, "height": 3, "width": 1, "out_channels": 48},
}


def training_passes(kernel: str) -> bool:
    """Whether each training step comes out right."""
    path, _, dw, layout = kernel.split("_")
    shapes = {"strips": STRIPS, "masked": MASKED}.get(dw, TRAINING)
    common = {"dtype": getattr(torch, path), "layout": layout}
    for name, shape in shapes.items():
        a, grad = training_runtime.make(Case(**shape, **common, act_primary="silu", act_cheap="none"))
        for sm_count in SM_COUNTS:
            print(f"{kernel}, {name}, {sm_count} SMs", end=": ", flush=True)
            with planned_for(sm_count):
                verdicts = judge_training(training_runtime.run(CUDA, a, grad, True), a, grad, True)
            worst = max(verdicts.values(), key=lambda verdict: verdict.error - verdict.limit)
            print(f"error {worst.error:.1e}, limit {worst.limit:.1e}", flush=True)
            if not worst.ok:
                return False
    return True


LAYOUT = [(2, 8, 8, 8), (1, 136, 4, 18), (2, 66, 14, 14), (1, 40, 7, 7)]


def layout_passes(kernel: str) -> bool:
    """Whether maps come through the change of layout, there and back."""
    dtype = torch.float16 if "_2_" in kernel else torch.float32
    for shape in LAYOUT:
        x = torch.randn(shape).to(dtype)
        for layout in (torch.channels_last, torch.contiguous_format):
            print(f"{kernel}, {shape}, {layout}", end=": ", flush=True)
            out = training_runtime.to(torch.full_like(x, float("nan"), memory_format=layout), CUDA.device)
            op("change_layout_cuda")(training_runtime.to(x, CUDA.device), out)
            wrong = int((out.cpu() != x).sum())
            print(f"error {wrong} elements, limit 0", flush=True)
            if wrong:
                return False
            x = x.contiguous(memory_format=torch.channels_last)
    return True


def main(kernels: list[str]) -> int:
    for kernel in kernels:
        if kernel.startswith("change_layout"):
            if not layout_passes(kernel):
                return 1
            continue
        if "_training_" in kernel:
            if not training_passes(kernel):
                return 1
            continue
        for name, args in cases(kernel).items():
            for sm_count in SM_COUNTS:
                print(f"{kernel}, {name}, {sm_count} SMs", end=": ", flush=True)
                with planned_for(sm_count), general_only("_nhwc_" not in kernel and "_nchw_w" not in kernel):
                    verdict = judge(CUDA.run(args), args)
                print(f"error {verdict.error:.1e}, limit {verdict.limit:.1e}", flush=True)
                if not verdict.ok:
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
