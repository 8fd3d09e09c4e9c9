"""Graphs whose ops write into tensors: those that networks are made of aren't traced a second time, and all stay right."""

import pytest
import torch
import torch.nn.functional as F
from capture_network import made
from networks import assert_same
from spies import needs_cpu_kernels
from torch import nn

from ghostfused import NotCaptured, capture
from ghostfused.capture.writes import without_writes


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout()
        self.form = forward

    def forward(self, x):
        return self.form(self, x)


def gated(net, x):
    y = net.bn(net.conv(x))
    y *= F.hardsigmoid(net.conv(x), inplace=True)
    return y


def then_added(net, x):
    y = F.relu_(net.conv(x))
    y += x
    return net.drop(F.hardswish(y, inplace=True)) * 2


def read_before(net, x):
    y = net.conv(x)
    return y * 2 + F.relu_(y)


def read_after(net, x):
    y = net.conv(x)
    F.relu_(y)
    return net.conv(y)


def over_a_view(net, x):
    y = net.conv(x)
    F.relu_(y[:, :2])
    return y


def behind_dropout(net, x):
    y = net.conv(x)
    F.relu_(net.drop(y))
    return y


def over_its_input(net, x):
    return F.relu_(x) + net.conv(x)


def in_another_dtype(net, x):
    y = net.conv(x).half()
    y += x
    return y


def two_results(net, x):
    y = net.conv(x)
    return net.drop(y), y


def norm_in_train_mode(net, x):
    return F.batch_norm(net.conv(x), None, None, training=True)


ONCE = (gated, then_added, read_after)
"""Of the last torch.export's graph has the write's result read."""
TWICE = (
    read_before, over_a_view, behind_dropout, over_its_input, in_another_dtype, two_results, norm_in_train_mode,
)  # fmt: skip


@pytest.mark.parametrize("form", ONCE + TWICE, ids=lambda f: f.__name__)
@torch.no_grad()
def test_no_op_writes(form, monkeypatch):
    net = Net(form).eval()
    x = torch.randn(2, 4, 7, 5)
    expected, given = net(after := x.clone()), torch.randn(2, 4, 7, 5)
    exported = torch.export.export(net, (given,), strict=False)
    traced = []
    again = exported.run_decompositions
    monkeypatch.setattr(type(exported), "run_decompositions", lambda self, table: traced.append(self) or again(table))
    functional = without_writes(exported)
    assert bool(traced) == (form in TWICE)
    for node in functional.graph.nodes:
        assert not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable, node
    assert_equal(functional.module(check_guards=False)(copied := x.clone()), expected)
    assert torch.equal(copied, after)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@needs_cpu_kernels
@pytest.mark.parametrize("form", ONCE + TWICE, ids=lambda f: f.__name__)
@torch.no_grad()
def test_captured(form):
    net = Net(form).eval()
    x = torch.randn(2, 4, 7, 5)
    if form is over_its_input:
        with pytest.raises(NotCaptured, match="writes into"):
            capture(net, torch.ones_like(x), partial=True)
        return
    captured = capture(net, torch.ones_like(x), partial=True)
    found, expected = captured(x), net(x.clone())
    for one, other in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@needs_cpu_kernels
def test_networks_are_traced_once(monkeypatch):
    def refuse(self, table):
        raise AssertionError("traced again")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    model, x = made(act=lambda: nn.ReLU(inplace=True))
    for each in (model, nn.Sequential(model, nn.Dropout(), nn.Flatten())):
        assert_same(capture(each.eval(), x, partial=True)(x), each, x)
