"""Registers the kernels that are Python functions, Triton's and the reference's; the extensions register theirs themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import BACKENDS, training_step
from ..spec import OPS, TENSORS, GhostArgs
from ..spec.checks import validate, validate_backward, validate_training
from .schemas import STATISTICS, gradients, library, train_args


def _refuse(op: str, reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(f"{op}: expected what its kernels take, got {reason}")


def _implement(op: str, name: str, backend: Any, dispatch_key: str) -> None:
    """Registers the forward of ``backend`` as ``ghostfused::<op>_<name>``, which takes no call that it can't run."""
    kind = OPS[op]

    def run(*args) -> Tensor:
        checked = kind(*args)
        validate(checked)
        _refuse(f"{op}_{name}", backend.supports(checked))
        return backend.forward(checked)

    library.impl(f"{op}_{name}", run, dispatch_key)


def _implement_training(backend: str, kernels: training_step.TrainingKernels, dispatch_key: str) -> None:
    """Registers both training ops of ``backend``."""

    def run_forward(*args) -> tuple[Tensor, ...]:
        fields = train_args(args[:-1])
        validate_training(fields)
        _refuse(f"train_forward_{backend}", kernels.supports(training_step.with_norms_in_one_dtype(fields)))
        return training_step.train_forward(kernels, fields, args[-1])

    def run_backward(grad_output: Tensor, *args) -> list[Tensor]:
        fields = GhostArgs(*args[:-3])
        validate_backward(fields, grad_output, args[-1])
        _refuse(f"backward_{backend}", kernels.supports(training_step.with_norms_in_one_dtype(fields)))
        batch_statistics, group_name, needs = args[-3:]
        stored = any(need and name in STATISTICS for name, need in zip(TENSORS, needs, strict=True))
        if backend == "reference" and not batch_statistics and not stored:
            return gradients(fields, grad_output, needs)  # faster, but PyTorch has no gradients of stored statistics
        return training_step.backward(kernels, grad_output, fields, batch_statistics, group_name, needs)

    library.impl(f"train_forward_{backend}", run_forward, dispatch_key)
    library.impl(f"backward_{backend}", run_backward, dispatch_key)


for _name, _backend in BACKENDS.items():
    for _device in _backend.DEVICES or ("cpu", "cuda"):
        if not hasattr(_backend, "extension"):
            for _op in OPS:
                _implement(_op, _name, _backend, _device.upper())
        if _name in training_step.KERNELS:
            _implement_training(_name, training_step.KERNELS[_name], _device.upper())
