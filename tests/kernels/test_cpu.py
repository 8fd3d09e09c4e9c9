"""The C++ SIMD kernel against the float64 reference, at each instruction set that this CPU has."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import draws
import pytest
import torch
from draws import DTYPES, LAYOUTS
from hypothesis import given
from hypothesis import strategies as st

from ghostfused import functional
from ghostfused.backends import cpu, reference
from ghostfused.cli.verify import read_cases
from ghostfused.ops.autograd import call
from ghostfused.ops.schemas import forward_op
from ghostfused.spec import TENSORS, Act
from ghostfused.spec.kernels import TAKES
from ghostfused.testing import (
    Case,
    DepthwiseCase,
    SqueezeExciteCase,
    convert,
    judge,
    make,
    make_args,
    make_depthwise,
    make_squeeze_excite,
)

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

ISA = "GHOSTFUSED_CPU_ISA"


def check(case: Case | DepthwiseCase | SqueezeExciteCase) -> torch.Tensor:
    return check_args(make(case), case)


def check_args(args, case) -> torch.Tensor:
    out = functional.run(args, "cpu")
    verdict = judge(out, args)
    assert verdict.ok, f"{case}: {verdict}"
    fake = args.new_output()
    assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_every_kernel(dtype, layout, dw_size):
    common = {"dtype": dtype, "layout": layout, "dw_size": dw_size}
    check(Case(2, 20, 9, 11, 24, **common))
    check(Case(1, 33, 17, 40, 29, 3, sliced=True, input_gate=True, residual=True, output_gate=True, **common))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 1), (2, 2), (7, 7), (14, 15), (5, 200), (112, 3)])
def test_sizes(size, layout):
    check(Case(2, 12, *size, 18, layout=layout))
    check(Case(1, 8, *size, 16, dw_size=5, layout=layout, act_primary="silu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dw_size", [3, 5, 7])
def test_every_width(dw_size, dtype):
    """A row's last vector ends where the row does, so that taps leave the image in one vector or in two."""
    for width in range(1, 37):
        check(Case(1, 4, 5, width, 6, dw_size=dw_size, dtype=dtype, residual=width % 2 == 0))
        if dw_size < 7:
            check(DepthwiseCase(1, 3, 6, width, (dw_size, dw_size), 2, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 11), (14, 14)])
def test_conv1x1_without_ghosts(size, dtype, layout):
    for extras in (False, True):
        case = Case(
            3, 21, *size, 19, dw_size=1, init_channels=19, dtype=dtype, layout=layout, input_gate=extras,
            residual=extras, act_primary="prelu" if extras else "relu", per_channel_slope=True,
        )  # fmt: skip
        args = make_args(case)
        check_args(args._replace(cheap_weight=args.primary_weight[:, :1]), case)
        check_args(args._replace(residual=None), case)
        check_args(args._replace(input_gate=None), case)
    deep = Case(5, 200, *size, 37, dw_size=1, init_channels=37, dtype=dtype, layout=layout, sliced=True)
    check(deep)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_primary_convs_of_any_kernel(kernel, stride, dtype, layout):
    common = {"kernel_size": kernel, "stride": stride, "dtype": dtype, "layout": layout}
    check(Case(1, 3, 33, 38, 16, dw_size=1, init_channels=16, **common))
    check(Case(2, 7, 9, 40, 26, sliced=True, input_gate=True, residual=True, act_primary="silu", **common))
    check(Case(2, 16, 11, 5, 13, dilation=2, dw_size=5, **common))
    args = make_args(Case(2, 5, 4, 1, 9, **common))
    check_args(args, "narrow")
    check_args(
        args._replace(primary_weight=args.primary_weight.to(memory_format=torch.channels_last)), "strided weight"
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 5), (5, 1)])
def test_depthwise(kernel, stride, dtype, layout):
    common = {"kernel": kernel, "stride": stride, "dtype": dtype, "layout": layout}
    check(DepthwiseCase(2, 12, 14, 14, **common))
    check(DepthwiseCase(1, 150, 9, 35, sliced=True, act="hardswish", **common))
    for size in ((1, 1), (1, 6), (5, 2), (33, 7)):
        check(DepthwiseCase(2, 19, *size, act="relu6", **common))


@given(
    case=draws.depthwise(
        channels=st.integers(2, 70), height=st.integers(1, 30), width=st.integers(1, 70), seed=st.integers(0, 999)
    )
)
def test_random_depthwise(case):
    check(case)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid", "relu6"])
def test_squeeze_excite(gate, dtype, layout):
    common = {"gate": gate, "dtype": dtype, "layout": layout}
    check(SqueezeExciteCase(2, 24, 8, 14, 14, **common))
    check(SqueezeExciteCase(5, 41, 11, 7, 9, act="silu", bias=False, sliced=True, **common))
    check(SqueezeExciteCase(1, 3, 1, 1, 1, **common))


@given(
    case=draws.squeeze_excite(
        channels=st.integers(2, 200), reduced=st.integers(1, 50), height=st.integers(1, 20), width=st.integers(1, 20),
        seed=st.integers(0, 999),
    )
)  # fmt: skip
def test_random_squeeze_excite(case):
    check(case)


@given(
    case=draws.ghost_modules(
        in_channels=st.integers(1, 70), height=st.integers(1, 30), width=st.integers(1, 40),
        out_channels=st.integers(12, 90), dw_size=st.sampled_from([1, 3, 5, 7]), seed=st.integers(0, 999),
    )
)  # fmt: skip
def test_random_cases(case):
    check(case)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """The same numbers, one element further from an aligned address."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)[1:]
    return buffer.as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_channels", [1, 2, 3, 16, 33, 34, 70])
def test_pairs_of_channels(in_channels, layout):
    """Some CPUs multiply bfloat16 in pairs, which an odd number of channels or an odd address cuts apart."""
    for size, out_channels in (((5, 7), 18), ((14, 13), 130)):
        case = Case(2, in_channels, *size, out_channels, dtype=torch.bfloat16, layout=layout)
        args = make_args(case)
        check_args(args, case)
        check_args(args._replace(x=shifted(args.x), primary_weight=shifted(args.primary_weight)), "shifted")
        weight = torch.empty(*args.primary_weight.shape[:2], 3, 1, dtype=torch.bfloat16)
        weight[:, :, 1:2] = args.primary_weight
        check_args(args._replace(primary_weight=weight[:, :, 1:2]), "strided weight")
        args.x[0, -1, 2, 3] = float("nan")
        args.x[1, 0, 0, 0] = float("inf")
        expected = reference.run(convert(args, torch.float64))  # PyTorch's bfloat16 spreads the infinity of one channel
        assert torch.equal(functional.run(args, "cpu").isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_shapes(layout):
    for case in read_cases(Path(__file__).parents[1] / "data" / "ghost_configs.jsonl", 15, batch=1, layout=layout):
        if case.kernel_size == 1 or case.in_channels <= TAKES["cpu"].patch_channels:
            check(case)


@pytest.mark.parametrize("isa", [] if cpu.unavailable() else cpu.build_info()["compiled"])
def test_each_instruction_set(isa):
    if ISA in os.environ:
        pytest.skip("runs at one instruction set")
    if isa not in cpu.build_info()["supported"]:
        pytest.skip("this CPU lacks it")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", __file__]
    command += [
        "-k",
        "every_kernel or sizes or width or chosen or without_ghosts or pairs or test_depthwise or test_squeeze or primary_convs",
    ]
    run = subprocess.run(command, env=os.environ | {ISA: isa}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.skipif(ISA not in os.environ, reason=f"{ISA} isn't set")
def test_chosen_instruction_set():
    assert cpu.build_info()["chosen"] == os.environ[ISA]


def vendor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"vendor_id\s*: (\S+)", path.read_text()) if path.exists() else None
    return found[1] if found else "unknown"


@pytest.mark.skipif(ISA in os.environ, reason=f"{ISA} is set")
@pytest.mark.skipif(vendor() != "GenuineIntel", reason="the CPU is not Intel's")
def test_intel_widens_bfloat16():
    """Its products of pairs are slower, and less exact."""
    info = cpu.build_info()
    assert info["chosen"] == [name for name in info["supported"] if not name.endswith("_bf16")][-1]


THREADED = {
    "ghost": (make_args, Case(3, 40, 28, 28, 72, dw_size=5)),
    "pairs": (make_args, Case(2, 41, 14, 14, 184, dtype=torch.bfloat16)),
    "panels": (make_args, Case(1, 80, 14, 14, 184, input_gate=True, residual=True)),
    "no ghosts": (make_args, Case(1, 80, 14, 14, 97, dw_size=1, init_channels=97)),
    "patches": (make_args, Case(2, 16, 45, 50, 37, kernel_size=3, stride=2)),
    "fully connected": (make_args, Case(3, 400, 1, 1, 301, dw_size=1, init_channels=301)),
    "depthwise": (make_depthwise, DepthwiseCase(2, 75, 40, 40, (5, 5))),
    "squeeze_excite": (make_squeeze_excite, SqueezeExciteCase(2, 330, 80, 28, 28)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", THREADED)
def test_threads_change_no_bit(case, layout):
    make, case = THREADED[case]
    args = make(dataclasses.replace(case, layout=layout))
    threads = torch.get_num_threads()
    try:
        outs = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outs.append(functional.run(args, "cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_nan_passes_and_every_element_is_written():
    args = make_args(Case(2, 6, 5, 5, 8, act_primary="relu", act_cheap="relu6"))
    args.x[1, 0, 2, 2] = float("nan")
    out, expected = functional.run(args, "cpu"), functional.run(args, "reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert out[0].isfinite().all()
    assert functional.run(args._replace(x=torch.empty(0, 6, 5, 5)), "cpu").shape == (0, 8, 5, 5)


def test_gradients_and_compile():
    args = make_args(Case(2, 6, 5, 7, 8, act_primary="silu", input_gate=True, residual=True))
    leaves = [
        t.requires_grad_()
        for name, t in zip(TENSORS, args.tensors, strict=True)
        if t is not None and not name.endswith(("mean", "var"))
    ]
    out = call("cpu", args)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(functional.run(args, "reference"), leaves, grad)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), expected, strict=True):
        torch.testing.assert_close(a, b)
    compiled = torch.compile(lambda x: functional.run(args._replace(x=x, residual=None)), fullgraph=True, dynamic=True)
    for shape in ((2, 6, 5, 7), (2, 6, 9, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(compiled(x), functional.run(args._replace(x=x, residual=None), "reference"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"primary_weight": torch.randn(4, 5, 1, 1)}, "primary_weight"),
        ({"cheap_weight": torch.randn(6, 1, 3, 3)}, "cheap_weight"),
        ({"primary_mean": torch.zeros(5)}, "primary_mean"),
        ({"input_gate": torch.zeros(2, 7)}, "input_gate"),
        ({"residual": torch.zeros(2, 8, 5, 4)}, "residual"),
        ({"output_gate": torch.zeros(2, 7, 2, 2)}, "output_gate"),
        ({"out_channels": 9}, "out_channels"),
        ({"primary_weight": torch.randn(4, 6, 2, 2)}, "primary_weight"),
        ({"primary_weight": torch.randn(4, 6, 3, 1)}, "primary_weight"),
        (
            {"x": torch.randn(2, 17, 5, 5), "primary_weight": torch.randn(4, 17, 3, 3)},
            "up to 16 input channels, got 17",
        ),
        ({"stride": 0}, "stride"),
        ({"groups": 2}, "groups"),
        ({"dilation": 0}, "dilation"),
        ({"x": torch.randn(2, 6, 5)}, "x"),
    ],
)
def test_the_binding_names_what_does_not_fit(changes, message):
    args = make_args(Case(2, 6, 5, 5, 8))._replace(**changes)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ghostfused.forward_cpu(*args)


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("depthwise", {"x": torch.randn(2, 6, 5)}, "x: expected 4 dimensions"),
        ("depthwise", {"weight": torch.randn(5, 1, 3, 3)}, "weight: expected shape"),
        ("depthwise", {"weight": torch.randn(6, 1, 2, 3)}, "weight: the kernel takes sides of"),
        ("depthwise", {"mean": torch.zeros(5)}, "mean: expected shape"),
        ("depthwise", {"gamma": torch.zeros(6).double()}, "gamma: expected x's dtype"),
        ("depthwise", {"stride": 3}, "stride"),
        ("depthwise", {"act": max(Act) + 1}, "act"),
        ("squeeze_excite", {"x": torch.randn(2, 6)}, "x: expected 4 dimensions"),
        ("squeeze_excite", {"reduce_weight": torch.randn(3, 5)}, "reduce_weight: expected shape"),
        ("squeeze_excite", {"expand_weight": torch.randn(6, 4)}, "expand_weight: expected shape"),
        ("squeeze_excite", {"expand_bias": torch.randn(3)}, "expand_bias: expected shape"),
        ("squeeze_excite", {"gate": 3}, "gate"),
        ("squeeze_excite", {"act": int(Act.PRELU)}, "act"),
    ],
)
def test_the_other_ops_name_what_does_not_fit(op, changes, message):
    make = {
        "depthwise": lambda: make_depthwise(DepthwiseCase(2, 6, 5, 5)),
        "squeeze_excite": lambda: make_squeeze_excite(SqueezeExciteCase(2, 6, 3, 5, 5)),
    }[op]
    args = make()._replace(**changes)
    with pytest.raises(RuntimeError, match=message):
        forward_op("cpu", op)(*args)


def test_matrices_of_any_strides():
    args = make_squeeze_excite(SqueezeExciteCase(2, 30, 8, 5, 5))
    columns = args._replace(
        reduce_weight=args.reduce_weight.T.contiguous().T, expand_weight=args.expand_weight.T.contiguous().T
    )
    check_args(columns, "column-major matrices")
