"""The backends of which the tests of kernels ask the same: which run here, and how one call is run and judged.

``conftest.py`` makes a fixture of them. The marks ``cuda`` and ``triton`` select those that need an environment of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import TypeVar

import cuda_runtime
import pytest
import torch
import triton_runtime
from torch import Tensor

from ghostfused import functional
from ghostfused.backends import BACKENDS, triton
from ghostfused.backends.triton import bottleneck as triton_bottleneck
from ghostfused.backends.triton import training as triton_training
from ghostfused.numerics import rounded_anew
from ghostfused.ops import forward_op
from ghostfused.spec import Args, GhostArgs
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, Verdict, judge, make, to_device

T = TypeVar("T")
AnyCase = Case | DepthwiseCase | SqueezeExciteCase
needs_cpu = pytest.mark.skipif(
    BACKENDS["cpu"].unavailable() is not None, reason=f"no CPU kernel: {BACKENDS['cpu'].unavailable()}"
)
NEEDS = {"cpu": [needs_cpu], "cuda": [pytest.mark.cuda, cuda_runtime.needs_cuda], "reference": []}
NEEDS["triton"] = NEEDS["triton_two_kernel"] = [pytest.mark.triton, triton_runtime.needs_triton]


def on(*names: str) -> pytest.MarkDecorator:
    """Marks a test that these backends run, rather than those of the fixture."""
    return pytest.mark.parametrize("backend", params(*names), indirect=True)


def params(*names: str) -> list:
    return [pytest.param(name, marks=NEEDS[name]) for name in names]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory, outputs and scratch buffers among it, is NaN: what a kernel forgets to write can't pass."""
    if cuda_runtime.ON_CPU:  # where it is so anyway
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _has_a_choice(a: GhostArgs) -> bool:
    """Whether CUDA's planner may choose another family of kernels than the general one, on any device."""
    path = "tf32" if a.allow_tf32 and a.x.dtype == torch.float32 else str(a.x.dtype).removeprefix("torch.")
    if a.kernel_size > 1 or a.stride > 1:  # one family alone has these
        return False
    batch, in_channels, height, width = a.x.shape
    shape = {
        "batch": batch, "in_channels": in_channels, "height": height, "width": width, "init_channels": a.init_channels,
        "out_channels": a.out_channels, "ratio": a.ratio, "dw_size": a.dw_size, "path": path, "input_gate": a.input_gate is not None,
    }  # fmt: skip
    strides = {"nchw": a.x.stride(3), "nhwc": a.x.stride(1)}  # of what lies side by side in the family's layout
    return any(
        cuda_runtime._C.plan(family=family, channels_last=family == "nhwc", full=full, **shape)
        for family, full in itertools.product(strides, (False, True))
        if strides[family] == 1
    )


@dataclasses.dataclass(frozen=True)
class Backend:
    """One of ``ghostfused.backends.BACKENDS``. Its methods take tensors on the CPU, and return such."""

    name: str

    @property
    def device(self) -> str:
        own_device = self.name == "cuda" or (self.name.startswith("triton") and not triton.INTERPRETED)
        return "cuda" if own_device else "cpu"

    @property
    def has_torch(self) -> bool:
        """Whether PyTorch's own operations run on the device; ptx-on-cpu has none."""
        return not (self.device == "cuda" and cuda_runtime.ON_CPU)

    def alternate(self, values: Sequence[T], number: int) -> Sequence[T]:
        """All of ``values``; where Triton interprets, every second of them: others at the next number and in its other backend."""
        if not (self.name.startswith("triton") and triton.INTERPRETED):
            return values
        return values[(number + (self.name == "triton")) % 2 :: 2]

    def there(self, args: Args) -> Args:
        return to_device(args, self.device)

    def call(self, args: Args) -> Tensor:
        """The op with its own checks, or where these are in the function before it, the function."""
        if self.name in ("cpu", "cuda"):
            return forward_op(self.name, args.op)(*args)
        return functional.run(args, self.name)

    def run(self, args: Args) -> Tensor:
        on_device = self.there(args)
        torch.full(
            args.output_shape(), float("nan"), dtype=args.x.dtype, device=self.device if self.has_torch else "cpu"
        )
        with poisoned():
            out = forward_op(self.name, args.op)(*on_device)
        expected = args.new_output()
        assert (out.shape, out.stride(), out.dtype) == (expected.shape, expected.stride(), expected.dtype)
        return out.cpu()

    def check(self, *several: AnyCase | Args, name: object = "", general_too: bool = True) -> None:
        """Judges each; CUDA's Ghost modules by the kernel that the planner chooses, and if there is a choice by the general one.

        What misses its limit in one run by less than twice is judged by the medians of five, on inputs that differ by less
        than rounding: PyTorch's error may be small by luck, and ours large.
        """
        for case in several:
            args = make(case) if isinstance(case, AnyCase) else case
            both = general_too and self.name == "cuda" and isinstance(args, GhostArgs) and _has_a_choice(args)
            for general in (False, True) if both else (False,):
                with cuda_runtime.general_only() if general else contextlib.nullcontext():
                    verdict = judge(self.run(args), args)
                    if verdict.limit < verdict.error < 2 * verdict.limit:
                        near = (args._replace(x=x) for x in rounded_anew(args.x, 4))
                        runs = [verdict, *(judge(self.run(each), each) for each in near)]
                        if all(each.error < 2 * each.limit for each in runs):
                            verdict = Verdict(*map(statistics.median, zip(*runs, strict=True)))
                assert verdict.ok, f"{case if isinstance(case, AnyCase) else name}, general {general}: {verdict}"

    @contextlib.contextmanager
    def planned_for(self, multiprocessors: int) -> Iterator[None]:
        """Launches as for a device of so many: few mean large tiles, many mean many small blocks. A CPU has one way."""
        if self.name == "cuda":
            with cuda_runtime.planned_for(multiprocessors):
                yield
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_bottleneck, "PROGRAMS", 4 * multiprocessors)
            patch.setattr(triton_training, "PROGRAMS", multiprocessors)
            yield
