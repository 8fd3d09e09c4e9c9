"""Op schemas and fakes: the only file that talks to torch.library.

One forward op per kernel backend, ``ghostfused::forward_<backend>``, all of one schema; the CUDA one's kernel is
registered by ``csrc/binding.cpp`` when the extension loads. One backward op serves them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .spec import TENSORS, GhostArgs

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}

SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in GhostArgs.__annotations__.items())
"""The schema of GhostArgs: ``Tensor x, Tensor primary_weight, Tensor? primary_bias, …``."""

FORWARD_OPS = ("cuda", "cpu", "triton", "triton_two_kernel", "reference")

_library = torch.library.Library("ghostfused", "DEF")


def _fake_forward(*args) -> Tensor:
    return GhostArgs(*args).new_output()


for _backend in FORWARD_OPS:
    _library.define(f"forward_{_backend}({SCHEMA}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"ghostfused::forward_{_backend}", _fake_forward, lib=_library)


def implement(backend: str, kernel: Callable[[GhostArgs], Tensor], *dispatch_keys: str) -> None:
    """Registers ``kernel`` as ``ghostfused::forward_<backend>`` under each of ``dispatch_keys``."""
    for key in dispatch_keys:
        _library.impl(f"forward_{backend}", lambda *args: kernel(GhostArgs(*args)), key)


def forward_op(backend: str) -> Callable[..., Tensor]:
    """The op ``ghostfused::forward_<backend>``; call it with ``*GhostArgs``."""
    return getattr(torch.ops.ghostfused, f"forward_{backend}").default


_library.define(
    f"backward(Tensor grad_output, {SCHEMA}, bool[] needs_grad) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag
)


def _backward(grad_output: Tensor, *args) -> list[Tensor]:
    """Gradients of the tensor arguments for which ``needs_grad`` holds, by recomputing through the reference."""
    *fields, needs_grad = args
    # under a TorchDispatchMode an op's kernel runs with autograd keys excluded: take them back in
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        tensors = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(fields[: len(TENSORS)], needs_grad, strict=True)
        ]
        out = reference.ghost_module(GhostArgs(*tensors, *fields[len(TENSORS) :]))  # type: ignore[arg-type]
        wanted = [t for t, need in zip(tensors, needs_grad, strict=True) if need and t is not None]
        grads = torch.autograd.grad(out, wanted, grad_output, allow_unused=True, materialize_grads=True)
    return [_owned(grad, like, grad_output) for grad, like in zip(grads, wanted, strict=True)]


def _owned(grad: Tensor, like: Tensor, grad_output: Tensor) -> Tensor:
    """``grad`` with the strides that the fake promises, and no alias of ``grad_output`` (the residual's is itself)."""
    promised = torch.empty_like(like)
    if grad.stride() == promised.stride() and grad.data_ptr() != grad_output.data_ptr():
        return grad
    return promised.copy_(grad)


def _fake_backward(grad_output: Tensor, *args) -> list[Tensor]:
    *fields, needs_grad = args
    return [torch.empty_like(t) for t, need in zip(fields[: len(TENSORS)], needs_grad, strict=True) if need]


for _key in ("CPU", "CUDA"):
    _library.impl("backward", _backward, _key)
torch.library.register_fake("ghostfused::backward", _fake_backward, lib=_library)
implement("reference", reference.ghost_module, "CPU", "CUDA")
