"""bench.static: what it counts, what the plans move, checked against a computation of its own, and that the committed
results are those of the present code."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from typing import Any

import pytest
from cuda_runtime import needs_extension

from bench import launches, predicted, sass_flow, static_cuda, static_cuda_kernels, static_cuda_model, static_network
from bench.sass import tool
from ghostfused.backends import BACKENDS
from ghostfused.spec import DepthwiseArgs, GhostArgs, SqueezeExciteArgs

pytestmark = needs_extension
needs_disassembler = pytest.mark.skipif(
    static_cuda_kernels.nvcc_path() is None or not os.path.exists(tool("cuobjdump")),
    reason="needs nvcc (on PATH or in CUDA_HOME) and the cuobjdump of Triton's package",
)
MODULES = static_cuda.modules()
RESULTS = json.loads(static_cuda.OUTPUT.read_text())
SYMBOL = "_ZN10ghostfused13ghost_forwardILNS_4PathE0ELi3ELb1EEEvNS_12KernelParamsE"


@pytest.fixture(scope="module")
def sass() -> dict[tuple[str, str], tuple[str, str]]:
    files = "ghost_float16", "bottleneck_float16"
    return {("sm_90", file): static_cuda.compile_sass("sm_90", file) for file in files}


@pytest.fixture(scope="module")
def kernels(sass) -> list[dict[str, Any]]:
    return list(static_cuda.kernel_rows(sass))


@pytest.fixture(scope="module")
def rows(sass) -> list[dict[str, Any]]:
    return static_cuda.module_rows(sass["sm_90", "ghost_float16"][0])


def tiles(size: int, tile: int, pad: int, align: int) -> list[set[int]]:
    """The rows (or columns) of the image that each tile computes x1 for, one by one."""
    out = []
    for start in range(0, size, tile):
        needed = {i for i in range(start - pad, min(start + tile, size) + pad) if 0 <= i < size}
        vectors = {i // align for i in needed}
        out.append({i for v in vectors for i in range(v * align, (v + 1) * align) if i < size})
    return out


def traffic(m: dict[str, Any], p: dict[str, Any], batch: int) -> dict[str, Any]:
    """The plan's bytes from the tiles' sets of pixels: everything that the blocks load, and what of it leaves DRAM."""
    cin, cout, h, w, pad = m["in_channels"], m["out_channels"], m["height"], m["width"], m["dw_size"] // 2
    init = math.ceil(cout / m["ratio"])
    rows, cols = tiles(h, p["tile_h"], pad, 1), tiles(w, p["tile_w"], pad, p["col_align"])
    pixels = [len(r) * len(c) for r in rows for c in cols]
    blocks_c = math.ceil(init / p["block_c"])
    grid = batch * len(pixels) * blocks_c
    block_m = p["threads"] // 32 // p["warps_n"] * 32
    passes = 1 if p["weights_resident"] else math.ceil(max(pixels) / block_m)
    x, x_loads = batch * cin * h * w * 2, batch * sum(pixels) * blocks_c * cin * 2
    out = batch * cout * h * w * 2
    near = blocks_c * len(cols) + p["blocks_per_sm"] * 132  # blocks between two that share pixels, and those at work
    kept = near >= grid or (near < grid and (x + out) // grid * near <= 20 * 2**20)
    return {
        "dram_read": (x if kept else x_loads) + 2 * init * (cin + (m["ratio"] - 1) * m["dw_size"] ** 2),
        "dram_write": out,
        "l2_read": x_loads + grid * passes * p["block_c"] * cin * 2,
        "grid": grid,
        "recompute": pytest.approx(sum(pixels) / (h * w)),
    }


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("batch", static_cuda.BATCHES)
def test_bytes_of_every_module(batch, nhwc):
    assert sum(m["count"] for m in MODULES) == 32
    for m in MODULES:
        p = static_cuda.plan(m, batch, nhwc)
        assert {k: p[k] for k in ("dram_read", "dram_write", "l2_read", "grid", "recompute")} == traffic(m, p, batch), m


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_dram_goal_at_batch_64(nhwc):
    """No exceptions: every module's plan moves at most a tenth more than x and the output."""
    for m in MODULES:
        p = static_cuda.plan(m, 64, nhwc)
        floor = 64 * (m["in_channels"] + m["out_channels"]) * m["height"] * m["width"] * 2
        assert floor <= p["dram_read"] + p["dram_write"] <= static_cuda.GOAL * floor, m


@needs_disassembler
def test_rows(rows):
    n = Counter((r["layout"], r["batch"]) for r in rows for _ in range(r["count"]))
    assert n == {(layout, batch): 32 for layout in ("nhwc", "nchw") for batch in static_cuda.BATCHES}
    for r in rows:
        times = {k: r[f"{k}_us"] for k in ("issue", "fp32", "alu", "tensor", "shared", "dram")}
        assert all(t > 0 for t in times.values())
        assert times[r["limiter"]] == max(times.values())
        assert sum(r["issue_shares"].values()) == pytest.approx(1, abs=0.01)


@needs_disassembler
def test_products_are_at_least_those_of_the_conv(rows):
    """The tensor time is the model's rounds × HMMA: never less than the conv's multiply-adds."""
    for r, m in zip(rows, MODULES * 6, strict=True):
        p = r["plan"]
        products = r["batch"] * m["height"] * m["width"] * m["in_channels"] * math.ceil(m["out_channels"] / 2)
        busiest = math.ceil(p["grid"] / 132) / p["grid"]
        least = products * p["recompute"] * busiest / static_cuda.TENSOR_FMA / static_cuda.CLOCK * 1e6
        assert r["tensor_us"] >= least - 0.005, r["module"]


@needs_disassembler
def test_compiled_kernels_use_no_local_memory(kernels):
    names = {f"float16_{dw}_{layout}" for dw in ("dw3", "dw5", "any") for layout in ("nchw", "nhwc")}
    names |= {f"float16_squeeze_{layout}" for layout in ("nchw", "nhwc")} | {"float16_excite"}
    for w, stride, layout in itertools.product((1, 3, 5, 7), (1, 2), ("nchw", "nhwc")):
        names.add(f"float16_depthwise_w{w}_s{stride}_{layout}")
    assert sorted(r["kernel"] for r in kernels) == sorted(names)
    for r in kernels:
        assert (r["spill_bytes"], r["local"]) == (0, 0)
        assert r["warps_per_sm"] >= 8
        if r["kernel"].split("_")[1] in ("dw3", "dw5", "any"):
            assert r["HMMA"] == 8
            assert r["LDGSTS.128"] > 0
            assert r["STG.128"] > 0


def planted(*lines: str) -> str:
    body = "\n".join(
        f"        /*{16 * i:04x}*/                   {line} ;    /* 0x0 */" for i, line in enumerate(lines)
    )
    return f"\t\tFunction : {SYMBOL}\n{body}\n"


def test_a_planted_spill_is_caught():
    text = planted("STL.64 [R1], R2", "@P0 LDL R3, [R1+0x8]", "LDS R4, [R5]", "EXIT")
    usage = f" Function {SYMBOL}:\n  REG:80 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:9\n"
    (row,) = static_cuda.kernel_rows({("sm_90", "ghost_float16"): (text, usage)})
    assert row["kernel"] == "float16_dw3_nhwc"
    assert row["static_smem"] == 0  # the 1 KB is the system's
    assert row["local"] == 2
    assert row["spill_bytes"] == 16
    assert row["counts"] == {"STL.64": 1, "LDL.32": 1, "LDS.32": 1, "EXIT": 1}


def test_unreadable_usage_is_an_error():
    with pytest.raises(ValueError, match="no resource usage"):
        list(static_cuda.kernel_rows({("sm_90", "ghost_float16"): (planted("EXIT"), "")}))


def test_a_kernel_that_nobody_listed_has_a_row():
    text = planted("EXIT")
    for symbol, name in (
        ("_ZN10ghostfused8gradientILNS_4PathE1ELi5ELb0EEEvNS_6ParamsE", "bfloat16_gradient_5_0"),
        ("_Z5otherPf", "_Z5otherPf"),
    ):
        usage = f" Function {symbol}:\n  REG:40 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:9\n"
        (row,) = static_cuda.kernel_rows({("sm_80", "any"): (text.replace(SYMBOL, symbol), usage)})
        assert (row["kernel"], row["registers"], row["smem"], row["threads"]) == (name, 40, 512, "-")


def test_other_loops_than_the_sources_are_an_error():
    (code,) = sass_flow.parse(planted("NOP", "@P0 BRA 0x0", "EXIT")).values()
    with pytest.raises(ValueError, match="1×1 conv: 0 loops"):
        static_cuda_model.Pieces(code, True, 16, 16, 16)


def test_ways_through_a_loop():
    """The longest takes the branch's longer side, the shortest the other; cold blocks and @!PT accesses don't count."""
    (code,) = sass_flow.parse(
        planted(
            "MOV R1, RZ",  # 00
            "@P0 BRA 0x40",  # 10: the loop
            "LDS.128 R4, [R1]",  # 20
            "@!PT LDS RZ, [RZ]",  # 30
            "FFMA R2, R2, R3, R4",  # 40
            "@P1 BRA 0x80",  # 50
            "MUFU.EX2 R2, R2",  # 60
            "BRA 0x80",  # 70
            "IADD3 R1, R1, 0x1, RZ",  # 80
            "@P2 BRA 0x10",  # 90
            "EXIT",  # a0
        )
    ).values()
    flow = sass_flow.Flow(code, lambda block: any(i.opcode == "MUFU.EX2" for i in block))
    (loop,) = flow.loops
    assert flow.body(loop) == Counter(issue=7, shared=4, fp32=1, alu=1)
    assert flow.short_body(loop) == Counter(issue=5, fp32=1, alu=1)
    assert sass_flow.Flow(code).body(loop)["issue"] == 9
    assert sass_flow.static_counts(code)["LDS.128"] == 1
    assert "LDS.32" not in sass_flow.static_counts(code)


def test_bank_conflicts():
    assert static_cuda_model.conflicts([4 * i for i in range(32)], 4) == 1
    assert static_cuda_model.conflicts([8 * i for i in range(32)], 8) == 1
    assert static_cuda_model.conflicts([0] * 32, 4) == 1  # a broadcast
    assert static_cuda_model.conflicts([128 * i for i in range(32)], 4) == 32
    assert static_cuda_model.conflicts([16 * i for i in range(32)], 8) == 2


def test_docs_have_the_tables_of_the_results():
    text = (static_cuda.ROOT / "docs/static.md").read_text()
    assert [table for table in static_cuda.markdown(RESULTS) if table not in text] == []
    assert not any(r["spill_bytes"] or r["local"] for r in RESULTS["kernels"])
    assert {r["arch"] for r in RESULTS["kernels"]} == set(static_cuda.DEVICES)


STALE = (
    "bench/results/static_cuda.json is not of this code: run python -m bench.static_cuda, and --markdown for the docs"
)


def test_results_have_every_file_of_kernels():
    assert RESULTS["about"]["sources"] == static_cuda_kernels.SOURCES, STALE


def test_predictions_are_those_of_the_results():
    path = static_cuda.OUTPUT.with_suffix(".jsonl")
    assert [json.loads(line) for line in path.read_text().splitlines()] == static_cuda.predictions(RESULTS), STALE
    found = predicted.predictions(path)
    assert len(found) == len(RESULTS["modules"])
    for r, row in zip(RESULTS["modules"], found.values(), strict=True):
        assert predicted.bound(row)[0] == r["limiter"]
        assert (row["issue_us"], row["count"]) == (r["issue_us"], r["count"])
        assert row["dram_us"] == pytest.approx((row["dram_read_bytes"] + row["dram_write_bytes"]) / 3.35e6, abs=6e-3)


def test_results_have_the_present_plans():
    for r, m in zip(RESULTS["modules"], MODULES * 6, strict=True):
        assert static_cuda.plan(m, r["batch"], r["layout"] == "nhwc") == r["plan"], (STALE, r["module"])


def test_results_have_the_present_launches_of_the_network():
    assert static_cuda.network_rows(RESULTS["kernels"]) == RESULTS["network"], STALE


@needs_disassembler
def test_results_have_the_present_kernels(sass, kernels, rows):
    """Of the two files that are compiled here; the others are the same templates."""
    if RESULTS["about"]["nvcc"] != static_cuda_kernels.nvcc_version():
        pytest.skip(f"the results were made with {RESULTS['about']['nvcc']}")
    committed = {r["kernel"]: r for r in RESULTS["kernels"] if r["arch"] == "sm_90"}
    assert [r for r in kernels if committed.get(r["kernel"]) != r] == [], STALE
    assert [r for r, old in zip(rows, RESULTS["modules"], strict=True) if r != old] == [], STALE
    assert static_cuda.round_rows(sass["sm_90", "ghost_float16"][0]) == RESULTS["rounds"], STALE


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_every_op_of_the_network_has_its_launches_and_bytes(layout):
    own = [r for r in RESULTS["network"] if r["layout"] == layout]
    ops = static_network.ops("cuda", 64, "float16", layout)
    assert sum(r["count"] for r in own) == len(ops)
    assert sum(isinstance(a, GhostArgs) and a.out_channels > a.init_channels for a in ops) == 32
    assert {type(a) for a in ops} == {GhostArgs, DepthwiseArgs, SqueezeExciteArgs}
    for args in ops:
        (r,) = (r for r in own if r["op"] == static_network.title(args))
        x, out = args.x.numel() * 2, args.new_output().numel() * 2
        others = [t for name in ("residual", "input_gate") if (t := getattr(args, name, None)) is not None]
        assert r["floor_bytes"] == x + out + sum(t.numel() * 2 for t in others)
        assert r["plan_bytes"] >= r["floor_bytes"]
        if not isinstance(args, SqueezeExciteArgs):
            assert r["plan_bytes"] <= static_cuda.GOAL * r["floor_bytes"], r["op"]
        assert all(layout in kernel or "excite" in kernel for kernel in r["kernel"])
        assert len(r["kernel"]) == r["launches"]


def test_launches_are_those_that_the_command_counts():
    """bench.launches' count per op is the number of launches in the plans, for every backend on a GPU."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter's launches are not recorded")
    for backend in ("cuda", "triton", "triton_two_kernel"):
        for args in static_network.ops(backend, 1, "float16", "nhwc"):
            name = f"ghostfused.{args.op}_{backend}"
            if backend == "cuda":
                made = len(static_network.plan_of(args, backend, "sm_90").launches)
            else:
                with static_network.recorded() as launched:
                    BACKENDS[backend].forward(args)
                made = len(launched)
            assert made == launches.kernels(name, args), static_network.title(args)
