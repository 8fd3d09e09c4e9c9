"""Stand-ins for the tests of the benchmark suite: a peer, a clock, and made-up results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from bench import cases, peers, results
from bench.cases import Setting, Unfused
from bench.timing import Method, Timed, Timing
from ghostfused import FusedGhostModule

QUICK = Method(cache="warm", samples=3, repeats=2, warmup=0)
SHAPE = (8, 6, 6)
needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed"
)


def small_ghost_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return cases.layer("one", Unfused(FusedGhostModule(8, 12)), SHAPE).calibrated()


class Planted(peers.Eager):
    """Eager, but for what a test does to it; counts its calls."""

    modes = cases.MODES

    def __init__(self, name: str, change=lambda out: out):
        self.name, self.change, self.calls = name, change, 0

    def prepare(self, module, x):
        def run(x):
            self.calls += 1
            return self.change(module(x))

        return run


class Clock:
    """Stands for ``time`` in bench.timing: it moves only when a timed function says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        pass

    def function(self, *milliseconds: float, log: list | None = None, name: str = ""):
        calls = iter(range(10**9))

        def run(x):
            self.now += milliseconds[next(calls) % len(milliseconds)] / 1e3
            if log is not None:
                log.append(name)

        return Timed(run)


def environment() -> dict:
    from bench.environment import collect

    return collect(torch.device("cpu"))


def module_rows(ms: dict[str, float], spread: float = 0.02, layers=None) -> list[dict]:
    rows = []
    for layer in layers or cases.layers_of(cases.network("paper")):
        for peer, median in ms.items():
            row = {"kind": "module", **layer.as_row(), **vars(Setting()), "peer": peer, "status": "ok"}
            row |= {"floor_bytes": layer.floor_bytes(1, 4), "flops": layer.flops(1), "error": 0.0, "cache": "warm"}
            medians = (median, median + spread, median)
            row["ms"] = Timing.of([[m] for m in medians]).as_row()
            rows.append(row)
    return rows


def network_rows() -> list[dict]:
    rows = []
    for peer, ms in (("eager", 9.0), ("openvino_default", 5.0), ("ghostfused_reference", 8.0)):
        for batch in (1, 2, 4):
            row = {
                "kind": "network",
                "name": "paper",
                "count": 1,
                "size": 224,
                **vars(Setting(batch=batch)),
                "peer": peer,
            }
            rows.append(row | {"status": "ok", "error": 0.0, "ms": Timing.of([[ms * batch]] * 3).as_row()})
    rows[3]["precision"] = "bfloat16"
    return rows


def write(path: Path, rows: list[dict]) -> Path:
    rows = [environment(), *rows, {"kind": "end", "seconds": 1.0}]
    for row in rows:
        results.check(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path
