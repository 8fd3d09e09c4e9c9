"""The one autograd.Function, over any op and backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import OPS, backward_op, forward_op
from .spec import Args, tensor_names

_COUNTS = {op: len(tensor_names(args)) for op, args in OPS.items()}
"""How many tensors each op's arguments begin with."""


class FusedFunction(torch.autograd.Function):
    """Runs one op; saves its inputs and recomputes in backward. Not twice differentiable."""

    @staticmethod
    def forward(ctx, op: str, backend: str, *args) -> Tensor:
        count = _COUNTS[op]
        ctx.save_for_backward(*args[:count])
        ctx.op, ctx.settings = op, args[count:]
        return forward_op(backend, op)(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        needs_grad = list(ctx.needs_input_grad[2 : 2 + _COUNTS[ctx.op]])
        grads = iter(backward_op(ctx.op)(grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad))
        return None, None, *(next(grads) if need else None for need in needs_grad), *(None for _ in ctx.settings)


def call(backend: str, args: Args) -> Tensor:
    """Runs ``args`` on ``backend``, by way of the Function only if a gradient will be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args.tensors):
        return FusedFunction.apply(args.op, backend, *args)
    return forward_op(backend, args.op)(*args)
