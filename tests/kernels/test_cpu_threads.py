"""The threads of the CPU kernels: whoever does an item, the result has the same bits, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from ghostfused import functional
from ghostfused.backends import cpu
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

CASES = [
    Case(1, 40, 28, 28, 72),
    Case(2, 40, 14, 14, 184, dtype=torch.bfloat16, input_gate=True),
    Case(1, 72, 28, 28, 40, layout="nhwc", residual=True),
    Case(3, 400, 1, 1, 301, dw_size=1, init_channels=301),
    DepthwiseCase(2, 75, 40, 40, (5, 5)),
    SqueezeExciteCase(2, 330, 80, 28, 28),
]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def alone(args) -> torch.Tensor:
    torch.set_num_threads(1)
    return functional.run(args, "cpu")


@pytest.mark.parametrize("count", [2, 5])
def test_many_callers_at_once(count):
    """More threads than cores call at once, each with sizes of its own in turns."""
    calls = [make(case) for case in CASES]
    expected = [alone(args) for args in calls]
    errors = []

    def caller(offset: int) -> None:
        torch.set_num_threads(count)
        for i in range(30):
            which = (offset + i) % len(calls)
            if not torch.equal(functional.run(calls[which], "cpu"), expected[which]):
                errors.append((offset, i))

    callers = [threading.Thread(target=caller, args=(offset,), daemon=True) for offset in range(8)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(120)
    assert not any(thread.is_alive() for thread in callers)
    assert errors == []


def test_more_callers_than_places():
    """The calls that find no place for a job do their work alone."""
    args = make(CASES[0])
    expected = alone(args)
    gate, results = threading.Barrier(80), []

    def caller() -> None:
        torch.set_num_threads(2)
        gate.wait()
        results.extend(torch.equal(functional.run(args, "cpu"), expected) for _ in range(5))

    callers = [threading.Thread(target=caller, daemon=True) for _ in range(80)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(120)
    assert results == [True] * 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_forked_child_has_threads_of_its_own():
    args = make(CASES[0])
    expected = alone(args)
    torch.set_num_threads(2)
    for _ in range(3):
        functional.run(args, "cpu")
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a deadlock ends it, too
            outs = [functional.run(args, "cpu") for _ in range(20)]
            torch.set_num_threads(1)  # PyTorch's own threads don't survive a fork
            os._exit(0 if all(torch.equal(out, expected) for out in outs) else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(functional.run(args, "cpu"), expected)


def test_helpers_round_as_the_caller():
    """Whether denormal numbers are flushed is a thread's own setting."""
    args = make(Case(1, 16, 56, 56, 64, act_primary="none", act_cheap="none"))
    args = args._replace(x=args.x * 1e-38, primary_mean=None, primary_var=None, primary_gamma=None, primary_beta=None)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU flushes no denormal numbers")
    try:
        flushed = alone(args)
        torch.set_num_threads(2)
        assert all(torch.equal(functional.run(args, "cpu"), flushed) for _ in range(20))
    finally:
        torch.set_flush_denormal(False)
    exact = alone(args)
    assert not torch.equal(exact, flushed)
    torch.set_num_threads(2)
    assert all(torch.equal(functional.run(args, "cpu"), exact) for _ in range(20))


def test_what_a_helper_throws_reaches_the_caller():
    args = make(DepthwiseCase(1, 4, 1, 1))._replace(x=torch.empty(1).expand(1, 4, 1, 1 << 28))
    torch.set_num_threads(2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="scratch memory"):
            functional.run(args, "cpu")
    test_many_callers_at_once(2)
