"""How a program runs on a CPU: whatever the formats of its maps and whichever images go together, each number is the same.

Every step here copies what it reads, exactly in every dtype, so that the result is known to the last bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from strides import strides
from torch import Tensor

from ghostfused import ops
from ghostfused.backends import cpu
from ghostfused.ops import encoding
from ghostfused.spec import (
    DTYPES,
    Act,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    DepthwiseArgs,
    Gate,
    GateArgs,
    GhostArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    UpsampleArgs,
)

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))

NONE = [None] * 9


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Recorder:
    """A program of steps that copy."""

    def __init__(self, x: Tensor):
        self.x, self.calls = x, []
        self.parameters: list[Tensor] = []

    def _call(self, args, result: Tensor) -> Tensor:
        self.calls.append((args, result))
        self.parameters += [t for t in args.tensors if t is not None]
        return result

    def subsampled(self, x: Tensor, stride: int) -> Tensor:
        """By a depthwise convolution of a one among zeros."""
        weight = torch.zeros(x.shape[1], 1, 3, 3, dtype=x.dtype)
        weight[:, 0, 1, 1] = 1
        args = DepthwiseArgs(x, weight, None, *NONE[:5], 0.0, int(Act.NONE), 0.0, stride)
        return self._call(args, x[:, :, ::stride, ::stride].clone())

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """By a 1×1 convolution of the unit matrix, with a residual."""
        channels = x.shape[1]
        weight = torch.eye(channels, dtype=x.dtype).reshape(channels, channels, 1, 1)
        settings = 0.0, int(Act.NONE), 0.0, 0.0, int(Act.NONE), 0.0, channels, 1, 1, 1, False
        nones = [*NONE[:6], weight[:, :1], *NONE[:7], other, None]
        args = GhostArgs(x, weight, *nones, *settings)
        return self._call(args, x + other)

    def cast(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return self._call(CastArgs(x, DTYPES.index(dtype)), x.to(dtype))

    def joined(self, *maps: Tensor) -> Tensor:
        return self._call(ConcatArgs(*maps, *[None] * (4 - len(maps))), torch.cat(maps, 1))

    def maxima(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        return self._call(MaxPoolArgs(x, kernel, stride), F.max_pool2d(x, kernel, stride, kernel // 2))

    def means(self, x: Tensor, kernel: int) -> Tensor:
        return self._call(AvgPoolArgs(x, kernel), F.avg_pool2d(x, kernel))

    def upsampled(self, x: Tensor, scale: int) -> Tensor:
        return self._call(UpsampleArgs(x, scale), F.interpolate(x, scale_factor=scale))

    def gated(self, x: Tensor) -> Tensor:
        return self._call(GateArgs(x, int(Gate.RELU6)), F.relu6(x))

    def pooled(self, x: Tensor) -> Tensor:
        return self._call(GlobalPoolArgs(x), x.mean((2, 3), keepdim=True))

    def projected(self, x: Tensor) -> Tensor:
        weight = torch.eye(x.shape[1], dtype=x.dtype)
        return self._call(LinearArgs(x, weight, None), x.flatten(1))

    def run(self) -> Tensor:
        program = encoding.encode(self.calls, self.x, {id(t) for t in self.parameters})
        assert program is not None
        kept, freely = (
            ops.KeptProgram("cpu", program, cpu.extension.module.drop_program, any_format=free)
            for free in (False, True)
        )
        out = freely(self.x)
        for same in (kept(self.x), ops.forward_op("cpu", "program")(self.x, *program)):
            assert torch.equal(out, same)
            assert strides(out) == strides(same)
        return out


def made(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Tensor:
    """Whole numbers, of which every dtype holds the sums."""
    n, c, h, w = shape
    if layout == "slices":
        return torch.randint(-8, 9, (n, c, h, 2 * w)).to(dtype)[..., ::2]
    format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    return torch.randint(-8, 9, shape).to(dtype, memory_format=format)


def judge(out: Tensor, expected: Tensor, x: Tensor, layout: str) -> None:
    assert torch.equal(out, expected)
    if out.dim() == 4 and out.numel() and layout != "slices":
        format = torch.channels_last if layout == "nhwc" and x.shape[1] > 1 else torch.contiguous_format
        assert out.is_contiguous(memory_format=format)


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 37), st.integers(1, 40), st.integers(1, 40)),
    strides=st.lists(st.sampled_from([1, 1, 2]), min_size=1, max_size=9),
    inside=st.sampled_from(DTYPES),
    late=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["nchw", "nhwc", "slices"]),
    count=st.integers(1, 3),
)
def test_chains(shape, strides, inside, late, dtype, layout, count):
    """Maps of all sizes, with a shortcut from a result, or from x, that is read late; cast on the way, or not."""
    torch.set_num_threads(count)
    x = made(shape, dtype, layout)
    recorder = Recorder(x)
    maps = [x if inside == dtype else recorder.cast(x, inside)]
    for stride in strides:
        maps.append(recorder.subsampled(maps[-1], stride))
    alike = [m for m in maps if m.shape == maps[-1].shape]
    expected = recorder.added(maps[-1], alike[late % len(alike)])
    if inside != dtype:
        expected = recorder.cast(expected, dtype)
    judge(recorder.run(), expected, x, layout)


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 21), st.integers(1, 40), st.integers(1, 40)),
    steps=st.lists(
        st.one_of(
            st.tuples(st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 1, 2])),
            st.sampled_from([-2, 0, 1, 2, 3]),
            st.lists(st.integers(0, 9), min_size=2, max_size=4),
        ),
        min_size=1,
        max_size=9,
    ),
    inside=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["nchw", "nhwc", "slices"]),
    count=st.integers(1, 3),
)
def test_chains_of_windows_gates_and_joined_maps(shape, steps, inside, dtype, layout, count):
    """Each map may be read again and again, once it is long gone from the caches."""
    torch.set_num_threads(count)
    x = made(shape, dtype, layout)
    recorder = Recorder(x)
    maps = [x if inside == dtype else recorder.cast(x, inside)]
    for step in steps:
        alike = [m for m in maps if m.shape[2:] == maps[-1].shape[2:]]
        if step == -2:
            if maps[-1].shape[3] < 64:
                maps.append(recorder.upsampled(maps[-1], 2))
        elif step == 0:
            maps.append(recorder.gated(maps[-1]))
        elif isinstance(step, int):
            if min(maps[-1].shape[2:]) >= step:
                maps.append(recorder.means(maps[-1], step))
        elif isinstance(step, tuple):
            maps.append(recorder.maxima(maps[-1], *step))
        elif sum(alike[i % len(alike)].shape[1] for i in step) < 150:
            maps.append(recorder.joined(maps[-1], *(alike[i % len(alike)] for i in step[1:])))
    expected = recorder.added(maps[-1], maps[-1])
    if inside != dtype:
        expected = recorder.cast(expected, dtype)
    judge(recorder.run(), expected, x, layout)


@pytest.mark.parametrize("layout", ["nchw", "nhwc", "slices"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4, 5, 8, 11])
def test_batches_of_wide_maps(batch, dtype, layout):
    """Wide enough for images to go one by one until the maps are narrow, then together, then apart as features."""
    for count in (1, 2):
        torch.set_num_threads(count)
        x = made((batch, 20, 96, 80), dtype, layout)
        recorder = Recorder(x)
        y = recorder.subsampled(x, 1)
        for stride in (2, 2, 1, 2):
            z = recorder.subsampled(y, stride)
            y = recorder.added(z, z)
        judge(recorder.run(), y, x, layout)
        while y.shape[2:] != (1, 1):
            y = recorder.subsampled(y, 2)
        judge(recorder.run(), y, x, layout)
        features = recorder.projected(recorder.pooled(y))
        judge(recorder.run(), features, x, layout)


def test_a_map_that_is_read_again_after_the_narrow_ones():
    """Here no image may be given up for its narrow map."""
    torch.set_num_threads(1)
    x = made((3, 20, 128, 128), torch.float32, "nchw")  # means of 8² are exact
    for again in (x, None):
        recorder = Recorder(x)
        wide = recorder.subsampled(x, 1)
        narrow = wide
        for _ in range(4):
            narrow = recorder.subsampled(narrow, 2)
        features = recorder.pooled(narrow)
        judge(recorder.run(), features, x, "nchw")
        for _ in range(3):
            wide = recorder.subsampled(wide, 1)
        expected = recorder.added(wide, wide if again is None else again)
        judge(recorder.run(), expected, x, "nchw")
