"""Judging a training step of one Ghost module: the output, the statistics and every gradient, by testing.TOLERANCES.

PyTorch's own error is that of autograd through ``reference.ghost_module`` in the same dtype. Gradients are sums that may
cancel, and then a single one says little about how large an error is usual. So PyTorch's error is the largest among the
step's gradients, or statistics, in several runs: on the batch as it is and reversed, in NCHW and in channels_last, which add up the same
numbers in other orders, and in float64 on arguments off by one rounding, which shows how far the result is determined. In half precision draw activations without kinks, for one pixel on the other side of a kink
is a large error in a small map.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..backends import reference
from ..backends.training_step import TrainingKernels, backward, train_forward
from ..numerics import TOLERANCES, relative_error
from ..spec import TENSORS, GhostArgs
from . import Verdict, convert

_STATISTICS = ops.STATISTICS


def wanted(a: GhostArgs) -> list[bool]:
    """``needs_grad`` for all but the statistics and the residual, whose gradient is the output's."""
    without = ("residual", *_STATISTICS)
    return [t is not None and name not in without for name, t in zip(TENSORS, a.tensors, strict=True)]


def by_op(backend: str, a: GhostArgs, grad_output: Tensor, batch_statistics: bool) -> dict[str, Tensor]:
    """Output, statistics ("batch_…") and gradients of one training step by the ops of ``backend``."""
    forward, gradients = (ops.training_op(kind, backend) for kind in ("train_forward", "backward"))

    def train(a: GhostArgs) -> tuple[Tensor, ...]:
        return forward(*(getattr(a, name) for name in ops.TRAIN_FIELDS), "")

    return _step(train, lambda g, a, *rest: gradients(g, *a, *rest), a, grad_output, batch_statistics)


def by_kernels(
    kernels: TrainingKernels, a: GhostArgs, grad_output: Tensor, batch_statistics: bool
) -> dict[str, Tensor]:
    """The same by ``kernels``, which needn't be registered."""
    return _step(
        lambda a: train_forward(kernels, a, ""),
        lambda *rest: backward(kernels, *rest),
        a, grad_output, batch_statistics,
    )  # fmt: skip


def _step(train: Any, gradients: Any, a: GhostArgs, grad_output: Tensor, batch_statistics: bool) -> dict[str, Tensor]:
    results: dict[str, Tensor] = {}
    if batch_statistics:
        cleared = a._replace(**dict.fromkeys(_STATISTICS))  # type: ignore[arg-type]
        results["out"], *statistics, _ = train(cleared)
        a = a._replace(**dict(zip(_STATISTICS, statistics, strict=True)))
        results |= {f"batch_{name}": t for name, t in zip(_STATISTICS, statistics, strict=True)}
    needs = wanted(a)
    names = [name for name, need in zip(TENSORS, needs, strict=True) if need]
    return results | dict(zip(names, gradients(grad_output, a, batch_statistics, "", needs), strict=True))


def by_autograd(a: GhostArgs, grad_output: Tensor, batch_statistics: bool) -> dict[str, Tensor]:
    """What ``by_op`` gives, by PyTorch's own operations."""
    needs = wanted(a)
    leaves = [t.detach().requires_grad_() if need else t for t, need in zip(a.tensors, needs, strict=True)]  # type: ignore[union-attr]
    leafed = GhostArgs(*leaves, *a[len(TENSORS) :])  # type: ignore[arg-type]
    with torch.enable_grad():
        out = reference.ghost_module(leafed, batch_statistics)
        asked = [t for t, need in zip(leaves, needs, strict=True) if need]
        grads = torch.autograd.grad(out, asked, grad_output, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    results: dict[str, Tensor] = {}
    if batch_statistics:
        results["out"] = out.detach()
        results |= _statistics(a)
    names = [name for name, need in zip(TENSORS, needs, strict=True) if need]
    return results | dict(zip(names, grads, strict=True))


def _statistics(a: GhostArgs) -> dict[str, Tensor]:
    """Mean and biased variance of both convolutions' outputs, in the maps' dtype until they are summed."""
    padding = a.dilation * (a.kernel_size - 1) // 2
    x = a.x if a.input_gate is None else a.x * a.input_gate[:, :, None, None]
    y1 = F.conv2d(x, a.primary_weight, a.primary_bias, a.stride, padding, a.dilation, a.groups)
    x1 = reference.normalize(y1, None, None, a.primary_gamma, a.primary_beta, a.primary_eps, batch_statistics=True)
    x1 = reference.activate(x1, a.primary_act, a.primary_negative_slope, a.primary_slope)
    y2 = F.conv2d(x1, a.cheap_weight, a.cheap_bias, padding=a.dw_size // 2, groups=a.init_channels)
    results: dict[str, Tensor] = {}
    for half, y in (("primary", y1), ("cheap", y2)):
        var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        results |= {f"batch_{half}_mean": mean, f"batch_{half}_var": var}
    return results


def _orders(a: GhostArgs) -> list[tuple[int, ...]]:
    """Dimensions of a map that may be reversed, so that PyTorch sums the same numbers in another order."""
    symmetric = a.stride == 1 and a.output_gate is None  # else other pixels would meet
    return [(), (0,), *([(2,), (3,), (0, 2, 3)] if symmetric else [])]


def _flip(name: str, t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The argument or result ``name`` of a step whose maps are reversed along ``dims``."""
    if name in ("x", "residual", "out", "input_gate", "output_gate"):
        return t.flip([d for d in dims if d < t.dim()])
    return t.flip([d for d in dims if d > 0]) if name in ("primary_weight", "cheap_weight") else t


def _reversed(a: GhostArgs, memory_format: torch.memory_format, dims: tuple[int, ...]) -> GhostArgs:
    """The maps of ``a`` in reverse order along ``dims``, x in ``memory_format``."""
    flipped: dict[str, Any] = {n: _flip(n, t, dims) for n in TENSORS if (t := getattr(a, n)) is not None}
    flipped["x"] = flipped["x"].contiguous(memory_format=memory_format)
    return a._replace(**flipped)


def _nudged(a: GhostArgs, seed: int) -> GhostArgs:
    """``a`` in float64, each number off by half a unit of ``a``'s dtype, up or down."""
    generator = torch.Generator().manual_seed(seed)
    half_unit = torch.finfo(a.x.dtype).eps / 2

    def nudge(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        sign = torch.randint(0, 2, t.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return t.double() * (1 + half_unit * sign)

    return GhostArgs(*(nudge(t) for t in a.tensors), *a[len(TENSORS) :])  # type: ignore[arg-type]


def judge_training(
    results: dict[str, Tensor], a: GhostArgs, grad_output: Tensor, batch_statistics: bool
) -> dict[str, Verdict]:
    """A verdict for each of ``results`` (``by_op``), against float64 autograd on ``a``, CPU tensors."""
    expected = by_autograd(convert(a, torch.float64), grad_output.double(), batch_statistics)  # type: ignore[arg-type]
    assert set(results) == set(expected)
    own = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for dims in _orders(a):
            other = by_autograd(_reversed(a, memory_format, dims), grad_output.flip(dims), batch_statistics)
            own.append({name: _flip(name, t, dims) for name, t in other.items()})
    own += [by_autograd(_nudged(a, seed), grad_output.double(), batch_statistics) for seed in range(16)]
    tolerance = TOLERANCES[a.x.dtype]
    torch_errors = {name: max(_error(name, run, expected) for run in own) for name in expected}
    # with batch statistics a bias's gradient is zero, and what autograd finds is the rounding of it
    zero: list[str] = [name for name in ("primary_bias", "cheap_bias") if batch_statistics and name in expected]
    statistics = [name for name in expected if name.startswith("batch_")]
    gradients = [name for name in TENSORS if name in expected and name not in zero]
    # PyTorch's worst of its kind: one of few numbers may be exact by luck
    for pool in (statistics, gradients):
        torch_errors |= dict.fromkeys(pool, max((torch_errors[name] for name in pool), default=0.0))
    verdicts: dict[str, Verdict] = {}
    for name in expected:
        if name in zero:
            verdicts[name] = Verdict(float(results[name].abs().max()), 0.0, 0.0)
            continue
        limit = max(tolerance.factor * torch_errors[name], tolerance.floor)
        verdicts[name] = Verdict(_error(name, results, expected), torch_errors[name], limit)
    return verdicts


def _error(name: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """``relative_error``; a mean's in standard deviations where it is less than one."""
    if name.startswith("batch_") and name.endswith("mean"):
        std = expected[name.replace("mean", "var")].sqrt()
        return relative_error(results[name].double() + std, expected[name] + std)
    return relative_error(results[name], expected[name])
