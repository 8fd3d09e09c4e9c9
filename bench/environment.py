"""What a result depends on beside the code that is timed: the first line of every results file."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import ghostfused
from ghostfused.cli.info import cpu_name, version_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "numpy", "timm", "onnx", "onnxruntime", "openvino", "tensorrt", "torch_tensorrt")
FLAGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "GHOSTFUSED_CUDA", "TORCH_CUDA_ARCH_LIST")
_GPU_FIELDS = (
    "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu,"
    "persistence_mode"
)


def _run(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_state() -> dict | None:
    """nvidia-smi's name, driver, clocks, power and temperature of the first GPU, at this moment."""
    text = _run("nvidia-smi", f"--query-gpu={_GPU_FIELDS}", "--format=csv,noheader", "-i", "0")
    return dict(zip(_GPU_FIELDS.split(","), (v.strip() for v in text.split(",")), strict=False)) if text else None


_RESULTS = ":(exclude,top)bench/results", ":(exclude,top)tools/sass/results"


def has_changes() -> bool:
    """Whether a tracked file differs from the commit. Results don't count: a run before this one may have written them."""
    return bool(_run("git", "status", "--porcelain", "--untracked-files=no", "--", ":/", *_RESULTS))


def collect(device: torch.device) -> dict:
    """Machine, versions, commit and flags."""
    facts: dict = {
        "kind": "environment",
        "schema": 1,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "device": device.type,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "os": platform.platform(),
        "python": platform.python_version(),
        "ghostfused": ghostfused.__version__,
        "packages": {p: v for p in PACKAGES if (v := version_of(p))},
        "cuda": torch.version.cuda,
        "commit": _run("git", "rev-parse", "HEAD"),
        "dirty": None,
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if facts["commit"]:
        facts["dirty"] = has_changes()
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "l2_bytes": p.L2_cache_size,
            "memory_bytes": p.total_memory,
            "gpu_state": gpu_state(),
        }
    return facts


def title(facts: dict) -> str:
    """One line for tables and plots."""
    where = facts["gpu"] if facts["device"] == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    if facts["device"] == "cpu" and facts["threads"] == 1:
        where = where.removesuffix("s")
    return f"{where}, torch {facts['packages'].get('torch')}"
