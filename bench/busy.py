"""A captured network on the CPU while another program keeps one core busy, beside the same on a quiet machine.

Rounds take turns: quiet, then with a process that computes without end, pinned to the last core. Times are wall clock per call
of all rounds; ``ratio`` is that of the medians.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

import ghostfused
from ghostfused.cli import inputs

from . import cases, measure
from .console import milliseconds, table
from .environment import title
from .results import Writer

_PROGRAM = "import os, sys; hasattr(os, 'sched_setaffinity') and os.sched_setaffinity(0, {int(sys.argv[1])}); print(flush=True)\n"
_PROGRAM += "while True: pass"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", default="paper", help="as in `network`")
    parser.add_argument("--size", type=inputs.positive, default=224)
    parser.add_argument("--rounds", type=inputs.positive, default=3, help="of each kind, default 3")
    parser.add_argument("--seconds", type=inputs.amount, default=2.0, help="of a round, default 2")
    parser.add_argument("--fail-above", type=inputs.amount, metavar="RATIO", help="exit with 1 where a ratio is larger")
    cases.add_setting_arguments(parser, batch="1", modes=False)
    measure.add_arguments(parser, cache="warm")


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Another program on the last core that this process may use."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) - 1
    with subprocess.Popen([sys.executable, "-c", _PROGRAM, str(core)], stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout is not None
            program.stdout.readline()
            yield
        finally:
            program.kill()


def call_times(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call, for so long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or not times:
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": statistics.median(ordered), "p90": ordered[len(ordered) * 9 // 10], "max": ordered[-1]}


def main(options: argparse.Namespace) -> int:
    """what a program that keeps one core busy costs a captured network on the CPU"""
    device = measure.set_device(options, only="cpu")
    (model,) = cases.networks(options.network, options.size).values()
    worst, shown = 0.0, []
    with Writer(options.output, device) as writer, torch.inference_mode():
        for setting in cases.settings(options):
            x = setting.input((3, options.size, options.size))
            captured = ghostfused.capture(setting.place(model), x)
            quiet: list[float] = []
            busy: list[float] = []
            call_times(lambda: captured(x), options.seconds / 4)  # noqa: B023
            for _ in range(options.rounds):
                quiet += call_times(lambda: captured(x), options.seconds)  # noqa: B023
                with busy_core():
                    busy += call_times(lambda: captured(x), options.seconds)  # noqa: B023
            row = {
                "kind": "busy", "name": options.network, "size": options.size, **vars(setting),
                "quiet_ms": summary(quiet), "busy_ms": summary(busy),
            }  # fmt: skip
            row["ratio"] = round(row["busy_ms"]["p50"] / row["quiet_ms"]["p50"], 3)
            writer.write(row)
            worst = max(worst, row["ratio"])
            times = [milliseconds(row[which][p]) for which in ("quiet_ms", "busy_ms") for p in ("p50", "p90", "max")]
            shown.append([f"{setting.batch} {setting.dtype} {setting.layout}", *times, f"{row['ratio']:.2f}"])
    columns = ["setting", "quiet p50", "p90", "max", "one core busy p50", "p90", "max", "ratio of p50"]
    heading = f"{options.network} at {options.size}², captured; {title(writer.environment)}"
    table(heading, columns, shown)
    return int(options.fail_above is not None and worst > options.fail_above)
