"""3×3 primary convs in the CUDA kernels: what they compute, on a GPU, or with none under ptx-on-cpu, and who chooses them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_runtime import _C, needs_cuda, needs_extension, planned_for
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import Backend
from strategies import ACTS
from strides import with_gaps

import ghostfused
from ghostfused import backends
from ghostfused.backends import cuda, cuda_training, reference
from ghostfused.models import paper
from ghostfused.spec.takes import kernel_refusal
from ghostfused.testing import Case, convert, judge, make_args

CUDA = Backend("cuda")
HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
each_dtype = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)

# Cin, H and W of x, init channels, stride, dilation
FORMS: dict[str, tuple[int, int, int, int, int, int]] = {
    "vectors, stride 2": (16, 20, 32, 20, 2, 1),
    "vectors, stride 1": (12, 10, 12, 36, 1, 1),
    "a first step of one channel": (5, 9, 24, 16, 1, 1),
    "a stem": (3, 16, 32, 8, 2, 1),
    "an odd width": (6, 13, 31, 7, 2, 1),
    "dilation": (8, 12, 12, 12, 1, 2),
    "dilation and stride": (9, 20, 24, 10, 2, 3),
    "stride 3": (4, 25, 22, 5, 3, 1),
    "weights by parts": (64, 6, 16, 40, 2, 1),
    "one row": (16, 1, 16, 16, 2, 1),
}


def case_of(name: str, **more: Any) -> Case:
    cin, height, width, init, stride, dilation = FORMS[name]
    form = {"kernel_size": 3, "stride": stride, "dilation": dilation, "init_channels": init, "dtype": torch.float16}
    return Case(
        **{"batch": 1, "in_channels": cin, "height": height, "width": width, "out_channels": 2 * init} | form | more
    )


def check(case: Case, sm_counts: tuple[int, ...] = (1, 132)) -> None:
    """Runs a module planned for devices with so many SMs."""
    args = make_args(case)
    assert kernel_refusal(args, "cuda") is None
    for sm_count in sm_counts:
        with planned_for(sm_count):
            verdict = judge(CUDA.run(args), args)
        assert verdict.ok, f"{verdict}: {case}, {sm_count} SMs"


def planned(name: str, **more: Any) -> dict[str, Any]:
    cin, height, width, init, stride, _ = FORMS[name]
    sizes = {"height": (height - 1) // stride + 1, "width": (width - 1) // stride + 1, "in_channels": cin}
    form = {
        "batch": 1,
        "init_channels": init,
        "out_channels": 2 * init,
        "channels_last": False,
        "window_stride": stride,
    }
    return _C.plan(**(sizes | form | more))


@needs_extension
@pytest.mark.parametrize("smem", [101376, 166912, 232448])
def test_whatever_is_supported_has_a_plan(smem):
    """On any device: of the widest maps, and of any number of channels."""
    device = {"smem_per_block": smem, "smem_per_sm": smem + 1024}
    for width, cin, init, dw_size, path in itertools.product(
        (8, 512), (1, 2**15), (1, 96), (3, 5), ("float16", "bfloat16")
    ):
        sizes = {"width": width, "in_channels": cin, "init_channels": init, "out_channels": 2 * init}
        found = planned("one row", dw_size=dw_size, path=path, **sizes, **device)
        assert found["family"] == "nchw"
        assert found["smem_bytes"] <= smem
    assert planned("a stem", path="float32") == {}
    assert planned("a stem", width=18) == planned("a stem", dw_size=7) == {}


@needs_extension
def test_weights_come_whole_or_by_parts():
    device = {"smem_per_block": 101376, "smem_per_sm": 102400}
    for name, whole in (("a stem", True), ("weights by parts", False)):
        assert (planned(name, **device)["k_chunk"] >= FORMS[name][0]) == whole


@pytest.mark.cuda
@needs_cuda
@each_dtype
@pytest.mark.parametrize("dw_size", [3, 5])
@pytest.mark.parametrize("name", FORMS)
def test_every_form(name, dw_size, dtype):
    check(case_of(name, dw_size=dw_size, dtype=dtype, act_primary="silu", act_cheap="none", primary_norm="bn+bias"))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dw_size", [3, 5])
def test_weights_by_parts(dw_size):
    """On a device with less shared memory than they take: each part comes for all pixels of a block's warps."""
    check(case_of("weights by parts", in_channels=150, height=40, init_channels=17, out_channels=33, dw_size=dw_size))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["vectors, stride 2", "vectors, stride 1", "dilation"])
def test_thread_order(name):
    """Also run in other orders of threads, in which a missing barrier shows."""
    check(case_of(name, batch=2))
    check(case_of(name, in_channels=150, height=5, width=16, init_channels=9, out_channels=18), (132,))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("act", ACTS)
def test_activations(act):
    for first, second in ((act, "none"), ("none", act)):
        check(case_of("a stem", act_primary=first, act_cheap=second, per_channel_slope=act == "prelu"), (132,))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["vectors, stride 2", "weights by parts"])
def test_sliced_ghosts(name):
    """The last ghost channels are cut off, those of whole blocks too."""
    for cut in (1, 8, 17):
        check(case_of(name, batch=2, out_channels=2 * FORMS[name][3] - cut))


@pytest.mark.cuda
@needs_cuda
def test_other_strides():
    """x and the weights, wherever they lie."""
    for name in ("vectors, stride 2", "vectors, stride 1"):
        check(case_of(name, sliced=True))
        args = make_args(case_of(name))
        wide = torch.full((1, args.x.shape[1] + 3, *args.x.shape[2:]), float("nan"), dtype=torch.float16)
        wide[:, 2:-1] = args.x
        weight = args.primary_weight
        for other in (weight.to(memory_format=torch.channels_last), with_gaps(weight)):
            CUDA.check(args._replace(primary_weight=other, x=wide[:, 2:-1]), name=name)
        flat = torch.full((args.x.numel() + 1,), float("nan"), dtype=torch.float16)
        CUDA.check(args._replace(x=flat[1:].view(args.x.shape).copy_(args.x)), name=name)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", ["vectors, stride 2", "vectors, stride 1", "dilation"])
def test_padding_is_zero_and_not_a_neighbour(name):
    """NaN and infinity reach the same outputs as in PyTorch, none of another row, column, channel's step or image."""
    for column in (0, 1, 6, 7, 8):
        args = make_args(case_of(name, batch=4, in_channels=7, height=8, width=16))
        args.x[:3, 3, 2, column] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        out, expected = CUDA.run(args), reference.run(convert(args, torch.float64)).float()
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        assert 0 < expected.isfinite()[0].sum() < expected[0].numel()


@pytest.mark.cuda
@needs_cuda
@settings(max_examples=settings.default.max_examples // 4)
@given(st.data())
def test_any_sizes(data):
    stride, width = data.draw(st.integers(1, 3)), 4 * data.draw(st.integers(2, 8))
    dtype, dw_size = data.draw(st.sampled_from(list(HALVES.values()))), data.draw(st.sampled_from([3, 5]))
    init, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 2))
    case = Case(
        batch, data.draw(st.integers(1, 40)), data.draw(st.integers(1, 24)),
        (width - 1) * stride + data.draw(st.integers(1, stride)), 2 * init - data.draw(st.integers(0, init - 1)),
        dw_size=dw_size, kernel_size=3, stride=stride, dilation=data.draw(st.integers(1, 3)), init_channels=init, dtype=dtype,
    )  # fmt: skip
    check(case, (data.draw(st.sampled_from([1, 132])),))


# ---- who chooses them


REFUSED = [
    ({"kernel_size": 5}, "a 5×5 primary conv"),
    ({"kernel_size": 1}, "a 1×1 primary conv with stride 2"),
    ({"dw_size": 7}, "dw_size 7"),
    ({"ratio": 3}, "ratio 3"),
    ({"out_channels": 8}, "ratio 2, 8 channels"),
    ({"dtype": torch.float32}, "in torch.float32"),
    ({"residual": True}, "with residual"),
    ({"input_gate": True}, "with input_gate"),
    ({"output_gate": True}, "with output_gate"),
    ({"width": 36}, "to a width of 18"),
    ({"width": 1032}, "to a width of 516"),
    ({"width": 6}, "to a width of 3"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_what_they_refuse(change, reason):
    assert reason in kernel_refusal(make_args(case_of("a stem", **change)), "cuda")


def test_what_they_take():
    for name, dw_size in itertools.product(FORMS, (3, 5)):
        args = make_args(case_of(name, dw_size=dw_size))
        assert kernel_refusal(args, "cuda") is None
        assert "groups 2" in kernel_refusal(args._replace(groups=2), "cuda")
        assert cuda.declines(args) is None
        assert "in torch.float32" in cuda.declines(convert(args, torch.float32))


@pytest.mark.cuda
@needs_cuda
def test_the_default_takes_them_forward():
    """Training stays with the reference: its kernels' own convolution is the 1×1 one."""
    args = CUDA.there(make_args(case_of("a stem")))
    assert backends.choose(args) == "cuda"
    assert "3×3 primary conv" in cuda_training.supports(args)
    assert cuda_training.supports(CUDA.there(make_args(Case(dtype=torch.float16)))) is None
    args = CUDA.there(make_args(case_of("a stem", layout="nhwc")))
    assert backends.choose(args) != "cuda"


def test_fuse_takes_them_in_half_precision(monkeypatch):
    """In NCHW; a model in float32 keeps its modules, which no kernel would run there."""
    monkeypatch.setitem(backends.AUTO, "cpu", ("cuda",))
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    model = torch.nn.Sequential(paper.GhostModule(8, 16, kernel_size=3, stride=2, dw_size=5)).eval()
    (swap,) = ghostfused.fuse_with_report(model)[1]
    assert (
        swap.reason
        == "no kernel for a 3×3 primary conv in torch.float32 (the kernels take torch.float16, torch.bfloat16)"
    )
    assert ghostfused.fuse_with_report(model.half())[1][0].fused
