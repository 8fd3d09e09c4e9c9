"""What a frozen network launches is recorded at its first call of a shape, and later calls only launch it."""

import networks
import pytest
import torch
from capture_network import made, scaled, without_packs
from spies import needs_cpu_kernels
from torch import nn
from torch.nn import functional as F

from ghostfused import capture
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper

pytestmark = needs_cpu_kernels


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ghostnet", "small"])
def test_later_calls_are_the_first_one(threads, name, dtype):
    """Bit by bit, whatever the batch, its memory format, and how many threads share its images or its rows."""
    model, x = networks.network(name), torch.randn(7, 3, 76, 60)
    captured = capture(model, x[:2], dynamic_batch=True, freeze=True, dtype=dtype)
    plain = without_packs(captured)
    for batch in (1, 2, 3, 7):
        threads(1)
        expected = plain(x[:batch])
        for number in (1, 2, 3):
            threads(number)
            for _ in range(3):
                assert torch.equal(captured(x[:batch]), expected)
        assert torch.equal(captured(x[:batch].to(memory_format=torch.channels_last)), expected)


def test_inputs_and_results_are_anywhere():
    model, x = made()
    captured = capture(model, x, freeze=True)
    inputs = torch.randn(5, x.shape[0], 6, *x.shape[2:])[:, :, 1:4]
    results = [captured(each) for each in inputs]
    for each, result in zip(inputs, results, strict=True):  # none has been written over by a later call
        networks.assert_same(result, model, each)
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="x: expected a storage that holds all of it"):
        captured(freed)
    networks.assert_same(captured(x), model, x)


def test_more_shapes_than_are_kept(threads):
    threads(1)
    model, _ = made()
    x = torch.randn(80, 3, 13, 10)
    captured = capture(model, x[:2], dynamic_batch=True, freeze=True)
    expected = without_packs(captured)(x)
    for batch in (*range(1, 81), *range(1, 6)):
        assert torch.equal(captured(x[:batch]), expected[:batch])


def test_a_weight_that_is_gone_is_named():
    """The last layer's is read where it lies: nobody may have freed it, or put another tensor in its place."""
    model, x = made()
    captured = capture(model, x, freeze=True)
    expected = captured(x)
    weight = next(args.weight for _, args in captured._frozen._steps.values() if type(args).__name__ == "LinearArgs")
    assert torch.equal(captured(x), expected)
    moved = weight.clone()
    weight.data = moved.data * 2
    assert not torch.equal(captured(x), expected)
    weight.data = moved.data
    assert torch.equal(captured(x), expected)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weight: expected a storage that holds all of it"):
        captured(x)


@pytest.mark.parametrize("name", ["primary_weight", "cheap_weight"])
def test_a_ghost_modules_weight_that_is_gone_is_named(name):
    """NCHW reads both where they lie."""
    model = calibrate(paper.GhostModule(8, 12), torch.randn(4, 8, 20, 17))
    x = torch.randn(2, 8, 20, 17)
    captured = capture(model, x, freeze=True)
    networks.assert_same(captured(x), model, x)
    ((_, args),) = captured._frozen._steps.values()
    expected, weight = captured(x), getattr(args, name)
    weight.data = weight * 2
    assert not torch.equal(captured(x), expected)
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"{name}: expected a storage that holds all of it"):
        captured(x)


def test_refreshed_after_many_calls(threads):
    model, x = made()
    captured = capture(model, x, freeze=True)
    for number in (1, 2):
        threads(number)
        for _ in range(3):
            networks.assert_same(captured(x), model, x)
        scaled(model)
        captured.refresh()
        networks.assert_same(captured(x), model, x)


class Joined(nn.Module):
    """Maps that several later steps read, at once and much later: none may have been given another's memory."""

    def __init__(self, stages: int):
        super().__init__()
        self.stages = nn.ModuleList(paper.GhostModule(8, 8) for _ in range(stages))

    def forward(self, x):
        first = y = self.stages[0](x)
        for stage in self.stages[1:]:
            y = stage(y) + y
        return F.relu(y) + first


@pytest.mark.parametrize("stages", [2, 5])
def test_maps_that_are_read_later(stages):
    model, x = calibrate(Joined(stages), torch.randn(4, 8, 20, 17)), torch.randn(2, 8, 20, 17)
    captured = capture(model, x, freeze=True, partial=True)
    for _ in range(3):
        networks.assert_same(captured(x), model, x)
