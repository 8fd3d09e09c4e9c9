"""Static evidence on the CUDA kernels, with no GPU: ``python -m bench.static_cuda``. Exit code 1 if a kernel spills.

Prints tables and writes them, with all columns, to bench/results/static_cuda.json (its modules also to static_cuda.jsonl, for
`python -m bench predicted`): every compiled kernel on each
architecture; what the launch plan and the machine code of the fp16 kernels predict for GhostNet 1.0×'s Ghost modules on an
H100; and every launch of the network fused whole.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import static_network
from .environment import collect
from .sass_flow import parse
from .static_cuda_kernels import BATCHES, DEVICES, SOURCES, compile_sass, kernel_name, kernel_rows, nvcc_version, plan
from .static_cuda_model import Cost, Pieces, block_cost, spans, times
from .static_triton import modules

ROOT = Path(__file__).parents[1]
OUTPUT = Path(__file__).parent / "results" / "static_cuda.json"
GOAL = 1.10

# An H100 SXM by its datasheet: 3.35 TB/s; 989.4 TFLOP/s dense fp16 is 132 SMs × 4096 FLOP × 1.83 GHz. Per SM and clock:
# 128 bytes of shared memory, 128 fp32 lanes, 64 integer lanes, 4 warp instructions issued (CUDA programming guide).
# 4096 FLOP (2048 FMA) are for wgmma; mma.sync, which the kernel uses, is taken to reach half of that.
DRAM_BYTES, CLOCK, TENSOR_FMA = 3.35e12, 1.83e9, 1024
PER_CLOCK = {"issue": 4, "fp32": 128 / 32, "alu": 64 / 32, "tensor": TENSOR_FMA / (16 * 8 * 16), "shared": 1}

HEADER = """\
Kernels. Registers and local bytes: of the compiled code. Shared memory and occupancy: of the plan that needs most among
GhostNet 1.0×'s modules at batch 1, 64 and 256 (a depthwise conv: on the output of each). Instruction counts are static: how often each stands in the code.

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
    names = list(dict.fromkeys(name for row in rows for name in row if name not in hidden))
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


def markdown(results: dict[str, list[dict[str, Any]]], batch: int = 64) -> list[str]:
    """The tables of docs/static.md: modules, rounds, network."""
    rows, rounds, network = results["modules"], results["rounds"], results["network"]
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
    sums = (round(sum(r["issue_us"] * r["count"] for r in part)) for part in (nhwc, nchw))
    lines += ["", "Issue of all 32 modules, predicted: {} µs in channels_last, {} µs in NCHW.".format(*sums)]
    per_round = [f"| {' | '.join(rounds[0])} |", "|" + "---|" * len(rounds[0])]
    per_round += [f"| {' | '.join(map(str, r.values()))} |" for r in rounds]
    names = ("op", "count", "kernel", "blocks", "registers", "shared", "MB", "bytes/floor")
    own = [r for r in network if r["layout"] == "nhwc"]
    ops = [f"| {' | '.join(names).replace('count', '×')} |", "|" + "---|" * len(names)]
    ops += [f"| {' | '.join(static_network.cells(r)[name] for name in names)} |" for r in own]
    return ["\n".join(part) for part in (lines, per_round, [*ops, "", f"In all: {static_network.total(own)}."])]


def predictions(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The modules as `python -m bench predicted` reads them."""
    by_name = {
        (f"{m['in_channels']}->{m['out_channels']} {m['height']}x{m['width']}", m["act_primary"]): m for m in modules()
    }
    rows = []
    for r in results["modules"]:
        busiest = math.ceil(r["blocks"] / DEVICES["sm_90"][0]) / r["blocks"]
        setting = {"dtype": "float16", "layout": r["layout"], "batch": r["batch"], "mode": "inference"}
        counts = {"instructions": round(r["issue_us"] * 1e-6 * CLOCK * PER_CLOCK["issue"] / busiest)}
        counts |= {f"{name}_bytes": r["plan"][name] for name in ("dram_read", "dram_write")}
        us = {name: value for name, value in r.items() if name.endswith("_us")}
        rows.append({"kind": "predicted", **by_name[r["module"], r["act"]], **setting, **counts, **us})
    return rows


def write_predictions(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in predictions(results)))


def compile_all() -> dict[tuple[str, str], tuple[str, str]]:
    """SASS and resource usage of every file of kernels, by (architecture, file)."""
    keys = [(arch, source) for arch in DEVICES for source in SOURCES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return dict(zip(keys, pool.map(lambda key: compile_sass(*key), keys), strict=True))


def network_rows(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every op of the fused network in fp16 on an H100; ``kernels``: those of sm_90 are looked up by name."""
    compiled = {r["kernel"]: r for r in kernels if r["arch"] == "sm_90"}
    return [
        row
        for layout in ("nhwc", "nchw")
        for row in static_network.rows("cuda", "sm_90", "float16", layout, 64, compiled)
    ]


def run(output: Path) -> int:
    """Prints the tables, writes ``output``; 1 if a kernel spills."""
    import torch

    sass = compile_all()
    kernels, text = list(kernel_rows(sass)), sass["sm_90", "ghost_float16"][0]
    rows, rounds, network = module_rows(text), round_rows(text), network_rows(kernels)
    print(HEADER + "\n")
    table(kernels, ("counts", "static_smem", "blocks_per_sm_all_plans"))
    print("\nWarp instructions of the fp16 3×3 kernels on sm_90, per round:")
    table(rounds, ())
    print()
    table(rows, ("issue_shares", "plan"))
    print(f"\nfloat16, H100, batch 64. {static_network.HEADER}")
    for layout in ("nhwc", "nchw"):
        own = [r for r in network if r["layout"] == layout]
        print(f"\n{layout}: {static_network.total(own)}")
        table([static_network.cells(r) for r in own], ())
    facts = collect(torch.device("cpu")) | {
        "kind": "static_cuda", "command": "python -m bench.static_cuda", "nvcc": nvcc_version(), "sources": SOURCES,
        "header": HEADER,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    parts = {
        name: ",\n".join(map(json.dumps, part))
        for name, part in (("kernels", kernels), ("rounds", rounds), ("modules", rows), ("network", network))
    }
    body = "".join(f',\n"{name}": [\n{part}\n]' for name, part in parts.items())
    output.write_text(f'{{"about": {json.dumps(facts)}{body}}}\n')
    write_predictions({"modules": rows}, output.with_suffix(".jsonl"))
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
    parser.add_argument("--predictions", action="store_true", help="write the .jsonl beside the file, from the file")
    parser.add_argument("--markdown", action="store_true", help="print docs/static.md's tables from the file")
    options = parser.parse_args()
    if options.predictions:
        write_predictions(json.loads(options.output.read_text()), options.output.with_suffix(".jsonl"))
        return 0
    if options.markdown:
        results = json.loads(options.output.read_text())
        print("\n\n".join(markdown(results)))
        return 0
    return run(options.output)


if __name__ == "__main__":
    sys.exit(main())
