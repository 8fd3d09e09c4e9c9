"""Fuses a network and prints what became of each of its modules, the error against float64 and the speed on this machine.

Networks are "seed" (the blog's GhostNet), "paper", "timm:NAME", or "file.py:function" (a function that returns the model,
or the model and an input). An untrained network is given statistics of its own activations, so that every layer counts.
The exit code is 1 if the error misses its limit, 2 if nothing could be fused.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from .. import backends
from ..fuse import LEVELS, fuse_with_report
from . import inputs
from .inputs import load_model, positive
from .verify import DTYPES, calibrated, network_verdict, word_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="seed|paper|timm:NAME|file.py:function")
    parser.add_argument(
        "--level", default="auto", choices=LEVELS, help="module: Ghost modules alone; auto: bottlenecks too"
    )
    parser.add_argument("--backend", default="auto", choices=["auto", *backends.BACKENDS], help=inputs.BACKEND)
    parser.add_argument("--dtype", type=inputs.dtype, default="float32", choices=list(DTYPES), help="default float32")
    parser.add_argument("--batch", type=positive, default=1, help="images of the input (default 1)")
    parser.add_argument("--size", type=positive, default=224, help="height and width of the input (default 224)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--rounds", type=_rounds, default=30, help="timed calls of each, taking turns (default 30)")
    parser.add_argument("--seed", type=inputs.seed, default=0, help="of the random numbers (default 0)")


def _rounds(text: str) -> int:
    if positive(text) < 2:
        raise argparse.ArgumentTypeError("expected at least 2: quartiles of one call say nothing")
    return int(text)


def main(options: argparse.Namespace) -> int:
    """fuse a network; print the report, the error and the speed here"""
    device = inputs.device(options.device, options.dtype)
    inputs.backend_on(options.backend, device)
    dtype = DTYPES[options.dtype]
    if options.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(options.seed)
    model, x = load_model(options.model)
    given = torch.randn(options.batch, 3, options.size, options.size) if x is None else x
    inputs.run_once(options.model, model, given)
    if x is None:
        x, model = given, calibrated(options.model, model, given)
    model, x = model.eval().to(device), x.to(device)
    fused, report = fuse_with_report(model, level=options.level, backend=options.backend)
    print(f"{report}\n")
    if not any(swap.fused for swap in report):
        print(f"nothing to fuse in {options.model}")
        return 2

    name, image = f"{options.model} in {options.dtype}", x
    verdict = inputs.attempt(name, lambda: network_verdict(model, fused, image, dtype, options.dtype == "tf32"))
    print(
        f"error against float64, relative to the largest output: {verdict.error:.2e} fused, "
        f"{verdict.torch_error:.2e} unfused, limit {verdict.limit:.2e}: {word_of(verdict)}"
    )
    if not verdict.decides:
        print(f"unfused, {options.dtype} is so far off, or overflows, that the limit decides nothing about fused")
    model, fused, x = model.to(dtype), fused.to(dtype), inputs.cast(x, dtype)
    with torch.inference_mode():
        calls: dict[str, Callable[[], object]] = {"unfused": partial(model, x), "fused": partial(fused, x)}
        times = inputs.attempt(name, lambda: time_interleaved(calls, options.rounds, device))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"{tuple(x.shape)} {options.dtype} on {where}{threads}; medians of {options.rounds}, quartiles in brackets:")
    for name, each in times.items():
        print(f"  {name:8} {quartiles(each)} ms")
    ratios = [unfused / ours for unfused, ours in zip(times["unfused"], times["fused"], strict=True)]
    low, _, high = _quartiles(ratios)
    print(f"  {'speed-up':8} {quartiles(ratios)}{', a tie' if low <= 1 <= high else ''}")
    return int(not verdict.ok)


def time_interleaved(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each function's calls, host time included; they take turns, so that drift hits all alike.

    The i-th calls of all are made one right after the other: their ratios are what a busy machine disturbs least.
    ``tick`` is called after each round.
    """
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(3):
            function()
    order = list(functions.items())
    for i in range(rounds):
        for name, function in order if i % 2 else reversed(order):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append((time.perf_counter() - start) * 1e3)
        tick()
    return times


def _quartiles(values: list[float]) -> list[float]:
    """Between the least and the greatest of the values, also of two."""
    return statistics.quantiles(values, n=4, method="inclusive")


def quartiles(values: list[float]) -> str:
    """``median [first–third quartile]``."""
    low, median, high = _quartiles(values)
    return f"{median:.2f} [{low:.2f}–{high:.2f}]"
