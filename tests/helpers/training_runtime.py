"""What the tests of training kernels share: the backends that can run here, and how one case is run and judged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_runtime
from cuda_runtime import ON_CPU, planned_for
from torch import Tensor

from ghostfused.backends import cuda, training, triton
from ghostfused.backends.triton import training as triton_training
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, make_args, to_device
from ghostfused.testing.training import by_kernels, by_op, judge_training

NORMS = ["bn", "bn+bias", "bn_no_affine"]
ALL_INPUTS = {"input_gate": True, "residual": True, "output_gate": True}

BACKENDS = [
    *(["triton"] if triton_runtime.unavailable is None else []),
    *(["cuda"] if cuda.unavailable() is None else []),
]
NEEDS = (
    f"Triton: {triton_runtime.unavailable}; or the compiled kernels under $PTX_ON_CPU/run-extension ghostfused/_C*.so"
)


def device(backend: str) -> str:
    return "cpu" if backend == "triton" and triton.INTERPRETED else "cuda"


def kernels(backend: str) -> training.Kernels:
    """``backend``'s kernels for CPU tensors."""
    own = training.KERNELS[backend]
    return training.Kernels(*(_from_cpu(f, device(backend)) for f in own))


def _from_cpu(kernel: Callable, device: str) -> Callable:
    def call(a: GhostArgs, *arguments: Any) -> Any:
        there = [to(t, device) if isinstance(t, Tensor) else t for t in arguments]
        results = kernel(to_device(a, device), *there)
        for own, moved in zip(arguments, there, strict=True):  # what is written in place
            if isinstance(own, Tensor):
                own.copy_(moved.cpu())
        return (
            tuple(r.cpu() if isinstance(r, Tensor) else r for r in results) if isinstance(results, tuple) else results
        )

    return call


def to(t: Tensor, device: str) -> Tensor:
    """``t`` on ``device`` with the same strides and offset."""
    buffer = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return buffer.to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def run(backend: str, a: GhostArgs, grad: Tensor, batch_statistics: bool) -> dict[str, Tensor]:
    """One training step: by the op, or where Torch itself has no CUDA, by the kernels alone."""
    if backend == "cuda" and ON_CPU:
        return by_kernels(kernels(backend), a, grad, batch_statistics)
    there = device(backend)
    return {name: t.cpu() for name, t in by_op(backend, to_device(a, there), grad.to(there), batch_statistics).items()}


def make(case: Case) -> tuple[GhostArgs, Tensor]:
    a = make_args(case)
    return a, torch.randn(a.output_shape(), generator=torch.Generator().manual_seed(case.seed)).to(a.x.dtype)


def check(backend: str, case: Case, batch_statistics: bool = True) -> None:
    a, grad = make(case)
    assert training.KERNELS[backend].supports(to_device(a, device(backend))) is None
    check_args(backend, a, grad, batch_statistics, str(case))


def check_args(backend: str, a: GhostArgs, grad: Tensor, batch_statistics: bool = True, name: str = "") -> None:
    verdicts = judge_training(run(backend, a, grad, batch_statistics), a, grad, batch_statistics)
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
    assert not wrong, f"{name}: {wrong}"


@contextlib.contextmanager
def rows(backend: str, count: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """About so many rows of partial results, or blocks."""
    if backend == "cuda":
        with planned_for(count):
            yield
    else:
        with monkeypatch.context() as patch:
            patch.setattr(triton_training, "PROGRAMS", count)
            yield
