"""The steps of a program that are no ops of their own, and a kept program as an op."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from spies import needs_cpu_kernels
from strides import strides

from ghostfused import FusedGhostModule, ops
from ghostfused.backends import reference
from ghostfused.numerics import TOLERANCES, relative_error
from ghostfused.ops import encoding
from ghostfused.spec import (
    DTYPES,
    STEPS,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    Gate,
    GateArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    Step,
    UpsampleArgs,
)

pytestmark = [needs_cpu_kernels, pytest.mark.usefixtures("threads")]


def made_alone(step: Step) -> torch.Tensor:
    known = {id(t) for t in step.tensors if t is not None}
    return ops.forward_op("cpu", "program")(step.x, *encoding.encode([(step, torch.empty(0))], step.x, known))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pooling_and_linear_steps(dtype):
    for n, c, h, w, m in ((1, 3, 7, 7, 5), (2, 40, 1, 1, 70), (5, 33, 6, 11, 1), (7, 130, 3, 2, 20)):
        for layout in (torch.contiguous_format, torch.channels_last):
            buffer = torch.randn(n, c, h + 1, w + 2).to(dtype, memory_format=layout)
            x, weight, bias = buffer[:, :, 1:, 1:-1], torch.randn(m, c).to(dtype), torch.randn(m).to(dtype)
            for b, matrix in ((bias, weight), (None, weight.T.contiguous().T), (bias[:1].expand(m), weight)):
                y = torch.empty(0)
                calls = [(GlobalPoolArgs(x), pooled := torch.empty(n, c, 1, 1)), (LinearArgs(pooled, matrix, b), y)]
                known = {id(matrix), id(b)}
                out = ops.forward_op("cpu", "program")(x, *encoding.encode(calls, x, known))
                exact = F.linear(x.double().mean((2, 3)), matrix.double(), None if b is None else b.double())
                own = F.linear(x.mean((2, 3)), matrix, b)
                tolerance = TOLERANCES[dtype]
                assert relative_error(out, exact) <= tolerance.factor * relative_error(own, exact) + tolerance.floor
                out = made_alone(GlobalPoolArgs(x))
                assert out.shape == (n, c, 1, 1)
                exact = reference.run(GlobalPoolArgs(x.double()))
                assert (
                    relative_error(out, exact)
                    <= tolerance.factor * relative_error(reference.run(GlobalPoolArgs(x)), exact) + tolerance.floor
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_steps(dtype):
    for n, c, h, w in (
        (2, 5, 7, 9),
        (1, 3, 64, 70),
        (3, 1, 5, 5),
        (2, 40, 1, 1),
        (1, 17, 1, 9),
        (0, 4, 3, 3),
        (2, 300, 9, 9),
    ):
        for layout in (torch.contiguous_format, torch.channels_last):
            dense = torch.randn(n, c, h, w).to(dtype, memory_format=layout)
            dense[:1, :1, :1, :1] = float("inf")
            dense[:1, :1, -1:, -1:] = float("nan")
            slices = dense[:, :, ::2], dense[..., 1:], dense[..., ::2], dense[:, c > 1 :], dense[:, :, 0, 0]
            for x in (
                dense,
                *slices,
                dense.transpose(2, 3),
                dense[:, :, 0, 0].T,
                dense[:1].expand(4 * min(n, 1), c, h, w),
            ):
                for to, other in enumerate(DTYPES):
                    args = CastArgs(x, to)
                    out, fake = made_alone(args), args.new_output()
                    assert torch.equal(out.nan_to_num(7), x.to(other).nan_to_num(7))
                    assert out.dtype == fake.dtype
                    assert strides(out) == strides(fake)


SIZES = [
    (0, 4, 3, 3),
    (1, 1, 1, 1),
    (1, 3, 1, 19),
    (2, 5, 7, 9),
    (1, 130, 10, 10),
    (2, 33, 20, 3),
    (1, 16, 40, 300),
    (5, 70, 33, 15),
]


def with_specials(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    """Random numbers, among them infinities, NaN of either sign, zeros of either sign and subnormal numbers."""
    x = torch.randn(shape)
    x[x.abs() > 2.4] *= float("inf")
    x[x.abs() < 0.05] *= 0
    x[(x - 1).abs() < 0.01] = float("nan")
    x[(x + 1).abs() < 0.01] = -float("nan")
    x = x.to(dtype, memory_format=layout)
    tiny = torch.finfo(dtype).smallest_normal / 4
    x[(x - 0.5).abs() < 0.02] = tiny
    x[(x + 0.5).abs() < 0.02] = -tiny
    return x


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    """``x``, and parts of it in other strides."""
    n, c, h, w = x.shape
    slices = x[:, :, ::2], x[..., w > 1 :], x[..., ::2], x[:, c > 1 :], x.transpose(2, 3)
    return [x, *slices, x[:1].expand(3 * min(n, 1), c, h, w)]


def assert_equal(step: Step, expected: torch.Tensor) -> None:
    """Bit by bit, but for the NaN's."""
    outs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outs.append(made_alone(step))
    out, fake = outs[0], step.new_output()
    assert out.dtype == expected.dtype
    assert strides(out) == strides(fake)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(7, 8e4, -8e4), expected.nan_to_num(7, 8e4, -8e4))
    assert torch.equal(*(each.view(torch.int32 if each.element_size() == 4 else torch.int16) for each in outs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_steps(dtype, layout):
    for shape in SIZES:
        for x, kernel, stride in itertools.product(pieces(with_specials(shape, dtype, layout)), (1, 3, 5, 13), (1, 2)):
            assert_equal(MaxPoolArgs(x, kernel, stride), F.max_pool2d(x, kernel, stride, kernel // 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avg_pool_steps(dtype, layout):
    for shape in (*SIZES, (2, 5, 14, 64), (1, 37, 28, 15)):
        map = with_specials(shape, dtype, layout)
        map[map.abs() < torch.finfo(dtype).smallest_normal] = 0  # which AVX512-BF16 makes of them as it rounds
        for x, kernel in itertools.product(pieces(map), (1, 2, 3, 7)):
            if min(x.shape[2:]) >= kernel:
                assert_equal(AvgPoolArgs(x, kernel), F.avg_pool2d(x, kernel))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsample_steps(dtype, layout):
    for shape, scale in itertools.product((*SIZES, (2, 5, 1, 64), (1, 1, 3, 5)), (1, 2, 3, 4)):
        for x in pieces(with_specials(shape, dtype, layout)):
            if x.numel() < 10**5:
                expected = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
                assert_equal(UpsampleArgs(x, scale), expected)
                if scale != 3:
                    by_pytorch = F.interpolate(x, scale_factor=scale) if x.numel() else expected
                    assert torch.equal(by_pytorch.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_steps(dtype, layout):
    """Within what PyTorch's own function loses, which is a rounding or two."""
    for shape in (*SIZES, (2, 3, 70, 71)):
        for each in pieces(with_specials(shape, dtype, layout)):
            for x, gate in itertools.product((each, each[:, :, :1, :1].flatten(1)), Gate):
                step = GateArgs(x, int(gate))
                exact = reference.run(GateArgs(x.double(), int(gate)))
                loss = torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.51)
                out = made_alone(step)
                assert strides(out) == strides(step.new_output())
                assert torch.equal(out.isnan(), exact.isnan())
                error = (out.double() - exact).nan_to_num().abs()
                assert (error <= loss * exact.nan_to_num().abs() + torch.finfo(dtype).smallest_normal).all()
                torch.set_num_threads(2)
                assert torch.equal(made_alone(step).nan_to_num(), out.nan_to_num())
                torch.set_num_threads(1)


def test_a_window_larger_than_the_map():
    x = torch.randn(2, 20, 9, 300)
    for layout in (torch.contiguous_format, torch.channels_last):
        step = MaxPoolArgs(x.contiguous(memory_format=layout), 1023, 1)
        assert_equal(step, x.amax((2, 3), keepdim=True).expand_as(x))


def test_nothing_wins_over_the_lowest_number():
    for dtype, stride in itertools.product(DTYPES, (1, 2)):
        x = torch.full((1, 40, 5, 7), -float("inf"), dtype=dtype)
        for layout in (torch.contiguous_format, torch.channels_last):
            out = made_alone(MaxPoolArgs(x.contiguous(memory_format=layout), 5, stride))
            assert out.eq(-float("inf")).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concat_steps(dtype, layout):
    for n, c, h, w in SIZES:
        other = with_specials((n, 21, h, w), dtype, torch.channels_last)
        for x in pieces(with_specials((n, c, h, w), dtype, layout)):
            if x.shape[2:] != other.shape[2:] or x.shape[0] != n:
                parts = [x.flip(1), x[:, :1], x]
            else:
                parts = [other, other.contiguous(), x]
            for count in (1, 2, 3):
                maps = [x, *parts[:count], *[None] * (3 - count)]
                assert_equal(ConcatArgs(*maps), torch.cat([t for t in maps if t is not None], 1))
                maps = [*parts[:count], x, *[None] * (3 - count)]
                assert_equal(ConcatArgs(*maps), torch.cat([t for t in maps if t is not None], 1))


def test_images_are_concatenated_one_by_one():
    """A batch is cut into pieces unless a part is the program's own tensor."""
    x, own = torch.randn(13, 3, 5, 4), torch.randn(13, 2, 5, 4)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for code, parts in (
            ([list(STEPS).index("concat"), 0, 0, 2, -1], [x, x, own]),
            ([list(STEPS).index("max_pool"), 0, 3, 1, list(STEPS).index("concat"), 0, 4, 5, 0], None),
        ):
            out = ops.forward_op("cpu", "program")(x, [own], code, [])
            pooled = F.max_pool2d(x, 3, 1, 1)
            assert torch.equal(out, torch.cat(parts or [x, pooled, pooled, x], 1))


X = torch.randn(2, 4, 3, 5)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            ConcatArgs(X, torch.randn(2, 4, 3, 6), None, None),
            r"second: expected shape \(2, 4, 3, 5\), got \(2, 4, 3, 6\)",
        ),
        (ConcatArgs(X, X, torch.randn(3, 4, 3, 5), None), "third: expected shape"),
        (ConcatArgs(X, X, X, torch.randn(2, 4, 4, 5)), "fourth: expected shape"),
        (ConcatArgs(X, X, None, X), "third: expected a tensor before the fourth"),
        (ConcatArgs(X, X.half(), None, None), "second: expected x's dtype"),
        (ConcatArgs(X, X[0], None, None), "second: expected 4 dimensions"),
        (ConcatArgs(X, X[:, :0], None, None), "second: expected 1 … 67108864 channels"),
        (ConcatArgs(X[0], X, None, None), "x: expected 4 dimensions"),
        (ConcatArgs(X.double(), X.double(), None, None), "x: expected"),
        (ConcatArgs(*[torch.ones(()).expand(1, 2**25, 1, 1)] * 4), "third: expected 1 … 67108864 channels"),
        (ConcatArgs(*[torch.ones(()).expand(1, 1, 2**20, 2**19)] * 4), r"x: expected at most 2\^40 elements of output"),
        (MaxPoolArgs(X, 4, 1), "kernel: expected an odd one, got 4"),
        (MaxPoolArgs(X, -1, 1), "kernel: expected 1 … 1023 rows, got -1"),
        (MaxPoolArgs(X, 1025, 1), "kernel: expected 1 … 1023 rows, got 1025"),
        (MaxPoolArgs(X, 3, 0), "stride: the kernel takes 1 and 2, got 0"),
        (MaxPoolArgs(X, 3, 3), "stride: the kernel takes 1 and 2, got 3"),
        (MaxPoolArgs(X[0], 3, 1), "x: expected 4 dimensions"),
        (MaxPoolArgs(X.double(), 3, 1), "x: expected"),
        (MaxPoolArgs(X[:, :, :0], 3, 1), "x: expected at least one row and column"),
        (AvgPoolArgs(X, 0), "kernel: expected 1 … 1023 rows, got 0"),
        (AvgPoolArgs(X, 1024), "kernel: expected 1 … 1023 rows, got 1024"),
        (AvgPoolArgs(X, 4), "x: expected at least 4 rows and columns"),
        (AvgPoolArgs(X[0], 3), "x: expected 4 dimensions"),
        (AvgPoolArgs(X.double(), 2), "x: expected"),
        (UpsampleArgs(X, 0), "scale: expected 1 … 1023, got 0"),
        (UpsampleArgs(X, 1024), "scale: expected 1 … 1023, got 1024"),
        (UpsampleArgs(torch.ones(()).expand(1, 1, 1, 2**30), 2), "scale: expected at most"),
        (UpsampleArgs(torch.ones(()).expand(1, 4, 2**19, 2**19), 2), "scale: expected at most"),
        (UpsampleArgs(X[:, :, :0], 2), "x: expected at least one row and column"),
        (UpsampleArgs(X[0], 2), "x: expected 4 dimensions"),
        (UpsampleArgs(X.double(), 2), "x: expected"),
        (GateArgs(X, 3), "gate: expected 0, 1 or 2, got 3"),
        (GateArgs(X, -1), "gate: expected 0, 1 or 2, got -1"),
        (GateArgs(X[0], 0), "x: expected 2 or 4 dimensions"),
        (GateArgs(X.double(), 0), "x: expected"),
        (LinearArgs(torch.randn(2, 5), torch.randn(3, 4), None), "x: expected shape"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4), torch.randn(2)), "bias: expected shape"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4).double(), None), "weight: expected x's dtype"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4, 1), None), "weight: expected 2 dimensions"),
        (GlobalPoolArgs(torch.randn(2, 4)), "x: expected 4 dimensions"),
        (CastArgs(torch.randn(2, 4, 3), 0), "x: expected 2 or 4 dimensions"),
        (CastArgs(torch.randn(2, 4), 3), "dtype: expected 0, 1 or 2, got 3"),
        (CastArgs(torch.randn(2, 4).double(), 0), "x: expected"),
    ],
)
def test_steps_name_what_does_not_fit(step, message):
    with pytest.raises(RuntimeError, match=message):
        made_alone(step)


def test_replay_is_an_op_with_a_fake():
    module, x = FusedGhostModule(4, 8).eval(), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        module(x)
        (kept,) = module._cache._state.programs.values()
        torch.library.opcheck(ops.forward_op("cpu", "replay"), (x, kept.number))
        number = kept.number
        del kept
        module._cache.forget()
        with pytest.raises(RuntimeError, match=f"program: there is none of number {number}"):
            ops.forward_op("cpu", "replay")(x, number)
