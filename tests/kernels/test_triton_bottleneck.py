"""Triton's depthwise and squeeze_excite against the float64 reference: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import bottleneck_cases as cases
import draws
import pytest
import torch
from draws import DTYPES, LAYOUTS
from hypothesis import given, settings
from triton_runtime import DEVICE, needs_triton

from ghostfused import functional
from ghostfused.backends import triton
from ghostfused.backends.triton import bottleneck as triton_bottleneck
from ghostfused.ops.schemas import forward_op
from ghostfused.spec import Act, Args
from ghostfused.testing import DepthwiseCase, SqueezeExciteCase, judge, make, to_device

pytestmark = [pytest.mark.triton, needs_triton]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fresh memory, outputs and the parts of sums among it, is NaN: what a kernel forgets to write can't pass."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() and t.device.type != "meta" else t

    monkeypatch.setattr(torch, "empty", poisoned)


def forward(args: Args, backend: str = "triton") -> torch.Tensor:
    out = forward_op(backend, args.op)(*to_device(args, DEVICE))
    expected = args.new_output()
    assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)
    return out.cpu()


def check(*several: cases.Case | Args, backend: str = "triton") -> None:
    for case in several:
        args = make(case) if isinstance(case, cases.Case) else case
        verdict = judge(forward(args, backend), args)
        assert verdict.ok, f"{case}: {verdict}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel(dtype, layout):
    check(*cases.every_kernel(dtype, layout))
    for gate in draws.GATES:
        check(SqueezeExciteCase(3, 24, 8, 9, 13, gate=gate, bias=gate == "sigmoid", dtype=dtype, layout=layout))


def test_both_backends():
    check(DepthwiseCase(), SqueezeExciteCase(), backend="triton_two_kernel")


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
def test_channels(layout):
    for count in cases.CHANNELS:
        check(*cases.channels(count, layout))


@pytest.mark.parametrize("case", cases.REAL, ids=str)
def test_real_layers(case):
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout):
    for x in cases.views(layout):
        check(*cases.on(x))


def test_strides_and_alignment():
    check(*cases.with_strided_parameters(), *cases.unaligned())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("programs", [1, 528])
def test_images_share_a_program_and_large_maps_have_several(programs, layout, monkeypatch):
    """One program per multiprocessor is wanted: of a small device, each takes several images; of a large one, few pixels."""
    monkeypatch.setattr(triton_bottleneck, "PROGRAMS", programs)
    case = SqueezeExciteCase(5, 70, 20, 60, 50, layout=layout)
    plan = triton_bottleneck.squeeze_plan(make(case))
    assert plan["IMAGES"] == (4 if programs == 1 else 1)
    assert plan["chunk"] < 60 * 50
    check(case)
    large = triton_bottleneck.squeeze_plan(make(SqueezeExciteCase(1, 72, 20, 112, 112, layout=layout)))
    assert 112 * 112 / large["chunk"] > 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_bit_indices(layout, monkeypatch):
    monkeypatch.setattr(triton_bottleneck, "reach", lambda t: 2**31)
    check(DepthwiseCase(sliced=True, layout=layout), SqueezeExciteCase(sliced=True, layout=layout))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity(value):
    for args, expected in cases.not_finite(value):
        cases.assert_like(forward(args), expected)


def test_deterministic_and_few_launches(monkeypatch):
    launches, run = [], triton_bottleneck.run
    monkeypatch.setattr(triton_bottleneck, "run", lambda *a: launches.append(a) or run(*a))
    for case, count in ((DepthwiseCase(dtype=torch.float16), 1), (SqueezeExciteCase(3, 70, 30, 40, 40), 2)):
        args = make(case)
        first = forward(args)
        assert len(launches) == count
        assert torch.equal(first, forward(args))
        launches.clear()


def test_empty_batch():
    for case in (DepthwiseCase(), SqueezeExciteCase()):
        args = make(case)
        assert forward(args._replace(x=args.x[:0])).shape[0] == 0


def test_refusals():
    depthwise = to_device(make(DepthwiseCase()), DEVICE)
    gate = to_device(make(SqueezeExciteCase()), DEVICE)
    assert triton.supports(depthwise) is None
    assert triton.supports(gate) is None
    assert "3×5" in triton.supports(depthwise._replace(weight=torch.ones(12, 1, 3, 5)))
    assert "stride 3" in triton.supports(depthwise._replace(stride=3))
    assert "LEAKY_RELU" in triton.supports(gate._replace(act=int(Act.LEAKY_RELU)))
    with pytest.raises(RuntimeError, match=r"can't run this depthwise convolution: a 9×9"):
        functional.run(depthwise._replace(weight=torch.ones(12, 1, 9, 9)), "triton")


@given(draws.depthwise())
@settings(max_examples=20)
def test_any_depthwise(case):
    check(case)


@given(draws.squeeze_excite())
@settings(max_examples=25)
def test_any_squeeze_excite(case):
    check(case)
