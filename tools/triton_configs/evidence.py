"""Static evidence on a Triton kernel: what the compiler made of it, for a GPU that need not be there.

Registers and spills are of the compiled kernel. Instructions are what all threads issue (a warp's instruction counts 32 times,
predicated-off ones count) over the bytes of the output, from SASS: the body of each loop times its trip count, averaged over
programs, straight-line code once.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ghostfused.backends import triton as backend
from ghostfused.backends.triton.compile import compile_launch
from ghostfused.backends.triton.configs import NUM_WARPS
from ghostfused.spec import Act, GhostArgs

from .disassembly import KINDS, disassemble


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
        x=x.to(memory_format=torch.channels_last) if nhwc else x,
        primary_weight=empty(cp, cin, 1, 1), primary_bias=None, primary_mean=empty(cp), primary_var=empty(cp),
        primary_gamma=empty(cp), primary_beta=empty(cp), primary_slope=empty(1) if act_primary == "prelu" else None,
        cheap_weight=empty(new, 1, dw_size, dw_size), cheap_bias=None, cheap_mean=empty(new), cheap_var=empty(new),
        cheap_gamma=empty(new), cheap_beta=empty(new), cheap_slope=empty(1) if act_cheap == "prelu" else None,
        input_gate=None, residual=None, output_gate=None,
        primary_eps=1e-5, primary_act=Act[act_primary.upper()], primary_negative_slope=0.01,
        cheap_eps=1e-5, cheap_act=Act[act_cheap.upper()], cheap_negative_slope=0.01,
        out_channels=out_channels, stride=1, dilation=1, groups=1, allow_tf32=allow_tf32,
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


def measure(args: GhostArgs, target: str, primary: bool, cheap: bool, choice: backend.Choice) -> dict[str, Any]:
    """The evidence on one kernel: ``ghost_kernel`` for ``args`` with both steps or one."""
    out = args.new_output()
    plan = backend.plan(args, out, out, primary, cheap, choice)
    compiled = compile_launch(plan, target)
    sass = disassemble(compiled.asm["cubin"])
    programs = backend.programs(plan, args.x.shape[0])
    scale = programs * NUM_WARPS * 32 / (out.numel() * out.element_size())
    counts = sass.counts(trip_counts(args, plan))
    blocks = {k: plan[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_P", "BLOCK_C", "run")}
    return {
        "registers": sass.registers, "spill_bytes": sass.spill_bytes, "shared": compiled.metadata.shared,
        "warps": NUM_WARPS, "programs": programs, **{k.lower(): v for k, v in blocks.items()},
        **{kind: round(counts[kind] * scale, 3) for kind in (*KINDS, "total")},
    }  # fmt: skip
