"""The copy from NCHW to channels_last and back, by which CUDA's training kernels take large maps."""

from __future__ import annotations

import pytest
import torch
from cuda_runtime import needs_cuda
from hypothesis import given
from hypothesis import strategies as st
from kernel_backends import Backend
from strategies import DTYPES
from torch import Tensor
from training_runtime import to

from ghostfused.backends.extension import op

pytestmark = [pytest.mark.cuda, needs_cuda]
DEVICE = Backend("cuda").device
LAYOUTS = {"to channels_last": torch.channels_last, "to NCHW": torch.contiguous_format}
OTHER = {torch.channels_last: torch.contiguous_format, torch.contiguous_format: torch.channels_last}


def check(x: Tensor, layout: torch.memory_format) -> None:
    out = to(torch.full_like(x, float("nan"), memory_format=layout), DEVICE)
    op("change_layout_cuda")(to(x, DEVICE), out)
    assert torch.equal(out.cpu(), x), (x.shape, x.stride())


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """All different, as far as the dtype has them."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.int32).remainder(2039).to(dtype).view(shape).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 8, 8, 8),  # whole vectors
        (1, 136, 4, 18),  # several tiles each way, the last ones cut
        (2, 66, 14, 14),  # halves of vectors
        (3, 40, 7, 7),  # single elements
        (1, 3, 5, 7),
        (2, 1, 4, 4),
        (2, 64, 1, 1),
        (0, 8, 4, 4),
    ],
    ids=str,
)
def test_every_element(shape, dtype, layout):
    check(numbers(shape, dtype, OTHER[layout]), layout)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 17)),
    st.integers(0, 8),
    st.sampled_from(DTYPES),
    st.sampled_from(list(LAYOUTS.values())),
)
def test_any_slice(shape, channel, dtype, layout):
    """Of channels: what remains has the strides of the whole, and often an odd address."""
    n, channels, h, w = shape
    whole = numbers((n, channels + 8, h, w), dtype, OTHER[layout])
    check(whole[:, channel : channel + channels], layout)


def test_errors_name_the_argument():
    def empty(*shape: int, layout: torch.memory_format = torch.contiguous_format, **options: torch.dtype) -> Tensor:
        return torch.empty(shape, device=DEVICE, memory_format=layout, **options)

    x, out = (empty(2, 8, 4, 4, layout=layout) for layout in (torch.contiguous_format, torch.channels_last))
    for bad_x, bad_out, message in [
        (x[0], out, "x: expected 4 dimensions, got 3"),
        (x, out[0], "out: expected 4 dimensions, got 3"),
        (empty(2, 8, 4, 4, dtype=torch.float64), out, "x: expected float32, float16 or bfloat16"),
        (x, empty(2, 8, 4, 4, dtype=torch.float16), "out: expected x's dtype"),
        (x, out[:1], r"out: expected shape"),
        (x, empty(2, 16, 4, 4, layout=torch.channels_last)[:, ::2], "out: expected a dense map"),
        (x.transpose(2, 3), out, "x: expected its pixels side by side"),
        (empty(2, 8, 4, 8)[..., ::2], out, "x: expected its pixels side by side"),
        (x, empty(2, 8, 4, 4), "x: expected its channels side by side"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op("change_layout_cuda")(bad_x, bad_out)
