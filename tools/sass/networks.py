"""Judges all launches of ours in a forward of a whole network, and lists what is left to PyTorch.

As with a training step, two runs: one counts an image's share of each launch's blocks at the whole batch, on memory full of
small numbers; the other runs all blocks for one image, and its output is compared with the network's in float64.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from bench import cases
from ghostfused.fuse import fuse_with_report
from ghostfused.numerics import TOLERANCES, relative_error

from .costs import DRAM, LaunchCost, cost_of
from .device import device
from .judge import DTYPES, sample
from .machine import Launch, execute
from .stand_in import TorchOperations
from .training import SMALL, run_all

LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def judge_network(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each distinct launch, one for each kind of PyTorch's operations, and one of sums."""
    dtype, layout = DTYPES[options.dtype][0], LAYOUTS[options.layout]
    original = cases.network(options.network)
    fused = fuse_with_report(copy.deepcopy(original), backend="cuda")[0]
    there = _place(fused, dtype, layout)
    costs, others = counted(there, options.batch, options.size, dtype, layout)
    error, limit = checked(original, there, options.size, dtype, layout)
    lines = [{"kind": "launch", **line} for line in distinct(costs)]
    lines += [{"kind": "pytorch", "op": op, "count": n, "dram_us": us} for op, (n, us) in others.items()]
    sums = {name: sum(getattr(c, name) for c in costs) for name in ("issue_us", "shared_us", "hmma_us", "dram_us")}
    slowest = sum(max(c.issue_us, c.shared_us, c.dram_us) for c in costs)
    pytorch = sum(us for _, us in others.values())
    totals = {"launches": len(costs), **sums, "slowest_us": slowest, "slowest_over_dram": slowest / sums["dram_us"]}
    verdict = {"error": error, "limit": limit, "ok": error <= limit}
    return [*lines, {"kind": "sums", "network": options.network, **totals, "pytorch_dram_us": pytorch, **verdict}]


def _place(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    return model.to(dtype).to(memory_format=layout).to("cuda")  # type: ignore[call-overload]


def counted(
    model: nn.Module, batch: int, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[list[LaunchCost], dict[str, tuple[int, float]]]:
    """The costs of our launches, in order, and how often PyTorch's operations run, with their bytes at DRAM's rate."""
    dev, costs = device(), list[LaunchCost]()

    def on_launch(launch: Launch) -> None:
        dev.memory.forget()
        costs.append(cost_of(launch, execute(launch, sample(launch, batch), dev.memory), dev.memory))

    dev.fill(SMALL)
    try:
        x = torch.empty(batch, 3, size, size, dtype=dtype, device="cuda", memory_format=layout)
        operations = TorchOperations(compute=False)
        with torch.inference_mode(), dev.launching(on_launch), operations:
            model(x)
    finally:
        dev.fill(0xFF)
    others: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for op, size_ in operations.made:
        n, us = others[op]
        others[op] = n + 1, us + size_ / DRAM * 1e6
    return costs, dict(others)


def checked(
    original: nn.Module, there: nn.Module, size: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[float, float]:
    """The error of the fused network's output, and what is allowed: a multiple of that of PyTorch's operations."""
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=layout)
    with torch.inference_mode():
        expected: Tensor = copy.deepcopy(original).to(dtype).double()(x.double())
        own = copy.deepcopy(original).to(dtype)(x)
        with device().launching(run_all), TorchOperations(compute=True):
            out = there(x.to("cuda")).cpu()
    tolerance = TOLERANCES[dtype]
    limit = max(tolerance.factor * relative_error(own, expected), tolerance.floor)
    return relative_error(out, expected), limit


def distinct(costs: list[LaunchCost]) -> list[dict[str, Any]]:
    """Launches that cost the same are one line with their number."""
    groups: dict[str, tuple[LaunchCost, int]] = {}
    for c in costs:
        key = f"{c.kernel} {c.grid} {c.shared_bytes} {c.instructions} {c.read_bytes} {c.written_bytes}"
        groups[key] = c, groups.get(key, (c, 0))[1] + 1
    return [{"count": n, **dataclasses.asdict(c), "dram_us": c.dram_us} for c, n in groups.values()]
