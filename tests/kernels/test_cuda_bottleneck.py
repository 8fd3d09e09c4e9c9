"""CUDA's depthwise and squeeze_excite, and Ghost modules without ghosts, against the float64 reference: on a GPU, or with
none under ptx-on-cpu."""

from __future__ import annotations

import dataclasses

import bottleneck_cases as cases
import draws
import pytest
import torch
from cuda_runtime import _C, ON_CPU, check_args, forward, needs_cuda, planned_for, run_in_order
from draws import DTYPES, LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

from ghostfused import functional, ops
from ghostfused.backends import choose, cuda
from ghostfused.spec import Args
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, judge, make, make_args, to_device

pytestmark = [pytest.mark.cuda, needs_cuda]


def check(*several: cases.Case | Args) -> None:
    for case in several:
        check_args(make(case) if isinstance(case, cases.Case) else case, str(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(dtype, layout):
    check(*cases.every_kernel(dtype, layout))
    check(*(dataclasses.replace(case, channels=16) for case in cases.every_kernel(dtype, layout)))  # wider vectors
    for gate in draws.GATES:
        check(SqueezeExciteCase(3, 24, 8, 9, 13, gate=gate, bias=gate == "sigmoid", dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm_count", [1, 132])
def test_thread_order(layout, sm_count):
    """Several blocks of everything; also run in other thread orders."""
    with planned_for(sm_count):
        check(DepthwiseCase(2, 144, 5, 13, (5, 5), dtype=torch.float16, layout=layout))
        check(DepthwiseCase(1, 5, 36, 33, (3, 3), 1, act="prelu", layout=layout))
        check(SqueezeExciteCase(5, 136, 40, 5, 7, dtype=torch.float16, layout=layout))
        check(SqueezeExciteCase(2, 12, 300, 24, 24, layout=layout))


@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
@pytest.mark.parametrize("order", ["desc", "rand:7"])
def test_other_orders(order):
    run_in_order(__file__, order)


@pytest.mark.parametrize("act", draws.ACTS)
def test_activations(act):
    check(*cases.activations(act))
    if act in draws.GATE_ACTS:
        check(SqueezeExciteCase(height=5, width=6, act=act))


@pytest.mark.parametrize("norm", draws.NORMS)
def test_norms(norm):
    for dtype in DTYPES:
        check(*cases.norms(norm, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", cases.SIZES, ids=str)
def test_sizes(size, layout):
    check(*cases.sizes(size, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", cases.CHANNELS)
def test_channels(count, layout):
    check(*cases.channels(count, layout))


@pytest.mark.parametrize("case", cases.REAL, ids=str)
def test_real_layers(case):
    with planned_for(132):
        check(case, dataclasses.replace(case, layout="nhwc", dtype=torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout):
    for x in cases.views(layout):
        check(*cases.on(x))


def test_strides_and_alignment():
    check(*cases.with_strided_parameters(), *cases.unaligned())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value):
    for args, expected in cases.not_finite(value):
        cases.assert_like(forward(args), expected)


def test_deterministic():
    for case in (DepthwiseCase(dtype=torch.float16, layout="nhwc"), SqueezeExciteCase(5, 130, 30, 40, 30)):
        args = make(case)
        assert torch.equal(forward(args), forward(args))


def test_empty_batch():
    for case in (DepthwiseCase(), SqueezeExciteCase()):
        args = make(case)
        assert forward(args._replace(x=args.x[:0])).shape[0] == 0


def test_errors_name_the_argument():
    for case in (DepthwiseCase(norm="bn+bias", act="prelu", per_channel_slope=True), SqueezeExciteCase()):
        good = to_device(make(case), "cuda")
        for name, value in cases.bad_arguments(good).items():
            with pytest.raises(RuntimeError, match=name):
                ops.forward_op("cuda", good.op)(*good._replace(**{name: value}))


def test_backend_is_the_default_and_explains_refusals():
    for case in (DepthwiseCase(), SqueezeExciteCase()):
        args = to_device(make(case), "cuda")
        assert choose(args) == "cuda"
        assert "float64" in cuda.supports(args._replace(x=args.x.new_empty(args.x.shape, dtype=torch.float64)))
        assert "cpu" in cuda.supports(make(case))
        with torch.no_grad():
            assert judge(functional.run(args).cpu(), make(case)).ok


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("optional", [(), ("input_gate",), ("residual",), ("output_gate",)], ids=str)
def test_no_ghosts(optional, dtype, layout):
    """A Ghost module cut off after its first half never reads what the second half is made of."""
    for conv in ({"dw_size": 1}, {"dw_size": 5, "ratio": 3}):
        case = Case(2, 20, 9, 14, 36, init_channels=36, layout=layout, dtype=dtype, **conv)
        args = make_args(dataclasses.replace(case, **dict.fromkeys(optional, True)))
        poisoned = args._replace(cheap_weight=torch.full_like(args.cheap_weight, float("nan")))
        verdict = judge(forward(poisoned), args)
        assert verdict.ok, verdict


def test_no_ghosts_plan():
    """No halo, no depthwise weights, and in channels_last nothing staged: an ordinary 1×1 conv."""
    shape = {"batch": 64, "in_channels": 40, "height": 28, "width": 28, "init_channels": 40}
    for channels_last in (True, False):
        common = {**shape, "channels_last": channels_last, "family": "general"}
        conv = _C.plan(**common, out_channels=40, dw_size=5)
        module = _C.plan(**common, out_channels=80, dw_size=5)
        assert conv == _C.plan(**common, out_channels=40, dw_size=1, ratio=4)
        assert conv["recompute"] == 1 < module["recompute"] or module["tiles_h"] == module["tiles_w"] == 1
        assert conv["dram_write"] * 2 == module["dram_write"]
        assert conv["dram_read"] == (64 * 40 * 28 * 28 + 40 * 40) * 2
        assert conv["smem_bytes"] < module["smem_bytes"]


@given(draws.depthwise(), st.sampled_from([1, 132]))
def test_any_depthwise(case, sm_count):
    with planned_for(sm_count):
        check(case)


@given(draws.squeeze_excite(), st.sampled_from([1, 132]))
def test_any_squeeze_excite(case, sm_count):
    with planned_for(sm_count):
        check(case)
