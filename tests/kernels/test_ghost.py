"""The Ghost module on every backend, against the float64 reference. What all ops share is in test_every_op.py."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import on
from strategies import ACTS, LAYOUTS, NORMS

from ghostfused.backends import triton
from ghostfused.testing import Case, judge, make_args

PATHS = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "tf32": {"dtype": torch.float32, "allow_tf32": True},
    "float32": {"dtype": torch.float32},
}
each_path = pytest.mark.parametrize("path", PATHS)
two_paths = pytest.mark.parametrize("path", ["float16", "float32"])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
both_tritons = on("cpu", "cuda", "triton", "triton_two_kernel")
ALL_INPUTS = {"input_gate": True, "residual": True, "output_gate": True}


@both_tritons
@each_path
@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_every_kernel(backend, path, dw_size):
    for layout in backend.alternate(LAYOUTS, list(PATHS).index(path) + dw_size // 2):
        common = {"dw_size": dw_size, "layout": layout, **PATHS[path]}
        backend.check(Case(1, 20, 9, 11, 24, **common), Case(1, 33, 7, 20, 29, 3, sliced=True, **ALL_INPUTS, **common))


@each_layout
@pytest.mark.parametrize("act", ACTS)
@two_paths
def test_activations(backend, act, layout, path):
    for per_channel in (False, True) if act == "prelu" else (False,):
        common = {"per_channel_slope": per_channel, "layout": layout, **PATHS[path]}
        number = ACTS.index(act) + LAYOUTS.index(layout) + list(PATHS).index(path) // 2
        for half in backend.alternate(("act_primary", "act_cheap"), number):
            acts = {"act_primary": "none", "act_cheap": "none", half: act}
            backend.check(Case(1, 12, 6, 5, 20, **acts, **common))


@each_path
@pytest.mark.parametrize("primary", NORMS)
def test_norms(backend, primary, path):
    products = list(itertools.product((None, torch.float32), ("none", "bias", "bn", "bn_no_affine", "bn+bias")))
    for norm_dtype, cheap in backend.alternate(products, NORMS.index(primary) + list(PATHS).index(path)):
        norms = {"primary_norm": primary, "cheap_norm": cheap, "norm_dtype": norm_dtype}
        backend.check(Case(1, 8, 5, 6, 16, **norms, **PATHS[path]))


@each_layout
@two_paths
def test_ratios_and_cut_ghosts(backend, layout, path):
    cuts = (
        (2, 25, None), (2, 23, None), (2, 13, 13), (3, 29, None), (3, 12, 12), (4, 40, 11), (4, 26, None), (5, 33, 8), (5, 8, None),
    )  # fmt: skip
    for ratio, out_channels, init in backend.alternate(cuts, LAYOUTS.index(layout) + (path == "float32")):
        backend.check(Case(1, 9, 6, 7, out_channels, ratio, init_channels=init, layout=layout, **PATHS[path]))
    with backend.planned_for(132):
        backend.check(Case(1, 16, 8, 8, 190, 4, layout=layout, **PATHS[path]))


@each_layout
@pytest.mark.parametrize("optional", list(itertools.product([False, True], repeat=3))[1:])
def test_optional_inputs(backend, layout, optional):
    for path in backend.alternate(list(PATHS), sum(optional) + LAYOUTS.index(layout)):
        common = {"layout": layout, **dict(zip(ALL_INPUTS, optional, strict=True)), **PATHS[path]}
        backend.check(Case(2, 20, 9, 6, 24, **common), Case(1, 16, 8, 16, 33, **common))


@pytest.mark.parametrize("gate_size", [(1, 1), (3, 5), (6, 8), (13, 17), (20, 19)])
def test_output_gate_of_any_size_and_strides(backend, gate_size):
    args = make_args(Case(height=13, width=17))
    gate = torch.randn(2, 24, gate_size[0] * 2, gate_size[1] + 3)[:, :, ::2, 3:]
    backend.check(args._replace(output_gate=gate, residual=torch.randn(2, 17, 13, 24).permute(0, 3, 2, 1)))


@each_layout
@pytest.mark.parametrize("size", [*strategies.SIZES, (3, 130), (64, 5)], ids=str)
def test_sizes(backend, layout, size):
    for path in backend.alternate(("float16", "float32"), sum(size) + LAYOUTS.index(layout)):
        backend.check(Case(2, 8, *size, 16, layout=layout, **PATHS[path]))
        backend.check(Case(1, 8, *size, 16, dw_size=5, act_primary="silu", layout=layout, **PATHS[path]))


@each_layout
def test_wider_than_any_tile(backend, layout):
    backend.check(Case(1, 4, 2, 1900, 8, layout=layout, dtype=torch.float16))
    with backend.planned_for(132):
        for width in (96, 97, 98, 100):  # halos that start at multiples of 8, 1, 2 and 4 pixels in NCHW
            backend.check(Case(1, 8, 17, width, 24, layout=layout, dtype=torch.float16))


@each_layout
@pytest.mark.parametrize("in_channels", [1, 4, 5, 12, 20, 33, 36, 100])
def test_channels(backend, in_channels, layout):
    number = LAYOUTS.index(layout) + in_channels // 4
    for out_channels in backend.alternate((4, 10, 24, 66, 72, 200), number):
        backend.check(Case(1, in_channels, 5, 6, out_channels, layout=layout, dtype=torch.float16))
    for path in ("bfloat16", "tf32", "float32"):
        backend.check(Case(1, in_channels, 5, 6, 36, layout=layout, **PATHS[path]))


def test_many_channels(backend):
    for (cin, out), layout in itertools.product([(960, 160), (2048, 8), (4, 2048), (500, 516)], LAYOUTS):
        backend.check(Case(1, cin, 2, 3, out, layout=layout, dtype=torch.float16))
    backend.check(Case(1, 960, 2, 3, 60, dtype=torch.float32))


@pytest.mark.parametrize("seed", range(3))
def test_long_fp32_sums(backend, seed):
    """Chains of hundreds of products must not round away more than PyTorch's blocked sums do."""
    sizes = [(336, 80), (672, 112), (960, 160), (1248, 208)]
    if not backend.has_torch:
        sizes = sizes[seed::3]
    for layout, (cin, out) in itertools.product(backend.alternate(LAYOUTS, seed), sizes):
        backend.check(Case(1, cin, 7, 7, out, layout=layout, act_primary="none", act_cheap="none", seed=seed))


@each_layout
@each_path
def test_sliced_input(backend, layout, path):
    backend.check(Case(2, 20, 9, 7, 24, layout=layout, sliced=True, residual=True, **PATHS[path]))
    backend.check(Case(1, 16, 16, 16, 32, layout=layout, sliced=True, **PATHS[path]))


@each_path
def test_maps_of_other_strides_than_x(backend, path):
    args = make_args(Case(3, 12, 5, 6, 24, **ALL_INPUTS, **PATHS[path]))
    x, residual = args.x, args.residual
    backend.check(args._replace(residual=residual.to(memory_format=torch.channels_last)))
    backend.check(args._replace(x=x[:1, :, :1].expand(3, 12, 5, 6), residual=residual[:1].expand_as(residual)))
    nhwc = args._replace(x=x.to(memory_format=torch.channels_last))
    backend.check(nhwc, nhwc._replace(residual=residual.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)))


def test_large_batch(backend):
    batch = 70_000 if backend.has_torch and backend.device == "cuda" else 50 if backend.name == "triton" else 400
    backend.check(Case(batch, 4, 1, 1, 8, dtype=torch.float16))


@both_tritons
@each_layout
@pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
@pytest.mark.parametrize("optional", [(), ("input_gate",), ("residual",), ("output_gate",)], ids=str)
def test_no_ghosts(backend, optional, dtype, layout):
    """A module cut off after its first half, a 1×1 conv, never reads what the second half is made of."""
    for (height, width), conv in (((9, 14), {"dw_size": 1}), ((1, 1), {"dw_size": 5, "ratio": 3})):
        case = Case(2, 20, height, width, 36, init_channels=36, layout=layout, dtype=dtype, act_cheap="prelu", **conv)
        args = make_args(dataclasses.replace(case, per_channel_slope=True, **dict.fromkeys(optional, True)))
        verdict = judge(backend.run(args._replace(cheap_weight=torch.full_like(args.cheap_weight, torch.nan))), args)
        assert verdict.ok, verdict
    if not optional:
        backend.check(Case(3, 200, 7, 7, 37, dw_size=1, init_channels=37, dtype=dtype, layout=layout, sliced=True))


def real_modules() -> list[dict]:
    """The distinct shapes of GhostNets that all kernels take, cut to 28 pixels, each with the activations that it has first."""
    path = Path(__file__).parents[1] / "data" / "ghost_configs.jsonl"
    fields = ("in_channels", "out_channels", "height", "width", "dw_size", "ratio", "act_primary", "act_cheap")
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["kernel_size"] == row["stride"] == 1]
    shapes: dict[tuple, dict] = {}
    for row in rows:
        cut = row | {name: min(row[name], 28) for name in ("height", "width")}
        shapes.setdefault(tuple(cut[f] for f in fields[:6]), {f: cut[f] for f in fields})
    return list(shapes.values())


@pytest.mark.parametrize("row", real_modules(), ids=lambda row: "-".join(map(str, row.values())))
def test_real_modules(backend, row):
    """The maps are cut where kernels are emulated, odd sizes kept, and the general family isn't asked as well."""
    index = row["in_channels"] + row["out_channels"]
    work = row["in_channels"] * row["out_channels"] * 4  # of a pixel, roughly
    odd = index // 4 % 2
    size = min(row["height"], 6 + odd) if backend.name == "triton" else row["height"]
    while backend.name == "cuda" and size > 4 and work * size * size > 1_500_000:
        size = size * 2 // 3
    row = row | {"height": size, "width": min(row["width"], size + 1 - 2 * odd)}
    with backend.planned_for(132):
        case = Case(1, layout=LAYOUTS[index // 16 % 2], **row, **PATHS[list(PATHS)[index // 4 % 4]])
        backend.check(case, general_too=backend.has_torch)


@both_tritons
@settings(
    max_examples=settings.default.max_examples // (2 if triton.INTERPRETED else 1)
)  # whose two backends share them
@given(
    case=strategies.ghost_modules(
        in_channels=st.integers(1, 70), height=st.integers(1, 10), width=st.integers(1, 13),
        out_channels=st.integers(4, 40), dw_size=st.sampled_from([1, 3, 3, 5]), allow_tf32=st.booleans(), cut=st.sampled_from([0, 0, 1, 5, 90]),
    ),
    multiprocessors=st.sampled_from([1, 4, 132]),
)  # fmt: skip
def test_any_case(backend, case, multiprocessors):
    with backend.planned_for(multiprocessors):
        backend.check(case)
