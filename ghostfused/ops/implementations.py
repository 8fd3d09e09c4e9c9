"""Registers the kernels that are Python functions, Triton's and the reference's; the extensions register theirs themselves."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..backends import BACKENDS, training
from ..spec import OPS, TENSORS, Args, GhostArgs, tensor_names
from ..spec.checks import check_memory
from .schemas import library, train_args


def _implement(op: str, backend: str, kernel: Callable[[Args], Tensor], dispatch_key: str) -> None:
    """Registers ``kernel`` as ``ghostfused::<op>_<backend>``."""
    kind = OPS[op]

    def run(*args) -> Tensor:
        checked = kind(*args)
        check_memory(tensor_names(kind), args)
        return kernel(checked)

    library.impl(f"{op}_{backend}", run, dispatch_key)


def _implement_training(backend: str, kernels: training.Kernels, dispatch_key: str) -> None:
    """Registers both training ops of ``backend``."""

    def run_forward(*args) -> tuple[Tensor, ...]:
        fields = train_args(args[:-1])
        check_memory(TENSORS, fields.tensors)
        return training.train_forward(kernels, fields, args[-1])

    def run_backward(grad_output: Tensor, *args) -> list[Tensor]:
        fields = GhostArgs(*args[:-3])
        check_memory(["grad_output", *TENSORS], [grad_output, *fields.tensors])
        return training.backward(kernels, grad_output, fields, *args[-3:])

    library.impl(f"train_forward_{backend}", run_forward, dispatch_key)
    library.impl(f"backward_{backend}", run_backward, dispatch_key)


for _name, _backend in BACKENDS.items():
    for _device in _backend.DEVICES or ("cpu", "cuda"):
        if not hasattr(_backend, "extension"):
            for _op in OPS:
                _implement(_op, _name, _backend.forward, _device.upper())
        if _name in training.KERNELS:
            _implement_training(_name, training.KERNELS[_name], _device.upper())
