"""Op schemas and fakes.

Per op and kernel backend one forward, ``ghostfused::<op>_<backend>``; the schema is that of the op's tuple of
arguments. Those of "cuda" and "cpu" are registered by the extensions when they load. One backward per op serves
all backends; but for Ghost modules each backend that can train has its own, ``backward_<backend>``, and
``train_forward_<backend>``, with BatchNorm by the batch's statistics. ``programs.py`` has the ops that run several forwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..spec import OPS, Args, GhostArgs, Step, tensor_names
from ..spec.checks import ArgumentError, dimensions, validate, validate_backward, validate_training
from . import refusals

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}

BACKENDS = ("cuda", "cpu", "triton", "triton_two_kernel", "reference")

library = torch.library.Library("ghostfused", "DEF")


def schema(args: type[Args]) -> str:
    """``Tensor x, Tensor primary_weight, Tensor? primary_bias, …``."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in args.__annotations__.items())


def fake_output(args: Step) -> Tensor:
    """The output of a step that isn't run. One tensor on the meta device is enough to get here."""
    check_fake(args, validate)
    return args.new_output()


def check_fake(args: Step, check: Callable[[Any], None]) -> None:
    """``check`` where all sizes are numbers. Of symbols each comparison costs as much as a kernel's trace: then only what a
    fake needs is looked at, and the op checks the rest as it runs."""
    dimensions(args)
    if all(type(size) is int for size in args.x.shape):
        return check(args)
    for name, t in zip(tensor_names(type(args)), args.tensors, strict=True):
        if t is not None and t.device != args.x.device:
            raise ArgumentError(f"{name}: expected x's device {args.x.device}, got {t.device}")
    return None


def define_op(name: str, signature: str, fake: Callable | None, **options: Any) -> None:
    """Defines ``ghostfused::<name>``; what it can't take is refused by name."""
    library.define(f"{name}{signature}", **options)
    if fake is not None:
        torch.library.register_fake(f"ghostfused::{name}", fake, lib=library)

    op = getattr(torch.ops.ghostfused, name).default
    library.impl(name, refusals.derivatives(op), "Autograd", with_keyset=True)
    for key in refusals.OTHER_KEYS:
        library.impl(name, refusals.layouts(op), key)


def forward_op(backend: str, op: str = "forward") -> Callable[..., Tensor]:
    """The op ``ghostfused::<op>_<backend>``; call it with ``*args``."""
    return getattr(torch.ops.ghostfused, f"{op}_{backend}").default


def backward_op(op: str) -> Callable[..., list[Tensor]]:
    """The op that gives the gradients of ``op``'s tensors; call it with the output's gradient, ``*args``, needs_grad."""
    return getattr(torch.ops.ghostfused, f"{op}_backward").default


def _backward(kind: type[Args], grad_output: Tensor, *args) -> list[Tensor]:
    """Gradients of the tensor arguments for which ``needs_grad`` holds, by recomputing through the reference."""
    *fields, needs_grad = args
    validate_backward(kind(*fields), grad_output, needs_grad)
    for name, need in zip(tensor_names(kind), needs_grad, strict=True):
        if need and name in ("mean", "var"):
            raise ArgumentError(f"needs_grad: expected no gradient of {name}, for which PyTorch's batch_norm has none")
    return gradients(kind(*fields), grad_output, needs_grad)


def gradients(args: Args, grad_output: Tensor, needs_grad: list[bool]) -> list[Tensor]:
    """Those of the tensors of ``args`` for which ``needs_grad`` holds: by autograd, after another forward of the reference."""
    if not any(needs_grad):
        return []
    with reference.differentiable(), torch.autocast(grad_output.device.type, enabled=False):
        tensors = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(args.tensors, needs_grad, strict=True)
        ]
        out = reference.run(type(args)(*tensors, *args[len(tensors) :]))  # type: ignore[arg-type]
        wanted = [t for t, need in zip(tensors, needs_grad, strict=True) if need and t is not None]
        grads = torch.autograd.grad(out, wanted, grad_output, allow_unused=True, materialize_grads=True)
    return [_owned(grad, like, grad_output) for grad, like in zip(grads, wanted, strict=True)]


def _owned(grad: Tensor, like: Tensor, grad_output: Tensor) -> Tensor:
    """``grad`` with the strides that the fake promises, and no alias of ``grad_output`` (the residual's is itself)."""
    promised = torch.empty_like(like)
    if grad.stride() == promised.stride() and grad.data_ptr() != grad_output.data_ptr():
        return grad
    return promised.copy_(grad)


def _fake_backward(kind: type[Args], grad_output: Tensor, *args) -> list[Tensor]:
    """Of ``args`` the first are ``kind``'s and the last is ``needs_grad``. As for a forward, one tensor on the meta device is
    enough to get here, and memory that nobody has filled must not be returned for the others."""
    fields, needs_grad = kind(*args[: len(kind.__annotations__)]), args[-1]
    check_fake(fields, lambda fields: validate_backward(fields, grad_output, needs_grad))
    return [torch.empty_like(t) for t, need in zip(fields.tensors, needs_grad, strict=True) if need and t is not None]


def _define(op: str, kind: type[Args]) -> None:
    for backend in BACKENDS:
        fake = lambda *args: fake_output(kind(*args))  # noqa: E731
        define_op(f"{op}_{backend}", f"({schema(kind)}) -> Tensor", fake, tags=torch.Tag.pt2_compliant_tag)

    if op == "forward":  # has backwards of its own, below
        return
    name = f"{op}_backward"
    signature = f"(Tensor grad_output, {schema(kind)}, bool[] needs_grad) -> Tensor[]"
    define_op(name, signature, functools.partial(_fake_backward, kind), tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        library.impl(name, lambda *args: _backward(kind, *args), key)


for _op, _kind in OPS.items():
    _define(_op, _kind)


STATISTICS = ("primary_mean", "primary_var", "cheap_mean", "cheap_var")
TRAIN_FIELDS = [name for name in GhostArgs.__annotations__ if name not in STATISTICS]
"""GhostArgs' fields but for the statistics, which the training forward computes."""
TRAINING_OPS = ("cuda", "triton", "reference")
"""The backends with training kernels: ``train_forward_<backend>`` and ``backward_<backend>``."""

_TRAIN_SCHEMA = ", ".join(f"{_TYPES[GhostArgs.__annotations__[name]]} {name}" for name in TRAIN_FIELDS)


def _fake_train_forward(*args) -> tuple[Tensor, ...]:
    *fields, group_name = args
    a = train_args(fields)
    check_fake(a, validate_training)
    dtype = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    sizes = [a.init_channels] * 2 + [a.cheap_weight.shape[0]] * 2 + [1 if group_name else 0]
    return a.new_output(), *(torch.empty(size, dtype=dtype, device=a.x.device) for size in sizes)


for _backend in TRAINING_OPS:
    define_op(
        f"train_forward_{_backend}",
        f"({_TRAIN_SCHEMA}, str group_name) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_train_forward,
        tags=torch.Tag.pt2_compliant_tag,
    )
    define_op(
        f"backward_{_backend}",
        f"(Tensor grad_output, {schema(GhostArgs)}, bool batch_statistics, str group_name, bool[] needs_grad) -> Tensor[]",
        functools.partial(_fake_backward, GhostArgs),
        tags=torch.Tag.pt2_compliant_tag,
    )


TRAINING_KERNELS = {
    "primary_statistics": "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var",
    "cheap_statistics": "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var",
    "normalize": "Tensor(a!) out",
    "cheap_backward": "Tensor grad, Tensor y1, Tensor(a!) dz2, Tensor(b!)? y2, Tensor(c!)? product, Tensor(d!)? sums",
    "primary_backward": "Tensor grad, Tensor y1, Tensor? dz2, Tensor? y2, Tensor? means2, bool batch_statistics, "
    "Tensor(a!)? dz1, Tensor(b!)? sums, Tensor(c!)? weight",
    "normalize_backward": "Tensor(a!) dz1, Tensor y1, Tensor means1",
}
"""The single kernels of ``backends.training_step.TrainingKernels`` that an extension registers as ``<kernel>_cuda``, and what each takes
after GhostArgs: memory to read and to fill. Only the two training ops call them, so they need no fakes."""

for _kernel, _memory in TRAINING_KERNELS.items():
    define_op(f"{_kernel}_cuda", f"({schema(GhostArgs)}, {_memory}) -> ()", None)

define_op("change_layout_cuda", "(Tensor x, Tensor(a!) out) -> ()", None)


def train_args(fields: Iterable) -> GhostArgs:
    """The GhostArgs of a training forward's arguments (``TRAIN_FIELDS``), with no statistics."""
    values: dict[str, Any] = dict(zip(TRAIN_FIELDS, fields, strict=True))
    return GhostArgs(**values, **dict.fromkeys(STATISTICS))  # type: ignore[arg-type]


def training_op(kind: str, backend: str) -> Callable[..., Any]:
    """The op ``ghostfused::<kind>_<backend>``, ``kind`` being "train_forward" or "backward"."""
    return getattr(torch.ops.ghostfused, f"{kind}_{backend}").default
