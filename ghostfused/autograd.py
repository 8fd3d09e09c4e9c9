"""The one autograd.Function, over any backend's forward op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ops import forward_op
from .spec import TENSORS, GhostArgs


class GhostFunction(torch.autograd.Function):
    """Runs one Ghost module; saves its inputs and recomputes in backward. Not twice differentiable."""

    @staticmethod
    def forward(ctx, backend: str, *args) -> Tensor:
        ctx.save_for_backward(*args[: len(TENSORS)])
        ctx.settings = args[len(TENSORS) :]
        return forward_op(backend)(*args)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        needs_grad = list(ctx.needs_input_grad[1 : 1 + len(TENSORS)])
        grads = iter(torch.ops.ghostfused.backward(grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad))
        return None, *(next(grads) if need else None for need in needs_grad), *(None for _ in ctx.settings)


def call(backend: str, args: GhostArgs) -> Tensor:
    """Runs ``args`` on ``backend``, by way of the Function only if a gradient will be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args.tensors):
        return GhostFunction.apply(backend, *args)
    return forward_op(backend)(*args)
