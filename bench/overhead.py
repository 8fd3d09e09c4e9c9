"""Host time of a call, layer by layer of the call path, on an input so small that computing it takes next to nothing.

Each step is timed whole, from its own entry down; the time that a layer adds is the difference to the step below. On a
GPU the host's time to issue the work is measured, without waiting for it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch

from ghostfused import FusedGhostModule, functional, fuse
from ghostfused.backends import BACKENDS, unavailable_on
from ghostfused.cli.inputs import positive
from ghostfused.nn.cache import CachesPrograms
from ghostfused.ops.schemas import forward_op
from ghostfused.spec import Act, BatchNorm, GhostArgs

from . import measure
from .cases import Unfused
from .console import table
from .environment import title
from .results import Writer

REPLAYED = "module, replayed"
"""What inference takes from the second call on: it leaps over the steps below."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--calls", type=positive, default=500, help="per repeat (default 500)")
    parser.add_argument("--repeats", type=positive, default=7)
    measure.add_device_arguments(parser)


def steps(backend: str, device: torch.device) -> dict[str, Callable[[], object]]:
    """The call path of FusedGhostModule on ``backend``, outermost first."""
    module = FusedGhostModule(4, 8, backend=backend).eval().to(device)
    x = torch.randn(1, 4, 2, 2, device=device)
    with mock.patch.object(functional, "run", wraps=functional.run) as run:
        module(x)
    args: GhostArgs = run.call_args.args[0]
    primary = BatchNorm(args.primary_mean, args.primary_var, args.primary_gamma, args.primary_beta, args.primary_eps)  # type: ignore[arg-type]
    cheap = BatchNorm(args.cheap_mean, args.cheap_var, args.cheap_gamma, args.cheap_beta, args.cheap_eps)  # type: ignore[arg-type]
    path = {
        REPLAYED: lambda: module(x),
        "module: its layers read afresh": lambda: module._run(x),
        "function: ghost_module(x, …)": lambda: functional.ghost_module(
            x, args.primary_weight, args.cheap_weight, primary_bn=primary, act_primary=Act.RELU,
            cheap_bn=cheap, act_cheap=Act.RELU6, backend=backend,
        ),
        "checks: run(args)": lambda: functional.run(args, backend),
        "dispatcher: torch.ops.ghostfused": lambda: forward_op(backend)(*args),
        "backend: allocate, plan, launch": lambda: BACKENDS[backend].forward(args),
    }  # fmt: skip
    if backend == "cuda":  # the op is C++, there is no Python below the dispatcher
        del path["backend: allocate, plan, launch"]
    if backend not in ("cuda", "cpu"):
        del path[REPLAYED]
    if backend == "reference":  # called without the op
        del path["dispatcher: torch.ops.ghostfused"]
    return path


def guard(device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Host time of what inference asks at every call before it replays, whether a network's modules are as they were: in
    each repeat, after a walk through more memory than caches hold, as a forward leaves nothing of the modules there."""
    if BACKENDS[device.type].unavailable():
        return {}
    from timm import create_model

    network = fuse(create_model("ghostnet_100").eval().to(device))
    with torch.no_grad():
        network(torch.randn(1, 3, 32, 32, device=device))
    replays = [(m, m._cache._state) for m in network.modules() if isinstance(m, CachesPrograms)]
    states = [(m, state) for m, state in replays if state is not None and state.recordable]
    memory, times = torch.zeros(32 << 20), []
    for _ in range(repeats):
        memory.add_(1)
        start = time.perf_counter()
        held = all(state.holds(module) for module, state in states)
        times.append((time.perf_counter() - start) * 1e6)
        assert held
    return {f"{device.type}|guard of timm:ghostnet_100, a whole forward's": times}


def microseconds(functions: dict[str, Callable[[], object]], calls: int, repeats: int) -> dict[str, list[float]]:
    """Host time per call in each repeat; the functions take turns, repeat by repeat."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    synchronize: Callable[[], None] = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    with torch.inference_mode():
        for i in range(repeats + 1):
            for name, function in functions.items() if i % 2 else reversed(functions.items()):
                synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    function()
                elapsed = time.perf_counter() - start
                if i:  # the first is warm-up
                    times[name].append(elapsed / calls * 1e6)
    return times


def main(options: argparse.Namespace) -> int:
    """measure host time per call: Python, checks, dispatcher, launch"""
    device = measure.set_device(options)
    x = torch.randn(1, 4, 2, 2, device=device)
    eager = Unfused(FusedGhostModule(4, 8)).eval().to(device)
    functions: dict[tuple[str, str], Callable[[], object]] = {("eager", "module: its 7 layers"): lambda: eager(x)}
    for backend in BACKENDS:
        try:
            if reason := unavailable_on(backend, device.type):
                raise RuntimeError(reason)
            functions |= {(backend, step): f for step, f in steps(backend, device).items()}
        except RuntimeError as error:
            print(f"absent  {backend}: {str(error).splitlines()[0]}")
    names = {f"{backend}|{step}": f for (backend, step), f in functions.items()}
    times = guard(device, options.repeats) | microseconds(names, options.calls, options.repeats)
    shown = []
    with Writer(options.output, device) as writer:
        medians = {key: statistics.median(t) for key, t in times.items()}
        keys = list(times)
        for key, below in zip(keys, [*keys[1:], None], strict=True):
            backend, _, step = key.partition("|")
            row: dict = {"kind": "overhead", "backend": backend, "step": step, "us": round(medians[key], 3)}
            row["spread_us"] = round(max(times[key]) - min(times[key]), 3)
            row["adds_us"] = None
            if (
                below is not None
                and step != REPLAYED
                and not step.startswith("guard")
                and below.partition("|")[0] == backend
            ):
                row["adds_us"] = round(medians[key] - medians[below], 3)
            writer.write(row)
            adds = "-" if row["adds_us"] is None else f"{row['adds_us']:.1f}"
            shown.append([backend, step, f"{row['us']:.1f} ± {row['spread_us'] / 2:.1f}", adds])
    heading = f"Host time per call, (1, 4, 2, 2) input; {title(writer.environment)}"
    table(heading, ["backend", "from", "µs", "of which this step"], shown)
    return 0
