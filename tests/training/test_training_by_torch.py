"""On a CPU no kernels train: a fused model in train mode runs as it does unfused, and costs what it does unfused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from networks import network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ghostfused import FusedGhostModule, fuse
from ghostfused.nn import batch_statistics


class Ops(TorchDispatchMode):
    """The names of all ops that run, those of the backward among them."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    @classmethod
    def is_infra_mode(cls) -> bool:  # around a user's mode our ops don't run
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **kwargs or {})

    def of_ghostfused(self) -> list[str]:
        return [name.removeprefix("ghostfused::") for name in self.names if name.startswith("ghostfused::")]


def step(model: nn.Module, x: Tensor) -> tuple[Ops, list[Tensor]]:
    """The ops of a training step; what it computes and what it leaves behind."""
    torch.manual_seed(1)  # dropout draws
    with Ops() as ops:
        outs = tree_leaves(model(x))
        sum(out.square().sum() for out in outs).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return ops, [*outs, *grads, *model.buffers()]


@pytest.mark.parametrize("norms", ["batch", "stored"])
@pytest.mark.parametrize("name", ["small", "ghostnet", "ghostnetv2", "yolov8n-ghost"])
def test_a_step_is_the_unfused_one(name, norms):
    """The same operations, and the same bits."""
    model = network(name)
    fused = fuse(model)
    assert any(isinstance(module, FusedGhostModule) for module in fused.modules())
    results = []
    for each in (model, fused):
        each.train()
        for module in each.modules():
            if norms == "stored" and isinstance(module, nn.BatchNorm2d):
                module.eval()
        results.append(step(each, torch.ones(2, 3, 64, 64).cumsum(3)))
    (ops, values), (own_ops, own_values) = results
    assert sorted(own_ops.names) == sorted(ops.names)
    assert len(own_values) == len(values)
    assert all(map(torch.equal, own_values, values))


def test_who_asks_for_the_reference_gets_its_ops():
    """They keep no map but x."""
    ops, _ = step(FusedGhostModule(4, 8, backend="reference").train(), torch.randn(2, 4, 5, 5))
    assert ops.of_ghostfused() == ["train_forward_reference", "backward_reference"]


def test_eval_mode_is_taken_for_inference():
    """A backward says what it costs."""
    module, x = FusedGhostModule(4, 8).eval(), torch.randn(2, 4, 5, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ops, _ = step(module, x)
        assert [name.rpartition("_")[0] for name in ops.of_ghostfused()] in (
            ["forward", "backward"],
            [],
        )  # no extension
        assert [w.category for w in said] == [UserWarning] * (len(ops.of_ghostfused()) // 2)
        assert all("ghostfused.unfuse(model)" in str(w.message) for w in said)
        said.clear()
        step(module.train(), x)
        with torch.no_grad():
            module.eval()(x)
        assert not said


def test_batch_statistics_without_gradients_are_pytorchs():
    module, x = FusedGhostModule(4, 8).train(), torch.randn(2, 4, 5, 5)
    twin = copy.deepcopy(module)
    with torch.no_grad(), Ops() as ops:
        out = module(x)
    assert not ops.of_ghostfused()
    x1 = twin.primary_conv(x)
    assert torch.equal(out, torch.cat([x1, twin.cheap_op(x1)], 1))


def test_statistics_of_several_processes_stay_ours(monkeypatch):
    """SyncBatchNorm has no code for CPUs."""
    module, x = FusedGhostModule(4, 8).train(), torch.randn(2, 4, 5, 5)
    assert batch_statistics.trains_by_torch(module, x, "auto")
    monkeypatch.setattr(batch_statistics, "_has_processes", lambda: True)
    assert batch_statistics.trains_by_torch(module, x, "auto")
    monkeypatch.setattr(batch_statistics, "group_name", lambda norm: "a group")
    assert not batch_statistics.trains_by_torch(module, x, "auto")
