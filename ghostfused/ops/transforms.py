"""When PyTorch's own operations run in place of ours: wherever somebody looks at or changes each operation that runs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..spec.subclasses import OWN_KINDS, takes_operations
from ..spec.takes import constant_to_dynamo

# looked up once: they are on every call's way
_interpreter = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
_has_function_mode = torch._C._is_torch_function_mode_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack


def transformed() -> bool:
    """Whether forward-mode differentiation or a function transform (``torch.func``'s vmap, grad, jvp, …) is at work: our
    ops have no rule for either."""
    return forward_ad._current_level >= 0 or _has_interpreter()


@constant_to_dynamo  # which has the same transforms at work while it traces, and guards on them
def _has_interpreter() -> bool:
    return _interpreter() is not None


def batched_backward() -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)``, which has a vmap of its own, computes several gradients at once."""
    level = torch._C._vmapmode_increment_nesting()  # there is no way but this to ask for the level
    torch._C._vmapmode_decrement_nesting()
    return level > 1


def undisturbed() -> bool:
    """Whether nobody else takes an op's call, nor traces it: one program may stand for several."""
    modes = _dispatch_modes() > 0 or _has_user_function_mode()
    return not modes and _tracing_state() is None and not transformed()


def onlooker() -> str | None:
    """Names who takes an op's call or traces it, but for one who counts flops; None if nobody does."""
    if transformed():
        return "transform (torch.func) and no dual level"
    if _tracing_state() is not None:
        return "trace by torch.jit"
    modes = (
        [m for m in _get_current_function_mode_stack() if type(m) is not DeviceContext] if _has_function_mode() else []
    )
    if _dispatch_modes():
        modes += [m for m in _get_current_dispatch_mode_stack() if type(m).__module__ != "torch.utils.flop_counter"]
    return f"{type(modes[-1]).__name__} around it" if modes else None


def _has_user_function_mode() -> bool:
    """Whether there is one but ``torch.device``'s, which concerns nothing but where new tensors are."""
    return _has_function_mode() and any(type(m) is not DeviceContext for m in _get_current_function_mode_stack())


class _Export(threading.local):
    keeps_ops = False


_export = _Export()


@contextlib.contextmanager
def ops_in_exports() -> Iterator[None]:
    """Makes this thread's ``torch.export``, unless it is strict, see an op for each kernel also of ``backend="auto"``."""
    before, _export.keeps_ops = _export.keeps_ops, True
    try:
        yield
    finally:
        _export.keeps_ops = before


def _exports_plain(backend: str) -> bool:
    """Whether standard operations stand for a call in the program that ``torch.export`` makes. Converters know no others, nor
    does a process without ghostfused."""
    if backend != "auto":
        return torch.onnx.is_in_onnx_export()  # what reads such a file has none of the backends
    return torch.compiler.is_dynamo_compiling() or not _export.keeps_ops


def runs_plain(backend: str = "auto", *tensors: Any) -> bool:
    """Whether PyTorch's operations are to run and no op of ours: under ``transformed``, TorchScript's tracer, an exporter, or
    a user's mode, or if one of ``tensors`` takes operations. Those of PyTorch's compilers and their fake tensors take our
    ops.

    A ``backend`` that was asked for by name runs, or says why it can't.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting() and _exports_plain(backend):
            return True
        return backend == "auto" and transformed()
    if _tracing_state() is not None:
        return backend == "auto" or torch.onnx.is_in_onnx_export()
    if backend != "auto":
        return False
    return (
        transformed()
        or _has_user_function_mode()
        or (_dispatch_modes() > 0 and not all(m.is_infra_mode() for m in _get_current_dispatch_mode_stack()))
        or (not OWN_KINDS.issuperset(map(type, tensors)) and any(map(takes_operations, tensors)))
    )


def refuse_transforms(backend: str) -> None:
    """Raises RuntimeError where only PyTorch's operations give the right result, and ``backend`` was asked for by name."""
    if transformed():
        raise RuntimeError(
            f"backend={backend!r} can't run under torch.func's transforms or forward-mode differentiation (backend='auto' can)"
        )
