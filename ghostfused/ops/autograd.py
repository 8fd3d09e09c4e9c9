"""The autograd.Functions, over any op and backend.

A gradient that is to be differentiated again (``create_graph=True``), or that a transform takes, comes from the reference,
of which PyTorch knows all derivatives; the kernels give the others. Those of a Ghost module save its inputs and one number per channel and statistic, so no map but x: docs/training.md says
why not the output.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..backends import reference, training_step
from ..spec import OPS, TENSORS, Args, GhostArgs, tensor_names
from .recording import note
from .refusals import below_autograd
from .schemas import STATISTICS, TRAIN_FIELDS, backward_op, forward_op, train_args, training_op
from .transforms import batched_backward, transformed

_COUNTS = {op: len(tensor_names(args)) for op, args in OPS.items()}
"""How many tensors each op's arguments begin with."""
_RESIDUAL = TENSORS.index("residual")


Then = Callable[[tuple[Tensor, ...]], None] | None
"""What is done with the results of a training forward."""


def _is_differentiated() -> bool:
    """Whether somebody differentiates or transforms the gradients that are being computed."""
    return not torch.compiler.is_compiling() and (torch.is_grad_enabled() or transformed() or batched_backward())


def _reference_gradients(
    function: Callable[..., Tensor], grad_output: Tensor, tensors: Sequence[Tensor | None], needs_grad: list[bool]
) -> list[Tensor | None]:
    """Gradients of ``tensors``, what ``function`` takes, by operations that can be differentiated and transformed in turn."""
    places = [i for i, (t, need) in enumerate(zip(tensors, needs_grad, strict=True)) if need and t is not None]

    def of_wanted(*wanted: Tensor) -> Tensor:
        given = list(tensors)
        for place, t in zip(places, wanted, strict=True):
            given[place] = t
        return function(*given)

    result: list[Tensor | None] = [None] * len(tensors)
    with torch.autocast(grad_output.device.type, enabled=False):
        _, gradients = torch.func.vjp(of_wanted, *(tensors[i] for i in places))  # type: ignore[misc]
        for place, grad in zip(places, gradients(grad_output), strict=True):
            result[place] = grad
    return result


class FusedFunction(torch.autograd.Function):
    """Runs one op; saves its inputs and recomputes in backward."""

    @staticmethod
    def forward(ctx, op: str, backend: str, *args) -> Tensor:
        count = _COUNTS[op]
        ctx.save_for_backward(*args[:count])
        ctx.op, ctx.settings = op, args[count:]
        return below_autograd(forward_op(backend, op), *args)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        needs_grad = list(ctx.needs_input_grad[2 : 2 + _COUNTS[ctx.op]])
        if _is_differentiated():
            kind, settings = OPS[ctx.op], ctx.settings
            gradients = _reference_gradients(
                lambda *tensors: reference.run(kind(*tensors, *settings)), grad_output, ctx.saved_tensors, needs_grad
            )
            return None, None, *gradients, *(None for _ in ctx.settings)
        grads = iter(below_autograd(backward_op(ctx.op), grad_output, *ctx.saved_tensors, *ctx.settings, needs_grad))
        return None, None, *(next(grads) if need else None for need in needs_grad), *(None for _ in ctx.settings)


def _save(ctx, args: GhostArgs, *training_settings) -> None:
    """For ``_backward``; of the residual nothing is needed."""
    ctx.save_for_backward(*args._replace(residual=None).tensors)
    ctx.settings = args[len(TENSORS) :]
    ctx.training_settings = training_settings


def _backward(ctx, grad_output: Tensor, needs_grad: list[bool]) -> list[Tensor | None]:
    """Gradients of GhostArgs' tensors, None where none is needed."""
    backend, *training_settings = ctx.training_settings
    asked = list(needs_grad)
    asked[_RESIDUAL] = False  # it is grad_output
    grads: Iterator[Tensor] = iter(())
    if any(asked) and _is_differentiated():
        _, batch_statistics, group_name = ctx.training_settings
        if group_name:
            raise RuntimeError(
                "create_graph: expected False with the statistics of several processes (SyncBatchNorm), which have no "
                "second derivatives"
            )
        settings = ctx.settings

        def recomputed(*tensors: Tensor) -> Tensor:
            return reference.ghost_module(GhostArgs(*tensors, *settings), batch_statistics)  # type: ignore[arg-type]

        grads = (g for g in _reference_gradients(recomputed, grad_output, ctx.saved_tensors, asked) if g is not None)
    elif any(asked):
        op = training_op("backward", backend)
        grads = iter(below_autograd(op, grad_output, *ctx.saved_tensors, *ctx.settings, *training_settings, asked))
    result: list[Tensor | None] = [next(grads) if need else None for need in asked]
    if needs_grad[_RESIDUAL]:
        result[_RESIDUAL] = grad_output
    return result


class GhostFunction(torch.autograd.Function):
    """One Ghost module with stored statistics."""

    @staticmethod
    def forward(ctx, backend: str, *args) -> Tensor:
        a = GhostArgs(*args)
        trains = training_step.choose(backend, a)
        _save(ctx, a, trains, False, "")
        ctx.runs_again = backend if trains == "reference" != backend else None
        return below_autograd(forward_op(backend), *args)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        if ctx.runs_again is not None and not torch.compiler.is_compiling():
            warnings.warn(
                f"no kernel of {ctx.runs_again} computes the gradients of this Ghost module: backward runs the forward again by "
                "PyTorch, and takes longer than unfused. A model in eval mode is as fast as unfused with ghostfused.unfuse(model)",
                stacklevel=2,
            )
        grads = _backward(ctx, grad_output, list(ctx.needs_input_grad[1 : 1 + len(TENSORS)]))
        return None, *grads, *(None for _ in ctx.settings)


class BatchGhostFunction(torch.autograd.Function):
    """One Ghost module with the batch's statistics, which it returns too."""

    @staticmethod
    def forward(ctx, backend: str, group_name: str, then: Then, *fields) -> tuple[Tensor, ...]:
        out, *statistics, count = results = below_autograd(training_op("train_forward", backend), *fields, group_name)
        if then is not None:
            then(results)
        a = train_args(fields)._replace(**dict(zip(STATISTICS, statistics, strict=True)))
        _save(ctx, a, backend, True, group_name)
        ctx.mark_non_differentiable(*statistics, count)
        return out, *statistics, count

    @staticmethod
    def backward(ctx, grad_output: Tensor, *_):
        fields = iter(ctx.needs_input_grad[3:])
        needs_grad = [name not in STATISTICS and next(fields) for name in TENSORS]
        grads = zip(TENSORS, _backward(ctx, grad_output, needs_grad), strict=True)
        return (
            None,
            None,
            None,
            *(grad for name, grad in grads if name not in STATISTICS),
            *(None for _ in ctx.settings),
        )


def _needs_grad(args: Args) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args.tensors)


def call(backend: str, args: Args) -> Tensor:
    """Runs ``args`` on ``backend``, by way of a Function only if a gradient will be asked for."""
    if not _needs_grad(args):
        out = below_autograd(forward_op(backend, args.op), *args)
        note(backend, args, out)
        return out
    if isinstance(args, GhostArgs):
        return GhostFunction.apply(backend, *args)
    return FusedFunction.apply(args.op, backend, *args)


def call_with_batch_statistics(backend: str, args: GhostArgs, group_name: str, then: Then = None) -> tuple[Tensor, ...]:
    """(out, primary_mean, primary_var, cheap_mean, cheap_var, count) of ``args``, whose own statistics don't count.

    ``then`` is called with them before anything is saved for backward: torch.utils.checkpoint ends a forward that it
    repeats once all of that has been.
    """
    fields = [getattr(args, name) for name in TRAIN_FIELDS]
    differentiable = _needs_grad(args)
    within = differentiable and not torch.compiler.is_compiling()  # a compiler takes no function as an argument
    if differentiable:
        results = BatchGhostFunction.apply(backend, group_name, then if within else None, *fields)
    else:
        results = below_autograd(training_op("train_forward", backend), *fields, group_name)
    if then is not None and not within:
        then(results)
    return results
