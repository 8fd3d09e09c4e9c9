"""What works on this machine, and for each backend that doesn't, why."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata

import torch

from .. import __version__
from ..backends import BACKENDS


def collect() -> dict:
    """Versions, devices, and per backend None or the reason why it can't run here."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "triton", "numpy"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30})
    return {
        "ghostfused": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_cuda": torch.version.cuda,
        **packages,
        "gpus": gpus,
        "extensions": {name: BACKENDS[name].build_info() for name in ("cuda", "cpu")},
        "backends": {name: backend.unavailable() for name, backend in BACKENDS.items()},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """print which backends work here and why the others don't"""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name not in ("backends", "gpus", "extensions"):
            print(f"{name:12} {value}")
    for gpu in facts["gpus"] or [None]:
        print(f"{'gpu':12} {gpu or 'none'}")
    for name, built in facts["extensions"].items():
        print(f"{f'{name} build':12} {built or 'not built'}")
    print("\nbackends")
    for name, reason in facts["backends"].items():
        print(f"  {name:18} {'works' if reason is None else f'no: {reason}'}")
    return 0
