"""What Triton's compiler makes of the kernels between Ghost modules, with no GPU; and their PTX run on the CPU."""

from __future__ import annotations

import re

import pytest
import torch
from strategies import LAYOUTS
from triton_compiler import compiled_on_cpu, launch_on_cpu, spilled  # noqa: F401 (a fixture)

from ghostfused.backends.triton import bottleneck as triton_bottleneck
from ghostfused.backends.triton.bottleneck_kernels import depthwise_kernel, excite_kernel, squeeze_kernel
from ghostfused.backends.triton.compile import compile_launch
from ghostfused.spec import Args, DepthwiseArgs
from ghostfused.testing import DepthwiseCase, SqueezeExciteCase, judge, make

TARGETS = ["sm_80", "sm_90", "sm_100"]
KNOWN = {("sm_80", torch.float16, "nhwc", 7): 8}
"""Bytes that spill all the same, with 32 registers in use: no block size that was tried changes it."""


def launches(args: Args, out: torch.Tensor) -> list[tuple]:
    """(kernel, its arguments, programs), as the backend would launch them."""
    made: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_bottleneck,
            "launch_kernel",
            lambda kernel, programs, kwargs, _: made.append((kernel, kwargs, programs)),
        )
        patch.setattr(type(args), "new_output", lambda _: out)
        if isinstance(args, DepthwiseArgs):
            triton_bottleneck.depthwise(args)
        else:
            triton_bottleneck.squeeze_excite(args)
    return made


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_spills_nothing(dtype, layout, target, tmp_path):
    for case in (
        DepthwiseCase(1, 72, 56, 56, (3, 3), dtype=dtype, layout=layout),
        DepthwiseCase(1, 60, 28, 28, (5, 5), dtype=dtype, layout=layout),
        DepthwiseCase(1, 112, 14, 14, (7, 7), dtype=dtype, layout=layout),
        SqueezeExciteCase(1, 960, 240, 7, 7, dtype=dtype, layout=layout),
        SqueezeExciteCase(64, 480, 120, 4, 4, dtype=dtype, layout=layout),  # several images to a program
    ):
        args = make(case)
        for kernel, kwargs, _ in launches(args, args.new_output()):
            compiled = compile_launch(kwargs, target, kernel)
            allowed = KNOWN.get((target, dtype, layout, kwargs.get("KH")), 0)
            assert spilled(compiled.asm["cubin"], tmp_path) <= allowed, f"{kernel.__name__} for {case}"


def test_channels_last_accesses_are_wide():
    for case in (
        DepthwiseCase(1, 72, 56, 56, dtype=torch.float16, layout="nhwc"),
        SqueezeExciteCase(1, 72, 16, 56, 56, dtype=torch.float16, layout="nhwc"),
    ):
        args = make(case)
        kernel, kwargs, _ = launches(args, args.new_output())[0]
        assert "ld.global.v4.b32" in compile_launch(kwargs, "sm_80", kernel).asm["ptx"]
        assert not re.search(r"st\.global\.b16", compile_launch(kwargs, "sm_80", kernel).asm["ptx"])


@pytest.mark.parametrize(
    "case",
    [
        DepthwiseCase(2, 40, 9, 11, (5, 5), dtype=torch.float16, layout="nhwc", act="prelu", per_channel_slope=True),
        DepthwiseCase(1, 6, 13, 17, (3, 3), 1, dtype=torch.bfloat16, norm_dtype=torch.float32, sliced=True),
        SqueezeExciteCase(2, 70, 20, 20, 20, dtype=torch.float16, layout="nhwc"),
        SqueezeExciteCase(5, 24, 33, 7, 9, sliced=True),
    ],
    ids=str,
)
def test_compiled_ptx(case, compiled_on_cpu):  # noqa: F811
    args = make(case)
    out = args.new_output().fill_(float("nan"))
    for kernel, kwargs, programs in launches(args, out):
        launch_on_cpu(compiled_on_cpu, kernel, programs, kwargs)
    verdict = judge(out, args)
    assert verdict.ok, verdict


def test_one_kernel_and_two():
    for case, expected in (
        (DepthwiseCase(), [depthwise_kernel]),
        (SqueezeExciteCase(), [squeeze_kernel, excite_kernel]),
    ):
        args = make(case)
        assert [kernel for kernel, *_ in launches(args, args.new_output())] == expected
