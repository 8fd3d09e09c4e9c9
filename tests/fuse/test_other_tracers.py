"""torch.fx traces in another thread, whose calls of all modules of the process are its own meanwhile."""

import contextlib
import threading

import pytest
import torch
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostModule, fuse, fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.recognize import disturbed


class Waits(nn.Module):
    """Keeps its tracer at work until it is told to end."""

    def __init__(self):
        super().__init__()
        self.inner, self.begun, self.ended = nn.Identity(), threading.Event(), threading.Event()

    def forward(self, x):
        self.begun.set()
        self.ended.wait(60)
        return self.inner(x)


@contextlib.contextmanager
def traced_elsewhere():
    waits = Waits()
    thread = threading.Thread(target=torch.fx.symbolic_trace, args=(waits,))
    thread.start()
    waits.begun.wait(60)
    try:
        yield waits.ended
    finally:
        waits.ended.set()
        thread.join()


def made():
    bottleneck = paper.GhostBottleneck(6, 12, 6, se_ratio=0.25)
    return calibrate(nn.Sequential(bottleneck, paper.GhostModule(6, 12)), torch.randn(4, 6, 9, 8))


def test_fuse_waits_for_the_end():
    model, x = made(), torch.randn(2, 6, 9, 8)
    with traced_elsewhere() as ended:
        threading.Timer(0.3, ended.set).start()
        fused, report = fuse_with_report(model)
        assert ended.is_set()
    assert [swap.fused for swap in report] == [True] * 4, report
    with torch.no_grad():
        assert_same(fused(x), model, x)


@pytest.mark.parametrize("inplace", [False, True])
def test_fuse_says_what_is_in_its_way(inplace, monkeypatch):
    monkeypatch.setattr(disturbed, "PATIENCE", 0.05)
    model, x = made(), torch.randn(2, 6, 9, 8)
    kinds, expected = [type(m) for m in model.modules()], model(x)
    with traced_elsewhere():
        with pytest.raises(RuntimeError, match=r"^fuse: torch\.fx traces in another thread"):
            fuse(model, inplace=inplace)
        with pytest.raises(RuntimeError, match=r"^from_module: torch\.fx traces in another thread"):
            FusedGhostModule.from_module(model[1])
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(model(x), expected)


def test_a_call_is_the_error_that_it_is_of_the_unfused():
    model, x = made(), torch.randn(2, 6, 9, 8)
    fused = fuse(model)
    with torch.no_grad():
        fused(x)
        with traced_elsewhere():
            for each in (model, fused):
                with pytest.raises(NameError, match="not installed as a submodule"):
                    each(x)
        assert_same(fused(x), model, x)
