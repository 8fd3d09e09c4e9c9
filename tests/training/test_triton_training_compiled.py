"""What Triton's compiler makes of the training kernels, with no GPU: resources, and the compiled PTX run on the CPU by
ptx-on-cpu (set PTX_ON_CPU to its folder)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton_compiler import SHARED_LIMIT, compiled_on_cpu, launch_on_cpu, spilled  # noqa: F401 (a fixture)

from ghostfused.backends import training_step
from ghostfused.backends.triton import training as triton_training
from ghostfused.backends.triton.compile import compile_launch
from ghostfused.testing import Case, make_args
from ghostfused.testing.judge_training import by_kernels, judge_training

ALL_KERNELS = [
    "primary_statistics_kernel", "cheap_statistics_kernel", "normalize_kernel",
    "cheap_backward_kernel", "primary_backward_kernel", "normalize_backward_kernel",
]  # fmt: skip
ALL_INPUTS = {
    "input_gate": True, "residual": True, "output_gate": True, "per_channel_slope": True, "primary_norm": "bn+bias",
    "act_primary": "prelu", "act_cheap": "silu",
}  # fmt: skip


def step(case: Case, batch_statistics: bool, launch: Callable[[Any, int, dict[str, Any]], None]) -> tuple:
    """(results, args, grad_output) of a training step whose kernels are handed to ``launch``; fresh memory is NaN."""
    a = make_args(case)
    grad = torch.randn(a.output_shape(), generator=torch.Generator().manual_seed(case.seed)).to(a.x.dtype)
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_training._Launch,
            "__call__",
            lambda self, kernel, **arguments: launch(kernel, *self.grid, self.shared | arguments),
        )
        try:
            return by_kernels(training_step.KERNELS["triton"], a, grad, batch_statistics), a, grad
        finally:
            torch.use_deterministic_algorithms(False)


def launches(case: Case, batch_statistics: bool) -> list[tuple]:
    """(kernel, programs, arguments) of each launch."""
    made: list[tuple] = []
    step(case, batch_statistics, lambda *launch: made.append(launch))
    return made


SHAPES = {
    "wide": Case(1, 16, 112, 112, 16),
    "deep": Case(1, 320, 7, 7, 960),  # and sums by blocks of channels
    "wide, all inputs": Case(1, 16, 112, 112, 16, **ALL_INPUTS),
    "deep, all inputs": Case(1, 160, 7, 7, 960, ratio=3, **ALL_INPUTS),
    "dw 5, all inputs": Case(1, 61, 28, 28, 59, dw_size=5, **ALL_INPUTS),
}


BUILDS = [("sm_80", torch.float32), ("sm_90", torch.float16)]


@pytest.mark.parametrize(
    ("name", "layout", "target", "dtype"),
    [
        *(
            (name, layout, *build)
            for name in SHAPES
            for layout in ("nchw", "nhwc")
            for build in BUILDS
            if "dw" not in name
        ),
        *(("dw 5, all inputs", layout, *build) for layout, build in zip(("nhwc", "nchw"), BUILDS, strict=True)),  # slow
    ],
    ids=str,
)
def test_spills_nothing(name, layout, target, dtype, tmp_path):
    case = dataclasses.replace(SHAPES[name], layout=layout, dtype=dtype)
    made = launches(case, True)
    assert [kernel.__name__ for kernel, *_ in made] == ALL_KERNELS
    for kernel, _, arguments in made:
        compiled = compile_launch(arguments, target, kernel)
        assert compiled.metadata.shared <= SHARED_LIMIT
        assert spilled(compiled.asm["cubin"], tmp_path) == 0, kernel.__name__


SMALL = {"batch": 2, "in_channels": 9, "height": 6, "width": 9, "out_channels": 11}
PTX_CASES = {
    "fp32 nchw": (Case(**SMALL, dw_size=5), True),
    "fp32 nhwc, all inputs": (Case(**SMALL, **ALL_INPUTS, layout="nhwc", ratio=3), False),
    "bf16 nchw": (Case(**SMALL, dtype=torch.bfloat16, act_primary="silu", act_cheap="none", sliced=True), False),
    "fp16 nchw, all inputs": (Case(**SMALL, **ALL_INPUTS, dtype=torch.float16), True),
    "fp16 nhwc": (Case(**SMALL, dtype=torch.float16, layout="nhwc", act_primary="silu", act_cheap="silu"), True),
    "bf16 nhwc, all inputs": (Case(**SMALL, **ALL_INPUTS, dtype=torch.bfloat16, layout="nhwc", dw_size=5), True),
}


@pytest.mark.parametrize("name", PTX_CASES)
def test_compiled_ptx(name, compiled_on_cpu, monkeypatch):  # noqa: F811
    monkeypatch.setattr(triton_training, "PROGRAMS", 4)  # rows of several tiles, and several rows
    case, batch_statistics = PTX_CASES[name]
    results, a, grad = step(case, batch_statistics, functools.partial(launch_on_cpu, compiled_on_cpu))
    verdicts = judge_training(results, a, grad, batch_statistics)
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
    assert not wrong, wrong
