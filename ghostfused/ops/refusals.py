"""What the ops refuse before a kernel sees it: tensors that have no strides to read, and derivatives of the ops themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

OTHER_KEYS = (
    *(f"{kind}{device}" for kind in ("Sparse", "SparseCsr") for device in ("CPU", "CUDA", "Meta")),
    *("QuantizedCPU", "QuantizedCUDA", "MkldnnCPU"),
)
"""Dispatch keys of tensors that have no strides, or no numbers, to read."""


def _tensors(op: Any, args: Sequence) -> Iterator[tuple[str, Tensor]]:
    """The tensors among ``args``, each with its argument's name."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        for t in value if isinstance(value, list | tuple) else [value]:
            if isinstance(t, Tensor):
                yield argument.name, t


def layouts(op: Any) -> Callable:
    """The kernel of ``op`` for ``OTHER_KEYS``."""

    def refuse(*args):
        for name, t in _tensors(op, args):
            if t.layout != torch.strided or t.is_quantized:
                raise RuntimeError(f"{name}: expected a dense tensor, got layout {t.layout}, {t.dtype}")
        raise RuntimeError(f"{op.name()}: expected dense tensors")

    return refuse


class _NoDerivative(torch.autograd.function._SingleLevelFunction):
    """What an op has made of tensors that require gradients."""

    @staticmethod
    def forward(ctx, op: Any, run: Callable, *tensors: Tensor):
        ctx.op = op
        return run()

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            f"{ctx.op.name()}: the op has no derivative; the functions and modules of ghostfused have"
        )


def derivatives(op: Any) -> Callable:
    """The kernel of ``op`` for autograd: PyTorch's own would drop a tangent without a word, and warn of a gradient.

    It is Python, and costs a call some microseconds. None are spent in inference mode, where PyTorch leaves autograd out, and in
    our own calls, which are ``below_autograd``.
    """

    def autograd(keyset, *args):
        def run():
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

        level = forward_ad._current_level
        if level < 0 and not torch.is_grad_enabled():
            return run()
        tensors = list(_tensors(op, args))
        for name, t in tensors if level >= 0 else ():
            if torch._VF._unpack_dual(t, level=level).tangent is not None:  # type: ignore[attr-defined]
                raise NotImplementedError(
                    f"{name}: expected no tangent: {op.name()} has no forward-mode derivative; the functions and modules "
                    "of ghostfused have"
                )
        if torch.is_grad_enabled() and any(t.requires_grad for _, t in tensors):
            with enable_single_level_autograd_function():
                return _NoDerivative.apply(op, run, *(t for _, t in tensors))
        return run()

    return autograd


def below_autograd(op: Callable, *args: Any) -> Any:
    """``op(*args)`` for a caller that has seen to derivatives."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
