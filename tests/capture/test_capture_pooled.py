"""Maxima and means under a window, gates, and maps one after the other, as steps of a captured network."""

import pytest
import torch
from capture_network import without_packs
from spies import needs_cpu_kernels
from torch import nn
from torch.nn import functional as F

from ghostfused import capture
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper

pytestmark = [needs_cpu_kernels, pytest.mark.filterwarnings("error:fuse. nothing is fused")]


class Maxima(nn.Module):
    """As in YOLO: two branches one after the other, and maxima of maxima."""

    def __init__(self, channels: int = 20):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.SiLU())
        self.one, self.two = paper.GhostModule(channels, channels), nn.Conv2d(channels, 8, 1)
        self.shrink, self.wide = nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(5, 1, 2)
        self.middle, self.last = nn.Conv2d(channels + 8, 24, 1), nn.Conv2d(96, 12, 1)

    def forward(self, x):
        x = self.shrink(self.stem(x))
        x = F.silu(self.middle(torch.cat((self.one(x), self.two(x)), 1)))
        y = self.wide(x)
        z = self.wide(y)
        return F.silu(self.last(torch.cat((x, y, z, self.wide(z)), dim=-3)))


class Parts(nn.Module):
    """Concatenated maps that are read before and after, twice, as a part of a part, and as the result."""

    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(3, 16, 3, 1, 1), paper.GhostModule(16, 16)
        self.two, self.three, self.four = nn.Conv2d(16, 8, 1), nn.Conv2d(24, 16, 1), nn.Conv2d(72, 5, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        first = self.one(x)
        both = torch.cat((first, self.two(first)), 1)
        more = torch.cat((x, both, self.three(both), first), 1)
        return torch.cat((more, self.four(more), both, more), 1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(48, 32), (21, 18), (5, 4)])
def test_parts_are_made_where_they_lie_in_the_whole(threads, size, layout):
    model = calibrate(Parts(), torch.randn(4, 3, *size))
    x = torch.randn(5, 3, *size).to(memory_format=layout)
    captured = capture(model, x[:2], dynamic_batch=True, freeze=True)
    for batch in (1, 2, 5):
        for number in (1, 2):
            threads(number)
            first = captured(x[:batch])
            torch.testing.assert_close(first, model(x[:batch]))
            for _ in range(3):
                assert torch.equal(captured(x[:batch]), first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options", [{}, {"freeze": True}, {"freeze": True, "dtype": torch.bfloat16}], ids=["plain", "frozen", "bfloat16"]
)
@pytest.mark.parametrize("size", [(76, 60), (21, 18), (160, 140)])
def test_maxima_and_concatenated_maps(threads, size, options, layout):
    """One program, whatever the batch and the threads that share it."""
    model = calibrate(Maxima(), torch.randn(4, 3, *size))
    x = torch.randn(5, 3, *size).to(memory_format=layout)
    captured = capture(model, x[:2], dynamic_batch=True, **options)
    assert str(captured).endswith(": 1 program")
    with torch.no_grad():
        expected = model(x)
    for batch in (1, 2, 5):
        threads(1)
        first = captured(x[:batch])
        torch.testing.assert_close(
            first, expected[:batch], **({"rtol": 0.1, "atol": 0.1} if "dtype" in options else {})
        )
        assert first.is_contiguous(memory_format=layout)
        for number in (1, 2):
            threads(number)
            for _ in range(3):
                assert torch.equal(captured(x[:batch]), first)
    if "freeze" in options:
        assert torch.equal(captured(x), without_packs(captured)(x))


class Cats(nn.Module):
    def __init__(self, joined):
        super().__init__()
        self.first, self.last, self.joined = nn.Conv2d(3, 6, 1), nn.LazyConv2d(5, 1), joined
        self.own = nn.Parameter(torch.randn(2, 6, 9, 7))

    def forward(self, x):
        return self.last(self.joined(self, F.relu(self.first(x)), x))


CATS = {  # how many programs, and what is left to PyTorch
    "with itself": (1, lambda self, y, x: torch.cat([y, y, y], 1)),
    "with x": (1, lambda self, y, x: torch.cat([y, x, y, x], 1)),
    "copies": (1, lambda self, y, x: torch.cat([y.clone(), x.contiguous()], 1)),
    "first result of two": (1, lambda self, y, x: F.max_pool2d(y, 3, 1, 1, return_indices=True)[0]),
    "means": (1, lambda self, y, x: F.avg_pool2d(y, 2)),
    "means of three": (1, lambda self, y, x: F.avg_pool2d(y, (3, 3), 3, 0, False, False, 9)),
    "gate": (1, lambda self, y, x: torch.sigmoid(y)),
    "hard gate of means": (1, lambda self, y, x: F.hardsigmoid(nn.AvgPool2d(2)(y), inplace=True)),
    "gate of a vector": (1, lambda self, y, x: y.mean((2, 3), keepdim=True).sigmoid()),
    "twice the rows": (1, lambda self, y, x: F.interpolate(y, scale_factor=2)),
    "of that size": (1, lambda self, y, x: nn.Upsample((36, 28))(y)),
    "three times the rows": (2, lambda self, y, x: F.interpolate(y, scale_factor=3)),
    "more rows than columns": (2, lambda self, y, x: F.interpolate(y, scale_factor=(4, 2))),
    "other indices": (2, lambda self, y, x: F.interpolate(y, scale_factor=2.05)),
    "fewer rows": (2, lambda self, y, x: F.interpolate(y, scale_factor=0.5)),
    "bilinear": (2, lambda self, y, x: F.interpolate(y, scale_factor=2, mode="bilinear")),
    "means, ceil": (2, lambda self, y, x: F.avg_pool2d(y, 2, ceil_mode=True)),
    "means, padding": (2, lambda self, y, x: F.avg_pool2d(y, 3, 3, 1)),
    "means, other stride": (2, lambda self, y, x: F.avg_pool2d(y, 3, 2)),
    "means, no square": (2, lambda self, y, x: F.avg_pool2d(y, (2, 1))),
    "means, other divisor": (2, lambda self, y, x: F.avg_pool2d(y, 2, divisor_override=3)),
    "five": (2, lambda self, y, x: torch.cat([y, x, y, x, y], 1)),
    "rows": (2, lambda self, y, x: torch.cat([y, y], 2)),
    "a parameter": (2, lambda self, y, x: torch.cat([y, self.own], 1)),
    "ceil": (2, lambda self, y, x: F.max_pool2d(y, 3, 2, 1, ceil_mode=True)),
    "even": (2, lambda self, y, x: F.max_pool2d(y, 2)),
    "no padding": (2, lambda self, y, x: F.max_pool2d(y, 3, 1)),
    "dilation": (2, lambda self, y, x: F.max_pool2d(y, 3, 1, 1, 2)),
    "two results": (2, lambda self, y, x: torch.add(*F.max_pool2d(y, 3, 1, 1, return_indices=True))),
    "two inputs": (2, lambda self, y, x: torch.cat([F.elu(y), F.elu(x)], 1)),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("what", CATS)
def test_which_are_steps(what, freeze):
    programs, joined = CATS[what]
    model, x = Cats(joined), torch.randn(2, 3, 9, 7)
    with torch.no_grad():
        expected = model.eval()(x)
    captured = capture(model, x, partial=True, freeze=freeze)
    (variant,) = captured._variants.values()
    assert len(variant.lowered.programs) == programs
    assert bool(variant.lowered.left) == (programs > 1)
    for _ in range(2):
        torch.testing.assert_close(captured(x), expected)


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    "what",
    [
        lambda y: torch.sigmoid(y),
        lambda y: F.avg_pool2d(y, 2),
        lambda y: F.max_pool2d(y, 3, 2, 1),
        lambda y: F.interpolate(y, scale_factor=2),
        lambda y: torch.cat([y, y], 1),
    ],
    ids=["gate", "means", "maxima", "upsampling", "concatenation"],
)
def test_a_result_that_lies_in_another_format_than_in_eager(what, freeze):
    """A view of it is none there."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 6, 1)

        def forward(self, x):
            made = what(F.relu(self.first(x)).contiguous(memory_format=torch.channels_last))
            return made.permute(0, 2, 3, 1).view(x.shape[0], -1)

    model, x = Flat().eval(), torch.randn(2, 3, 8, 8)
    captured = capture(model, x, partial=True, freeze=freeze)
    for _ in range(2):
        torch.testing.assert_close(captured(x), model(x).detach())
