"""Types in a captured network: casts that the model makes, weights that are rounded, and a network of float32 in another."""

import copy

import networks
import pytest
import torch
import torch.nn.functional as F
from capture_network import made, scaled
from spies import ONE_OP, needs_cpu_kernels, ops_of
from torch import nn

import ghostfused
from ghostfused import NotCaptured, capture
from ghostfused.numerics import TOLERANCES, relative_error

pytestmark = needs_cpu_kernels


class Mixed(nn.Module):
    """A network in half precision for those who have and want float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, x):
        return self.model(x.to(self.dtype)).float()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casts_are_steps(dtype, layout):
    model, x = made()
    exact = copy.deepcopy(model).double()(x.double())
    mixed, x = Mixed(model.to(dtype), dtype).eval(), x.to(memory_format=layout)
    for freeze in (False, True):
        captured = capture(mixed, x, freeze=freeze)
        assert ops_of(captured, x) == ONE_OP
        assert captured(x).dtype == torch.float32
        own = relative_error(mixed(x), exact)
        assert relative_error(captured(x), exact) < TOLERANCES[dtype].factor * own
    with pytest.raises(NotCaptured, match="something else than Mixed"):  # of rounding alone it would be right
        capture(Mixed(Wrong(model), dtype).eval(), x)


class Wrong(nn.Module):
    """Not the same again."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x):
        self.calls += 1
        return self.model(x if self.calls == 1 else 2 * x)


@pytest.mark.parametrize(("name", "weights"), [("ghostnet", torch.bfloat16), ("small", "bf16")], ids=repr)
def test_rounded_weights(name, weights, tmp_path):
    model = networks.network(name)
    x = torch.randn(2, 3, 64, 64)
    exact = copy.deepcopy(model).double()(x.double())
    captured = capture(model, x, freeze=True, weights=weights)
    assert captured.weights == torch.bfloat16
    assert "bfloat16 weights" in str(captured)
    error = relative_error(captured(x), exact)
    whole = relative_error(copy.deepcopy(model).bfloat16()(x.bfloat16()), exact)
    assert relative_error(model(x), exact) < error < TOLERANCES[torch.bfloat16].factor * whole
    captured.save(tmp_path / "net.pt2")
    loaded = ghostfused.load(tmp_path / "net.pt2")
    assert loaded.weights == torch.bfloat16
    assert torch.equal(loaded(x), captured(x))


@pytest.mark.parametrize(
    ("name", "given", "dtype", "layout"),
    [
        ("ghostnet", "bfloat16", torch.bfloat16, torch.contiguous_format),
        ("small", torch.bfloat16, torch.bfloat16, torch.channels_last),
        ("ghostnet", "torch.float16", torch.float16, torch.channels_last),
        ("small", "fp16", torch.float16, torch.contiguous_format),
    ],
    ids=repr,
)
def test_computes_in_another_type(name, given, dtype, layout, tmp_path):
    model = networks.network(name).to(memory_format=layout)
    examples = [torch.randn(2, 3, 64, 64).to(memory_format=layout), torch.randn(5, 3, 40, 72)]
    captured = capture(model, examples, freeze=True, dtype=given)
    assert captured.dtype == captured.weights == dtype
    assert f"in {str(dtype).removeprefix('torch.')}" in str(captured)
    assert all(len(variant.lowered.programs) == 1 for variant in captured._variants.values())
    half = copy.deepcopy(model).to(dtype)
    for factor in (1.0, 0.98):
        scaled(model, factor)
        scaled(half, factor)
        captured.refresh()
        for x in examples:
            exact = copy.deepcopy(model).double()(x.double())
            error = relative_error(captured(x), exact)
            assert captured(x).dtype == torch.float32
            assert relative_error(model(x), exact) < error
            assert error < TOLERANCES[dtype].factor * relative_error(half(x.to(dtype)), exact)
    captured.save(tmp_path / "net.pt2")
    loaded = ghostfused.load(tmp_path / "net.pt2")
    assert loaded.dtype == loaded.weights == dtype
    assert torch.equal(loaded(x), captured(x))


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_what_pytorch_computes_between_stays_float32():
    model, x = made(lambda self, x: F.elu(x) * 1.5)
    captured = capture(model, x, partial=True, freeze=True, dtype="bfloat16")
    assert len(captured._variants[next(iter(captured._variants))].lowered.programs) == 2
    exact = copy.deepcopy(model).double()(x.double())
    whole = relative_error(copy.deepcopy(model).bfloat16()(x.bfloat16()), exact)
    assert relative_error(captured(x), exact) < TOLERANCES[torch.bfloat16].factor * whole


def test_a_program_without_weights_stays_float32():
    """It would only round."""

    class Pooled(nn.Module):
        def forward(self, x):
            return F.elu(F.avg_pool2d(F.elu(x), 2)).sigmoid()

    x = torch.randn(2, 3, 9, 8)
    captured = capture(Pooled().eval(), x, partial=True, freeze=True, dtype="bfloat16")
    torch.testing.assert_close(captured(x), Pooled()(x))


@pytest.mark.parametrize(
    ("own", "arguments", "message"),
    [
        (torch.float32, {"freeze": True, "dtype": torch.float64},
         r"dtype: expected None, torch.bfloat16 or torch.float16, got torch.float64"),
        (torch.float32, {"dtype": "bfloat16"}, "dtype: expected None where freeze is False"),
        (torch.float16, {"freeze": True, "dtype": "bfloat16"},
         r"dtype: expected a network of float32, got one that computes in torch.float16"),
        (torch.float32, {"freeze": True, "weights": torch.float16},
         r"weights: expected None or torch.bfloat16, got torch.float16"),
        (torch.float32, {"weights": "bfloat16"}, "weights: expected None where freeze is False"),
        (torch.float16, {"freeze": True, "weights": "bfloat16"},
         r"weights: expected a network of float32 or torch.bfloat16"),
    ],
)  # fmt: skip
def test_types_are_refused(own, arguments, message):
    model, x = made()
    with pytest.raises(ValueError, match=message):
        capture(model.to(own), x.to(own), **arguments)
    assert capture(model.float(), x.float(), freeze=True).weights is None


def test_a_type_that_cannot_hold_the_numbers_is_refused():
    model, x = made()
    with torch.no_grad():
        model.norm.weight.mul_(1e6)
    with pytest.raises(
        ValueError, match=r"dtype: expected a type that holds all numbers of the network, got torch.float16"
    ):
        capture(model, x, freeze=True, dtype="float16")
    assert capture(model, x, freeze=True, dtype="bfloat16")(x).isfinite().all()
