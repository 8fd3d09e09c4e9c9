"""What works on this machine, and for each backend that doesn't, why."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata

import torch

from . import __version__
from .backends import BACKENDS


def collect() -> dict:
    """Versions, devices, and per backend None or the reason why it can't run here."""
    packages = {}
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
        "extension": BACKENDS["cuda"].build_info(),
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
        if name not in ("backends", "gpus", "extension"):
            print(f"{name:12} {value}")
    for gpu in facts["gpus"] or [None]:
        print(f"{'gpu':12} {gpu or 'none'}")
    print(f"{'extension':12} {facts['extension'] or 'not built'}")
    print("\nbackends")
    for name, reason in facts["backends"].items():
        print(f"  {name:18} {'works' if reason is None else f'no: {reason}'}")
    return 0
