"""The benchmark suite: what is wrong is not timed, what is slower is shown, what is drawn is complete. No times are judged."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_stand_ins import QUICK, SHAPE, Clock, Planted
from spies import needs_cpu_kernels

from bench import cases, measure, peers, timing
from bench.cases import Setting
from bench.timing import Method, Timed, Timing, verdict
from ghostfused.numerics import relative_error

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


def _last_sample(out):
    out = out.clone()
    out[-1, -1, -1, -1] += 1e-3
    return out


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        ("inference", lambda out: out * 1.0001),
        ("inference", _last_sample),
        ("inference", lambda out: torch.full_like(out, float("nan"))),
        ("inference", lambda out: out[:, :-1]),
        ("training_forward", lambda out: out * 1.0001),
        ("backward", _WrongGradient.apply),
    ],
)
def test_wrong_peer_is_caught_and_not_timed(ghost, mode, change):
    wrong, right = Planted("wrong", change), Planted("right")
    setting = Setting(batch=3, mode=mode)
    rows = measure.measure(ghost, SHAPE, setting, {"eager": peers.Eager(), "wrong": wrong, "right": right}, QUICK)
    by_peer = {row["peer"]: row for row in rows}
    assert by_peer["wrong"]["status"] == "WRONG"
    assert "ms" not in by_peer["wrong"]
    assert wrong.calls == 1  # the one that was judged
    assert by_peer["right"]["status"] == by_peer["eager"]["status"] == "ok"
    assert right.calls > 1


def test_wrong_value_is_called_wrong(ghost):
    rows = measure.measure(ghost, SHAPE, Setting(), {"w": Planted("w", lambda out: out * 1.0001)}, QUICK)
    assert rows[0]["status"] == "WRONG"
    assert rows[0]["error"] > rows[0]["limit"]


def test_others_tolerance_is_not_for_ours(ghost):
    class Ours(Planted):
        ours = True

    slightly = 1 + 3e-6  # beyond the limit, within a hundred times the limit
    both = {"ours": Ours("ours", lambda out: out * slightly), "other": Planted("other", lambda out: out * slightly)}
    rows = measure.measure(ghost, SHAPE, Setting(), both, QUICK, others_tolerance=100)
    assert [row["status"] for row in rows] == ["WRONG", "ok"]


def test_broken_and_absent_peers_have_reasons_and_stop_nobody(ghost):
    def broken(out):
        raise RuntimeError("planted")

    class Absent(Planted):
        def unavailable(self, setting):
            return "not here"

    rows = measure.measure(
        ghost, SHAPE, Setting(), {"b": Planted("b", broken), "a": Absent("a"), "eager": peers.Eager()}, QUICK
    )
    assert [row["status"] for row in rows] == ["error", "absent", "ok"]
    assert "planted" in rows[0]["reason"]
    assert rows[1]["reason"] == "not here"


def test_every_peer_is_right_or_says_why_it_is_absent(ghost):
    """But for torch.compile, which takes seconds a module."""
    chosen = {n: p for n, p in peers.all_peers().items() if not isinstance(p, peers.Compiled)}
    rows = measure.measure(ghost, SHAPE, Setting(), chosen, QUICK, others_tolerance=10)
    assert {row["status"] for row in rows} <= {"ok", "absent"}, rows
    assert all(row["reason"] for row in rows if row["status"] == "absent")
    assert {"eager", "bn_folded", "ghostfused_reference"} <= {row["peer"] for row in rows if row["status"] == "ok"}
    if not torch.cuda.is_available():
        absent = {row["peer"] for row in rows if row["status"] == "absent"}
        assert {
            "eager+graph",
            "onnxruntime_cuda",
            "onnxruntime_tensorrt",
            "torch_tensorrt",
            "ghostfused_cuda",
        } <= absent


def test_a_captured_peer_hands_over_its_arguments(ghost, monkeypatch):
    """Or says which of them this version's ``capture`` lacks."""
    peer = peers.all_peers()["ghostfused_frozen_bf16"]
    given = []

    def capture(module, x, *, partial, freeze, weights):
        given.append((partial, freeze, weights))
        return module

    def older(module, x, *, partial, freeze):
        return module

    monkeypatch.setattr(peers, "unavailable_on", lambda backend, device: None)
    monkeypatch.setattr(peers, "capture", older)
    assert peer.unavailable(Setting()) == "this ghostfused.capture has no weights"
    monkeypatch.setattr(peers, "capture", capture)
    assert peer.unavailable(Setting(dtype="float16")) == "no float16"
    assert peer.unavailable(Setting()) is None
    (row,) = measure.measure(ghost, SHAPE, Setting(), {peer.name: peer}, QUICK)
    assert row["status"] == "ok"
    assert row["precision"] == "bfloat16"
    assert set(given) == {(True, True, "bfloat16")}


@needs_cpu_kernels
def test_a_whole_network_in_bfloat16(ghost):
    """Gets float32 and gives it back, by way of bfloat16."""
    peer = peers.all_peers()["ghostfused_bf16"]
    (row,) = measure.measure(ghost, SHAPE, Setting(), {peer.name: peer}, QUICK)
    assert (row["status"], row["precision"]) == ("ok", "bfloat16")
    x = torch.randn(1, *SHAPE)
    out = peer.prepare(copy.deepcopy(ghost), x)(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, out.bfloat16().float())
    assert 0 < relative_error(out, ghost(x).double()) < 0.05


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_modes_and_layouts(ghost, mode, layout):
    setting = Setting(batch=2, mode=mode, layout=layout)
    rows = measure.measure(ghost, SHAPE, setting, peers.select("eager,ghostfused_reference"), QUICK)
    assert [row["status"] for row in rows] == ["ok", "ok"], rows


def test_interleaved_order_and_medians(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    log: list[str] = []
    functions = {name: clock.function(ms, log=log, name=name) for name, ms in (("a", 1), ("b", 3))}
    method = Method("rotate", samples=4, repeats=3, warmup=2)
    timings, samples, *_ = timing.time_interleaved(functions, [torch.zeros(1)], method)
    assert samples == 4
    assert log[:6] == ["a"] * 3 + ["b"] * 3  # warm-up
    assert log[8:16] == ["b", "a", "a", "b", "b", "a", "a", "b"]  # the order reverses each round
    assert timings["a"].p50 == pytest.approx(1)
    assert timings["b"].medians == pytest.approx((3, 3, 3))
    assert timings["b"].spread == pytest.approx(0, abs=1e-9)


def test_samples_are_cut_to_the_time_allowed(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    method = Method("rotate", samples=20, repeats=2, max_seconds=1.1)
    _, samples, *_ = timing.time_interleaved({"a": clock.function(100)}, [torch.zeros(1)], method)
    assert samples == 5  # two repeats of five calls of 100 ms
    _, samples, *_ = timing.time_interleaved({"a": clock.function(10_000)}, [torch.zeros(1)], method)
    assert samples == 3


def test_rotation_and_flush_are_what_they_say(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4096)
    x = torch.randn(100)
    inputs = timing.rotation(x, "rotate")
    assert len({t.data_ptr() for t in inputs}) == len(inputs) >= 2 * 4096 / x.nbytes
    assert all(torch.equal(t, x) for t in inputs)
    seen: list[int] = []
    timing.time_interleaved({"f": Timed(lambda x: seen.append(x.data_ptr()))}, inputs, Method("rotate", samples=50))
    assert set(seen) == {t.data_ptr() for t in inputs}
    order: list[str] = []
    warm = Timed(lambda x: order.append("call"), lambda x: order.append("before"))
    timing.time_interleaved({"f": warm}, [x], Method("warm", samples=3, repeats=2, warmup=3))
    assert order == ["before", "call"] * (2 * (1 + 3 + 1 + 6))  # an untimed call, prepared anew, before each timed one
    flushed: list[int] = []
    monkeypatch.setattr(timing.Flush, "__call__", lambda self: flushed.append(self.buffer.nbytes))
    calls: list[int] = []
    timing.time_interleaved({"f": Timed(lambda x: calls.append(1))}, [x], Method("flush", samples=3, repeats=2))
    assert len(flushed) == len(calls)
    assert min(flushed) >= 2 * 4096


def test_a_flush_leaves_no_written_lines(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 4096)
    flush = timing.Flush(torch.device("cpu"))
    before = flush.buffer._version
    flush()
    assert flush.buffer._version == before


def test_peers_that_are_quick_to_prepare_are_heard_before_the_others(ghost):
    class Slow(Planted):
        slow_to_prepare = True

        def prepare(self, module, x):
            order.append(self.name)
            return super().prepare(module, x)

    order: list = []
    everybody = {"slow": Slow("slow"), "eager": peers.Eager(), "wrong": Planted("wrong", lambda out: out * 2)}
    rows = measure.measure(ghost, SHAPE, Setting(), everybody, QUICK, early=lambda rows: order.append(rows))
    early, then = order
    assert then == "slow"
    assert [(row["peer"], row["status"], row["preliminary"]) for row in early] == [
        ("eager", "ok", True),
        ("wrong", "WRONG", True),
    ]
    assert [row["peer"] for row in rows] == list(everybody)
    assert not any("preliminary" in row for row in rows)
    assert rows[0]["ms"]
    assert rows[1]["ms"] != early[0]["ms"]  # timed again, beside the slow one
    order.clear()
    measure.measure(ghost, SHAPE, Setting(), {"eager": peers.Eager()}, QUICK, early=order.append)
    assert order == []  # nobody to wait for


def test_a_case_that_nobody_can_run_costs_itself_only():
    from ghostfused.models.paper import GhostModule

    setting = Setting(batch=1, mode="training_forward")  # batch statistics of one value
    (row,) = measure.measure(GhostModule(3, 8).eval(), (3, 1, 1), setting, {"eager": peers.Eager()}, QUICK)
    assert row["status"] == "error"
    assert "more than 1 value per channel" in row["reason"]


def test_a_peer_that_breaks_while_timed_costs_the_case_only(ghost):
    def breaks(out):
        if broken.calls > 1:
            raise RuntimeError("out of memory\nand more")
        return out

    broken = Planted("broken", breaks)
    wrong = Planted("wrong", lambda out: out * 2)
    rows = measure.measure(ghost, SHAPE, Setting(), {"eager": peers.Eager(), "broken": broken, "wrong": wrong}, QUICK)
    assert [row["status"] for row in rows] == ["error", "error", "WRONG"]
    assert rows[0]["reason"] == "RuntimeError: out of memory"
    assert not any("ms" in row for row in rows)


@pytest.mark.parametrize(
    ("base", "other", "expected"),
    [
        ((10.0, 10.2, 9.9), (10.1, 10.3, 10.2), "tie"),  # the difference of medians lies inside the spread
        ((10.0, 10.2, 9.9), (11.0, 11.1, 10.9), "slower"),
        ((10.0, 10.2, 9.9), (9.0, 9.1, 8.9), "faster"),
        ((10.0, 10.0, 10.0), (12.0, 8.0, 11.0), "tie"),  # one of them is too noisy to tell
        ((10.0, 10.0, 10.0), (10.0, 10.0, 10.0), "tie"),
        ((10.0, 11.0, 10.5), (11.5, 11.5, 11.5), "tie"),  # exactly the spread is still a tie
    ],
)
def test_tie_rule(base, other, expected):
    def of(medians):
        return Timing.of([[m] for m in medians])

    assert verdict(of(base), of(other)) == expected
    mirrored = {"faster": "slower", "slower": "faster", "tie": "tie"}
    assert verdict(of(other), of(base)) == mirrored[expected]


_FREED_IN_ORDER = """
import faulthandler, signal, subprocess, sys, torch
from bench.engines import OpenVino
faulthandler.enable()  # signals arrive on a stack of their own
signal.signal(signal.SIGCHLD, lambda *_: None)
models = [OpenVino("float32").prepare(torch.nn.Conv2d(2, 3, 1).eval(), torch.randn(1, 2, 4, 4)) for _ in range(2)]
del models[0]
del models[0]
subprocess.run([sys.executable, "-c", ""], check=True, timeout=60)
"""


def test_openvino_leaves_the_signal_stack_alone():
    pytest.importorskip("openvino"), pytest.importorskip("onnx")
    subprocess.run([sys.executable, "-c", _FREED_IN_ORDER], check=True, timeout=300, cwd=ROOT)
