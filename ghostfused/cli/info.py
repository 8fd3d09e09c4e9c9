"""What works on this machine, and for each backend that doesn't, why."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata

import torch

from .. import __version__
from ..backends import BACKENDS
from ..spec import Act
from ..spec.kernels import TAKES


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
        "takes": {
            name: {field: _words(value) for field, value in takes._asdict().items()} for name, takes in TAKES.items()
        },
    }


def _words(value: object) -> object:
    """A field of ``spec.kernels.Takes`` as JSON has it."""
    if isinstance(value, tuple):
        return [_words(each) for each in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return value.name.lower() if isinstance(value, Act) else value


def _short(value: object) -> str:
    return "×".join(map(str, value)) if isinstance(value, list) else str(value).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """print which backends work here and why the others don't"""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if name not in ("backends", "gpus", "extensions", "takes"):
            print(f"{name:12} {value}")
    for gpu in facts["gpus"] or [None]:
        print(f"{'gpu':12} {gpu or 'none'}")
    for name, built in facts["extensions"].items():
        print(f"{f'{name} build':12} {built or 'not built'}")
    print("\nbackends")
    for name, reason in facts["backends"].items():
        print(f"  {name:18} {'works' if reason is None else f'no: {reason}'}")
    print("\nwhat their kernels take (the reference runs the rest)")
    for name, takes in facts["takes"].items():
        print(f"  {name}")
        for field, value in takes.items():
            print(f"    {field:18} {', '.join(map(_short, value)) if isinstance(value, list) else value}")
    return 0
