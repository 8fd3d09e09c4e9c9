"""Static evidence on the CUDA kernels, with no GPU: ``python -m bench.static_cuda``. Exit code 1 if a kernel spills.

Prints two tables and writes both, with all columns, to bench/results/static_cuda.json: the compiled kernels on each
architecture, and what the launch plan and the machine code of the fp16 kernels predict for GhostNet 1.0× on an H100.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .environment import collect
from .sass import tool
from .sass_flow import Instruction, parse, static_counts
from .static_cuda_model import Cost, Pieces, block_cost, spans, times
from .static_triton import modules

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).parent / "results" / "static_cuda.json"
PATHS = ("float16", "bfloat16", "tf32", "float32")
BATCHES = (1, 64, 256)
DEVICES = {"sm_80": (108, 166912, 167936), "sm_90": (132, 232448, 233472)}  # A100, H100: SMs, shared memory (block, SM)
GOAL = 1.10

# An H100 SXM by its datasheet: 3.35 TB/s; 989.4 TFLOP/s dense fp16 is 132 SMs × 4096 FLOP × 1.83 GHz. Per SM and clock:
# 128 bytes of shared memory, 128 fp32 lanes, 64 integer lanes, 4 warp instructions issued (CUDA programming guide).
# 4096 FLOP (2048 FMA) are for wgmma; mma.sync, which the kernel uses, is taken to reach half of that.
DRAM_BYTES, CLOCK, TENSOR_FMA = 3.35e12, 1.83e9, 1024
PER_CLOCK = {"issue": 4, "fp32": 128 / 32, "alu": 64 / 32, "tensor": TENSOR_FMA / (16 * 8 * 16), "shared": 1}

HEADER = """\
Kernels. Registers and local bytes: of the compiled code. Shared memory and occupancy: of the plan that needs most among
GhostNet 1.0×'s modules at batch 1, 64 and 256. Instruction counts are static: how often each stands in the code.

Modules. PREDICTIONS for an H100 SXM (132 SMs) from datasheet rates: nothing here was timed. Tile, blocks and bytes are
the launch plan's; the floor is x read once and the output written once; waves = blocks / (SMs × blocks per SM).
Times: DRAM = the plan's bytes / 3.35 TB/s. The others are clocks of the busiest SM (ceil(blocks / SMs) average blocks) at
1.83 GHz: issue at 4 warp instructions a clock, fp32 (FFMA, FMUL, FADD, and IMAD twice) at 128 lanes, alu (integer,
compare, select) at 64 lanes, shared memory at 128 bytes, tensor at 1024 fp16 FMA (half of wgmma's dense rate, for mma.sync).
Each assumes that nothing else is in its way: latency, barriers, waves' tails and launch time are not modelled, so the
limiter is a bound, not a run time.
Dynamic counts: rounds of each loop, exact from the source's loop bounds for every tile of the plan (warps with any
active lane), × one round in SASS by its longest way, branches that these modules never take left out (SiLU,
Hardswish, gates, residual, other vector widths); so predicated-off instructions count, and steps of the 1×1 conv
count the instructions around unused HMMA, but not those HMMA. Code outside the innermost loops is the shortest way from
loop to loop. Error: bodies are counted too high (at tile edges), straight-line code too low (skipped ifs, calls of
division, up to some hundred instructions a warp; no bank conflicts but those of the depthwise conv's and the transpose's
reads, which are computed from their addresses). No profiler has checked the sums. The JSON has each row's
plan and the shares of issue by stage; "straight" is what lies outside the innermost loops."""


def compile_sass(arch: str, path: str) -> tuple[str, str]:
    """SASS and resource usage of one path's kernels.

    Raises:
        RuntimeError: no nvcc or no cuobjdump, or the compiler failed.
    """
    nvcc = nvcc_path()
    if nvcc is None or not os.path.exists(tool("cuobjdump")):
        raise RuntimeError("bench.static_cuda needs nvcc and the cuobjdump of Triton's package")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{path}.cubin"
        source = str(ROOT / "csrc" / f"kernels_{path}.cu")
        command = [nvcc, "-std=c++20", "-O3", "-cubin", f"-arch={arch}", "-o", cubin, source]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
        done = run(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return run([tool("cuobjdump"), "-sass", cubin]).stdout, run([tool("cuobjdump"), "-res-usage", cubin]).stdout


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or next((p for p in (f"{home}/bin/nvcc",) if os.path.exists(p)), None)


def kernel_name(mangled: str) -> str | None:
    """As kernel_attributes() calls it."""
    m = re.search(r"ghost_forwardILNS_4PathE(\d)ELi(\d)ELb([01])E", mangled)
    if m is None:
        return None
    return f"{PATHS[int(m[1])]}_{'dw' + m[2] if m[2] != '0' else 'any'}_{'nhwc' if m[3] == '1' else 'nchw'}"


def plan(m: dict[str, Any], batch: int, nhwc: bool, path: str = "float16", arch: str = "sm_90", dw: int = 0) -> dict:
    _C = importlib.import_module("ghostfused._C")
    sms, block, sm = DEVICES[arch]
    return _C.plan(
        batch=batch, in_channels=m["in_channels"], height=m["height"], width=m["width"],
        init_channels=math.ceil(m["out_channels"] / m["ratio"]), out_channels=m["out_channels"], ratio=m["ratio"],
        dw_size=dw or m["dw_size"], path=path, channels_last=nhwc, sm_count=sms, smem_per_block=block, smem_per_sm=sm,
    )  # fmt: skip


def occupancy(registers: int, shared: int, threads: int, arch: str) -> int:
    """Blocks per SM: registers are given to warps in units of 256, 1 KB of each block's shared memory is the system's."""
    warps = threads // 32
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    return min(by_registers, DEVICES[arch][2] // (shared + 1024), 2048 // threads, 32)


def kernel_row(name: str, arch: str, code: list[Instruction], usage: str) -> dict[str, Any]:
    """One compiled kernel. ``usage``: the line that -res-usage prints for it."""
    m = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if m is None:
        raise ValueError(f"no resource usage of {name}: {usage!r}")
    path, dw, layout = name.split("_")
    plans = [
        plan(mod, batch, layout == "nhwc", path, arch, {"dw3": 3, "dw5": 5, "any": 7}[dw])
        for mod in modules()
        for batch in BATCHES
    ]
    most = max(plans, key=lambda p: p["smem_bytes"])
    blocks = [occupancy(int(m[1]), p["smem_bytes"], p["threads"], arch) for p in plans]
    at_most = occupancy(int(m[1]), most["smem_bytes"], most["threads"], arch)
    counts = static_counts(code)
    local = sum(n for kind, n in counts.items() if kind.startswith(("LDL", "STL")))
    return {
        "kernel": name, "arch": arch, "registers": int(m[1]), "spill_bytes": int(m[2]) + int(m[3]), "local": local,
        "smem": most["smem_bytes"], "threads": most["threads"], "blocks_per_sm": at_most,
        "warps_per_sm": at_most * most["threads"] // 32, "blocks_per_sm_all_plans": [min(blocks), max(blocks)],
        "HMMA": counts.get("HMMA", 0), "LDSM": counts.get("LDSM", 0), "LDGSTS.128": counts.get("LDGSTS.128", 0),
        "LDG.128": counts.get("LDG.128", 0), "STG.128": counts.get("STG.128", 0), "FFMA": counts.get("FFMA", 0),
        "instructions": sum(counts.values()), "counts": dict(sorted(counts.items())),
    }  # fmt: skip


def kernel_rows(sass: dict[tuple[str, str], tuple[str, str]]) -> Iterator[dict[str, Any]]:
    for (arch, _), (text, usage) in sass.items():
        usages = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
        for mangled, code in parse(text).items():
            if name := kernel_name(mangled):
                yield kernel_row(name, arch, code, usages.get(mangled, ""))


def module_row(m: dict[str, Any], batch: int, nhwc: bool, pieces_for: Callable[..., Pieces]) -> dict[str, Any]:
    """The plan's traffic for one module, and the predicted times. ``pieces_for``: (channels_last, vector bytes of x, of
    the weights, of the output) → the kernel's code."""
    p = plan(m, batch, nhwc)
    cin, cout, image, sms = m["in_channels"], m["out_channels"], m["height"] * m["width"], DEVICES["sm_90"][0]
    floor = batch * (cin + cout) * image * 2
    pieces = pieces_for(nhwc, p["x_vector_bytes"], p["weight_vector_bytes"], p["out_vector_bytes"])
    init, pad = math.ceil(cout / m["ratio"]), m["dw_size"] // 2
    total: Cost = collections.Counter()
    for h, h_count in spans(m["height"], p["tile_h"], pad, 1).items():
        for w, w_count in spans(m["width"], p["tile_w"], pad, p["col_align"]).items():
            blocks = collections.Counter(min(p["block_c"], init - c) for c in range(0, init, p["block_c"]))
            for channels, c_count in blocks.items():
                n = h_count * w_count * c_count * batch
                total.update(times(block_cost(pieces, m, p, nhwc, (h, w), channels), n))
    busiest = math.ceil(p["grid"] / sms) / p["grid"]  # of all work
    us = {kind: total[kind] * busiest / rate / CLOCK * 1e6 for kind, rate in PER_CLOCK.items()}
    us["dram"] = (p["dram_read"] + p["dram_write"]) / DRAM_BYTES * 1e6
    return {
        "module": f"{cin}->{cout} {m['height']}x{m['width']}", "act": m["act_primary"], "count": m["count"],
        "layout": "nhwc" if nhwc else "nchw", "batch": batch,
        "tile": f"{p['tile_h']}x{p['tile_w']}x{p['block_c']}", "blocks": p["grid"],
        "waves": round(p["grid"] / (sms * p["blocks_per_sm"]), 2),
        "dram/floor": round((p["dram_read"] + p["dram_write"]) / floor, 3),
        "l2/x": round(p["l2_read"] / (batch * cin * image * 2), 2), "recompute": round(p["recompute"], 2),
        **{f"{kind}_us": round(t, 2) for kind, t in us.items()},
        "limiter": max(us, key=lambda k: us[k]),
        "chip/dram": round(max(t for k, t in us.items() if k != "dram") / us["dram"], 2),
        "issue_shares": {k.removeprefix("issue "): round(n / total["issue"], 3) for k, n in total.items() if " " in k},
        "plan": p,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], hidden: tuple[str, ...]) -> None:
    names = [name for name in rows[0] if name not in hidden]
    widths = [max(len(name), *(len(str(r[name])) for r in rows)) for name in names]
    for cells in (names, *([str(r[name]) for name in names] for r in rows)):
        print("  ".join(cell.rjust(n) for cell, n in zip(cells, widths, strict=True)))


def module_rows(text: str) -> list[dict[str, Any]]:
    """All modules × batches × layouts; ``text``: SASS of the fp16 kernels on sm_90."""
    codes = {kernel_name(mangled): code for mangled, code in parse(text).items()}

    @functools.cache
    def pieces_for(nhwc: bool, *vector_bytes: int) -> Pieces:
        return Pieces(codes[f"float16_dw3_{'nhwc' if nhwc else 'nchw'}"], nhwc, *vector_bytes)

    return [module_row(m, batch, nhwc, pieces_for) for nhwc in (True, False) for batch in BATCHES for m in modules()]


def round_rows(text: str) -> list[dict[str, Any]]:
    """Warp instructions in one round of each loop, and in what lies between them, with 16-byte vectors."""
    codes = {kernel_name(mangled): code for mangled, code in parse(text).items()}
    out = []
    for layout in ("nhwc", "nchw"):
        p = Pieces(codes[f"float16_dw3_{layout}"], layout == "nhwc", 16, 16, 16)
        parts = {
            "vector of x": p.x_vector, "vector of weights": p.w_vector, "K step": p.k_step, "epilogue": p.epilogue,
            "depthwise row": p.row, "its output": p.emit, "vector stored": p.store_vector, "per chunk": p.chunk,
            "per block": p.once,
        }  # fmt: skip
        out.append({"layout": layout, **{name: part["issue"] for name, part in parts.items()}})
    return out


def markdown(rows: list[dict[str, Any]], rounds: list[dict[str, Any]], batch: int = 64) -> str:
    """The tables of docs/static.md."""
    lines = [
        "| module | × | bytes / floor | limiter | its time / DRAM's | of issue: straight | load | multiply | epilogue | depthwise "
        "| store | NCHW: limiter | its time / DRAM's |",
        "|" + "---|" * 13,
    ]
    nhwc, nchw = ([r for r in rows if r["batch"] == batch and r["layout"] == layout] for layout in ("nhwc", "nchw"))
    for r, other in zip(nhwc, nchw, strict=True):
        s = r["issue_shares"] | {"load": sum(r["issue_shares"][k] for k in ("load x", "load weights", "parameters"))}
        shares = [f"{s[k]:.0%}" for k in ("straight", "load", "multiply", "epilogue", "depthwise", "store")]
        cells = [f"{r['module']} {r['act']}", r["count"], r["dram/floor"], r["limiter"], r["chip/dram"], *shares]
        lines.append(f"| {' | '.join(map(str, [*cells, other['limiter'], other['chip/dram']]))} |")
    lines += ["", f"| {' | '.join(rounds[0])} |", "|" + "---|" * len(rounds[0])]
    lines += [f"| {' | '.join(map(str, r.values()))} |" for r in rounds]
    return "\n".join(lines)


def run(output: Path) -> int:
    """Prints both tables, writes ``output``; 1 if a kernel spills."""
    import torch

    keys = [(arch, path) for arch in DEVICES for path in PATHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sass = dict(zip(keys, pool.map(lambda key: compile_sass(*key), keys), strict=True))
    kernels, rows = list(kernel_rows(sass)), module_rows(sass["sm_90", "float16"][0])
    rounds = round_rows(sass["sm_90", "float16"][0])
    print(HEADER + "\n")
    table(kernels, ("counts", "blocks_per_sm_all_plans"))
    print("\nWarp instructions of the fp16 3×3 kernels on sm_90, per round:")
    table(rounds, ())
    print()
    table(rows, ("issue_shares", "plan"))
    nvcc = subprocess.run([str(nvcc_path()), "--version"], capture_output=True, text=True, check=False).stdout
    facts = collect(torch.device("cpu")) | {
        "kind": "static_cuda", "command": "python -m bench.static_cuda", "nvcc": nvcc.strip().splitlines()[-1],
        "header": HEADER,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = {
        name: ",\n".join(map(json.dumps, part))
        for name, part in (("kernels", kernels), ("rounds", rounds), ("modules", rows))
    }
    body = "".join(f',\n"{name}": [\n{part}\n]' for name, part in parts.items())
    output.write_text(f'{{"about": {json.dumps(facts)}{body}}}\n')
    at64 = [r for r in rows if r["batch"] == 64]
    over = [r for r in at64 if r["dram/floor"] > GOAL]
    slow = [r for r in rows if r["limiter"] != "dram"]
    spilled = [r["kernel"] for r in kernels if r["spill_bytes"] or r["local"]]
    print(f"\n{sum(r['count'] for r in over)} modules at batch 64 move more than {GOAL} of the floor")
    print(f"{len(slow)} of {len(rows)} rows have a limiter other than DRAM (predicted)")
    print(f"{len(spilled)} kernels use local memory: {', '.join(spilled) or 'none'}")
    return 1 if spilled else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file (default %(default)s)")
    parser.add_argument("--markdown", action="store_true", help="print docs/static.md's tables from the file")
    options = parser.parse_args()
    if options.markdown:
        results = json.loads(options.output.read_text())
        print(markdown(results["modules"], results["rounds"]))
        return 0
    return run(options.output)


if __name__ == "__main__":
    sys.exit(main())
