"""What training keeps for backward: bytes of saved activations, counted; on a GPU also the peak of a training step.

The count runs on PyTorch's "meta" device, as the one in launches.py: no GPU needed, nothing computed. With --rss: what
inference takes, whole processes' resident memory (rss.py).
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from torch import Tensor, nn

from ghostfused.backends import unavailable_on
from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput

from . import cases, measure, rss
from .cases import Setting
from .console import table
from .launches import as_if_available, executions
from .results import Writer

MODES = {"training": True, "frozen_bn": False}
"""BatchNorm by batch statistics, or by stored ones, as in fine-tuning with frozen statistics."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rss", action="store_true", help="of processes that load and run a network, each peer's its own"
    )
    parser.add_argument("--network", help="as in `network`; several with commas; default paper, or timm:ghostnet_100")
    parser.add_argument("--size", type=inputs.positive, default=224)
    parser.add_argument(
        "--batch",
        type=inputs.several(inputs.positive),
        metavar="N,N",
        help="default 8; with --rss several, default 1,16",
    )
    parser.add_argument(
        "--dtype", default="float32", type=inputs.dtype, choices=[d for d in cases.DTYPES if d != "tf32"]
    )
    measure.add_device_arguments(parser)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters, buffers and x left out."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    storages: dict[int, torch.UntypedStorage] = {}  # held until the end, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)  # noqa: F841  the graph lives until the storages are counted
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(model: nn.Module, x: Tensor) -> int:
    """The most memory that a training step on the GPU allocates beyond what is there before it."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x).sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(options: argparse.Namespace) -> int:
    """count the activations that a training step saves, or measure what inference takes"""
    options.network = options.network or ("timm:ghostnet_100" if options.rss else "paper")
    options.batches = options.batch or ([1, 16] if options.rss else [8])
    if options.rss:
        return rss.main(options)
    if len(options.batches) > 1:
        raise BadInput(f"--batch: expected one number without --rss, got {','.join(map(str, options.batches))}")
    (options.batch,) = options.batches
    device = measure.set_device(options)
    networks = cases.networks(options.network, options.size)
    shown = []
    setting = Setting("meta", options.batch, options.dtype)
    shape = options.batch, 3, options.size, options.size
    with Writer(options.output, device) as writer:
        for name, network in networks.items():
            variants = executions(network)
            for mode, training in MODES.items():
                for execution, (model, backend) in variants.items():
                    with as_if_available(backend):
                        x = torch.empty(shape, dtype=setting.torch_dtype, device="meta")
                        saved = saved_bytes(setting.place(model).train(training), x)
                    peak = None
                    if device.type == "cuda" and (backend is None or unavailable_on(backend, "cuda") is None):
                        real = replace(setting, device="cuda")
                        peak = peak_bytes(real.place(model).train(training), real.input(shape[1:]))
                    row = {"kind": "memory", "name": name, "mode": mode, "execution": execution, "batch": options.batch}
                    row |= {"dtype": options.dtype, "size": options.size, "saved_bytes": saved, "peak_bytes": peak}
                    writer.write(row)
                    shown.append(row)
    base = {(r["name"], r["mode"]): r["saved_bytes"] for r in shown if r["execution"] == "eager"}
    table(
        f"Activations saved for backward (counted; no GPU needed), {options.dtype}, batch {options.batch}",
        ["network", "mode", "execution", "MB per image", "of eager", "peak MB per image"],
        [
            [r["name"], r["mode"], r["execution"], f"{r['saved_bytes'] / r['batch'] / 1e6:.1f}",
             f"{100 * r['saved_bytes'] / base[r['name'], r['mode']]:.0f}%",
             f"{r['peak_bytes'] / r['batch'] / 1e6:.1f}" if r["peak_bytes"] else "-"]
            for r in shown
        ],
    )  # fmt: skip
    return 0
