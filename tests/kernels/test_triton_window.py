"""Primary convs of more than one tap, or of another stride than 1, in Triton's kernels: what they compute, and who chooses
them. test_cuda_window.py has CUDA's."""

import dataclasses
from pathlib import Path

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_backends import Backend, on
from strategies import LAYOUTS
from strides import with_gaps
from triton_runtime import DEVICE, needs_triton

import ghostfused
from ghostfused import backends
from ghostfused.backends import reference, training_step, triton
from ghostfused.cli.verify import read_cases
from ghostfused.models import paper
from ghostfused.spec.takes import kernel_refusal
from ghostfused.testing import Case, convert, make_args, to_device

TRITON = Backend("triton")
both_tritons = on("triton", "triton_two_kernel")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", strategies.DTYPES, ids=str)
ALL_INPUTS = {"input_gate": True, "residual": True, "output_gate": True}


@on("triton")
@each_layout
@each_dtype
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 2), (5, 3)])
def test_primary_convs(backend, kernel, stride, dtype, layout):
    common = {"kernel_size": kernel, "stride": stride, "dtype": dtype, "layout": layout}
    number = LAYOUTS.index(layout) + strategies.DTYPES.index(dtype) + kernel // 2
    cases = (
        Case(1, 20, 9, 11, 24, dw_size=5, **common),
        Case(2, 33, 8, 13, 29, 3, sliced=True, act_primary="silu", **ALL_INPUTS, **common),
        Case(1, 16, 9, 5, 13, dilation=2, dw_size=1, **common),
        Case(2, 5, 4, 1, 9, dw_size=7, **common),
    )
    backend.check(*backend.alternate(cases, number))


@both_tritons
@each_layout
@pytest.mark.parametrize("in_channels", [1, 3, 40])
def test_weights_in_either_format(backend, in_channels, layout):
    """Whatever the maps' is: kernels read both, and copy what is in neither."""
    args = make_args(Case(1, in_channels, 6, 7, 8, kernel_size=3, stride=2, layout=layout, dtype=torch.float16))
    weight = args.primary_weight
    for name, other in (("channels_last", weight.to(memory_format=torch.channels_last)), ("gaps", with_gaps(weight))):
        backend.check(args._replace(primary_weight=other), name=name)


@each_layout
def test_a_weight_in_either_format_is_not_copied(layout):
    args = make_args(Case(kernel_size=3, layout=layout))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        a = args._replace(primary_weight=args.primary_weight.contiguous(memory_format=memory_format))
        plan = triton.plan(a, a.new_output(), None)
        assert plan["primary_weight_ptr"].data_ptr() == a.primary_weight.data_ptr()
        assert plan["TAPS_FIRST"] == (memory_format == torch.channels_last)


@both_tritons
@each_layout
def test_no_ghosts(backend, layout):
    """A convolution alone, with any stride: what the second half is made of is never read."""
    case = Case(2, 9, 7, 10, 20, init_channels=20, kernel_size=3, stride=2, layout=layout, act_primary="silu")
    for optional in ({}, {"residual": True}):
        args = make_args(dataclasses.replace(case, **optional))
        backend.check(args._replace(cheap_weight=torch.full_like(args.cheap_weight, torch.nan)), name=optional)


@pytest.mark.triton
@needs_triton
@each_layout
def test_real_modules(layout):
    """YOLO's, cut to 20 pixels: all are 3×3 at stride 2, under 5×5."""
    cases = read_cases(Path(__file__).parents[1] / "data" / "ghost_configs.jsonl", 20, batch=1, layout=layout)
    windows = [case for case in cases if case.kernel_size > 1]
    assert len(windows) > 6
    for case in windows[LAYOUTS.index(layout) :: 2] if triton.INTERPRETED else windows:
        size = 5 if triton.INTERPRETED else case.height
        TRITON.check(dataclasses.replace(case, height=size, width=size))


@both_tritons
@each_layout
def test_padding_is_zero_and_not_a_neighbour(backend, layout):
    """NaN and infinity reach the same outputs as in PyTorch, none of another row, column or image."""
    args = make_args(Case(4, 8, 7, 8, 16, kernel_size=3, stride=2, layout=layout))
    args.x[:3, 3, 2, 7] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    out, expected = backend.run(args), reference.run(convert(args, torch.float64)).float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isinf(), expected.isinf())
    assert 0 < expected.isfinite()[0].sum() < expected[0].numel()


@both_tritons
@settings(max_examples=settings.default.max_examples // (4 if triton.INTERPRETED else 1))
@given(
    case=strategies.ghost_modules(
        in_channels=st.integers(1, 70), height=st.integers(1, 12), width=st.integers(1, 13),
        out_channels=st.integers(4, 40), dw_size=st.sampled_from([1, 3, 5]), allow_tf32=st.booleans(),
        kernel_size=st.sampled_from([1, 3, 3, 5]), stride=st.integers(1, 3), dilation=st.integers(1, 2),
        cut=st.sampled_from([0, 0, 1, 90]),
    ),
)  # fmt: skip
def test_any_case(backend, case):
    backend.check(case)


# ---- who chooses them


@pytest.mark.parametrize(
    ("settings", "reason"), [({"kernel_size": 3}, "3×3 primary conv in torch.float32"), ({"stride": 2}, "stride 2")]
)
def test_of_the_gpu_kernels_triton_alone_takes_these(settings, reason):
    args = make_args(Case(in_channels=300, **settings))
    assert reason in kernel_refusal(args, "cuda")
    assert kernel_refusal(args, "triton") is None
    assert "groups 2" in kernel_refusal(args._replace(groups=2), "triton")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """CPU tensors are chosen for as CUDA tensors are."""
    monkeypatch.setitem(backends.AUTO, "cpu", backends.AUTO["cuda"])


@pytest.mark.triton
@needs_triton
def test_the_default_takes_triton_in_channels_last(as_on_a_gpu):
    """In NCHW the counts of docs/counts.md are against it."""
    for form in ({"kernel_size": 3}, {"stride": 2}, {"kernel_size": 3, "stride": 2}):
        case = Case(in_channels=20, layout="nhwc", **form)
        args = to_device(make_args(case), DEVICE)
        assert backends.choose(args) == "triton"
        assert backends.choose(args._replace(groups=2)) == "reference"
        args = to_device(make_args(dataclasses.replace(case, layout="nchw")), DEVICE)
        assert backends.choose(args) == "reference"
        assert "NCHW is for backend='triton' alone" in backends.declines("triton", args)
        assert backends.choose(args, "triton") == "triton"
    assert backends.declines("triton", make_args(Case(layout="nchw"))) is None


@pytest.mark.triton
@needs_triton
def test_fuse_takes_triton_where_it_is_installed(as_on_a_gpu, monkeypatch):
    model = torch.nn.Sequential(paper.GhostModule(20, 24, kernel_size=3, stride=2)).eval().to(DEVICE)
    x = torch.randn(2, 20, 9, 11, device=DEVICE)
    _, (swap,) = ghostfused.fuse_with_report(model)
    assert swap.reason == (
        "no kernel for a 3×3 primary conv in torch.float32 (the kernels take torch.float16, torch.bfloat16); "
        "a 3×3 primary conv with stride 2 in NCHW is for backend='triton' alone; channels_last is not"
    )
    assert ghostfused.fuse_with_report(model, backend="triton")[1][0].fused
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    fused, (swap,) = ghostfused.fuse_with_report(model)
    assert (swap.fused, swap.backend) == (True, "triton")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(triton, "unavailable", lambda: "triton is not installed")
    _, (swap,) = ghostfused.fuse_with_report(model)
    assert swap.reason == (
        "no kernel for a 3×3 primary conv in torch.float32 (the kernels take torch.float16, torch.bfloat16); "
        "triton would take it, but triton is not installed"
    )


@pytest.mark.triton
@needs_triton
def test_training_stays_with_the_reference(as_on_a_gpu):
    """The training kernels' own convolution is the 1×1 one."""
    args = TRITON.there(make_args(Case(kernel_size=3, stride=2)))
    assert training_step.choose("triton", args) == "reference"
    module = ghostfused.FusedGhostModule(20, 24, kernel_size=3, stride=2).to(DEVICE)
    plain = module.unfused()
    x = torch.randn(2, 20, 9, 11, device=DEVICE)
    for train in (True, False):
        module.train(train), plain.train(train)
        ours, theirs = ([*torch.autograd.grad(m(x).square().sum(), m.parameters())] for m in (module, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_windows_too_large_for_32_bits_are_refused():
    args = make_args(Case(kernel_size=3))
    for change in ({"dilation": 2**29}, {"stride": 2**31}):
        assert triton.unavailable() or "more than" in triton.supports(TRITON.there(args)._replace(**change))
