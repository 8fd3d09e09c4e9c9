"""Many threads that call one captured network on the CPU, on inputs of mixed sizes, beside one thread that does the same calls.

A round is so many calls, which one caller makes, or which callers take from one list until it is empty. Rounds take turns.
Every result of the first round of both is compared with the model's for that input called alone, bit by bit. ``ratio`` is
the throughput of many over that of one, the median of the rounds' ratios; ``cpu_ms`` is processor time per call, of all
threads. ``growth_mb`` is what the process's memory grew by over the second half of the rounds.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import ghostfused
from ghostfused.cli import inputs

from . import cases, measure
from .console import table
from .environment import title
from .results import Writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", default="paper", help="as in `network`")
    parser.add_argument(
        "--sizes",
        default="224,192,256",
        metavar="N,N",
        type=inputs.several(inputs.positive),
        help="height and width of the inputs, default 224,192,256",
    )
    parser.add_argument("--callers", type=inputs.positive, default=8, help="default 8")
    parser.add_argument("--calls", type=inputs.positive, default=240, help="of a round, default 240")
    parser.add_argument("--rounds", type=inputs.positive, default=5, help="of each kind, default 5")
    parser.add_argument(
        "--fail-below", type=inputs.amount, metavar="RATIO", help="exit with 1 where a ratio is smaller"
    )
    cases.add_setting_arguments(parser, batch="1,2", modes=False)
    measure.add_device_arguments(parser)


def seconds(callers: int, calls: Sequence[Callable[[], object]]) -> float:
    """How long so many threads take for ``calls``, each of which is made once. Raises what a call raises."""
    waiting, lock = iter(calls), threading.Lock()
    errors: list[Exception] = []

    def work() -> None:
        while True:
            with lock:
                call = next(waiting, None)
            if call is None or errors:
                return
            try:
                call()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - start
    if errors:
        raise errors[0]
    return took


def resident_bytes() -> int:
    """This process's memory, as Linux counts it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mixed(captured: Callable[[Tensor], Tensor], inputs: list[Tensor], count: int) -> list[Callable[[], Tensor]]:
    """``count`` calls of ``captured``, the inputs in turn."""
    return [lambda x=x: captured(x) for x in itertools.islice(itertools.cycle(inputs), count)]  # type: ignore[misc]


def check(captured: Callable[[Tensor], Tensor], inputs: list[Tensor], callers: int, calls: int) -> None:
    """Raises RuntimeError unless so many callers get what one gets."""
    alone = [captured(x) for x in inputs]
    got: list[tuple[int, bool]] = []  # append is atomic

    def compared(i: int) -> Callable[[], None]:
        return lambda: got.append((i, torch.equal(captured(inputs[i]), alone[i])))

    seconds(callers, [compared(i % len(inputs)) for i in range(calls)])
    if wrong := sorted({i for i, equal in got if not equal}):
        shapes = ", ".join(str(tuple(inputs[i].shape)) for i in wrong)
        raise RuntimeError(f"{callers} callers: expected what one caller gets, got something else for {shapes}")


def main(options: argparse.Namespace) -> int:
    """throughput of many threads that call one captured network on the CPU, over that of one"""
    device = measure.set_device(options, only="cpu")
    sizes = options.sizes
    (model,) = cases.networks(options.network, min(sizes)).values()
    batches, options.batch = options.batch, options.batch[:1]
    lowest, shown = float("inf"), []
    with Writer(options.output, device) as writer, torch.inference_mode():
        for setting in cases.settings(options):
            one_image = [setting.input((3, size, size))[:1] for size in sizes]
            inputs = [torch.cat([x] * batch) for batch in batches for x in one_image]
            captured = ghostfused.capture(setting.place(model), inputs)
            check(captured, inputs, options.callers, options.calls)
            calls = mixed(captured, inputs, options.calls)
            per_second: dict[int, list[float]] = {1: [], options.callers: []}
            cpu_ms: dict[int, list[float]] = {1: [], options.callers: []}
            memory: list[float] = []
            for number in range(options.rounds):
                for callers in per_second if number % 2 == 0 else reversed(per_second):
                    before = time.process_time()
                    per_second[callers].append(round(options.calls / seconds(callers, calls), 3))
                    cpu_ms[callers].append(round((time.process_time() - before) / options.calls * 1e3, 3))
                memory.append(round(resident_bytes() / 1e6, 3))
            one, many = per_second.values()
            ratios = [round(b / a, 3) for a, b in zip(one, many, strict=True)]
            row = {
                "kind": "callers", "name": options.network, "sizes": sizes, "batches": batches, **vars(setting),
                "threads": torch.get_num_threads(), "callers": options.callers, "calls": options.calls,
                "one_per_second": one, "many_per_second": many, "ratios": ratios,
                "one_cpu_ms": statistics.median(cpu_ms[1]), "many_cpu_ms": statistics.median(cpu_ms[options.callers]),
                "ratio": round(statistics.median(ratios), 3),
                "growth_mb": round(memory[-1] - memory[(len(memory) - 1) // 2], 3), "memory_mb": memory,
            }  # fmt: skip
            del row["batch"]
            writer.write(row)
            lowest = min(lowest, row["ratio"])
            shown.append([
                f"{setting.dtype} {setting.layout}", f"{statistics.median(one):.1f}", f"{statistics.median(many):.1f}",
                f"{row['ratio']:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", f"{row['one_cpu_ms']:.1f}", f"{row['many_cpu_ms']:.1f}", f"{row['growth_mb']:.1f}",
            ])  # fmt: skip
    heading = f"{options.network} at {','.join(map(str, sizes))}, batch {','.join(map(str, batches))}, captured, calls per second; "
    columns = ["setting", "1 caller", f"{options.callers} callers", "ratio", "of rounds",
               "1 caller's CPU ms", f"{options.callers} callers'", "memory grew by MB"]  # fmt: skip
    table(heading + title(writer.environment), columns, shown)
    return int(options.fail_below is not None and lowest < options.fail_below)
