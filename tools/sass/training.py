"""Judges a training step of a Ghost module: what its kernels cost at the whole batch, and their results for one image.

The kernels of a step hand each other maps and statistics, so the blocks of one image alone have no right inputs. Hence two
runs: one counts some blocks of every launch at the whole batch, on memory that is full of small numbers; the other runs all
blocks for a batch of one image, and its output, statistics and gradients are compared with autograd in float64.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ghostfused.backends.training_step import KERNELS
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, make_args, to_device
from ghostfused.testing.judge_training import by_kernels, judge_training

from .costs import LaunchCost, cost_of
from .device import Handler, device
from .judge import PER_IMAGE, Row, memory_format, row
from .machine import Launch, execute
from .stand_in import TorchOperations

SMALL = 0x3C
"""Memory of this byte is 1.06 in half precision and 0.01 in float32."""


def judge_training_step(case: Case, name: str, count: int) -> Row:
    costs = counted(case)
    error, limit = checked(dataclasses.replace(case, batch=1), as_of_batch=case.batch)
    return row(name, count, costs, sum(c.dram_us for c in costs), error, limit, 1.0)


def counted(case: Case) -> list[LaunchCost]:
    """The costs of a step's launches; of each, the middle blocks run, an image's share of them."""
    dev, costs = device(), []

    def on_launch(launch: Launch) -> None:
        dev.memory.forget()
        share = math.ceil(launch.blocks / case.batch)
        first = (launch.blocks - share) // 2
        costs.append(cost_of(launch, execute(launch, range(first, first + share), dev.memory), dev.memory))

    a = _on_device(make_args(dataclasses.replace(case, batch=1)))
    dev.fill(SMALL)
    try:
        maps = {n: _of_batch(t, case.batch) for n in PER_IMAGE if (t := getattr(a, n)) is not None}
        a = a._replace(**maps)  # type: ignore[arg-type]
        with dev.launching(on_launch), TorchOperations(compute=False):
            by_kernels(KERNELS["cuda"], a, a.new_output(), batch_statistics=True)
    finally:
        dev.fill(0xFF)
    return costs


def _on_device(a: GhostArgs) -> GhostArgs:
    return to_device(a, "cuda")  # type: ignore[return-value]


def _of_batch(t: Tensor, batch: int) -> Tensor:
    return torch.empty((batch, *t.shape[1:]), dtype=t.dtype, device=t.device, memory_format=memory_format(t))


def checked(case: Case, handler: Handler | None = None, as_of_batch: int | None = None) -> tuple[float, float]:
    """Error and limit of the result that comes closest to its limit; ``handler`` runs all blocks of a launch. The layout is
    the one that a batch of ``as_of_batch`` has."""
    dev, kernels = device(), KERNELS["cuda"]
    a = away_from_kinks(make_args(case))
    grad = torch.randn(a.output_shape(), generator=torch.Generator().manual_seed(case.seed)).to(a.x.dtype)
    grad = grad.contiguous(memory_format=memory_format(a.x))

    whole = _of_batch(a.x.to("meta"), as_of_batch or case.batch)
    layout = kernels.layout(a._replace(x=whole))
    kernels = kernels._replace(layout=lambda a: layout)

    there, grad_there = _on_device(a), _on_device(a._replace(x=grad)).x
    with dev.launching(handler or run_all), TorchOperations(compute=True):
        results = by_kernels(kernels, there, grad_there, batch_statistics=True)
    verdicts = judge_training({name: t.cpu() for name, t in results.items()}, a, grad, batch_statistics=True)
    worst = max(verdicts.values(), key=lambda v: v.error / v.limit)
    return worst.error, worst.limit


def run_all(launch: Launch) -> None:
    execute(launch, range(launch.blocks), device().memory)


def away_from_kinks(a: GhostArgs) -> GhostArgs:
    """Norms after which nothing lies near 0 or 6, where an activation's derivative jumps and rounding decides."""

    def norm(gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        return gamma.abs().clamp(0.2, 0.5) * gamma.sign(), torch.where(beta < -0.7, -3.0, 3.0).to(beta.dtype)

    changed: dict[str, Tensor] = {}
    for half in ("primary", "cheap"):
        gamma, beta = getattr(a, f"{half}_gamma"), getattr(a, f"{half}_beta")
        if gamma is not None:
            changed[f"{half}_gamma"], changed[f"{half}_beta"] = norm(gamma, beta)
    return a._replace(**changed)  # type: ignore[arg-type]
