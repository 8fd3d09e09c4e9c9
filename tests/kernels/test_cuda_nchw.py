"""The NCHW kernel (csrc/cuda/ghost/nchw): every form of it, on a GPU, or with none under ptx-on-cpu; and what it takes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_runtime import _C, needs_cuda, needs_extension, planned_for
from hypothesis import given
from hypothesis import strategies as st
from kernel_backends import Backend
from strategies import ACTS

from ghostfused.testing import Case, judge, make_args

CUDA = Backend("cuda")
PATHS: dict[str, dict[str, Any]] = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "allow_tf32": True},
    "float32": {"dtype": torch.float32},
}
HALVES, FLOATS = ("float16", "bfloat16"), ("tf32", "float32")
each_path = pytest.mark.parametrize("path", PATHS)

Sizes = tuple[int, int, int, int]  # Cin, H, W, Cp

# Of each map: few and many channels of a warp, half a k16 step, and rows, chunks and channels that don't fill a block.
MAPS: dict[str, list[Sizes]] = {
    "wide8": [(16, 16, 112, 8), (24, 15, 56, 20), (8, 3, 16, 3), (40, 9, 24, 36), (64, 30, 40, 32)],
    "wide4": [(72, 17, 28, 20), (16, 9, 20, 60), (8, 1, 12, 5), (8, 12, 12, 120), (24, 8, 8, 33)],
    "fourteen": [(48, 14, 14, 20), (24, 14, 14, 46), (8, 14, 14, 2), (112, 14, 14, 56)],
    "seven": [(16, 7, 7, 8), (160, 7, 7, 40), (96, 7, 7, 120), (336, 7, 7, 80)],
}
FLOAT_MAPS: dict[str, list[Sizes]] = {  # Cin a half of mma's K, and in fp32 a half of that
    "wide4": [(12, 9, 24, 36), (4, 5, 8, 3), (24, 30, 56, 12)],
    "fourteen": [(24, 14, 14, 33), (100, 14, 14, 8)],
    "seven": [(24, 7, 7, 20), (4, 7, 7, 4), (640, 7, 7, 44)],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"act_primary": "none", "act_cheap": "none"},
    "relu": {},
    "one of two": {"act_primary": "none"},
    "any": {"act_primary": "silu", "residual": True},
    "5x5": {"dw_size": 5, "act_cheap": "none", "input_gate": True},
    "input gate": {"act_cheap": "hardswish", "input_gate": True},
}


def maps_of(path: str, name: str) -> list[Sizes]:
    return MAPS[name] + (FLOAT_MAPS.get(name, []) if path in FLOATS else [])


def variants_of(path: str) -> list[str]:
    return [name for name in VARIANTS if name != "5x5" or path in HALVES]


def planned(sizes: Sizes, cut: int = 0, **more: Any) -> dict[str, Any]:
    """The plan for dense tensors, by the family that the planner chooses."""
    cin, height, width, init = sizes
    return _C.plan(
        batch=1, in_channels=cin, height=height, width=width, init_channels=init, out_channels=2 * init - cut,
        channels_last=False, **more,
    )  # fmt: skip


def check(sizes: Sizes, batch: int = 1, cut: int = 0, sm_counts: tuple[int, ...] = (1, 132), **more: Any) -> None:
    """Runs a module that this kernel takes, planned for devices with so many SMs."""
    cin, height, width, init = sizes
    args = make_args(Case(batch, cin, height, width, 2 * init - cut, init_channels=init, **more))
    path = "tf32" if args.allow_tf32 else str(args.x.dtype).removeprefix("torch.")
    assert planned(sizes, cut, path=path, dw_size=args.dw_size)["family"] == "nchw"
    for sm_count in sm_counts:
        with planned_for(sm_count):
            verdict = judge(CUDA.run(args), args)
        assert verdict.ok, f"error {verdict.error:.2e}, limit {verdict.limit:.2e}: {sizes}, {more}, {sm_count} SMs"


@needs_extension
def test_which_modules_it_takes():
    for name, path in itertools.product(MAPS, PATHS):
        for one, dw_size in itertools.product(maps_of(path, name), (3, 5) if path in HALVES else (3,)):
            found = planned(one, path=path, dw_size=dw_size)
            expected = "wide4" if path in FLOATS and name == "wide8" else name
            assert (found["family"], found["map"]) == ("nchw", expected), one
    # rows or channels that aren't whole vectors, a row that is one vector
    others = [
        (16, 9, 15, 8),
        (16, 10, 10, 8),
        (12, 8, 16, 8),
        (8, 7, 7, 8),
        (16, 7, 7, 4),
        (16, 14, 14, 5),
        (8, 8, 4, 8),
    ]
    for one in others:
        assert planned(one)["family"] == "general", one
    for one in [(16, 9, 15, 8), (16, 10, 10, 8), (6, 8, 16, 8), (8, 7, 7, 2), (8, 8, 4, 8)]:
        for path in FLOATS:
            assert planned(one, path=path)["family"] == "general", one
    for more in [{"path": "float32", "dw_size": 5}, {"path": "tf32", "dw_size": 5}, {"dw_size": 7}, {"ratio": 3}]:
        assert planned((16, 16, 16, 16), **more)["family"] == "general", more
    for path in PATHS:  # more than what one block's shared memory has of x
        assert planned((960, 7, 7, 80), path=path, smem_per_block=65536)["family"] == "nchw"


@needs_extension
def test_tf32_takes_the_kernels_of_fp32():
    """Where it has none of its own: with gates, a residual or other activations, and half a step of K."""
    for more in ({"full": True}, {"input_gate": True}, {}):
        tf32, float32 = (planned((12, 8, 24, 24), path=path, **more) for path in FLOATS)
        assert tf32 == float32
    assert planned((16, 8, 24, 24), path="tf32") != planned((16, 8, 24, 24), path="float32")


@needs_extension
@pytest.mark.parametrize("smem", [101376, 166912, 232448])
def test_plans_fit_the_device(smem):
    for one, input_gate, path in itertools.product(itertools.chain(*MAPS.values()), (False, True), PATHS):
        found = planned(one, smem_per_block=smem, smem_per_sm=smem + 1024, input_gate=input_gate, path=path)
        assert found["family"] == "nchw"
        assert found["smem_bytes"] <= smem
        assert found["block_c"] * found["channel_blocks"] >= one[3]
        assert found["tile_h"] * found["tiles_h"] >= one[1]


@needs_extension
@pytest.mark.parametrize("smem", [101376, 166912, 232448])
def test_it_takes_all_of_ghostnet(smem):
    lines = (Path(__file__).parents[1] / "data" / "ghost_configs.jsonl").read_text().splitlines()
    modules = [m for m in map(json.loads, lines) if m["source"] == "timm/ghostnet_100@224" and m["kernel_size"] == 1]
    assert sum(m["count"] for m in modules) == 32
    for m, input_gate, path in itertools.product(modules, (False, True), PATHS):
        sizes = (m["in_channels"], m["height"], m["width"], m["out_channels"] // 2)
        device = {"smem_per_block": smem, "smem_per_sm": smem + 1024, "input_gate": input_gate, "path": path}
        assert planned(sizes, **device)["family"] == "nchw", sizes


@needs_extension
def test_all_forms_are_planned():
    plans = [planned(one, sm_count=n) for one in itertools.chain(*MAPS.values()) for n in (1, 132)]
    assert {(p["map"], p["warp_tiles"]) for p in plans} >= {
        ("wide8", 1), ("wide8", 2), ("wide4", 2), ("wide4", 4), ("fourteen", 2), ("fourteen", 4), ("seven", 3),
    }  # fmt: skip
    assert {p["warps_k"] for p in plans if p["map"] == "seven"} > {1}
    assert {p["tiles_h"] for p in plans} > {1}
    assert {p["channel_blocks"] for p in plans} > {1}


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize(("path", "variant"), [(path, variant) for path in PATHS for variant in variants_of(path)])
@pytest.mark.parametrize("name", MAPS)
def test_every_kernel(name, variant, path):
    for one in maps_of(path, name)[1::2] if path == "bfloat16" else maps_of(path, name):  # which have all tiles, too
        check(one, **PATHS[path], **VARIANTS[variant])


@pytest.mark.cuda
@needs_cuda
@each_path
def test_input_channels_by_parts(path):
    """7 × 7 where shared memory hasn't all of x: on a device with less of it."""
    cin, init = (2000, 40) if path in HALVES else (1000, 36)
    found = planned((cin, 7, 7, init), path=path)
    assert found["k_chunk"] < cin
    for variant in ("relu", "input gate"):
        check((cin, 7, 7, init), **PATHS[path], **VARIANTS[variant])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", *FLOATS])
@pytest.mark.parametrize("variant", ["relu", "any"])
@pytest.mark.parametrize("name", MAPS)
def test_thread_order(name, variant, path):
    """Also run in other orders of threads, in which a missing barrier shows."""
    for one in MAPS[name][:2]:
        check(one, batch=2, **PATHS[path], **VARIANTS[variant])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", "float32"])
@pytest.mark.parametrize("act", ACTS)
def test_activations(act, path):
    for name, per_channel in itertools.product(list(MAPS)[ACTS.index(act) % 2 :: 2], {False, act == "prelu"}):
        common: dict[str, Any] = {"per_channel_slope": per_channel, "sm_counts": (132,), **PATHS[path]}
        check(MAPS[name][0], act_primary=act, act_cheap="none", **common)
        check(MAPS[name][0], act_primary="none", act_cheap=act, **common)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("optional", list(itertools.product([False, True], repeat=3))[1:])
def test_optional_inputs(optional, name):
    gate, residual, output_gate = optional
    extra = {"input_gate": gate, "residual": residual, "output_gate": output_gate}
    for one, path in zip(itertools.cycle(MAPS[name][:2]), PATHS):
        check(one, batch=2, sm_counts=(132,), **PATHS[path], **extra)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", *FLOATS])
@pytest.mark.parametrize("name", MAPS)
def test_sliced_ghosts(name, path):
    """The last ghost channels are cut off, those of whole blocks too."""
    step = {"fourteen": 2, "seven": 8}.get(name, 1) if path in HALVES else {"seven": 4}.get(name, 1)
    for cut in (step, 8, 16):
        check(MAPS[name][1], batch=2, cut=cut, **PATHS[path])
        check(MAPS[name][1], batch=2, cut=cut, residual=True, **PATHS[path])


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", *FLOATS])
def test_norms_and_biases(path):
    for primary, cheap in itertools.product(["none", "bias", "bn", "bn+bias", "bn_no_affine"], ["none", "bias", "bn"]):
        for norm_dtype in (None, torch.float32) if path in HALVES else (None,):
            common: dict[str, Any] = {"norm_dtype": norm_dtype, "sm_counts": (132,), **PATHS[path]}
            check((8, 5, 16, 8), primary_norm=primary, cheap_norm=cheap, **common)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", *FLOATS])
def test_nan_and_infinity_stay(path):
    for act, value in itertools.product(("none", "relu"), (float("nan"), float("inf"))):
        args = make_args(Case(1, 8, 8, 16, 16, act_primary=act, act_cheap=act, **PATHS[path]))
        args.x[0, 3, 4, 5] = value
        out = CUDA.run(args)
        assert out[0, :, 4, 5].isnan().all() if value != value else not out[0, :8, 4, 5].isnan().any()
        assert out[0, :, 0, 0].isfinite().all()


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("path", ["float16", *FLOATS])
def test_x_in_a_larger_buffer(path):
    """Channel slices of whole vectors are taken as they lie; an odd address goes to the general kernel."""
    for width in (8, 12, 16):
        args = make_args(Case(2, 16, 6, width, 24, **PATHS[path]))
        buffer = torch.full((2, 24, 6, width), float("nan"), dtype=args.x.dtype)
        buffer[:, 4:20] = args.x
        CUDA.check(args._replace(x=buffer[:, 4:20]))
        flat = torch.full((args.x.numel() + 1,), float("nan"), dtype=args.x.dtype)
        CUDA.check(args._replace(x=flat[1:].view(args.x.shape).copy_(args.x)))


@pytest.mark.cuda
@needs_cuda
@given(st.data())
def test_any_sizes(data):
    width = data.draw(st.one_of(st.integers(2, 16).map(lambda n: 4 * n), st.sampled_from([7, 14])))
    small = width in (7, 14)
    path = data.draw(st.sampled_from(sorted(PATHS)))
    half = path in HALVES
    cin = data.draw(st.integers(1, 6)) * (4 if not half else 16 if width == 7 else 8)
    init = data.draw(st.integers(1, 9)) * ({7: 8, 14: 2} if half else {7: 4}).get(width, 1)
    height = width if small else data.draw(st.integers(1, 20))
    variant = VARIANTS[data.draw(st.sampled_from(variants_of(path)))]
    check(
        (cin, height, width, init), batch=data.draw(st.integers(1, 2)),
        sm_counts=(data.draw(st.sampled_from([1, 16, 132])),), **PATHS[path], **variant,
    )  # fmt: skip
