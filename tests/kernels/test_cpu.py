"""What only the C++ SIMD kernels are asked: each width of a vector, pairs of channels, any primary conv, instruction sets,
threads. What they compute is in test_ghost.py, test_depthwise.py, test_squeeze_excite.py and test_every_op.py."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_backends import Backend, needs_cpu
from strategies import DTYPES, LAYOUTS
from strides import shifted, with_gaps

from ghostfused import backends, functional
from ghostfused.backends import cpu, reference
from ghostfused.cli.verify import read_cases
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, convert, make, make_args

pytestmark = needs_cpu

ISA = "GHOSTFUSED_CPU_ISA"
CPU = Backend("cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dw_size", [3, 5, 7])
def test_every_width(dw_size, dtype):
    """A row's last vector ends where the row does, so that taps leave the image in one vector or in two."""
    for width in range(1, 37):
        CPU.check(Case(1, 4, 5, width, 6, dw_size=dw_size, dtype=dtype, residual=width % 2 == 0))
        if dw_size < 7:
            CPU.check(DepthwiseCase(1, 3, 6, width, (dw_size, dw_size), 2, dtype=dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_gates_of_any_size(dtype, layout):
    """Smaller, larger and no whole part of the output, in either format and with gaps."""
    for (height, width), init_channels in itertools.product(((6, 5), (4, 16), (7, 28), (3, 41), (1, 9)), (5, 7, 13)):
        case = Case(
            2,
            3,
            height,
            width,
            13,
            ratio=3 if init_channels == 5 else 2,
            init_channels=init_channels,
            dtype=dtype,
            layout=layout,
            residual=width == 28,
        )
        args = make_args(case)
        sizes = (1, 1), (height, width), (-(-height // 2), -(-width // 2)), (2, 5), (height + 1, 2 * width), (3, 67)
        for size, format in itertools.product(sizes, (torch.contiguous_format, torch.channels_last)):
            gate = torch.rand(2, 13, *size).to(dtype, memory_format=format)
            for each in (gate, with_gaps(gate)):
                CPU.check(args._replace(output_gate=each), name=(case, size))
        if dtype == torch.float32 and width != 28:  # the gate is the one for the place
            gated = args._replace(output_gate=torch.rand(2, 13, 2, 5))
            spread = torch.nn.functional.interpolate(gated.output_gate, (height, width))
            assert torch.equal(functional.run(gated, "cpu"), functional.run(args, "cpu") * spread)


def test_a_gate_far_wider_than_the_output():
    """Lanes past the row's end would have columns beyond int32."""
    args = make_args(Case(1, 3, 2, 2, 8, dtype=torch.bfloat16))
    row = torch.zeros(300_000_000, dtype=torch.bfloat16)
    row[150_000_000] = 7
    row[0] = 3
    for step in (1, 2):
        wide = row[::step].expand(1, 8, 1, -1)
        expected = reference.run(args._replace(output_gate=None)) * torch.tensor([3, 7], dtype=torch.bfloat16)
        torch.testing.assert_close(
            functional.run(args._replace(output_gate=wide), "cpu"), expected, rtol=0.05, atol=0.05
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_primary_convs_of_any_kernel(kernel, stride, dtype, layout):
    common = {"kernel_size": kernel, "stride": stride, "dtype": dtype, "layout": layout}
    CPU.check(Case(1, 3, 33, 38, 16, dw_size=1, init_channels=16, **common))
    CPU.check(Case(2, 7, 9, 40, 26, sliced=True, input_gate=True, residual=True, act_primary="silu", **common))
    CPU.check(Case(2, 16, 11, 5, 13, dilation=2, dw_size=5, **common))
    args = make_args(Case(2, 5, 4, 1, 9, **common))
    CPU.check(args, name="narrow")
    CPU.check(args._replace(primary_weight=args.primary_weight.to(memory_format=torch.channels_last)), name="strided")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("in_channels", [1, 2, 3, 16, 33, 34, 70])
def test_pairs_of_channels(in_channels, layout):
    """Some CPUs multiply bfloat16 in pairs, which an odd number of channels or an odd address cuts apart."""
    for size, out_channels in (((5, 7), 18), ((14, 13), 130)):
        case = Case(2, in_channels, *size, out_channels, dtype=torch.bfloat16, layout=layout)
        args = make_args(case)
        CPU.check(args, name=case)
        CPU.check(args._replace(x=shifted(args.x), primary_weight=shifted(args.primary_weight)), name="shifted")
        weight = torch.empty(*args.primary_weight.shape[:2], 3, 1, dtype=torch.bfloat16)
        weight[:, :, 1:2] = args.primary_weight
        CPU.check(args._replace(primary_weight=weight[:, :, 1:2]), name="strided weight")
        args.x[0, -1, 2, 3] = float("nan")
        args.x[1, 0, 0, 0] = float("inf")
        expected = reference.run(convert(args, torch.float64))  # PyTorch's bfloat16 spreads the infinity of one channel
        assert torch.equal(functional.run(args, "cpu").isfinite(), expected.isfinite())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_shapes(layout):
    for case in read_cases(Path(__file__).parents[1] / "data" / "ghost_configs.jsonl", 15, batch=1, layout=layout):
        CPU.check(case)


@given(
    case=st.one_of(
        strategies.ghost_modules(
            in_channels=st.integers(1, 70), height=st.integers(1, 30), width=st.integers(1, 40),
            out_channels=st.integers(12, 90), seed=st.integers(0, 999),
        ),
        strategies.depthwise(channels=st.integers(2, 70), height=st.integers(1, 30), width=st.integers(1, 70)),
        strategies.squeeze_excite(channels=st.integers(2, 200)),
    )
)  # fmt: skip
def test_larger_cases(case):
    """Than other backends have the time for, where they are emulated."""
    CPU.check(case)


@pytest.mark.parametrize("isa", [] if cpu.unavailable() else cpu.build_info()["compiled"])
def test_each_instruction_set(isa):
    if ISA in os.environ:
        pytest.skip("runs at one instruction set")
    if isa not in cpu.build_info()["supported"]:
        pytest.skip("this CPU lacks it")
    here = Path(__file__).parent
    files = [here / f"test_{name}.py" for name in ("cpu", "ghost", "depthwise", "squeeze_excite")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", *files, "-m", "not cuda and not triton"]
    command += ["-k", "every_kernel or sizes or width or chosen or no_ghosts or pairs or primary_convs"]
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
    "ghost": Case(3, 40, 28, 28, 72, dw_size=5),
    "pairs": Case(2, 41, 14, 14, 184, dtype=torch.bfloat16),
    "panels": Case(1, 80, 14, 14, 184, input_gate=True, residual=True),
    "no ghosts": Case(1, 80, 14, 14, 97, dw_size=1, init_channels=97),
    "patches": Case(2, 16, 45, 50, 37, kernel_size=3, stride=2),
    "fully connected": Case(3, 400, 1, 1, 301, dw_size=1, init_channels=301),
    "depthwise": DepthwiseCase(2, 75, 40, 40, (5, 5)),
    "squeeze_excite": SqueezeExciteCase(2, 330, 80, 28, 28),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", THREADED.values(), ids=list(THREADED))
def test_threads_change_no_bit(case, layout):
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


WINDOWS = {
    "few pixels": Case(3, 40, 5, 5, 36, kernel_size=3, dw_size=5),
    "rows of whole vectors": Case(2, 18, 17, 64, 22, kernel_size=3, stride=2, dw_size=5, residual=True),
    "rows of whole vectors, dilated": Case(1, 17, 21, 32, 20, kernel_size=3, dilation=3, input_gate=True),
    "as many rows as taps": Case(2, 20, 3, 5, 18, kernel_size=3, stride=3, dilation=3),
    "a width of one": Case(2, 24, 37, 1, 36, kernel_size=5, stride=2),
    "several tiles": Case(2, 70, 41, 23, 52, kernel_size=3, dw_size=7, input_gate=True, residual=True),
    "a tile of few pixels": Case(1, 66, 33, 5, 40, kernel_size=3, dw_size=5),
    "every third, dilated": Case(2, 33, 40, 47, 40, kernel_size=3, stride=3, dilation=2, sliced=True),
    "no ghosts": Case(2, 48, 33, 30, 64, init_channels=64, dw_size=1, kernel_size=3, stride=2),
    "no ghosts, odd channels": Case(2, 48, 19, 18, 37, init_channels=37, dw_size=1, kernel_size=3, residual=True),
    "deep": Case(1, 128, 14, 20, 96, kernel_size=3, stride=2, dw_size=5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WINDOWS.values(), ids=list(WINDOWS))
def test_windows_of_many_channels(case, dtype, layout):
    """Tiles keep what they share for the next one, and threads change no bit of it."""
    case = dataclasses.replace(case, dtype=dtype, layout=layout, act_primary="silu", act_cheap="silu")
    CPU.check(case)
    test_threads_change_no_bit(case, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "mish", "hardswish", "prelu", "leaky_relu"])
def test_an_activation_is_the_same_in_every_place(act, layout):
    """Vectors are activated several in turn, and what is left of them one by one: channels that are all the same stay so."""
    args = make_args(Case(2, 3, 5, 23, 38, act_primary=act, act_cheap=act, layout=layout))
    same = {
        name: value[:1].expand(len(value), *value.shape[1:]).contiguous()
        for name, value in args._asdict().items()
        if isinstance(value, torch.Tensor) and name != "x" and value.dim() and len(value) > 1
    }
    out = functional.run(args._replace(**same), "cpu")
    for half in (out[:, :19], out[:, 19:]):
        assert torch.equal(half, half[:, :1].expand_as(half))


def test_what_lies_in_the_next_tile_spreads_no_further():
    """A border that is kept holds what the tile above made of it, be it NaN or infinite."""
    args = make_args(Case(1, 70, 45, 23, 52, kernel_size=3, act_primary="none", act_cheap="none"))
    for row in range(0, 45, 4):
        x = args.x.clone()
        x[0, row % 70, row, 11] = float("nan")
        got, expected = (functional.run(args._replace(x=x), b).isnan() for b in ("cpu", "reference"))
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("dtype", "layout", "most"),
    [
        (torch.float32, "nchw", 128),
        (torch.bfloat16, "nhwc", 128),
        (torch.bfloat16, "nchw", 16),
        (torch.float16, "nhwc", 16),
    ],
)
def test_auto_leaves_convolutions_of_many_channels_to_pytorch(dtype, layout, most):
    for channels, backend in ((most, "cpu"), (most + 1, "reference")):
        args = make_args(Case(2, channels, 5, 5, 8, kernel_size=3, dtype=dtype, layout=layout))
        assert backends.choose(args) == backend
        assert backends.cpu.may_try(args) == (backend == "cpu")
        CPU.check(args)
    assert f"of {most + 1} channels in {dtype}" in backends.declines("cpu", args)
