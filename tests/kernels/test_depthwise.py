"""The depthwise convolution on every backend, against the float64 reference. What all ops share is in test_every_op.py."""

import dataclasses

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS
from torch import nn

from ghostfused import BatchNorm, functional
from ghostfused.spec.takes import COMMON
from ghostfused.testing import DepthwiseCase


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", COMMON.depthwise_strides)
@pytest.mark.parametrize("kernel", COMMON.depthwise)
def test_every_kernel(backend, kernel, stride, dtype):
    for layout in backend.alternate(LAYOUTS, COMMON.depthwise.index(kernel) + stride + DTYPES.index(dtype)):
        common = {"kernel": kernel, "stride": stride, "dtype": dtype, "layout": layout}
        backend.check(DepthwiseCase(1, 12, 7, 10, **common))  # half a vector beyond whole ones
        backend.check(DepthwiseCase(1, 16, 5, 6, sliced=True, act="hardswish", **common))


@pytest.mark.parametrize("act", strategies.ACTS)
def test_activations(backend, act):
    for per_channel in (False, True) if act == "prelu" else (False,):
        common = {"act": act, "per_channel_slope": per_channel, "height": 6, "width": 5}
        backend.check(DepthwiseCase(norm="bn+bias", **common))
        backend.check(DepthwiseCase(dtype=torch.float16, layout="nhwc", **common))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", strategies.NORMS)
def test_norms(backend, norm, dtype):
    for norm_dtype in (None, torch.float32):
        backend.check(DepthwiseCase(1, 8, 5, 6, norm=norm, dtype=dtype, norm_dtype=norm_dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", strategies.SIZES, ids=str)
def test_sizes(backend, size, layout):
    cases = (
        DepthwiseCase(2, 8, *size, dtype=torch.float16, layout=layout),
        DepthwiseCase(2, 8, *size, (5, 5), 1, layout=layout, act="relu6"),
        DepthwiseCase(2, 8, *size, (1, 5), 1, layout=layout),
    )
    backend.check(*backend.alternate(cases, strategies.SIZES.index(size) + LAYOUTS.index(layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels(backend, layout):
    for i, channels in enumerate(strategies.CHANNELS):
        backend.check(DepthwiseCase(1, channels, 5, 6, layout=layout, dtype=DTYPES[i % 3]))


REAL = [  # GhostNet 1.0×: the stride-2 steps of its bottlenecks, with the maps cut down
    DepthwiseCase(1, 48, 20, 20, (3, 3)),
    DepthwiseCase(1, 72, 18, 18, (5, 5)),
    DepthwiseCase(1, 240, 12, 12, (3, 3)),
    DepthwiseCase(1, 672, 6, 6, (5, 5), act="relu"),
    DepthwiseCase(1, 40, 14, 14, (1, 5), 1),
    DepthwiseCase(1, 40, 14, 14, (5, 1), 1),
]


@pytest.mark.parametrize(("layout", "dtype"), [("nchw", torch.float32), ("nhwc", torch.float16)])
def test_real_layers(backend, layout, dtype):
    for case in backend.alternate(REAL, LAYOUTS.index(layout)):
        with backend.planned_for(132):
            backend.check(dataclasses.replace(case, layout=layout, dtype=dtype))


@given(
    case=strategies.depthwise(channels=st.integers(1, 40), width=st.integers(1, 33)),
    multiprocessors=st.sampled_from([1, 132]),
)
def test_any_case(backend, case, multiprocessors):
    with backend.planned_for(multiprocessors):
        backend.check(case)


def test_it_is_the_layers_it_stands_for():
    conv = nn.Conv2d(6, 6, 5, 2, 2, groups=6)
    bn = nn.BatchNorm2d(6)
    bn(torch.randn(4, 6, 5, 5) * 2 + 1)
    bn.eval()
    x = torch.randn(2, 6, 9, 11)
    norm = BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    out = functional.depthwise(x, conv.weight, bias=conv.bias, bn=norm, act="silu", stride=2, backend="reference")
    torch.testing.assert_close(out, nn.functional.silu(bn(conv(x))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(5, 1, 3, 3)}, r"weight: expected shape \(C, 1, kh, kw\) with C = 4"),
        ({"weight": torch.randn(4, 1, 2, 3)}, "odd kernel"),
        ({"stride": 0}, "stride: expected a positive number, got 0"),
        ({"bias": torch.randn(3)}, r"bias: expected shape \(C,\) = \(4,\), got \(3,\)"),
        ({"act": "tanh"}, "act: expected one of"),
        ({"backend": "cpu_"}, "backend: expected 'auto' or one of"),
    ],
)
def test_the_function_names_the_bad_argument(change, message):
    with pytest.raises(ValueError, match=message):
        functional.depthwise(torch.randn(1, 4, 5, 5), **{"weight": torch.randn(4, 1, 3, 3), **change})
