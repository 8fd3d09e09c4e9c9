"""The compiled CUDA kernels against the float64 reference: on a GPU, or with none under ptx-on-cpu."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_raw_ops
import pytest
import torch
from cuda_runtime import _C, ON_CPU, check, check_args, forward, needs_cuda, planned_for, run_in_order
from draws import ACTS, LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

import ghostfused
from ghostfused import ops
from ghostfused.backends import cuda, reference
from ghostfused.spec import TENSORS, Act
from ghostfused.testing import Case, convert, make_args, to_device

pytestmark = [pytest.mark.cuda, needs_cuda]

PATHS = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "allow_tf32": True},
    "float32": {"dtype": torch.float32},
}
SMALL_DEVICE = 101376
"""Bytes of shared memory for a block on sm_86, sm_89 and sm_120."""
each_path = pytest.mark.parametrize("path", PATHS)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@each_path
@each_layout
@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_every_kernel(path, layout, dw_size):
    for ratio in (2, 3):
        check(Case(1, 20, 9, 11, 12 * ratio, ratio, dw_size=dw_size, layout=layout, **PATHS[path]))


@each_path
@each_layout
@pytest.mark.parametrize("sm_count", [1, 132])
def test_thread_order(path, layout, sm_count):
    """Pipelines of several chunks and stages, column tiles, several channel blocks; also run in other thread orders."""
    with planned_for(sm_count):
        check(Case(1, 72, 12, 20, 24, layout=layout, **PATHS[path]))
        check(Case(1, 8, 15, 11, 64, layout=layout, **PATHS[path]))  # rows that strips don't divide
        check(Case(1, 200, 7, 7, 40, dw_size=5, layout=layout, input_gate=True, residual=True, **PATHS[path]))
        check(Case(1, 24, 9, 24, 54, ratio=3, layout=layout, output_gate=True, **PATHS[path]))


@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
@pytest.mark.parametrize("order", ["desc", "rand:7"])
def test_other_orders(order):
    run_in_order(__file__, order)


@each_layout
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("path", ["float16", "float32"])
def test_activations(act, layout, path):
    for per_channel in (False, True) if act == "prelu" else (False,):
        common = {"per_channel_slope": per_channel, "layout": layout, **PATHS[path]}
        check(Case(1, 12, 6, 5, 20, act_primary=act, act_cheap="none", **common))
        check(Case(1, 12, 6, 5, 20, act_primary="none", act_cheap=act, **common))


@each_path
@pytest.mark.parametrize("primary", ["none", "bias", "bn", "bn+bias", "bn_no_affine"])
def test_norms(primary, path):
    for cheap in ("none", "bias", "bn", "bn_no_affine"):
        for norm_dtype in (None, torch.float32):
            check(Case(1, 8, 5, 6, 16, primary_norm=primary, cheap_norm=cheap, norm_dtype=norm_dtype, **PATHS[path]))


@each_layout
@pytest.mark.parametrize("path", ["float16", "float32"])
def test_ratios_and_slicing(layout, path):
    for ratio, out_channels, init in [(2, 25, None), (2, 13, 13), (3, 29, None), (4, 40, 11), (3, 12, 12), (5, 33, 8)]:
        check(Case(1, 9, 6, 7, out_channels, ratio, init_channels=init, layout=layout, **PATHS[path]))
    with planned_for(132):
        check(Case(1, 16, 8, 8, 190, 4, layout=layout, **PATHS[path]))


@each_layout
@each_path
@pytest.mark.parametrize("optional", list(itertools.product([False, True], repeat=3))[1:])
def test_optional_inputs(layout, path, optional):
    gate, residual, output_gate = optional
    extra = {"input_gate": gate, "residual": residual, "output_gate": output_gate}
    check(Case(2, 20, 9, 6, 24, layout=layout, **extra, **PATHS[path]))
    check(Case(1, 16, 8, 16, 33, layout=layout, **extra, **PATHS[path]))


@each_layout
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (2, 2), (7, 9), (3, 130), (64, 5)])
def test_sizes(layout, size):
    for path in ("float16", "float32"):
        for dw_size in (3, 5):
            check(Case(2, 8, *size, 16, dw_size=dw_size, layout=layout, **PATHS[path]))


@each_layout
def test_wider_than_any_tile(layout):
    check(Case(1, 4, 2, 1900, 8, layout=layout, dtype=torch.float16))
    with planned_for(132):
        for width in (96, 97, 98, 100):  # halos that start at multiples of 8, 1, 2 and 4 pixels in NCHW
            check(Case(1, 8, 17, width, 24, layout=layout, dtype=torch.float16))


@each_layout
@pytest.mark.parametrize("in_channels", [1, 4, 5, 12, 20, 33, 36, 100])
def test_channels(in_channels, layout):
    for out_channels in (4, 10, 24, 66, 72, 200):
        check(Case(1, in_channels, 5, 6, out_channels, layout=layout, dtype=torch.float16))
    for path in ("bfloat16", "tf32", "float32"):
        check(Case(1, in_channels, 5, 6, 36, layout=layout, **PATHS[path]))


def test_many_channels():
    for cin, out in [(960, 160), (2048, 8), (4, 2048), (500, 516)]:
        for layout in LAYOUTS:
            check(Case(1, cin, 2, 3, out, layout=layout, dtype=torch.float16))
    check(Case(1, 960, 2, 3, 60, dtype=torch.float32))


@each_layout
@pytest.mark.parametrize("seed", range(3))
def test_long_fp32_sums(layout, seed):
    """Chains of hundreds of products must not round away more than PyTorch's blocked sums do."""
    for cin, out in [(336, 80), (672, 112), (960, 160), (1248, 208)]:
        check(Case(1, cin, 7, 7, out, layout=layout, act_primary="none", act_cheap="none", seed=seed))


@each_layout
@each_path
def test_sliced_input(layout, path):
    check(Case(2, 20, 9, 7, 24, layout=layout, sliced=True, residual=True, **PATHS[path]))
    check(Case(1, 16, 16, 16, 32, layout=layout, sliced=True, **PATHS[path]))


@each_path
def test_any_strides(path):
    args = make_args(Case(3, 12, 5, 6, 24, residual=True, output_gate=True, input_gate=True, **PATHS[path]))
    x = args.x
    permuted = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # W outermost, N innermost
    check_args(args._replace(x=permuted))
    check_args(args._replace(x=x[:1, :, :1].expand(3, 12, 5, 6), residual=args.residual[:1].expand_as(args.residual)))
    check_args(args._replace(residual=args.residual.to(memory_format=torch.channels_last)))
    nhwc = args._replace(x=x.to(memory_format=torch.channels_last))
    check_args(nhwc)  # residual and gate stay NCHW
    check_args(nhwc._replace(residual=nhwc.residual.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)))


def test_any_strides_of_parameters():
    args = make_args(Case(1, 12, 5, 6, 24, primary_norm="bn+bias", input_gate=True, dtype=torch.float16))
    strided = {}
    for name in TENSORS[1:]:
        t = getattr(args, name)
        if t is not None:
            wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
            wide[..., ::3] = t
            strided[name] = wide[..., ::3]
    strided["primary_weight"] = args.primary_weight.transpose(0, 1).contiguous().transpose(0, 1)
    strided["input_gate"] = args.input_gate.t().contiguous().t()
    check_args(args._replace(**strided))


def test_unaligned_storage():
    """Pointers that are aligned to one element only."""
    for layout in LAYOUTS:
        args = make_args(Case(2, 16, 8, 8, 32, layout=layout, residual=True, dtype=torch.float16))
        shifted = {}
        for name in ("x", "primary_weight", "residual"):
            t = getattr(args, name)
            buffer = torch.zeros(t.numel() + 1, dtype=t.dtype)
            shifted[name] = buffer[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
        check_args(args._replace(**shifted))


def test_large_batch():
    check(Case(70_000, 4, 1, 1, 8, dtype=torch.float16) if not ON_CPU else Case(400, 4, 1, 1, 8, dtype=torch.float16))


def test_empty_batch():
    for layout in LAYOUTS:
        args = make_args(Case(1, 8, 4, 4, 16, layout=layout))
        out = ops.forward_op("cuda")(*to_device(args._replace(x=args.x[:0]), "cuda"))
        assert out.shape == (0, 16, 4, 4)


@each_layout
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity(act, layout):
    """NaN and infinities reach the same outputs as in PyTorch, and no others: in float64, since GELU of many infinities in
    float32 is NaN in PyTorch, and of one infinite."""
    for value in (float("nan"), float("inf"), -float("inf")):
        args = make_args(Case(1, 8, 7, 8, 16, act_primary=act, act_cheap=act, layout=layout))
        args.x[0, 3, 2, 5] = value
        out, expected = forward(args), reference.ghost_module(convert(args, torch.float64)).float()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        finite = expected.isfinite()
        torch.testing.assert_close(out[finite], expected[finite], rtol=1e-5, atol=1e-5)


def test_deterministic():
    args = make_args(Case(2, 40, 14, 14, 80, dtype=torch.float16, layout="nhwc"))
    assert torch.equal(forward(args), forward(args))


CONFIGS = Path(__file__).parents[1] / "data" / "ghost_configs.jsonl"


def shape_classes() -> list[dict]:
    """The distinct rows that the kernel covers; the map cut to at most 28 × 28 and few tiles of work."""
    rows = {}
    for line in CONFIGS.read_text().splitlines():
        row = json.loads(line)
        if row["kernel_size"] == 1 and row["stride"] == 1:
            fields = ("in_channels", "out_channels", "height", "width", "dw_size", "act_primary", "act_cheap")
            rows[tuple(row[f] for f in fields)] = {f: row[f] for f in fields}
    return list(rows.values())


@pytest.mark.parametrize("row", shape_classes(), ids=lambda r: "-".join(map(str, r.values())))
def test_real_modules(row):
    work = row["in_channels"] * row["out_channels"] * 4  # of a pixel, roughly
    size = min(row["height"], 28)
    while size > 4 and work * size * size > 2_500_000:
        size = size * 2 // 3
    row = row | {"height": size, "width": min(row["width"], size + 1)}
    index = row["in_channels"] + row["out_channels"]
    path = list(PATHS)[index // 4 % 4]
    with planned_for(132):
        check(Case(1, layout=LAYOUTS[index // 16 % 2], **row, **PATHS[path]))


@st.composite
def cases(draw) -> Case:
    ratio = draw(st.integers(2, 4))
    init = draw(st.integers(1, 40))
    path = draw(st.sampled_from(list(PATHS.values())))
    return Case(
        batch=draw(st.integers(1, 3)),
        in_channels=draw(st.integers(1, 70)),
        height=draw(st.integers(1, 17)),
        width=draw(st.integers(1, 17)),
        out_channels=draw(st.integers(init, init * ratio)),
        ratio=ratio,
        init_channels=init,
        dw_size=draw(st.sampled_from([1, 3, 5, 7])),
        act_primary=draw(st.sampled_from(ACTS)),
        act_cheap=draw(st.sampled_from(ACTS)),
        per_channel_slope=draw(st.booleans()),
        primary_norm=draw(st.sampled_from(["bn", "bias", "bn+bias", "bn_no_affine", "none"])),
        cheap_norm=draw(st.sampled_from(["bn", "bias", "none"])),
        norm_dtype=draw(st.sampled_from([None, torch.float32])),
        layout=draw(st.sampled_from(LAYOUTS)),
        sliced=draw(st.booleans()),
        input_gate=draw(st.booleans()),
        residual=draw(st.booleans()),
        output_gate=draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
        **path,
    )


@given(cases(), st.sampled_from([1, 4, 132]))
def test_any_case(case, sm_count):
    with planned_for(sm_count):
        check(case)


def test_errors_name_the_argument():
    good = to_device(make_args(Case(1, 8, 4, 4, 16, residual=True, output_gate=True, input_gate=True)), "cuda")
    cpu = make_args(Case(1, 8, 4, 4, 16))
    bad = {
        "x": good.x[0],
        "primary_weight": good.primary_weight[:, :4],
        "primary_bias": good.primary_mean[:4],
        "primary_mean": cpu.primary_mean,
        "cheap_weight": good.cheap_weight[:5],
        "cheap_var": None,
        "cheap_gamma": torch.ones(8, dtype=torch.float64).cuda(),
        "primary_slope": good.primary_mean[:3],
        "input_gate": good.input_gate[:, :3],
        "residual": good.residual[:, :, :2],
        "output_gate": good.output_gate[:, :7],
        "out_channels": 17,
        "stride": 2,
        "primary_act": max(Act) + 1,
    }
    for name, value in bad.items():
        with pytest.raises(RuntimeError, match=name):
            ops.forward_op("cuda")(*good._replace(**{name: value}))


def test_backend_is_the_default_and_explains_refusals():
    args = to_device(make_args(Case(1, 8, 4, 4, 16)), "cuda")
    assert cuda.supports(args) is None
    assert ghostfused.backends.choose(args) == "cuda"
    assert "stride" in cuda.supports(args._replace(stride=2))
    assert "dw_size 9" in cuda.supports(args._replace(cheap_weight=torch.ones(8, 1, 9, 9)))
    assert "cpu" in cuda.supports(make_args(Case(1, 8, 4, 4, 16)))
    with pytest.raises(RuntimeError, match="dw_size 9"):
        ghostfused.ghost_module(args.x, args.primary_weight, torch.ones(8, 1, 9, 9).cuda(), backend="cuda")


def test_function_and_compile():
    """The public function, and under torch.compile with no graph break."""
    args = make_args(Case(1, 8, 6, 6, 16, primary_norm="bias", cheap_norm="none", act_cheap="silu"))
    on_gpu = to_device(args, "cuda")

    def run(x):
        return ghostfused.ghost_module(
            x, on_gpu.primary_weight, on_gpu.cheap_weight, primary_bias=on_gpu.primary_bias, act_cheap="silu"
        )

    expected = reference.ghost_module(args)
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        with torch.no_grad():
            torch.testing.assert_close(function(on_gpu.x).cpu(), expected, rtol=1e-5, atol=1e-5)


def test_malformed_calls():
    """The binding's own checks; more of them run on the CPU: tests/kernels/test_raw_ops.py."""
    counts = fuzz_raw_ops.run(seed=3, calls=60, backend="cuda")
    assert counts["error"] > 0, counts
    assert counts["right result"] > 0, counts


@pytest.mark.skipif(not ON_CPU, reason="a GPU's shared memory can't be chosen")
def test_plans_ask_the_device_for_shared_memory(tmp_path):
    """The code is that of sm_80, which has 163 KB; a device may have 99. The runner refuses a launch with more."""
    shape = {"in_channels": 200, "height": 14, "width": 14, "out_channels": 64, "dw_size": 7}
    planned = _C.plan(batch=1, init_channels=32, path="float32", sm_count=4, **shape)
    assert planned["smem_bytes"] > SMALL_DEVICE
    library = tmp_path / "small_device.so"
    source = Path(__file__).parents[1] / "helpers" / "small_device.c"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    script = f"from cuda_runtime import *; check(Case(1, dtype=torch.float32, layout='nhwc', **{shape}))"
    environment = {
        "LD_PRELOAD": f"{library}:{os.environ['LD_PRELOAD']}",
        "SHIM_SMEM": str(SMALL_DEVICE),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
