"""The clock of the benchmarks on a GPU, on a device made up of two times: the host's, and when the device will be idle."""

import pytest
import torch

from bench import gpu_clock
from bench.timing import Method, Timed, time_interleaved

CYCLES_PER_MS = 1.5e6


class Device:
    """Kernels run one after another, each once the host has enqueued it."""

    def __init__(self):
        self.now = self.idle_at = 0.0

    def enqueue(self, ms: float, host_ms: float = 0.001) -> None:
        self.now += host_ms
        self.idle_at = max(self.now, self.idle_at) + ms

    def synchronize(self) -> None:
        self.now = max(self.now, self.idle_at)

    def event(self, enable_timing: bool = False):
        return Event(self)


class Event:
    def __init__(self, device: Device):
        self.device = device

    def record(self) -> None:
        self.at = max(self.device.now, self.device.idle_at)

    def query(self) -> bool:
        return self.device.now >= self.at

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other) -> float:
        return other.at - self.at


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.enqueue(cycles / CYCLES_PER_MS), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    return device


def kernels(device: Device, n: int, ms: float, host_ms: float):
    def call():
        for _ in range(n):
            device.enqueue(ms, host_ms)

    return call


def test_the_clock_of_the_multiprocessors(device):
    assert gpu_clock.sm_mhz() == pytest.approx(CYCLES_PER_MS / 1e3, rel=2e-3)


@pytest.mark.parametrize("host_ms", [0.001, 0.05, 0.4])
def test_time_is_the_devices_alone(device, host_ms):
    clock = gpu_clock.GpuClock()
    call = kernels(device, 7, 0.002, host_ms)
    while not (sample := clock.take("f", call)).isolated:
        assert sample.milliseconds() >= 0.999 * 7 * 0.002
        assert clock.lengthen("f")
    assert sample.milliseconds() == pytest.approx(7 * 0.002)


def test_a_call_that_waits_for_the_device_is_marked_and_soon_left_alone(device):
    clock = gpu_clock.GpuClock()

    def call():
        device.enqueue(0.1)
        device.synchronize()

    tries = 0
    while not clock.take("f", call).isolated and clock.lengthen("f"):
        tries += 1
    assert 3 < tries < 12
    before = device.now
    assert not clock.take("f", call).isolated
    assert device.now - before < 0.2  # without a spin, now


def test_a_comparison_says_whose_times_hold_host_time(device, monkeypatch):
    class X:
        device = torch.device("cuda")

    def waits(x):
        device.enqueue(0.3)
        device.synchronize()

    functions = {"ours": Timed(lambda x: kernels(device, 2, 0.01, 0.2)()), "waits": Timed(waits)}
    timings = time_interleaved(functions, [X()], Method(cache="rotate", samples=4, repeats=2))  # type: ignore[list-item]
    assert timings.host_bound == {"waits"}
    assert timings.of["ours"].p50 == pytest.approx(0.02)
    assert timings.of["waits"].p50 > 0.29
    assert timings.sm_mhz == pytest.approx((CYCLES_PER_MS / 1e3,) * 2, rel=2e-3)
