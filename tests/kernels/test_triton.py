"""The Triton kernels against the float64 reference: on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1)."""

import dataclasses
import json
from pathlib import Path

import draws
import pytest
import torch
from draws import ACTS, LAYOUTS, NORMS
from hypothesis import given, settings
from triton_runtime import DEVICE, needs_triton

from ghostfused import ghost_module
from ghostfused.backends import reference, triton
from ghostfused.backends.triton.configs import run_length
from ghostfused.ops.schemas import forward_op
from ghostfused.testing import Case, judge, make_args, to_device

pytestmark = [pytest.mark.triton, needs_triton]
BACKENDS = ["triton", "triton_two_kernel"]
HALVES = [torch.float16, torch.bfloat16]
ROWS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "data" / "ghost_configs.jsonl").read_text().splitlines()
]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory, outputs and scratch buffers among it, is NaN: what a kernel forgets to write can't pass."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

    monkeypatch.setattr(torch, "empty", poisoned)


def check(case: Case, backend: str = "triton") -> None:
    args = make_args(case)
    on_device = to_device(args, DEVICE)
    out = forward_op(backend)(*on_device)
    assert out.stride() == on_device.new_output().stride()
    verdict = judge(out, args)
    assert verdict.ok, f"{case}: {verdict}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_dtypes_layouts_backends(dtype, layout, backend):
    check(Case(dtype=dtype, layout=layout, in_channels=24), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_with_float32_norms(dtype, layout):
    check(Case(dtype=dtype, layout=layout, norm_dtype=torch.float32, primary_norm="bn+bias"))


@pytest.mark.parametrize("act", ACTS)
def test_activations(act):
    check(Case(act_primary=act, act_cheap="none", per_channel_slope=True))
    check(Case(act_primary="relu", act_cheap=act, layout="nhwc", dtype=torch.float16))


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm):
    check(Case(primary_norm=norm, cheap_norm=NORMS[NORMS.index(norm) - 1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_dw_sizes(dw_size, backend):
    check(Case(dw_size=dw_size, batch=1, height=11, width=13, layout=LAYOUTS[dw_size // 2 % 2]), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "out_channels"), [(2, 23), (3, 25), (4, 26), (5, 8)])
def test_ratio_and_slicing(ratio, out_channels, layout):
    check(Case(ratio=ratio, out_channels=out_channels, layout=layout, height=9, width=7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optional", ["input_gate", "residual", "output_gate", "all"])
def test_optional_inputs(optional, layout, backend):
    names = ("input_gate", "residual", "output_gate") if optional == "all" else (optional,)
    case = Case(layout=layout, height=13, width=17, out_channels=23, dtype=torch.float16, **dict.fromkeys(names, True))
    check(case, backend)


@pytest.mark.parametrize("gate_size", [(1, 1), (3, 5), (6, 8), (13, 17), (20, 19)])
def test_output_gate_of_any_size_and_strides(gate_size):
    args = make_args(Case(height=13, width=17))
    gate = torch.randn(2, 24, gate_size[0] * 2, gate_size[1] + 3)[:, :, ::2, 3:]
    args = args._replace(output_gate=gate, residual=torch.randn(2, 17, 13, 24).permute(0, 3, 2, 1))
    assert judge(forward_op("triton")(*to_device(args, DEVICE)), args).ok


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (7, 9), (13, 17), (3, 40), (40, 3), (32, 33)], ids=str)
def test_sizes(size, layout):
    check(Case(height=size[0], width=size[1], layout=layout, batch=1, dw_size=5 if size[0] == 7 else 3))


@pytest.mark.parametrize("channels", [1, 4, 5, 12, 33, 100])
def test_odd_channels(channels):
    check(Case(in_channels=channels, out_channels=24, height=5, width=6, layout="nhwc", dtype=torch.float16))
    check(Case(in_channels=9, out_channels=channels * 2, height=5, width=6))
    check(Case(in_channels=channels, out_channels=channels * 2 - 1, height=5, width=6, layout="nhwc"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sliced_input(dtype, layout):
    check(Case(sliced=True, dtype=dtype, layout=layout))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.expand(3, -1, -1, -1),
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2],
        lambda x: x[:, :, ::2, ::3],
        lambda x: x[:, 1:],
        lambda x: x.permute(0, 2, 1, 3),
    ],
    ids=["expanded", "transposed", "every other channel", "every other pixel", "channel offset", "CHW permuted"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(view, layout):
    x = torch.randn(1, 16, 16, 18)
    x = view(x.to(memory_format=torch.channels_last) if layout == "nhwc" else x)
    args = make_args(Case(in_channels=x.shape[1], height=x.shape[2], width=x.shape[3]))._replace(x=x)
    assert judge(forward_op("triton")(*to_device(args, DEVICE)), args).ok


def test_strided_parameters():
    args = make_args(Case())
    args = args._replace(
        primary_weight=args.primary_weight.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        cheap_weight=args.cheap_weight.transpose(2, 3),
        primary_gamma=args.primary_gamma.repeat_interleave(2)[::2],
    )
    assert judge(forward_op("triton")(*to_device(args, DEVICE)), args).ok


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optional", [(), ("input_gate",), ("residual",), ("output_gate",)], ids=str)
def test_no_ghosts_is_one_launch_with_nothing_allocated(optional, layout, backend, monkeypatch):
    """A module cut off after its first half: the 1×1 conv alone, even if the depthwise conv would be 5×5 with 3 ghosts."""
    launches, allocated, empty, run = [], [], torch.empty, triton.run
    monkeypatch.setattr(triton, "run", lambda *a: launches.append(a) or run(*a))
    for conv in ({"dw_size": 1}, {"dw_size": 5, "ratio": 3}):
        case = Case(out_channels=20, init_channels=20, height=9, layout=layout, act_cheap="prelu", **conv)
        args = make_args(dataclasses.replace(case, **dict.fromkeys(optional, True)))
        args = args._replace(cheap_weight=torch.full_like(args.cheap_weight.transpose(2, 3), float("nan")))
        on_device = to_device(args, DEVICE)
        launches.clear()
        allocated.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", lambda *a, **k: allocated.append(a) or empty(*a, **k))
            out = forward_op(backend)(*on_device)
        assert judge(out, args._replace(cheap_weight=torch.ones_like(args.cheap_weight))).ok
        (launch,) = launches
        assert not launch[2]["CHEAP"]
        assert allocated == [(out.shape,)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", [16, 32, 48, 112])
def test_runs_shorter_than_the_halo(run, layout, monkeypatch):
    blocks = triton.blocks
    monkeypatch.setattr(triton, "blocks", lambda *args: blocks(*args) | {"run": run})
    check(Case(height=9, width=29, dw_size=5, layout=layout, batch=1))


@pytest.mark.parametrize("units", [1, 2, 64, 5000])
@pytest.mark.parametrize(("pixels", "halo"), [(12544, 113), (784, 58), (784, 0), (49, 8), (1, 2)])
def test_run_length(pixels, halo, units):
    run, step = run_length(pixels, halo, units, 32), 32
    assert run % step == 0
    assert run < pixels + step
    assert run >= min(halo, pixels)
    assert run < max(8 * halo, 1024) + step
    if run > max(halo, 1) + step:  # a shorter run would give more programs than are wanted
        assert -(-pixels // (run - step)) * units >= 528


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optional", [False, True])
def test_64_bit_indices(layout, optional, monkeypatch):
    monkeypatch.setattr(triton, "reach", lambda t: 2**31)
    options = dict.fromkeys(("input_gate", "residual", "output_gate"), optional)
    check(Case(layout=layout, height=9, sliced=True, **options))
    check(Case(layout=layout, height=9, dtype=torch.float16, **options), "triton_two_kernel")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ACTS)
def test_nan_passes_through(act, backend):
    args = make_args(Case(act_primary=act, act_cheap=act, height=9, width=10))
    args.x[0, 3, 4, 5] = float("nan")
    expected = reference.ghost_module(args)
    out = forward_op(backend)(*to_device(args, DEVICE)).cpu()
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(out.isnan(), expected.isnan())
    torch.testing.assert_close(out.nan_to_num(), expected.nan_to_num(), rtol=1e-4, atol=1e-5)


def test_infinity_stays_where_it_is():
    args = make_args(Case(height=9, width=10, act_primary="none", act_cheap="none"))
    args.x[0, 3, 4, 5] = float("inf")
    expected = reference.ghost_module(args)
    out = forward_op("triton")(*to_device(args, DEVICE)).cpu()
    assert torch.equal(out.isfinite(), expected.isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    args = to_device(make_args(Case(batch=1)), DEVICE)
    out = forward_op(backend)(*args._replace(x=args.x[:0]))
    assert out.shape == (0, 24, 14, 14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tf32_when_allowed(layout):
    check(Case(allow_tf32=True, layout=layout, in_channels=40))


def test_through_the_function():
    """Validation, choice of the backend, Function and its backward."""
    args = to_device(make_args(Case(height=6, width=7, batch=1)), DEVICE)
    weight = args.primary_weight.clone().requires_grad_()
    out = ghost_module(args.x, weight, args.cheap_weight, backend="triton")
    expected = ghost_module(args.x, weight, args.cheap_weight, backend="reference")
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(t.square().sum(), weight)[0] for t in (out, expected)]
    torch.testing.assert_close(*grads)


def test_refusals():
    args = to_device(make_args(Case(dtype=torch.float64)), DEVICE)
    assert "float64" in triton.supports(args)
    args = to_device(make_args(Case(kernel_size=3)), DEVICE)
    assert "3×3" in triton.supports(args)
    assert triton.supports(to_device(make_args(Case()), DEVICE)) is None
    huge = make_args(Case(batch=1, height=1, width=1))
    huge = huge._replace(x=huge.x.expand(2**31, -1, -1, -1))
    assert "programs" in triton.supports(huge if DEVICE == "cpu" else to_device(huge, "cuda"))


def _real_modules() -> list[Case]:
    """Every module of ghost_configs.jsonl that the kernels take, at most 9 pixels wide and high, odd sizes kept."""
    cases = {}
    for i, row in enumerate(ROWS):
        if row["kernel_size"] != 1 or row["stride"] != 1:
            continue
        names = ("in_channels", "out_channels", "ratio", "dw_size", "act_primary", "act_cheap")
        fields = {name: row[name] for name in names}
        size = {"height": min(row["height"], 8 + i % 2), "width": min(row["width"], 9 - i % 2)}
        key = (row["in_channels"], row["out_channels"], row["dw_size"], row["act_primary"] == "none")
        cases.setdefault(key, Case(batch=1, **fields, **size, dtype=HALVES[i % 2], layout=LAYOUTS[i // 2 % 2]))
    return list(cases.values())


@pytest.mark.parametrize("case", _real_modules(), ids=str)
def test_real_modules(case):
    check(case)


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=draws.ghost_modules())
@settings(max_examples=25)
def test_any_module(backend, case):
    check(dataclasses.replace(case, out_channels=max(case.out_channels, case.ratio)), backend)


def test_deterministic():
    args = make_args(Case(dtype=torch.float16, height=20, width=20, layout="nhwc"))
    first, second = (forward_op("triton")(*to_device(args, DEVICE)) for _ in range(2))
    assert torch.equal(first, second)
