"""One call of each Ghost module's kernel, between cudaProfilerStart and cudaProfilerStop, for a profiler that starts there:
``ncu --profile-from-start off python -m bench profile ORDER.jsonl``. ORDER.jsonl gets a row for each module in the order of calls,
which ``predicted --counters`` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator

import torch

from ghostfused.backends import BACKENDS, unavailable_on
from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput
from ghostfused.fuse import fuse

from . import cases, measure, module
from .timing import Flush

CALLS_BEFORE = 3
"""Calls that aren't profiled: the first ones read the module and record its program."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("order", type=inputs.new_file, metavar="ORDER.jsonl")
    module.add_module_arguments(parser)
    cases.add_setting_arguments(parser, batch="64", modes=False)
    parser.add_argument("--backend", default="cuda", choices=list(BACKENDS), help="default cuda")
    measure.add_device_arguments(parser)


@contextlib.contextmanager
def _profiled(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(options: argparse.Namespace) -> int:
    """call each module's kernel once, for a profiler"""
    device = measure.set_device(options)
    if reason := unavailable_on(options.backend, device.type):
        raise BadInput(f"--backend {options.backend}: {reason}")
    layers, flush = module.layers(options), Flush(device)
    options.order.parent.mkdir(parents=True, exist_ok=True)
    with options.order.open("w", encoding="utf-8") as order:
        for setting in cases.settings(options):
            for layer in layers:
                fused = fuse(setting.place(layer.calibrated()), inplace=True, backend=options.backend)
                x = setting.input(layer.shape)
                with torch.inference_mode():
                    for _ in range(CALLS_BEFORE):
                        fused(x)
                    flush()
                    with _profiled(device):
                        fused(x)
                order.write(json.dumps({**layer.as_row(), **vars(setting)}, ensure_ascii=False) + "\n")
                order.flush()
    return 0
