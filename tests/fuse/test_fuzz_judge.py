"""The judge of ``python -m tests.fuzz`` where half precision overflows: what isn't finite is judged as well."""

import math

import pytest
import torch
from torch import nn

from ghostfused.numerics import relative_error
from tests.fuzz.trials import _across_a_kink, _OtherSums, _vector, compare, infer, step, trial


class Scaled(nn.Module):
    """x times its weight, and that divided again: in half precision the first overflows where x is large."""

    def __init__(self, back: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(256.0))
        self.back = back

    def forward(self, x):
        return x * self.weight * self.back


def given(value: float) -> torch.Tensor:
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0] = value
    return x.half()


def judge(back: float, x: torch.Tensor, at: float | None) -> None:
    """Of a twin that is right but for the first number, which is ``at``."""
    model = Scaled(back).half()

    def twin(x):
        out = model(x).clone()
        if at is not None:
            out[0, 0, 0, 0] = at
        return out

    compare("twin", model, twin, x, infer)


@pytest.mark.parametrize("value", [1000.0, -1000.0])
def test_no_room_for_the_right_number(value):
    """±256,000 is an infinity of that sign."""
    judge(1.0, given(value), None)
    for wrong in (0.0, math.nan, -math.copysign(math.inf, value), 65504.0):
        with pytest.raises(AssertionError, match="errors"):
            judge(1.0, given(value), wrong)


def test_pytorchs_own_overflows_on_its_way():
    """1,000 is right, PyTorch's own is infinite: either passes."""
    judge(2.0**-8, given(1000.0), None)
    judge(2.0**-8, given(1000.0), 1000.0)
    for wrong in (0.0, 900.0, math.nan, -math.inf):
        with pytest.raises(AssertionError, match="errors"):
            judge(2.0**-8, given(1000.0), wrong)


def test_nan_is_nan():
    judge(1.0, given(math.nan), None)
    for wrong in (0.0, math.inf):
        with pytest.raises(AssertionError, match="errors"):
            judge(1.0, given(math.nan), wrong)


def test_what_is_finite_stays_so():
    judge(1.0, given(3.0), None)
    for wrong in (math.nan, math.inf, -math.inf, 760.0):
        with pytest.raises(AssertionError, match="errors"):
            judge(1.0, given(3.0), wrong)


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(10.0))

    def forward(self, x):
        return (x * self.weight > 1).to(x)


@pytest.mark.parametrize("units", [1, 40])
def test_a_kink(units):
    """The twin is on the other side of the step for a number that is so many units of rounding from it."""
    model, x = Step(), torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0] = 0.1 * (1 + units * 2**-24)
    with torch.no_grad():
        out = model.double()(x.double()).float()
    assert _across_a_kink(infer, model.float(), x, [out], [2**-22])
    out[0, 0, 0, 0] = 1 - out[0, 0, 0, 0]
    assert _across_a_kink(infer, model, x, [out], [2**-22]) == (units == 1)


class Gated(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("between", [nn.Identity, Gated, lambda: nn.Sequential(Gated(), nn.ReLU(inplace=True))])
def test_sums_in_another_order_are_of_the_same_numbers(training, affine, between):
    torch.manual_seed(0)
    layers = [between(), nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5, affine=affine), nn.ReLU()]
    model = nn.Sequential(*layers).train(training)
    x = torch.randn(4, 3, 9, 8)
    expected = step(model, x)
    with _OtherSums():
        found = step(model, x)
    for part, right in zip(found, expected, strict=True):
        assert relative_error(_vector(part), _vector(right)) < 1e-5


@pytest.mark.parametrize(("seed", "number"), [(20261129, 712), (2027, 637)])
def test_a_gradient_that_sums_in_another_order_is_not_wrong(seed, number):
    """PyTorch sums that of a norm's bias in double precision; and multiplies the maps by a gate before it sums that of a weight,
    where a kernel sums first."""
    assert trial("bottlenecks", seed, number, "cpu") == "fused"


def test_a_norm_that_sums_in_channels_last_is_not_wrong():
    """PyTorch's batch_norm is off by 1.6e-6 there, and by 1.4e-7 of the same maps in NCHW."""
    assert trial("networks", 2030, 2, "cpu") == "some fused"
