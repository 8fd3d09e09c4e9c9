"""All measurements of this machine, in one go: a results file for each command, then the report.

``--quick`` is for trying it out: fewer modules, no peer that takes long to compile.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import torch

from ghostfused.cli import inputs

from .cases import ROOT

RESULTS = ROOT / "bench" / "results"
COMMANDS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "launches": ["launches", "--network", "paper,seed"],
        "memory": ["memory"],
        "rss": ["memory", "--rss"],
        "overhead": ["overhead", "--threads", "1"],
        "cpu_peak": ["cpu_peak", "--batch", "1,16"],
        "module": ["module"],
        "network": ["network", "--batch", "1,4,16", "--max-seconds", "30"],
    },
    "cuda": {
        "launches": ["launches", "--network", "paper,seed"],
        "memory": ["memory", "--dtype", "float16", "--batch", "64"],
        "overhead": ["overhead"],
        "module": ["module", "--dtype", "float16,float32", "--batch", "1,64,256"],
        "training": ["module", "--dtype", "float16", "--batch", "64", "--mode", "training_forward,backward"],
        "network": ["network", "--dtype", "float16", "--batch", "1,4,16,64,256"],
    },
}
QUICK_PEERS = ["--peers", "eager,eager+graph,bn_folded,onnxruntime,openvino*,ghostfused_*"]
QUICK = {
    "cpu_peak": ["--only", "blocks.0,blocks.6.3,blocks.8.0", "--batch", "1", "--samples", "5", "--repeats", "3"],
    "module": [*QUICK_PEERS, "--only", "blocks.0,blocks.6.3,blocks.8.0", "--samples", "5", "--repeats", "3"],
    "network": [*QUICK_PEERS, "--batch", "1,2", "--samples", "3", "--repeats", "3"],
}


def results_folder(device: str) -> Path:
    """bench/results/cpu, or a folder named by the GPU."""
    return RESULTS / ("cpu" if device == "cpu" else re.sub(r"\W+", "_", torch.cuda.get_device_name()).lower())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    parser.add_argument(
        "--output", type=inputs.new_folder, metavar="DIR", help="default bench/results/cpu or …/NAME_OF_THE_GPU"
    )
    parser.add_argument("--others-tolerance", type=inputs.amount, default=1.0, metavar="FACTOR", help="as in `module`")
    parser.add_argument("--quick", action="store_true", help="a small run, to out/bench unless --output says otherwise")


def main(options: argparse.Namespace) -> int:
    """run every benchmark and make the report"""
    device = inputs.device(options.device).type
    folder = options.output or (ROOT / "out" / "bench" if options.quick else results_folder(device))
    failed = []
    for name, arguments in COMMANDS[device].items():
        if options.quick:
            arguments = arguments + QUICK.get(arguments[0], [])
        if arguments[0] in ("module", "network"):
            arguments = [*arguments, "--others-tolerance", f"{options.others_tolerance:g}"]
        command = [*arguments, "--device", device, "--output", str(folder / f"{name}.jsonl")]
        print(f"\n== python -m bench {' '.join(command)}", flush=True)
        # a process each: no benchmark inherits the memory and the caches of another
        if subprocess.run([sys.executable, "-m", "bench", *command], cwd=ROOT).returncode:
            failed.append(name)
    report = ["report", str(folder), "--output", str(ROOT / "out" / "report" if options.quick else folder / "report")]
    subprocess.run([sys.executable, "-m", "bench", *report], cwd=ROOT, check=True)
    if failed:
        print(f"{', '.join(failed)}: a peer was wrong or broke, or the command failed; see above")
    return int(bool(failed))
