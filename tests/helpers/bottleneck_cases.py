"""Cases of the ops between a bottleneck's Ghost modules, shared by the tests of the GPU kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from draws import ACTS, DTYPES, GATES, LAYOUTS

from ghostfused.backends import reference
from ghostfused.spec import Act, Args, DepthwiseArgs, tensor_names
from ghostfused.spec.kernels import COMMON
from ghostfused.testing import DepthwiseCase, SqueezeExciteCase, convert, make

Case = DepthwiseCase | SqueezeExciteCase


def every_kernel(dtype: torch.dtype, layout: str) -> Iterator[DepthwiseCase]:
    for kernel in COMMON.depthwise:
        for stride in (1, 2):
            yield DepthwiseCase(1, 12, 7, 10, kernel, stride, dtype=dtype, layout=layout)


def activations(act: str) -> Iterator[DepthwiseCase]:
    for per_channel in (False, True) if act == "prelu" else (False,):
        common = {"act": act, "per_channel_slope": per_channel, "height": 6, "width": 5}
        yield DepthwiseCase(norm="bn+bias", **common)
        yield DepthwiseCase(dtype=torch.float16, layout="nhwc", **common)


def norms(norm: str, dtype: torch.dtype) -> Iterator[DepthwiseCase]:
    for norm_dtype in (None, torch.float32):
        yield DepthwiseCase(1, 8, 5, 6, norm=norm, dtype=dtype, norm_dtype=norm_dtype)


SIZES = [(1, 1), (1, 9), (13, 1), (2, 2), (7, 7), (7, 9), (14, 14), (3, 33), (20, 6), (16, 16)]
CHANNELS = [1, 2, 4, 5, 12, 20, 33, 36, 72, 130]


def sizes(size: tuple[int, int], layout: str) -> Iterator[Case]:
    for kernel, stride in (((3, 3), 2), ((5, 5), 1), ((1, 5), 1)):
        dtype = torch.float16 if stride == 2 else torch.float32
        yield DepthwiseCase(2, 8, *size, kernel, stride, layout=layout, dtype=dtype)
    yield SqueezeExciteCase(2, 16, 6, *size, layout=layout, dtype=torch.float16)


def channels(count: int, layout: str) -> Iterator[Case]:
    dtype = DTYPES[count % 3]
    yield DepthwiseCase(1, count, 5, 6, layout=layout, dtype=dtype)
    yield SqueezeExciteCase(2, count, max(1, count // 3), 5, 6, layout=layout, dtype=dtype)


# GhostNet 1.0×: the stride-2 steps of its bottlenecks, with the maps cut down, and its squeeze-and-excite blocks
REAL = [
    DepthwiseCase(1, 48, 20, 20, (3, 3)),
    DepthwiseCase(1, 72, 18, 18, (5, 5)),
    DepthwiseCase(1, 240, 12, 12, (3, 3)),
    DepthwiseCase(1, 672, 6, 6, (5, 5), act="relu"),
    DepthwiseCase(1, 40, 14, 14, (1, 5), 1),
    DepthwiseCase(1, 40, 14, 14, (5, 1), 1),
    *(SqueezeExciteCase(1, c, c // 4, size, size) for c, size in ((72, 28), (120, 28), (480, 14), (672, 7), (960, 7))),
]


def views(layout: str) -> Iterator[torch.Tensor]:
    """Maps of 16 channels at most and of unusual strides."""
    x = torch.randn(1, 16, 11, 12)
    x = x.to(memory_format=torch.channels_last) if layout == "nhwc" else x
    yield from (x.expand(3, -1, -1, -1), x.transpose(2, 3), x[:, ::2], x[:, :, ::2, ::3], x[:, 1:])
    yield from (x.permute(0, 2, 1, 3), x.permute(3, 2, 1, 0), x[:, :, :1].expand(1, 16, 9, 12), x[:, :, 1:, 3:])
    yield from (x[..., :1], x[:, :, 3:4, 5:6], x[:, :1])


def on(x: torch.Tensor) -> Iterator[Args]:
    """Both ops on ``x``."""
    _, c, h, w = x.shape
    yield make(DepthwiseCase(1, c, h, w, stride=1 + c % 2))._replace(x=x)
    yield make(SqueezeExciteCase(1, c, 6, h, w))._replace(x=x)


def with_strided_parameters() -> Iterator[Args]:
    for case in (DepthwiseCase(norm="bn+bias", act="prelu", per_channel_slope=True), SqueezeExciteCase()):
        args = make(case)
        strided = {}
        for name in tensor_names(type(args))[1:]:
            t = getattr(args, name)
            wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
            wide[..., ::3] = t
            strided[name] = wide[..., ::3]
        yield args._replace(**strided)
        for name in ("weight", "reduce_weight", "expand_weight"):
            if hasattr(args, name):
                yield args._replace(**{name: getattr(args, name).transpose(0, -1).contiguous().transpose(0, -1)})


def unaligned() -> Iterator[Args]:
    """Pointers that are aligned to one element only."""
    for layout in LAYOUTS:
        for case in (
            DepthwiseCase(2, 16, 8, 8, layout=layout, dtype=torch.float16),
            SqueezeExciteCase(2, 16, 8, 8, 8, layout=layout, dtype=torch.float16),
        ):
            args = make(case)
            shifted = {}
            for name in ("x", *tensor_names(type(args))[1:]):
                if (t := getattr(args, name)) is not None:
                    buffer = torch.zeros(t.numel() + 1, dtype=t.dtype)
                    shifted[name] = buffer[1:].as_strided(t.shape, t.stride(), 1).copy_(t)
            yield args._replace(**shifted)


def not_finite(value: float) -> Iterator[tuple[Args, torch.Tensor]]:
    """Arguments with ``value`` in one pixel of one of two images, and the reference's output: float64's, since GELU of many
    infinities in float32 is NaN in PyTorch, and of one infinite."""
    for layout in LAYOUTS:
        for act in ACTS:
            args: Args = make(DepthwiseCase(2, 8, 7, 8, stride=1, act=act, layout=layout))
            args.x[0, 3, 2, 5] = value
            yield args, reference.run(convert(args, torch.float64)).float()
        for gate in GATES:
            args = make(SqueezeExciteCase(2, 24, 8, 7, 8, gate=gate, layout=layout))
            args.x[0, 3, 2, 5] = value
            yield args, reference.run(convert(args, torch.float64)).float()


def assert_like(out: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN and infinities in the same places, and the rest close."""
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(out[finite], expected[finite], rtol=1e-4, atol=1e-5)


def bad_arguments(args: Args) -> dict[str, object]:
    """By name, values that don't fit ``args``, which are on a GPU and have every tensor."""
    cpu = args.x.shape[1]
    if isinstance(args, DepthwiseArgs):
        return {
            "x": args.x[0],
            "weight": args.weight[:, :, :, :2],
            "bias": args.bias[:3],
            "mean": torch.ones(cpu),
            "var": None,
            "gamma": torch.ones(cpu, dtype=torch.float64).cuda(),
            "slope": args.mean[:3],
            "act": max(Act) + 1,
            "stride": 3,
        }
    return {
        "x": args.x[0],
        "reduce_weight": args.reduce_weight[:, :5],
        "reduce_bias": args.reduce_bias[:3],
        "expand_weight": args.expand_weight.t(),
        "expand_bias": torch.ones(cpu),
        "act": int(Act.LEAKY_RELU),
        "gate": 3,
    }
