"""A GPU's own time of a call, by CUDA events, without the host's.

Two events around a call hold more than the kernels where the device waits for the host: for the first launch after an idle
moment, and between launches that are shorter than their enqueueing. So the device first spins, reading no memory, until the
host has enqueued the whole call. Whether it did so is seen at every sample: the first event must still be ahead of the
device when the last has been enqueued. If it isn't, the sample is *not isolated*; the spin of that function is doubled and
the sample taken again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

FIRST_SPIN_MS = 0.1
MAX_SPIN_MS = 12.8
"""A call that isn't isolated by this waits for the device itself, or takes the host longer: no spin will do."""
_PROBE_CYCLES = 2_000_000


class Sample(NamedTuple):
    """Events before and after a call."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    isolated: bool

    def milliseconds(self) -> float:
        """Once the device has passed both."""
        return self.start.elapsed_time(self.end)


def sm_mhz() -> float:
    """The clock of the SMs at this moment: so many cycles of the device's own counter, over the time they take."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.cuda._sleep(_PROBE_CYCLES)
    end.record()
    end.synchronize()
    return _PROBE_CYCLES / start.elapsed_time(end) / 1e3


class GpuClock:
    """Takes samples of named functions, each behind a spin of its own length."""

    def __init__(self) -> None:
        sm_mhz()  # loads the kernel, and wakes an idle device
        self._cycles_per_ms = sm_mhz() * 1e3
        self._spin_ms: dict[str, float] = {}

    def take(self, name: str, call: Callable[[], object]) -> Sample:
        """One sample, isolated or not."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        spin_ms = self._spin_ms.setdefault(name, FIRST_SPIN_MS)
        if spin_ms:
            torch.cuda._sleep(int(spin_ms * self._cycles_per_ms))
        start.record()
        call()
        end.record()
        return Sample(start, end, isolated=not start.query())

    def lengthen(self, name: str) -> bool:
        """Doubles the spin of ``name``; False if that is of no use, and there will be none from now on."""
        spin_ms = self._spin_ms[name] * 2
        useful = 0 < spin_ms <= MAX_SPIN_MS
        self._spin_ms[name] = spin_ms if useful else 0.0
        return useful
