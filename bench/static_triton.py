"""Static evidence on the Triton kernels: what the compiler made of them, for GPUs that need not be there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ghostfused.backends import triton as backend
from ghostfused.backends.triton_compile import compile_launch
from ghostfused.backends.triton_configs import NUM_WARPS
from ghostfused.spec import Act, GhostArgs

from .sass import KINDS, disassemble

CONFIGS = Path(__file__).parents[1] / "tests" / "data" / "ghost_configs.jsonl"
GHOSTNET = "timm/ghostnet_100@224"
HEADER = """\
registers, spill bytes, shared memory: of the compiled kernel. Instructions: what all threads issue (a warp's
instruction counts 32 times, predicated-off ones count) over the bytes of the output, from SASS: the body of each loop
times its trip count, averaged over programs, straight-line code once. LDS and STS contain ldmatrix and stmatrix; HMMA is
any tensor-core instruction; LDGSTS is cp.async. The two-kernel version has one row for each kernel."""


def shape_args(
    cin: int, out_channels: int, h: int, w: int, *, batch: int = 64, dtype: torch.dtype = torch.float16, nhwc: bool = True,
    ratio: int = 2, dw_size: int = 3, act_primary: str = "relu", act_cheap: str = "relu", allow_tf32: bool = False,
) -> GhostArgs:  # fmt: skip
    """A Ghost module with BatchNorm and no data (meta tensors)."""
    cp = -(-out_channels // ratio)
    new = cp * (ratio - 1)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(batch, cin, h, w)
    return GhostArgs(
        x.to(memory_format=torch.channels_last) if nhwc else x,
        empty(cp, cin, 1, 1), None, *(empty(cp) for _ in range(4)), empty(1) if act_primary == "prelu" else None,
        empty(new, 1, dw_size, dw_size), None, *(empty(new) for _ in range(4)), empty(1) if act_cheap == "prelu" else None,
        None, None, None, 1e-5, int(Act[act_primary.upper()]), 0.01, 1e-5, int(Act[act_cheap.upper()]), 0.01,
        out_channels, 1, 1, 1, allow_tf32,
    )  # fmt: skip


def trip_counts(args: GhostArgs, plan: dict[str, Any]) -> list[list[float]]:
    """Of the kernel's loops (see ``Sass.counts``), averaged over programs."""
    pixels, run, w = plan["H"] * plan["W"], plan["run"], plan["W"]
    runs = range(0, pixels, run)
    trips = []
    if plan["PRIMARY"]:
        halo = plan["DW_SIZE"] // 2 * (w + 1) if plan["CHEAP"] else 0
        chunks = 0
        for begin in runs:
            lo = max(begin - halo, 0) // 16 * 16
            hi = min(-(-(min(begin + run, pixels) + halo) // 16) * 16, pixels)
            chunks += math.ceil((hi - lo) / plan["BLOCK_M"])
        inner = [] if plan["ONE_K"] else [math.ceil(plan["Cin"] / plan["BLOCK_K"])]
        trips.append([chunks / len(runs), *inner])
    if plan["CHEAP"]:
        chunks = sum(math.ceil(min(run, pixels - begin) / plan["BLOCK_P"]) for begin in runs)
        outer = []
        if plan["BLOCK_C"] < plan["BLOCK_N"]:
            cp, n = plan["Cp"], plan["BLOCK_N"]
            outer = [sum(math.ceil(min(n, cp - c) / plan["BLOCK_C"]) for c in range(0, cp, n)) / math.ceil(cp / n)]
        trips.append([*outer, chunks / len(runs)])
    return trips


def measure(args: GhostArgs, target: str, primary: bool = True, cheap: bool = True, **override: Any) -> dict[str, Any]:
    """The evidence on one kernel: ``ghost_kernel`` for ``args`` with both steps or one."""
    out = args.new_output()
    plan = backend.plan(args, out, out, primary, cheap) | override
    compiled = compile_launch(plan, target)
    sass = disassemble(compiled.asm["cubin"])
    programs = args.x.shape[0] * -(-plan["H"] * plan["W"] // plan["run"]) * -(-args.init_channels // plan["BLOCK_N"])
    scale = programs * NUM_WARPS * 32 / (out.numel() * out.element_size())
    counts = sass.counts(trip_counts(args, plan))
    blocks = {k: plan[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_C", "run")}
    return {
        "registers": sass.registers, "spill_bytes": sass.spill_bytes, "shared": compiled.metadata.shared,
        "warps": NUM_WARPS, "programs": programs, **{k.lower(): v for k, v in blocks.items()},
        **{kind: round(counts[kind] * scale, 3) for kind in (*KINDS, "total")},
    }  # fmt: skip


def modules(source: str = GHOSTNET) -> list[dict[str, Any]]:
    """The distinct modules of one network that the kernels take."""
    rows = [json.loads(line) for line in CONFIGS.read_text().splitlines()]
    return [r for r in rows if r["source"] == source and r["kernel_size"] == 1 and r["stride"] == 1]


def rows(
    targets: tuple[str, ...] = ("sm_80", "sm_90"), dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.float32),
    layouts: tuple[str, ...] = ("nchw", "nhwc"),
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per target × dtype × layout × module × kernel."""
    steps = (
        ("triton", True, True),
        ("triton_two_kernel/primary", True, False),
        ("triton_two_kernel/cheap", False, True),
    )
    for target in targets:
        for dtype in dtypes:
            for layout in layouts:
                for m in modules():
                    args = shape_args(
                        m["in_channels"], m["out_channels"], m["height"], m["width"], dtype=dtype, nhwc=layout == "nhwc",
                        ratio=m["ratio"], dw_size=m["dw_size"], act_primary=m["act_primary"], act_cheap=m["act_cheap"],
                    )  # fmt: skip
                    for kernel, primary, cheap in steps:
                        yield {
                            "target": target, "dtype": str(dtype).removeprefix("torch."), "layout": layout, "batch": 64,
                            "module": f"{m['in_channels']}->{m['out_channels']} {m['height']}x{m['width']}",
                            "activation": m["act_primary"], "kernel": kernel, **measure(args, target, primary, cheap),
                        }  # fmt: skip
