"""The channels_last kernel (csrc/cuda/ghost/nhwc): every tile and mode of it, on a GPU, or with none under ptx-on-cpu."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from cuda_runtime import _C, needs_cuda, planned_for
from hypothesis import given
from hypothesis import strategies as st
from kernel_backends import Backend
from strategies import ACTS

from ghostfused.spec import Act, GhostArgs
from ghostfused.testing import Case, make_args

pytestmark = [pytest.mark.cuda, needs_cuda]

CUDA = Backend("cuda")
PATHS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "allow_tf32": True},
    "float32": {"dtype": torch.float32},
}
FLOATS = ("tf32", "float32")
each_path = pytest.mark.parametrize("path", PATHS)


def plan(args: GhostArgs, sm_count: int, family: str = "") -> dict[str, Any]:
    """The launch plan for dense ``args`` on the device that ``planned_for`` pretends."""
    batch, cin, height, width = args.x.shape
    plain = args.residual is args.output_gate is None and args.primary_act == args.cheap_act in (Act.NONE, Act.RELU)
    plain = plain and (args.x.element_size() == 2 or args.input_gate is None)
    return _C.plan(
        batch=batch, in_channels=cin, height=height, width=width, init_channels=args.init_channels,
        out_channels=args.out_channels, ratio=args.ratio, dw_size=args.dw_size,
        path="tf32" if args.allow_tf32 else str(args.x.dtype).removeprefix("torch."), channels_last=True, input_gate=args.input_gate is not None,
        full=not plain, sm_count=sm_count, smem_per_block=101376, smem_per_sm=102400, family=family,
    )  # fmt: skip


def check(sm_counts: tuple[int, ...] = (1, 132), **case: Any) -> list[dict[str, Any]]:
    """Runs the case as planned for each device; returns the plans, all of which are this kernel's."""
    args = make_args(Case(layout="nhwc", **case))
    plans = []
    for sm_count in sm_counts:
        plans.append(plan(args, sm_count))
        assert plans[-1]["family"] == "nhwc", case
        with planned_for(sm_count):
            CUDA.check(args, name=f"{case}, planned as {plans[-1]}", general_too=False)  # test_ghost.py asks it
    return plans


SHAPES: dict[str, dict[str, Any]] = {  # Cin, H, W, Cout
    "one tile": {"in_channels": 16, "height": 16, "width": 16, "out_channels": 16},
    "rows of fours": {"in_channels": 24, "height": 12, "width": 20, "out_channels": 72},
    "odd rows": {"in_channels": 72, "height": 9, "width": 13, "out_channels": 40},
    "long K": {"in_channels": 200, "height": 7, "width": 7, "out_channels": 80},
    "two warps": {"in_channels": 40, "height": 14, "width": 14, "out_channels": 240},
    "images": {"batch": 5, "in_channels": 64, "height": 7, "width": 7, "out_channels": 96},
    "warps of channels": {"in_channels": 8, "height": 5, "width": 8, "out_channels": 120},
    "narrow": {"in_channels": 32, "height": 21, "width": 4, "out_channels": 24},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"act_primary": "none", "act_cheap": "none"},
    "relu": {"act_primary": "relu", "act_cheap": "relu"},
    "any": {"act_primary": "silu", "act_cheap": "relu"},
    "5x5": {"act_primary": "relu", "act_cheap": "relu", "dw_size": 5},
}


@pytest.mark.parametrize(
    ("path", "variant"), [(p, v) for p, v in itertools.product(PATHS, VARIANTS) if p not in FLOATS or v != "5x5"]
)
def test_every_kernel(path, variant):
    plans = [p for shape in SHAPES.values() for p in check(**PATHS[path], **shape, **VARIANTS[variant])]
    few, many = {"none": (1, 3), "relu": (1, 3), "any": (1, 2), "5x5": (2, 2)}[variant]
    if path in FLOATS:
        few, many = (1, 2) if many == 3 else (2, 2)
    assert {p["warp_tiles"] for p in plans} == set(range(few, many + 1))
    assert {p["images"] for p in plans} > {1}
    assert {p["warps_n"] for p in plans} > {1}
    assert {p["strips"] for p in plans} > {1}
    assert {p["channel_blocks"] for p in plans} > {1}


@pytest.mark.parametrize("variant", VARIANTS)
def test_thread_order(variant):
    """Also run in other orders of threads, in which a missing barrier shows."""
    for name in ("one tile", "odd rows", "images"):
        for path in ("float16", *FLOATS) if variant != "5x5" else ("float16",):
            check((1, 132), **PATHS[path], **SHAPES[name], **VARIANTS[variant])


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("path", ["float16", *FLOATS])
def test_activations(act, path):
    shape = {"in_channels": 16, "height": 6, "width": 9, "out_channels": 24, **PATHS[path]}
    for per_channel in (False, True) if act == "prelu" else (False,):
        check((132,), **shape, act_primary=act, act_cheap="none", per_channel_slope=per_channel)
        check((132,), **shape, act_primary="none", act_cheap=act, per_channel_slope=per_channel)


@each_path
@pytest.mark.parametrize("optional", list(itertools.product([False, True], repeat=3))[1:])
def test_optional_inputs(optional, path):
    gate, residual, output_gate = optional
    extra = {"input_gate": gate, "residual": residual, "output_gate": output_gate, **PATHS[path]}
    check((132,), batch=2, in_channels=40, height=9, width=6, out_channels=24, **extra)
    check((132,), batch=2, in_channels=24, height=8, width=16, out_channels=40, **VARIANTS["none"], **extra)


@pytest.mark.parametrize("more", [{}, {"residual": True, "output_gate": True}], ids=["plain", "residual"])
@pytest.mark.parametrize("cut", [4, 12, 20])
def test_sliced_ghosts(cut, more):
    """The last ghost channels are cut off, and so are those of residual and gate: nothing lies behind the last image."""
    for path, dw_size in (("float16", 3), ("float16", 5), ("tf32", 3), ("float32", 3)):
        shape = {"in_channels": 16, "height": 8, "width": 8, "out_channels": 48 - cut, "init_channels": 24}
        check(dw_size=dw_size, **shape, **PATHS[path], **more)


CONVS: dict[str, dict[str, Any]] = {
    "plain": {"act_primary": "none"},
    "relu": {"act_primary": "relu", "input_gate": True},
    "silu": {"act_primary": "silu", "residual": True},
    "prelu": {"act_primary": "prelu", "per_channel_slope": True, "primary_norm": "bn+bias"},
    "mish": {"act_primary": "mish", "input_gate": True, "residual": True},
}


@pytest.mark.parametrize(
    ("variant", "path"), [*itertools.product(CONVS, ["float16"]), *itertools.product(["relu", "mish"], ["bfloat16"])]
)
def test_no_ghosts(variant, path):
    """A module cut off after its first half goes from registers to the output."""
    plans = []
    for shape in (*SHAPES.values(), {"in_channels": 24, "height": 12, "width": 3, "out_channels": 20}):
        plans += check(**PATHS[path], **shape, init_channels=shape["out_channels"], **CONVS[variant])
    assert {p["images"] for p in plans} > ({1} if "input_gate" not in CONVS[variant] else set())
    assert {p["warps_n"] for p in plans} > {1}
    assert {p["tiles_h"] for p in plans} > {1}
    assert {p["channel_blocks"] for p in plans} > {1}


def test_no_ghosts_with_maps_of_other_strides():
    """Pixels are counted without rows, so the residual's rows must follow each other; else another kernel runs."""
    conv = Case(3, 16, 6, 8, 24, init_channels=24, residual=True, layout="nhwc", dtype=torch.float16)
    args = make_args(conv)
    wide = torch.full((3, 6, 10, 24), float("nan"), dtype=torch.float16)
    wide[:, :, :8] = args.residual.permute(0, 2, 3, 1)
    apart = args._replace(residual=wide.permute(0, 3, 1, 2)[..., :8])
    alike = args._replace(residual=args.residual[:, :, :1, :1].expand_as(args.residual))
    gated = make_args(dataclasses.replace(conv, output_gate=True))
    for sm_count in (1, 132):
        with planned_for(sm_count):
            for case in (args, apart, alike, gated):
                CUDA.check(case, general_too=False)


def test_norms_and_biases():
    for primary, cheap in itertools.product(["none", "bias", "bn", "bn+bias", "bn_no_affine"], ["none", "bias", "bn"]):
        for norm_dtype in (None, torch.float32):
            check(
                (132,), in_channels=8, height=5, width=8, out_channels=16, primary_norm=primary, cheap_norm=cheap,
                norm_dtype=norm_dtype, dtype=torch.float16,
            )  # fmt: skip


@pytest.mark.parametrize("path", ["float16", *FLOATS])
def test_zeros_stay_zeros_beside_infinite_channels(path):
    """Lanes beyond the last input channel add nothing, whatever lies behind it."""
    for cin in (8, 40, 56) if path == "float16" else (4, 8, 20, 44):
        args = make_args(Case(1, cin, 8, 8, 16, layout="nhwc", **PATHS[path]))
        wide = torch.full((1, 8, 8, 2 * cin), float("inf"), dtype=args.x.dtype)
        wide[..., :cin] = args.x.permute(0, 2, 3, 1)
        weight = torch.full((8, 2 * cin), float("nan"), dtype=args.x.dtype)
        weight[:, :cin] = args.primary_weight.flatten(1)
        x = wide.permute(0, 3, 1, 2)[:, :cin]
        CUDA.check(args._replace(x=x, primary_weight=weight[:, :cin, None, None]))


@pytest.mark.parametrize(
    "case",
    [
        {"in_channels": 20}, {"out_channels": 20, "init_channels": 10}, {"out_channels": 30, "init_channels": 16},
        {"width": 3, "height": 12}, {"ratio": 3, "out_channels": 48}, {"dw_size": 7}, {"dw_size": 1},
        {"height": 4, "width": 4}, {"layout": "nchw"}, {**PATHS["tf32"], "in_channels": 18},
        {**PATHS["tf32"], "dw_size": 5}, {**PATHS["float32"], "in_channels": 18},
        {**PATHS["tf32"], "init_channels": 32}, {"init_channels": 32, "in_channels": 20},
    ],
    ids=lambda case: "-".join(case),
)  # fmt: skip
def test_what_the_general_kernel_keeps(case):
    case = {
        "batch": 1, "in_channels": 16, "height": 8, "width": 8, "out_channels": 32, "layout": "nhwc",
        "dtype": torch.float16, **case,
    }  # fmt: skip
    args = make_args(Case(**case))
    if case["layout"] == "nhwc":
        assert plan(args, 132)["family"] == "general"
        assert plan(args, 132, "nhwc") == {}
    with planned_for(132):
        CUDA.check(args)


@st.composite
def cases(draw) -> Case:
    path = draw(st.sampled_from(list(PATHS)))
    dw_size = 3 if path in FLOATS else draw(st.sampled_from([3, 5]))
    init = 4 * draw(st.integers(1, 24))
    gated = draw(st.booleans())
    return Case(
        batch=draw(st.integers(1, 5)),
        in_channels=(4 if path in FLOATS else 8) * draw(st.integers(1, 14)),
        height=draw(st.integers(8, 19)),
        width=draw(st.integers(4, 19)),
        out_channels=init + 4 * draw(st.integers(1, init // 4)),
        init_channels=init,
        dw_size=dw_size,
        act_primary=draw(st.sampled_from(["none", "relu", *ACTS])),
        act_cheap=draw(st.sampled_from(["none", "relu", *ACTS])),
        per_channel_slope=draw(st.booleans()),
        primary_norm=draw(st.sampled_from(["bn", "bias", "bn+bias", "none"])),
        cheap_norm=draw(st.sampled_from(["bn", "bias", "none"])),
        layout="nhwc",
        input_gate=gated and draw(st.booleans()),
        residual=gated and draw(st.booleans()),
        output_gate=gated and draw(st.booleans()),
        seed=draw(st.integers(0, 100)),
        **PATHS[path],
    )


@given(cases(), st.sampled_from([1, 4, 132]))
def test_any_case(case, sm_count):
    args = make_args(case)
    assert plan(args, sm_count)["family"] == "nhwc"
    with planned_for(sm_count):
        CUDA.check(args, name=case, general_too=False)
