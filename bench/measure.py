"""One module or network in one setting, all peers: first compared with float64, then those that are right timed in turns."""

from __future__ import annotations

import argparse
import gc
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput

from .cases import Setting
from .correctness import Exact, grad_output, snapshot
from .peers import Peer, Run
from .timing import CACHES, Method, Timed, cache_bytes, rotation, time_interleaved

BASELINE = "eager"


def measure(
    module: nn.Module,
    shape: tuple[int, ...],
    setting: Setting,
    peers: dict[str, Peer],
    method: Method,
    tick: Callable[[str], object] = lambda doing: None,
    others_tolerance: float = 1.0,
    early: Callable[[list[dict]], object] | None = None,
) -> list[dict]:
    """A row for each peer: its status and, if that is "ok", its times; ``module`` is float32, on the CPU, in eval mode.

    Status: "ok"; "absent", with the reason; "WRONG", its error is beyond the limit, not timed; "error", it raised.
    ``others_tolerance`` multiplies the limit of peers that are not ours; the row's limit is the one that was applied.
    ``early`` hears the rows of the peers that are quick to prepare before the others are prepared, marked "preliminary":
    whoever is stopped while something compiles has them. All are timed again together.
    """
    x = setting.input(shape)
    inputs = rotation(x, method.cache)
    timed: dict[str, Timed] = {}
    try:
        exact = Exact(module, x, setting)
    except Exception as error:  # such as batch statistics of one value
        return [{"peer": name, **_failure(error)} for name in peers]
    torch.compiler.reset()  # graphs of earlier modules would count towards Dynamo's limit on recompilations

    def prepared(name: str, peer: Peer) -> dict:
        if reason := peer.unavailable(setting):
            return {"peer": name, "status": "absent", "reason": reason}
        tick(f"preparing {name}")
        try:
            with _grad_mode(setting):
                own = setting.place(module)
                run = peer.prepare(own, x)
            outputs = snapshot(exact.outputs(run, own, x))
        except Exception as error:
            return {"peer": name, **_failure(error)}
        row = {"peer": name, **_verdict(exact, outputs, peer, others_tolerance)}
        if row["status"] == "ok":
            timed[name] = _timed(run, own, setting)
        return row

    def measured(rows: list[dict]) -> list[dict]:
        """``rows`` with the times of those whose status is "ok"."""
        if not timed:
            return rows
        try:
            with _grad_mode(setting):
                timings = time_interleaved(timed, inputs, method, lambda f: tick(f"timing {f:.0%}"))
        except Exception as error:  # of one peer, which takes the others' times along
            return [row | _failure(error) if row["status"] == "ok" else row for row in rows]
        facts = {"samples": timings.samples, "clock": method.clock if x.is_cuda else "wall", "cache": method.cache}
        facts |= {"inputs": len(inputs), "cold": method.cache == "flush" or _fills_cache_twice(inputs)}
        if timings.sm_mhz:
            facts["sm_mhz"] = [round(mhz) for mhz in timings.sm_mhz]

        def times(name: str) -> dict:
            host = {"host_bound": True} if name in timings.host_bound else {}
            return {"ms": timings.of[name].as_row(), **facts, **host}

        return [row | times(row["peer"]) if row["status"] == "ok" else row for row in rows]

    rows = {name: prepared(name, peer) for name, peer in peers.items() if not peer.slow_to_prepare}
    if early and len(rows) < len(peers):
        early([row | {"preliminary": True} for row in measured(list(rows.values()))])
    rows |= {name: prepared(name, peer) for name, peer in peers.items() if peer.slow_to_prepare}
    done = measured([rows[name] for name in peers])
    timed.clear()
    gc.collect()
    return done


def _failure(error: Exception) -> dict:
    lines = str(error).strip().splitlines()
    return {"status": "error", "reason": f"{type(error).__name__}: {lines[0][:200] if lines else ''}"}


def _verdict(exact: Exact, outputs: list[Tensor], peer: Peer, others_tolerance: float) -> dict:
    verdict = exact.judge(outputs, peer.computes_in)
    if not peer.ours:
        verdict = verdict._replace(limit=verdict.limit * others_tolerance)
    finite = math.isfinite(verdict.error)  # JSON has no infinity
    row: dict = {"status": "ok" if verdict.ok else "WRONG"}
    row |= {"error": verdict.error if finite else None, "torch_error": verdict.torch_error, "limit": verdict.limit}
    if peer.computes_in is not None:
        row["precision"] = str(peer.computes_in).removeprefix("torch.")
    if not verdict.ok:
        row["reason"] = f"error {verdict.error:.1e}, limit {verdict.limit:.1e}: not timed"
    return row


def _fills_cache_twice(inputs: list[Tensor]) -> bool:
    return sum(x.numel() * x.element_size() for x in inputs) >= 2 * cache_bytes(inputs[0].device)


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
        type=inputs.amount,
        default=1,
        metavar="FACTOR",
        help="multiply the package's tolerance by this for peers that are not ours (default 1)",
    )
    parser.add_argument("--cache", choices=CACHES, default=cache, help="default flush on a GPU, warm on the CPU")
    parser.add_argument("--samples", type=inputs.positive, default=20, help="per repeat (default 20)")
    parser.add_argument("--repeats", type=inputs.positive, default=5)
    parser.add_argument(
        "--max-seconds", type=inputs.amount, default=20, help="per case, else fewer samples (default 20)"
    )


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument("--threads", type=inputs.positive, help="CPU threads of every peer alike (default: the cores)")
    parser.add_argument("--output", type=inputs.new_file, metavar="FILE.jsonl", help="write the rows here")


def set_device(options: argparse.Namespace, only: str | None = None) -> torch.device:
    """Resolves --device, of which a command may know one ``only``, and pins the thread count; says if the machine is busy."""
    if only and options.device not in (None, only):
        raise BadInput(f"--device: expected {only}, got {options.device}")
    options.device = inputs.device(only or options.device).type
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
