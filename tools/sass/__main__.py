"""Counts what the kernels of Ghost modules would issue on an H100, by running their machine code on the CPU.

    python -m tools.sass --configs tests/data/ghost_configs.jsonl --source timm/ghostnet_100@224 --layout nhwc --json

For each line of the file: the launch is the planner's for that batch on an H100; the blocks of one image run; what they write
is compared with the float64 reference. Times are counts at an H100's rates, of a GPU that does nothing else: none was measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import cases, environment
from ghostfused.cli import inputs
from ghostfused.cli.inputs import BadInput
from ghostfused.cli.verify import read_rows

from . import build, costs, device


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.sass", description=__doc__.split("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--configs", type=Path, help="modules: JSON lines as in tests/data/ghost_configs.jsonl")
    what.add_argument(
        "--network", help="a whole network, fused: 'paper' (GhostNet 1.0×) or as `bench network` takes it"
    )
    parser.add_argument("--size", type=inputs.positive, default=224, help="of the network's input")
    parser.add_argument("--source", help="only lines of this source")
    parser.add_argument("--only", default="", help="only modules whose name contains this, as in '24->72'")
    parser.add_argument("--batch", type=inputs.positive, default=64)
    parser.add_argument(
        "--dtype", default="float16", type=inputs.dtype, choices=("float16", "bfloat16", "float32", "tf32")
    )
    parser.add_argument("--layout", default="nhwc", type=inputs.layout, choices=("nhwc", "nchw"))
    parser.add_argument("--mode", default="forward", choices=("forward", "training"))
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    parser.add_argument("--backend", default="cuda", choices=("cuda", "triton"), help="of modules, forward")
    parser.add_argument("--race", action="store_true", help="instead, look for races for shared memory")
    parser.add_argument(
        "--latency",
        action="store_true",
        help="of modules, forward: also the time by a model of one SM, which no GPU has checked",
    )
    parser.add_argument(
        "--general",
        action="store_true",
        help="of modules, forward: the general kernels, by weights that lie between vectors",
    )
    parser.add_argument("--jobs", type=inputs.positive, default=1, help="processes")
    return parser.parse_args(argv)


def configs(path: Path, source: str | None, only: str) -> list[dict[str, Any]]:
    from .judge import name_of

    rows = [row for _, row in read_rows(path, source) if only in name_of(row)]
    if not rows:
        raise BadInput(f"--only: expected a part of a module's name, as in '24->72', got {only!r}")
    return rows


def provenance() -> dict[str, str]:
    """What was run. ``sources`` is of the extension alone, so that it tells whether a file of counts is of these kernels."""
    git = ["git", "describe", "--always", "--exclude=*"]
    commit = subprocess.run(git, cwd=build.ROOT, capture_output=True, text=True, check=False).stdout.strip()
    rates = f"{costs.SMS} SMs, {costs.CLOCK / 1e9} GHz, {costs.DRAM / 1e12} TB/s"
    command = " ".join(["python -m tools.sass", *(f"'{a}'" if " " in a or ">" in a else a for a in sys.argv[1:])])
    return {
        "evidence": "counted, not measured",
        "rates": rates,
        "commit": commit + ("-dirty" if environment.has_changes() else ""),
        "sources": build.sources_hash(),
        "nvcc": build.nvcc_version(),
        "command": command,
    }


def show(row: Any) -> str:
    times = f"{row.issue_us:8.2f} {row.shared_us:8.2f} {row.hmma_us:7.2f} {row.dram_us:7.2f}"
    verdict = "" if row.ok else "  WRONG"
    return f"{row.module:24s} ×{row.count} {times} {row.store_sector_ratio:6.2f} {row.error:9.1e}{verdict}"


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    return inputs.in_one_line("python -m tools.sass", functools.partial(run, options))


def run(options: argparse.Namespace) -> int:
    if options.network:
        cases.networks(options.network, options.size)
    else:
        work = configs(options.configs, options.source, options.only)
    if reason := build.missing():
        raise BadInput(reason)
    device.enter("tools.sass")
    if options.network:
        return print_network(options)
    return print_races(work, options) if options.race else print_costs(work, options)


def print_network(options: argparse.Namespace) -> int:
    from .networks import judge_network

    *lines, sums = judge_network(options)
    for line in lines if options.json else []:
        print(json.dumps(line))
    for line in [] if options.json else lines:
        times = " ".join(f"{line.get(name, 0):8.2f}" for name in ("issue_us", "shared_us", "dram_us"))
        print(f"{line.get('kernel', line.get('op')):48s} ×{line['count']:<3d} {times}")
    print(json.dumps(sums | provenance()) if options.json else ", ".join(f"{k} {v}" for k, v in sums.items()))
    return 0 if sums["ok"] else 1


def print_races(work: list[dict[str, Any]], options: argparse.Namespace) -> int:
    from .judge import name_of, races

    failed = False
    for config in work:
        found = races(config, options)
        failed |= bool(found)
        print("\n".join([f"{name_of(config)}: {len(found) or 'no'} races", *found]), flush=True)
    return int(failed)


def print_costs(work: list[dict[str, Any]], options: argparse.Namespace) -> int:
    from .judge import judge_config, line_of, totals

    rows = []
    if not options.json:
        print(
            "module                        issue   shared    hmma    DRAM stores     error   (µs counted, not measured)"
        )
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        results = pool.map(judge_config, work, [options] * len(work)) if options.jobs > 1 else (
            judge_config(config, options) for config in work
        )  # fmt: skip
        for config, row in zip(work, results, strict=True):
            rows.append(row)
            line = json.dumps(line_of(row, config, options)) if options.json else show(row)
            print(line, flush=True)
    sums = totals(rows)
    if options.json:
        print(json.dumps({"kind": "sums", **sums, **provenance()}))
    else:
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in sums.items()))
    return 0 if sums["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
