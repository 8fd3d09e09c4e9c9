"""One module or network in one setting, all peers: first compared with float64, then those that are right timed in turns."""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .cases import Setting
from .oracle import Oracle, grad_output, snapshot
from .peers import Peer, Run
from .timing import CACHES, Method, Timed, cache_bytes, rotation, time_interleaved

BASELINE = "eager"


def contest(
    module: nn.Module,
    shape: tuple[int, ...],
    setting: Setting,
    peers: dict[str, Peer],
    method: Method,
    tick: Callable[[str], object] = lambda doing: None,
    others_tolerance: float = 1.0,
) -> list[dict]:
    """A row for each peer: its status and, if that is "ok", its times; ``module`` is float32, on the CPU, in eval mode.

    Status: "ok"; "absent", with the reason; "WRONG", its error is beyond the limit, not timed; "error", it raised.
    ``others_tolerance`` multiplies the limit of peers that are not ours; the row's limit is the one that was applied.
    """
    x = setting.input(shape)
    inputs = rotation(x, method.cache)
    rows: list[dict] = []
    timed: dict[str, Timed] = {}
    oracle = None
    torch.compiler.reset()  # graphs of earlier modules would count towards Dynamo's limit on recompilations
    for name, peer in peers.items():
        row: dict = {"peer": name}
        rows.append(row)
        reason = peer.unavailable(setting)
        if reason is not None:
            row |= {"status": "absent", "reason": reason}
            continue
        oracle = oracle or Oracle(module, x, setting)
        tick(f"preparing {name}")
        try:
            with _grad_mode(setting):
                own = setting.place(module)
                run = peer.prepare(own, x)
            outputs = snapshot(oracle.outputs(run, own, x))
        except Exception as error:
            lines = str(error).strip().splitlines()
            row |= {"status": "error", "reason": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}
            continue
        verdict = oracle.judge(outputs, peer.computes_in)
        if not peer.ours:
            verdict = verdict._replace(limit=verdict.limit * others_tolerance)
        finite = math.isfinite(verdict.error)  # JSON has no infinity
        row |= {"error": verdict.error if finite else None, "torch_error": verdict.torch_error, "limit": verdict.limit}
        if peer.computes_in is not None:
            row["precision"] = str(peer.computes_in).removeprefix("torch.")
        if not verdict.ok:
            row |= {"status": "WRONG", "reason": f"error {verdict.error:.1e}, limit {verdict.limit:.1e}: not timed"}
            continue
        row["status"] = "ok"
        timed[name] = _timed(run, own, setting)
    if timed:
        with _grad_mode(setting):
            timings, samples = time_interleaved(timed, inputs, method, lambda f: tick(f"timing {f:.0%}"))
        input_bytes = len(inputs) * x.numel() * x.element_size()
        for row in rows:
            if row["status"] == "ok":
                row |= {"ms": timings[row["peer"]].as_row(), "samples": samples, "clock": _clock(method, x)}
                row |= {"cache": method.cache, "inputs": len(inputs)}
                row["cold"] = method.cache == "flush" or input_bytes >= 2 * cache_bytes(x.device)
    del timed
    gc.collect()
    return rows


def _clock(method: Method, x: Tensor) -> str:
    return method.clock if x.is_cuda else "wall"


def _grad_mode(setting: Setting):
    return torch.inference_mode(setting.mode == "inference")


def _timed(run: Run, module: nn.Module, setting: Setting) -> Timed:
    if setting.mode == "inference":
        return Timed(run)
    if setting.mode == "training_forward":
        return Timed(run, lambda x: x.detach().requires_grad_())
    parameters = list(module.parameters())
    grads: list[Tensor] = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        out = run(leaf)
        if not grads:
            grads.append(grad_output(out))
        return leaf, out

    return Timed(lambda pair: torch.autograd.grad(pair[1], [pair[0], *parameters], grads[0]), forward)


def add_arguments(parser: argparse.ArgumentParser, cache: str | None = None) -> None:
    add_device_arguments(parser)
    parser.add_argument("--peers", metavar="NAME,NAME*", help="default all")
    parser.add_argument(
        "--others-tolerance",
        type=float,
        default=1,
        metavar="FACTOR",
        help="multiply the package's tolerance by this for peers that are not ours (default 1)",
    )
    parser.add_argument("--cache", choices=CACHES, default=cache, help="default flush on a GPU, warm on the CPU")
    parser.add_argument("--samples", type=int, default=20, help="per repeat (default 20)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-seconds", type=float, default=20, help="per case, else fewer samples (default 20)")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="CPU threads of every peer alike (default: the cores)")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="write the rows here")


def set_device(options: argparse.Namespace) -> torch.device:
    """Resolves --device and pins the thread count; says if the machine is busy."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(
            f"load average {load:.1f} on {cores} cores: other programs are running, and times will be noisy", flush=True
        )
    set_tf32("tf32" in getattr(options, "dtype", []))
    return torch.device(options.device)


def set_tf32(allowed: bool) -> None:
    """Convolutions too, where PyTorch's own default would allow it to float32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def method(options: argparse.Namespace, clock: str = "events") -> Method:
    cache = options.cache or ("flush" if options.device == "cuda" else "warm")
    return Method(cache, clock, samples=options.samples, repeats=options.repeats, max_seconds=options.max_seconds)
