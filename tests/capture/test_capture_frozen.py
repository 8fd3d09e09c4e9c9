"""``capture(..., freeze=True)``: parameters of its own, which the model's later ones don't change until ``refresh``."""

import networks
import pytest
import torch
import torch.nn.functional as F
from capture_network import made, scaled, without_packs
from spies import needs_cpu_kernels
from torch import nn

import ghostfused
from ghostfused import capture

pytestmark = needs_cpu_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_writes_take_effect_when_it_is_refreshed(dtype, layout):
    model, x = made()
    model, x = model.to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)
    captured, reading = capture(model, x, freeze=True), capture(model, x)
    assert captured.frozen
    assert "frozen" in str(captured)
    assert not reading.frozen
    before = captured(x)
    networks.assert_same(before, model, x)
    scaled(model)
    assert torch.equal(captured(x), before)
    assert not torch.equal(reading(x), before)
    captured.refresh()
    networks.assert_same(captured(x), model, x)
    assert not torch.equal(captured(x), before)
    with pytest.raises(ValueError, match="refresh: expected a frozen network"):
        reading.refresh()


@pytest.mark.parametrize("name", ["ghostnet", "small"])
def test_whole_networks(name):
    model = networks.network(name)
    x = torch.randn(2, 3, 64, 64)
    captured = capture(model, x, freeze=True)
    networks.assert_same(captured(x), model, x)
    norms = [node for node in captured._frozen._steps.values() if getattr(node[1], "primary_mean", None) is not None]
    assert norms == []  # all are folded


def test_shapes_share_what_is_frozen():
    model, x = made()
    captured = capture(model, [x, x[:1], torch.randn(2, 3, 30, 8)], freeze=True)
    first, *others = (program.lowered.programs for program in captured._variants.values())
    addresses = {t.data_ptr() for kept in first for t in kept.program.tensors}
    assert len(addresses) > 10
    for each in others:
        assert {t.data_ptr() for kept in each for t in kept.program.tensors} == addresses
    own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not addresses & own
    scaled(model)
    captured.refresh()
    for shape in ((3, 3, 21, 18), (1, 3, 21, 18), (2, 3, 30, 8)):
        x = torch.randn(shape)
        networks.assert_same(captured(x), model, x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_what_pytorch_computes_is_frozen_too():
    class Offset(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.offset = model, torch.nn.Parameter(torch.tensor([0.5]))

        def forward(self, x):
            return F.elu(self.model(x) * self.offset)

    model, x = made()
    model = Offset(model).eval()
    captured = capture(model, x, partial=True, freeze=True)
    before = captured(x)
    networks.assert_same(before, model, x)
    scaled(model, 1.5)
    assert torch.equal(captured(x), before)
    captured.refresh()
    networks.assert_same(captured(x), model, x)


def test_a_norm_that_leaves_the_range_of_floats_is_not_folded():
    model, x = made()
    with torch.no_grad():  # folded, these weights would be infinite
        model.stem.weight.mul_(1e30)
        model.norm.running_mean.mul_(1e30)
        model.norm.running_var.mul_(1e-6)
        model.norm.weight.mul_(1e9)
        x.mul_(1e-33)
        model.norm.running_mean.zero_()
        expected = F.batch_norm(model.stem(x), model.norm.running_mean, model.norm.running_var, model.norm.weight)
        assert expected.isfinite().all()
    captured = capture(model, x, freeze=True)
    networks.assert_same(captured(x), model, x)
    assert any(getattr(own, "primary_mean", None) is not None for _, own in captured._frozen._steps.values())
    model, x = made()
    captured = capture(model, x, freeze=True)
    with torch.no_grad():
        model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="refresh: primary_weight: expected finite numbers"):
        captured.refresh()


def test_saved_as_it_is(tmp_path):
    model, x = made()
    captured = capture(model, x, freeze=True)
    captured.save(tmp_path / "net.pt2")
    loaded = ghostfused.load(tmp_path / "net.pt2")
    assert loaded.frozen
    assert torch.equal(loaded(x), captured(x))
    scaled(model)
    with pytest.raises(ValueError, match="save: the model's parameters were written since they were frozen"):
        captured.save(tmp_path / "net.pt2")
    captured.refresh()
    captured.save(tmp_path / "net.pt2")
    assert torch.equal(ghostfused.load(tmp_path / "net.pt2")(x), captured(x))


def test_a_gpu_refuses(monkeypatch):
    model, x = made()
    monkeypatch.setitem(ghostfused.capture.__globals__, "check", lambda model, inputs: torch.device("cuda"))
    with pytest.raises(ValueError, match="freeze: expected False on a GPU, where a CUDA graph reads"):
        capture(model, x, freeze=True)


@pytest.mark.parametrize("channels", [7, 33, 38, 100])
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_fully_connected_layers_sum_alike_in_both_types(batch, channels):
    """At depths that leave a part of a vector, of which the compiler fused a product with its sum in one type only."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 7)).eval()
    x = torch.randn(batch, channels, 3, 3)
    captured = capture(model, x, freeze=True, weights=torch.bfloat16)
    assert torch.equal(captured(x), without_packs(captured)(x))


@pytest.mark.parametrize(
    ("dtype", "weights"), [*((dtype, None) for dtype in DTYPES), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("ghostnet", torch.contiguous_format),
        ("small", torch.contiguous_format),
        ("small", torch.channels_last),
    ],
    ids=str,
)
def test_packed_weights_are_the_same(name, layout, dtype, weights):
    model = networks.network(name).to(dtype, memory_format=layout)
    x = torch.randn(3, 3, 60, 44).to(dtype, memory_format=layout)
    captured = capture(model, x, freeze=True, weights=weights)
    for _ in range(2):
        out = captured(x)
        assert out.isfinite().all()
        assert torch.equal(out, without_packs(captured)(x))
        scaled(model, 0.98)
        captured.refresh()
