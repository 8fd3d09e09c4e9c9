"""What the tests of training kernels share: how one case is run on a backend, and judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_backends import Backend, poisoned
from torch import Tensor

from ghostfused.backends import training_step
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, make_args, to_device
from ghostfused.testing.judge_training import by_kernels, by_op, judge_training

NORMS = ["bn", "bn+bias", "bn_no_affine"]
ALL_INPUTS = {"input_gate": True, "residual": True, "output_gate": True}


def kernels(backend: Backend) -> training_step.TrainingKernels:
    """``backend``'s kernels for CPU tensors."""
    own = training_step.KERNELS[backend.name]
    moved = {name: _from_cpu(f, backend.device) for name, f in own._asdict().items() if name != "layout"}
    return own._replace(**moved)


def _from_cpu(kernel: Callable, device: str) -> Callable:
    def call(a: GhostArgs | Tensor, *arguments: Any) -> Any:
        there = [to(t, device) if isinstance(t, Tensor) else t for t in arguments]
        results = kernel(to(a, device) if isinstance(a, Tensor) else to_device(a, device), *there)
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


def run(backend: Backend, a: GhostArgs, grad: Tensor, batch_statistics: bool) -> dict[str, Tensor]:
    """One training step: by the op, or where Torch itself has no CUDA, by the kernels alone."""
    with poisoned():
        if not backend.has_torch:
            return by_kernels(kernels(backend), a, grad, batch_statistics)
        results = by_op(backend.name, backend.there(a), grad.to(backend.device), batch_statistics)
    return {name: t.cpu() for name, t in results.items()}


def make(case: Case) -> tuple[GhostArgs, Tensor]:
    a = make_args(case)
    return a, torch.randn(a.output_shape(), generator=torch.Generator().manual_seed(case.seed)).to(a.x.dtype)


def check(backend: Backend, case: Case, batch_statistics: bool = True) -> None:
    a, grad = make(case)
    assert training_step.KERNELS[backend.name].supports(backend.there(a)) is None
    check_args(backend, a, grad, batch_statistics, str(case))


def check_args(backend: Backend, a: GhostArgs, grad: Tensor, batch_statistics: bool = True, name: str = "") -> None:
    verdicts = judge_training(run(backend, a, grad, batch_statistics), a, grad, batch_statistics)
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
    assert not wrong, f"{name}: {wrong}"
