"""The CPU kernels on aarch64, in an emulator: every op against the float64 reference, at each instruction set."""

from __future__ import annotations

import itertools
from pathlib import Path

import aarch64
import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS

from ghostfused import spec
from ghostfused.backends import reference
from ghostfused.spec import (
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    GateArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    Step,
    UpsampleArgs,
)
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, judge, make, make_args, make_depthwise

pytestmark = pytest.mark.skipif(aarch64.missing() is not None, reason=str(aarch64.missing()))

ISAS = ["baseline", "neon_fp16", "neon_bf16", "sve512"]
SHORT_SVE = "max,sve-default-vector-length=32"


@pytest.fixture(scope="session")
def binary(tmp_path_factory) -> Path:
    root = tmp_path_factory.getbasetemp()
    return aarch64.build(root.parent if root.name.startswith("popen-gw") else root)


@pytest.fixture(scope="module", params=ISAS)
def driver(request, binary):
    driver = aarch64.Driver(binary, "max", request.param, threads=2)
    assert driver.isa == request.param
    yield driver
    driver.close()


def check(driver: aarch64.Driver, case: Case | DepthwiseCase | SqueezeExciteCase) -> None:
    check_args(driver, make(case), case)


def check_args(driver: aarch64.Driver, args: Step, case: object) -> None:
    out = driver.run(args)
    verdict = judge(out, args)
    assert verdict.ok, f"{driver.isa}, {case}: {verdict}"
    fake = args.new_output()
    assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ghost_modules(driver, dtype, layout):
    common = {"dtype": dtype, "layout": layout}
    extras = {"input_gate": True, "residual": True, "output_gate": True}
    for dw_size in (1, 3, 5, 7):
        check(driver, Case(2, 20, 9, 11, 24, dw_size=dw_size, **common))
        check(driver, Case(1, 33, 7, 20, 29, 3, dw_size=dw_size, sliced=True, **extras, **common))
    for act in strategies.ACTS:
        check(driver, Case(1, 6, 5, 6, 10, act_primary=act, act_cheap=act, per_channel_slope=True, **common))
    for size in ((1, 1), (1, 9), (13, 1), (2, 2), (7, 7), (5, 70)):
        check(driver, Case(2, 12, *size, 18, act_primary="silu", **common))
    check(driver, Case(1, 40, 14, 13, 130, **common))  # threads share it, and in NCHW x is packed in panels
    check(driver, Case(3, 21, 9, 11, 38, dw_size=1, init_channels=38, act_primary="prelu", **common))
    check(driver, Case(1, 300, 3, 5, 8, **common))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(driver, dtype, layout):
    for width in range(1, 14):
        check(driver, Case(1, 5, 4, width, 6, residual=width % 2 == 0, dtype=dtype, layout=layout))
        check(driver, DepthwiseCase(1, 3, 6, width, dtype=dtype, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_of_channels(driver, dtype, layout):
    """Products of half-precision numbers are made in pairs, which an odd number of channels or an odd address cuts apart."""
    for in_channels in (1, 2, 3, 4, 5, 6, 7, 8, 16, 33, 34, 35):
        case = Case(2, in_channels, 5, 7, 18, dtype=dtype, layout=layout)
        args = make_args(case)
        check_args(driver, args, case)
        shifted = {name: _shifted(getattr(args, name)) for name in ("x", "primary_weight")}
        check_args(driver, args._replace(**shifted), f"shifted {case}")


def _shifted(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element further from an aligned address."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return buffer.as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_primary_convs_of_any_kernel(driver, dtype, layout):
    common = {"dtype": dtype, "layout": layout}
    check(driver, Case(1, 3, 13, 18, 16, kernel_size=3, stride=2, dw_size=1, init_channels=16, **common))
    check(driver, Case(2, 7, 9, 14, 10, kernel_size=5, input_gate=True, sliced=True, residual=True, **common))
    check(driver, Case(1, 16, 11, 5, 13, kernel_size=3, stride=3, dilation=2, dw_size=5, **common))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise(driver, dtype, layout):
    for stride in (1, 2):
        for kernel in ((3, 3), (5, 5), (7, 7), (1, 5), (5, 1)):
            common = {"kernel": kernel, "stride": stride, "dtype": dtype, "layout": layout}
            check(driver, DepthwiseCase(1, 21, 9, 19, sliced=True, act="hardswish", **common))
            check(driver, DepthwiseCase(2, 5, 5, 2, act="relu6", **common))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squeeze_excite_pool_and_linear(driver, dtype, layout):
    common = {"dtype": dtype, "layout": layout}
    for gate in strategies.GATES:
        check(driver, SqueezeExciteCase(5, 41, 11, 7, 9, gate=gate, sliced=True, **common))
    case = SqueezeExciteCase(1, 130, 33, 1, 1, act="silu", bias=False, **common)
    args = make(case)
    check_args(driver, args, case)
    check_args(driver, args._replace(reduce_weight=args.reduce_weight.T.contiguous().T), "a column-major matrix")
    x = make_depthwise(DepthwiseCase(2, 37, 7, 9, **common)).x
    check_args(driver, GlobalPoolArgs(x), "global_pool")
    weight = torch.randn(45, 37, dtype=dtype)
    check_args(driver, LinearArgs(x[:, :, 0, 0], weight, torch.randn(45, dtype=dtype)), "linear")
    for to, other in enumerate(spec.DTYPES):
        for each in (x, x[:, 1:, ::2, :5], x[..., ::2], x[:, :, 0, 0]):
            assert torch.equal(driver.run(CastArgs(each, to)), each.to(other))
    for each in (x, x[:, 1:, ::2, :5], x[..., ::2], x[:, :, 0, 0]):
        for gate in spec.Gate:
            check_args(driver, GateArgs(each, int(gate)), "gate")
        if each.dim() == 4:
            for args in (AvgPoolArgs(each, 2), UpsampleArgs(each, 2)):
                assert torch.equal(driver.run(args), reference.run(args))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_and_concatenation(driver, dtype, layout):
    x, narrow = (
        make_depthwise(DepthwiseCase(2, channels, 9, 37, sliced=channels < 9, dtype=dtype, layout=layout)).x
        for channels in (41, 5)
    )
    x[0, :3, 2] = float("nan")
    x[0, :, 4, ::3] = -float("inf")
    for each, kernel, stride in itertools.product((x, narrow, x[..., ::2], x[:, :, :1, :1]), (1, 5, 13), (1, 2)):
        args = MaxPoolArgs(each, kernel, stride)
        out, expected = driver.run(args), reference.run(args)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())
        assert out.stride() == args.new_output().stride()
    turned = x.flip(1).contiguous(memory_format=torch.channels_last)
    for args in (ConcatArgs(x, narrow, None, None), ConcatArgs(narrow, turned, x.contiguous(), narrow)):
        out = driver.run(args)
        assert torch.equal(out.nan_to_num(7), reference.run(args).nan_to_num(7))
        assert out.stride() == args.new_output().stride()


few = settings(max_examples=12)


@few
@given(case=strategies.ghost_modules(seed=st.integers(0, 999)))
def test_random_ghost_modules(driver, case):
    check(driver, case)


@few
@given(case=strategies.depthwise(seed=st.integers(0, 999)))
def test_random_depthwise(driver, case):
    check(driver, case)


@few
@given(
    case=strategies.squeeze_excite(channels=st.integers(1, 60), reduced=st.integers(1, 20), seed=st.integers(0, 999))
)
def test_random_squeeze_excite(driver, case):
    check(driver, case)


def test_threads_change_no_bit(driver, binary):
    alone = aarch64.Driver(binary, "max", driver.isa)
    for layout, dtype in itertools.product(LAYOUTS, DTYPES):
        for channels in (130, 72):  # in blocks of other sizes
            args = make_args(Case(1, 40, 14, 13, channels, layout=layout, dtype=dtype))
            assert torch.equal(driver.run(args), alone.run(args))
    alone.close()


def test_an_error_is_the_bindings_own(driver):
    args = make_args(Case(2, 6, 5, 5, 8))._replace(primary_weight=torch.randn(4, 5, 1, 1))
    with pytest.raises(RuntimeError, match=r"primary_weight: expected shape \(4, 6, 1, 1\), got \(4, 5, 1, 1\)"):
        driver.run(args)
    check(driver, Case(2, 6, 5, 5, 8))


def test_a_cpu_gets_the_fastest_that_it_has(binary):
    baseline = ISAS[:1]
    cpus = {"max": ISAS, SHORT_SVE: ISAS[:-1], "a64fx": [*baseline, "sve512"], "cortex-a57": baseline}
    for cpu, expected in (cpus | {"neoverse-n1": baseline}).items():
        driver = aarch64.Driver(binary, cpu)
        assert driver.supported == expected
        assert driver.isa == expected[-1]
        check(driver, Case(2, 20, 9, 11, 24, dtype=torch.float16))
        driver.close()


@pytest.mark.parametrize(
    ("isa", "why"), [*((isa, "this CPU lacks it") for isa in ISAS[1:]), ("avx2", "no such instruction set")]
)
def test_a_cpu_refuses_what_it_lacks(binary, isa, why):
    for cpu in ("cortex-a57", SHORT_SVE) if isa == "sve512" else ("cortex-a57",):
        with pytest.raises(RuntimeError, match=f"GHOSTFUSED_CPU_ISA={isa}: {why}"):
            aarch64.Driver(binary, cpu, isa)
