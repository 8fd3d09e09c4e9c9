"""What only the C++ SIMD kernels are asked: each width of a vector, pairs of channels, any primary conv, instruction sets,
threads. What they compute is in test_ghost.py, test_depthwise.py, test_squeeze_excite.py and test_every_op.py."""

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
from kernel_backends import Backend, needs_cpu
from strides import shifted

from ghostfused import functional
from ghostfused.backends import cpu, reference
from ghostfused.cli.verify import read_cases
from ghostfused.spec.kernels import TAKES
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
        if case.kernel_size == 1 or case.in_channels <= TAKES["cpu"].patch_channels:
            CPU.check(case)


@given(
    case=st.one_of(
        draws.ghost_modules(
            in_channels=st.integers(1, 70), height=st.integers(1, 30), width=st.integers(1, 40),
            out_channels=st.integers(12, 90), seed=st.integers(0, 999),
        ),
        draws.depthwise(channels=st.integers(2, 70), height=st.integers(1, 30), width=st.integers(1, 70)),
        draws.squeeze_excite(channels=st.integers(2, 200)),
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


def test_patches_have_few_channels():
    args = make_args(Case(2, 17, 5, 5, 8, kernel_size=3))
    with pytest.raises(RuntimeError, match="up to 16 input channels, got 17"):
        CPU.call(args)
