"""How everything here is timed: in turns, cold or warm as named, as medians of repeats whose spread decides about ties.

All functions of one comparison take turns within one process, call by call, in an order that reverses every round, so
that clock drift and other load hit all alike. A *repeat* is ``samples`` such rounds; the spread of a timing is the
range of its repeats' medians, and a difference no larger than the larger spread of the two is a tie.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gpu_clock import GpuClock, Sample, sm_mhz

CACHES = ("flush", "rotate", "warm")
"""Before a timed call: the last-level cache is filled with other data; the input is another one than last time; an untimed
call of the same function runs."""
SETTLE_SECONDS = 0.002
"""On the CPU, before each sample: thread pools of the peer before (OpenMP's, ONNX Runtime's) spin on for about a millisecond
after their work is done, on the cores that the next peer needs."""
MAX_INPUTS = 64


class Timed(NamedTuple):
    """What is timed: ``call(before(x))``, of which only ``call`` counts."""

    call: Callable[[Any], object]
    before: Callable[[Tensor], Any] = lambda x: x


@dataclass(frozen=True)
class Method:
    cache: str = "flush"
    clock: str = "events"
    """"events": the GPU's own time, by CUDA events, without the host's (``gpu_clock``); "wall": perf_counter from an idle
    device to an idle device. The CPU has "wall" only."""
    warmup: int = 3
    samples: int = 20
    repeats: int = 5
    max_seconds: float = 20.0
    """Estimated time of one comparison above which samples are cut, to no fewer than 3."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call."""

    p20: float
    p50: float
    p80: float
    medians: tuple[float, ...]
    """Of each repeat."""

    @classmethod
    def of(cls, repeats: list[list[float]]) -> Timing:
        every = sorted(t for repeat in repeats for t in repeat)

        def quantile(q: float) -> float:
            return every[min(int(q * len(every)), len(every) - 1)]

        medians = tuple(statistics.median(repeat) for repeat in repeats)
        return cls(quantile(0.2), statistics.median(every), quantile(0.8), medians)

    @classmethod
    def from_row(cls, ms: dict) -> Timing:
        return cls(ms["p20"], ms["p50"], ms["p80"], tuple(ms["medians"]))

    def as_row(self) -> dict:
        return {k: [round(m, 6) for m in v] if k == "medians" else round(v, 6) for k, v in asdict(self).items()}

    @property
    def spread(self) -> float:
        return max(self.medians) - min(self.medians)


def verdict(base: Timing, other: Timing) -> str:
    """Whether ``other`` is "faster" or "slower" than ``base``, or it is a "tie"."""
    if abs(other.p50 - base.p50) <= max(base.spread, other.spread):
        return "tie"
    return "faster" if other.p50 < base.p50 else "slower"


def cache_bytes(device: torch.device) -> int:
    """Size of the device's last-level cache."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1))
    return max(sizes, default=32 * 2**20)


def rotation(x: Tensor, cache: str) -> list[Tensor]:
    """The inputs that calls take in turn: x alone, or for "rotate" enough copies to fill the cache twice (up to 64)."""
    if cache != "rotate":
        return [x]
    copies = math.ceil(2 * cache_bytes(x.device) / (x.numel() * x.element_size()))
    return [x, *(x.clone() for _ in range(min(max(copies, 2), MAX_INPUTS) - 1))]


class Flush:
    """Fills the last-level cache with other data by reading them: written lines would be written back while the next call is
    timed, at its cost."""

    def __init__(self, device: torch.device):
        self.buffer = torch.zeros(max(2 * cache_bytes(device), 2**26) // 4, device=device)

    def __call__(self) -> None:
        self.buffer.sum()


class Timings(NamedTuple):
    """What a comparison measured."""

    of: dict[str, Timing]
    samples: int
    """Per repeat."""
    host_bound: frozenset[str]
    """Functions whose events, in some sample, hold host time."""
    sm_mhz: tuple[float, float] | None
    """The GPU's clock before and after."""


def time_interleaved(
    functions: dict[str, Timed],
    inputs: list[Tensor],
    method: Method,
    tick: Callable[[float], object] = lambda fraction: None,
) -> Timings:
    """Times all ``functions`` in turns; ``tick`` hears what fraction is done."""
    device = inputs[0].device
    gpu = device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    flush: Callable[[], None] = Flush(device) if method.cache == "flush" else lambda: None
    clock = GpuClock() if gpu and method.clock == "events" else None

    def once(name: str, x: Tensor) -> Sample | float:
        f = functions[name]
        if not gpu:
            time.sleep(SETTLE_SECONDS)
        if method.cache == "warm":
            f.call(f.before(x))
        prepared = f.before(x)
        flush()
        if clock:
            return clock.take(name, lambda: f.call(prepared))
        synchronize()
        start = time.perf_counter()
        f.call(prepared)
        synchronize()
        return (time.perf_counter() - start) * 1e3

    def sample(name: str, x: Tensor) -> Sample | float:
        while True:
            taken = once(name, x)
            if clock is None or taken.isolated or not clock.lengthen(name):  # type: ignore[union-attr]
                return taken

    for name in functions:
        for x in (*inputs, *inputs[:1] * method.warmup):
            sample(name, x)
    synchronize()
    before = sm_mhz() if gpu else None
    start = time.perf_counter()
    for name in functions:
        sample(name, inputs[0])
    synchronize()
    round_seconds = time.perf_counter() - start
    samples = max(3, min(method.samples, int(method.max_seconds / (round_seconds * method.repeats + 1e-9))))

    names = list(functions)
    collected: dict[str, list[list[float]]] = {name: [] for name in names}
    host_bound: set[str] = set()
    for repeat in range(method.repeats):
        measured: dict[str, list] = {name: [] for name in names}
        for i in range(samples):
            x = inputs[(repeat * samples + i) % len(inputs)]
            for name in names if i % 2 else reversed(names):
                measured[name].append(sample(name, x))
        synchronize()
        for name in names:
            collected[name].append([m.milliseconds() if clock else m for m in measured[name]])
            if clock and not all(m.isolated for m in measured[name]):
                host_bound.add(name)
        tick((repeat + 1) / method.repeats)
    clocks = (before, sm_mhz()) if before is not None else None
    return Timings(
        {name: Timing.of(repeats) for name, repeats in collected.items()}, samples, frozenset(host_bound), clocks
    )


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read and written bytes together, of a copy whose two sides fill the cache four times, or more."""
    size = max(2 * cache_bytes(device), 2**28 if device.type == "cpu" else 2**30)
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    method = Method(cache="warm", samples=5, repeats=3)
    timing = time_interleaved({"copy": Timed(target.copy_)}, [source], method).of["copy"]
    return 2 * source.numel() * 4 / timing.p50 / 1e6


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a large matrix product, the compute roof of the roofline plot."""
    # PyTorch's half-precision products on a CPU without instructions for them are slower by a hundred times
    n = 8192 if device.type == "cuda" else 1536 if dtype == torch.float32 else 384
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    method = Method(cache="warm", samples=3, repeats=3)
    return 2 * n**3 / time_interleaved({"mm": Timed(lambda a: a @ b)}, [a], method).of["mm"].p50 / 1e6
