"""The steps of a program that are no ops of their own, and a kept program as an op."""

import pytest
import torch
import torch.nn.functional as F
from spies import needs_cpu_kernels
from strides import strides

from ghostfused import FusedGhostModule, ops
from ghostfused.backends import reference
from ghostfused.numerics import TOLERANCES, relative_error
from ghostfused.ops import encoding
from ghostfused.spec import DTYPES, CastArgs, GlobalPoolArgs, LinearArgs

pytestmark = needs_cpu_kernels


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
                pool = encoding.encode(calls[:1], x, known)
                out = ops.forward_op("cpu", "program")(x, *pool)
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
                    program = encoding.encode([(args, torch.empty(0))], x, set())
                    out, fake = ops.forward_op("cpu", "program")(x, *program), args.new_output()
                    assert torch.equal(out.nan_to_num(7), x.to(other).nan_to_num(7))
                    assert out.dtype == fake.dtype
                    assert strides(out) == strides(fake)


@pytest.mark.parametrize(
    ("step", "message"),
    [
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
    known = {id(t) for t in step.tensors}
    with pytest.raises(RuntimeError, match=message):
        ops.forward_op("cpu", "program")(step.x, *encoding.encode([(step, torch.empty(0))], step.x, known))


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
