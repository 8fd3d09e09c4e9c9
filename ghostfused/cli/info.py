"""What works on this machine, and for each backend that doesn't, why: the report that an issue wants."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__
from ..backends import BACKENDS
from ..spec import Act
from ..spec.takes import COMMON, TAKES, Takes

ISA = "GHOSTFUSED_CPU_ISA"
VARIABLES = (
    "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "CXX", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "TORCH_CUDA_ARCH_LIST",
    "TORCH_LOGS", "TRITON_CACHE_DIR", "TRITON_INTERPRET",
)  # fmt: skip
"""Environment variables that change what is built or what runs, beside all that begin with GHOSTFUSED_."""


def collect() -> dict:
    """Versions, devices, what the extensions were built for, and per backend None or the reason why it can't run here."""
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            gpus.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_gib": p.total_memory / 2**30})
    extensions = {name: BACKENDS[name].build_info() for name in ("cuda", "cpu")}
    return {
        "ghostfused": __version__,
        "package": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "torch_cuda": torch.version.cuda,
        **{name: version_of(name) for name in ("torch", "triton", "numpy")},
        "cpu": {"name": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": gpus,
        "instruction_sets": _instruction_sets(extensions["cpu"]),
        "extensions": extensions,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name in VARIABLES or name.startswith("GHOSTFUSED_")
        },
        "backends": {name: backend.unavailable() for name, backend in BACKENDS.items()},
        "takes": {
            name: {field: _words(value) for field, value in takes._asdict().items()} for name, takes in TAKES.items()
        },
    }


def version_of(package: str) -> str | None:
    """As pip knows it; None of a package that isn't there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """As the system calls it. On aarch64 Linux gives the part's number and no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    parts = [f"{key} {facts[key]}" for key in ("CPU implementer", "CPU part") if key in facts]
    return facts.get("model name") or ", ".join(parts) or platform.processor()


def _instruction_sets(built: dict | None) -> dict | None:
    """Those of the CPU kernels: what this CPU has of them, which one runs, and what the environment asks for."""
    if built is None:
        return None
    return {"found": built["supported"], "runs": built["chosen"], "forced": os.environ.get(ISA) or None}


def _words(value: object) -> object:
    """A field of ``spec.takes.Takes`` as JSON has it."""
    if isinstance(value, tuple):
        return [_words(each) for each in value]
    if isinstance(value, torch.dtype) or value == math.inf:  # JSON has no infinity
        return str(value)
    return value.name.lower() if isinstance(value, Act) else value


def described(takes: Takes) -> dict[str, str]:
    """What ``takes`` says, in words."""
    window = "no other"
    if takes.windows:
        least, greatest, step = takes.window_widths
        limits = [
            f"in {_list(takes.window_dtypes)}" if takes.window_dtypes != takes.dtypes else "",
            f"under a cheap conv of {_list(takes.window_dw_sizes)}" if takes.window_dw_sizes != takes.dw_sizes else "",
            f"of outputs {least} to {greatest} wide, a multiple of {step}"
            if takes.window_widths != COMMON.window_widths
            else "",
            "in NCHW, with ratio 2, no gates and no residual" if takes.plain_windows else "",
        ]
        kernels = _list([(k, k) for k in takes.window_kernels]) or "any odd kernel"
        window = ", ".join([f"{kernels} at any stride", *filter(None, limits)])
    most, other = takes.auto_window_channels
    left = [
        f"up to {most} channels in float32 and in bfloat16 in channels_last, else {other}" if other < math.inf else "",
        "" if takes.auto_nchw_windows else "in channels_last",
    ]
    return {
        "dtypes": _list(takes.dtypes),
        "primary conv": f"1×1 at stride 1; {window}",
        "larger, for auto": " and ".join(filter(None, left)) or "all",
        "cheap conv": _list([(d, d) for d in takes.dw_sizes]),
        "activations": _list(takes.acts),
        "depthwise": f"{_list(takes.depthwise)} at stride {_list(takes.depthwise_strides)}",
        "squeeze-and-excite": _list(takes.gate_acts),
        "eps of a norm": "any" if takes.eps == COMMON.eps else " to ".join(f"{eps:.3g}" for eps in takes.eps),
    }


def _list(values: Iterable) -> str:
    return ", ".join("×".join(map(str, each)) if isinstance(each, tuple) else _short(_words(each)) for each in values)


def _short(value: object) -> str:
    if isinstance(value, list):
        return _list(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value).removeprefix("torch.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(options: argparse.Namespace) -> int:
    """print which backends work here and why the others don't"""
    facts = collect()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    for name, value in facts.items():
        if not isinstance(value, dict | list):
            _line(name, value)
    for name in ("cpu", "instruction_sets"):
        _line(name.replace("_", " "), _fields(facts[name]) if facts[name] else "none")
    for gpu in facts["gpus"] or [None]:
        _line("gpu", _fields(gpu) if gpu else "none")
    for name, built in facts["extensions"].items():
        above = ("supported", "chosen", "error")  # told by the instruction sets and the backends
        _line(f"{name} build", _fields({k: v for k, v in built.items() if k not in above}) if built else "not built")
    for title in ("environment", "backends"):
        print(f"\n{title}")
        for name, value in facts[title].items():
            if title == "backends":
                value = "works" if value is None else f"no: {value}"
            print(f"  {name:20} {value}")
    print("\nwhat their kernels take (the reference runs the rest)")
    for name, takes in TAKES.items():
        print(f"  {name}")
        for what, text in described(takes).items():
            print(f"    {what:18} {text}")
    return 0


def _line(name: str, value: object) -> None:
    print(f"{name:17} {value}")


def _fields(facts: dict) -> str:
    return "; ".join(f"{name}: {_short(value)}" for name, value in facts.items() if value is not None)
