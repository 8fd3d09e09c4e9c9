"""Training with the batch's statistics and with stored ones: the ops and the Function on the reference's kernels, and what
modules make of them. The kernels of CUDA and Triton are in test_training_kernels.py."""

import copy
import dataclasses

import pytest
import strategies
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strides import with_gaps
from torch import nn

from ghostfused import Act, FusedGhostModule, ops
from ghostfused.backends import reference, training_step
from ghostfused.nn.batch_statistics import ghost_module_training, update_running_statistics
from ghostfused.numerics import relative_error
from ghostfused.ops import autograd
from ghostfused.ops.autograd import call, call_with_batch_statistics
from ghostfused.spec import GhostArgs, tensor_names
from ghostfused.testing import Case, DepthwiseCase, make, make_args
from ghostfused.testing.judge_training import by_autograd, by_op, judge_training

ACTS = [act.name.lower() for act in Act]
TRAINED_NORMS = ["bn", "bn+bias", "bn_no_affine"]
EVERYTHING = {
    "input_gate": True,
    "residual": True,
    "output_gate": True,
    "primary_norm": "bn+bias",
    "cheap_norm": "bn+bias",
}


def assert_right(case: Case, batch_statistics: bool, backend: str = "reference") -> None:
    a = make_args(case)
    grad = torch.randn(a.output_shape(), generator=torch.Generator().manual_seed(case.seed)).to(a.x.dtype)
    verdicts = judge_training(by_op(backend, a, grad, batch_statistics), a, grad, batch_statistics)
    wrong = {name: verdict for name, verdict in verdicts.items() if not verdict.ok}
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("change", [with_gaps, lambda t: t[:1].expand(t.shape)], ids=["gaps", "expanded"])
def test_norm_tensors_of_other_strides(change, layout):
    """PyTorch's own batch_norm takes them for dense where the map is in channels_last."""
    for case in (Case(3, 6, 4, 11, 18, layout=layout), DepthwiseCase(3, 9, 4, 11, stride=2, layout=layout)):
        args = make(case)
        names = [name for name in tensor_names(type(args)) if getattr(args, name) is not None]
        norms = [name for name in names if name.endswith(("mean", "var", "gamma", "beta"))]
        args = args._replace(**{name: change(getattr(args, name)) for name in norms})
        gradients = []
        for dtype in (torch.float32, torch.float64):
            leaves = {name: getattr(args, name).to(dtype).detach() for name in names}
            trained = {name: t.requires_grad_() for name, t in leaves.items() if not name.endswith(("mean", "var"))}
            out = reference.run(args._replace(**leaves))
            gradients.append(torch.autograd.grad(out.square().sum(), list(trained.values())))
        for name, own, exact in zip(trained, *gradients, strict=True):
            assert relative_error(own, exact) < 1e-5, (case, name)


SMOOTH = ("none", "silu", "gelu", "gelu_tanh", "mish")


def smooth(act: str) -> str:
    """An activation without kinks in place of one that has some (see testing_training)."""
    return act if act in SMOOTH else "silu"


# ---- the ops


@given(
    case=strategies.ghost_modules(
        in_channels=st.sampled_from([4, 8]),
        height=st.integers(2, 7),
        width=st.integers(2, 7),
        out_channels=st.integers(8, 16),
        dw_size=st.sampled_from([1, 3, 5]),
        kernel_size=st.sampled_from([1, 1, 3]),
        stride=st.sampled_from([1, 1, 2]),
        dilation=st.sampled_from([1, 1, 2]),
        act_primary=st.sampled_from(ACTS),
        act_cheap=st.sampled_from(ACTS),
        primary_norm=st.sampled_from(TRAINED_NORMS),
        cheap_norm=st.sampled_from(TRAINED_NORMS),
        dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    ),
    batch_statistics=st.booleans(),
)
@settings(max_examples=60)
def test_any_module(case, batch_statistics):
    if case.dtype == torch.float64 or (not batch_statistics and case.norm_dtype):
        case = dataclasses.replace(case, norm_dtype=None)
    if batch_statistics and case.dw_size == 1:
        case = dataclasses.replace(
            case, dw_size=3
        )  # a 1×1 kernel's scale doesn't matter before a norm: its gradient is 0
    if case.dtype.itemsize == 2:
        case = dataclasses.replace(case, act_primary=smooth(case.act_primary), act_cheap=smooth(case.act_cheap))
    assert_right(case, batch_statistics)


def test_grouped_primary_conv():
    assert_right(Case(in_channels=12, out_channels=16, groups=4, height=6, width=5, dtype=torch.float64), True)


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_fewer_channels_than_the_first_half(batch_statistics):
    """The cheap half's running statistics count all of its channels."""
    assert_right(Case(init_channels=8, out_channels=5, height=5, width=4), batch_statistics)


def gradcheck_args(**settings) -> tuple[GhostArgs, list[torch.Tensor]]:
    args = make_args(Case(dtype=torch.float64, height=3, width=4, in_channels=3, out_channels=7, ratio=3, **settings))
    leaves = [t.requires_grad_() for name in ops.TRAIN_FIELDS if isinstance(t := getattr(args, name), torch.Tensor)]
    return args, leaves


@pytest.mark.parametrize(
    ("acts", "options"),
    [
        (("silu", "hardswish"), EVERYTHING),
        (("prelu", "gelu"), {"layout": "nhwc"}),
        (("mish", "gelu_tanh"), {}),
        (("leaky_relu", "none"), {"kernel_size": 3, "dilation": 2, "per_channel_slope": True}),
        (("relu", "relu6"), {"layout": "nhwc", "sliced": True}),
    ],
    ids=str,
)
def test_gradcheck(acts, options):
    """The random numbers keep away from the kinks by more than gradcheck's step."""
    args, leaves = gradcheck_args(act_primary=acts[0], act_cheap=acts[1], **options)
    weight = torch.randn(args.output_shape(), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *_: (call_with_batch_statistics("reference", args, "")[0] * weight).sum(), leaves, fast_mode=True
    )


def test_gradcheck_of_stored_statistics():
    """PyTorch's own batch_norm has no gradients of these."""
    args, _ = gradcheck_args(act_primary="silu", act_cheap="hardswish", cheap_norm="bn_no_affine")
    leaves = [getattr(args, name).requires_grad_() for name in ops.STATISTICS]
    assert torch.autograd.gradcheck(lambda *_: call("reference", args), leaves, fast_mode=True)


# ---- what is computed, and what is kept


def spying(calls: list) -> training_step.TrainingKernels:
    """The reference's kernels, noting what is asked of each."""

    def spy(name, kernel):
        def run(a, *rest):
            calls.append((name, tuple(r for r in rest if r is None or isinstance(r, bool))))
            return kernel(a, *rest)

        return run

    kernels = training_step.KERNELS["reference"]
    return kernels._replace(
        **{n: spy(n, kernel) for n, kernel in kernels._asdict().items() if n not in ("layout", "copy")}
    )


@pytest.mark.parametrize(
    ("asked", "batch_statistics", "expected"),
    [
        (["x"], False, [("cheap_backward", (False, False, None)),
                        ("primary_backward", (None, None, False, True, False, False))]),
        (["x"], True, [("cheap_backward", (True, True, None)), ("primary_backward", (True, True, True, False)),
                       ("normalize_backward", ())]),
        (["cheap_gamma"], True, [("cheap_backward", (True, True, None))]),
        (["output_gate"], False, [("cheap_backward", (False, False))]),
        (["cheap_weight"], True, [("cheap_backward", (True, True, None)), ("primary_backward", (True, False, False, True))]),
        (["primary_beta"], True, [("cheap_backward", (True, True, None)), ("primary_backward", (True, True, True, False))]),
        (["residual"], True, []),
    ],
    ids=str,
)  # fmt: skip
def test_nothing_is_computed_that_is_not_asked_for(asked, batch_statistics, expected, monkeypatch):
    calls: list = []
    a = make_args(Case(height=4, width=5, residual=True, output_gate=True))
    leaves = [getattr(a, name).requires_grad_() for name in asked]
    op = ops.training_op
    spied = lambda grad, *args: training_step.backward(spying(calls), grad, GhostArgs(*args[:-3]), *args[-3:])  # noqa: E731
    monkeypatch.setattr(
        autograd, "training_op", lambda kind, backend: spied if kind == "backward" else op(kind, backend)
    )
    products: list = []
    conv_backward = training_step._primary_conv_backward
    monkeypatch.setattr(
        training_step, "_primary_conv_backward", lambda *args: products.append(1) or conv_backward(*args)
    )
    out = call_with_batch_statistics("reference", a, "")[0] if batch_statistics else call("reference", a)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, leaves, grad)
    assert calls == expected
    assert bool(products) == (asked == ["x"])
    for result, exact in zip(
        ours, torch.autograd.grad(reference.ghost_module(a, batch_statistics), leaves, grad), strict=True
    ):
        torch.testing.assert_close(result, exact)


def saved(function) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        function()
    return tensors


@pytest.mark.parametrize("training_mode", [False, True])
@pytest.mark.parametrize("options", [{}, {"input_gate": True, "residual": True, "output_gate": True}], ids=str)
def test_saves_no_map_but_its_inputs(options, training_mode):
    m = FusedGhostModule(6, 9, act_primary="silu", backend="reference" if training_mode else "auto").train(
        training_mode
    )
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    inputs = {name: torch.randn(shape) for name, shape in (
        ("input_gate", (2, 6)), ("residual", (2, 9, 8, 8)), ("output_gate", (2, 9, 4, 4))) if name in options}  # fmt: skip
    kept = {t.data_ptr() for t in saved(lambda: m(x, **inputs))}
    known = {t.data_ptr() for t in (x, *m.parameters(), *m.buffers(), *inputs.values())}
    if "residual" in inputs:
        assert inputs["residual"].data_ptr() not in kept
    others = [t for t in saved(lambda: m(x, **inputs)) if t.data_ptr() not in known]
    assert all(t.dim() == 1 for t in others)  # the batch's statistics


def test_output_can_be_changed_in_place(training):
    """GhostBottleneck adds its shortcut to it."""
    m = FusedGhostModule(6, 8).train(training)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    out = m(x)
    out += torch.ones_like(out)
    out.mul_(2).sum().backward()
    assert x.grad is not None


def test_bad_input_is_explained():
    x, pw, cw = torch.randn(2, 6, 5, 5), torch.randn(4, 6, 1, 1), torch.randn(4, 1, 3, 3)
    from ghostfused import BatchNorm

    with pytest.raises(ValueError, match=r"cheap_bn: expected no mean and var"):
        ghost_module_training(x, pw, cw, cheap_bn=BatchNorm(torch.zeros(4), torch.ones(4)))
    with pytest.raises(ValueError, match=r"primary_gamma: expected shape .*\(4,\), got \(3,\)"):
        ghost_module_training(x, pw, cw, primary_bn=BatchNorm(None, None, torch.ones(3)))
    with pytest.raises(ValueError, match=r"x: expected 4 dimensions"):
        ghost_module_training(x[0], pw, cw)
    with pytest.raises(ValueError, match=r"primary_weight: expected 4 dimensions"):
        ghost_module_training(x, pw.flatten(1), cw)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ghost_module_training(x[:1, :, :1, :1], pw, cw)
    with pytest.raises(RuntimeError, match="backend='cuda' can't run"):
        ghost_module_training(x, pw, cw, backend="cuda")


def test_the_judge_catches_wrong_results():
    a = make_args(Case(height=5, width=6))
    grad = torch.randn(a.output_shape())
    right = by_autograd(a, grad, True)
    for name, result in right.items():
        wrong = right | {name: result + result.abs().max() * 1e-4}
        verdicts = judge_training(wrong, a, grad, True)
        assert [n for n, verdict in verdicts.items() if not verdict.ok] == [name]


# ---- modules


def unfused(m: FusedGhostModule, x: torch.Tensor) -> torch.Tensor:
    return m._run_children(x, None, None, None)


def assert_same_step(
    m: nn.Module, twin: nn.Module, x: torch.Tensor, run=unfused, tolerance: dict | None = None
) -> None:
    """Output, gradients and buffers of one step of ``m`` are those of ``twin``, run by ``run``."""
    tolerance = tolerance or {"rtol": 1e-10, "atol": 1e-10}
    for module in (m, twin):
        module.zero_grad()
    a, b = (t.clone().requires_grad_() for t in (x, x))
    out, expected = m(a), run(twin, b)
    torch.testing.assert_close(out, expected, **tolerance)
    grad = torch.randn_like(expected)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(a.grad, b.grad, **tolerance)
    for p, q in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, **tolerance)
    for p, q in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def pair(*args, **kwargs) -> tuple[FusedGhostModule, FusedGhostModule]:
    m = FusedGhostModule(*args, backend="reference", **kwargs).double().train()
    return m, copy.deepcopy(m)


@pytest.mark.parametrize("norm", [{"momentum": None}, {"momentum": 0.4}, {"track_running_stats": False}, {"affine": False},
                                  {"momentum": 0.0}], ids=str)  # fmt: skip
def test_running_statistics_are_those_of_batchnorm(norm):
    m, _ = pair(6, 9)
    m.primary_conv[1], m.cheap_op[1] = nn.BatchNorm2d(5, **norm).double(), nn.BatchNorm2d(5, **norm).double()
    twin = copy.deepcopy(m)
    for _ in range(3):
        assert_same_step(m, twin, torch.randn(3, 6, 5, 4, dtype=torch.float64) + 1)


def test_batchnorm_that_does_not_track_any_more():
    m, _ = pair(6, 8)
    m.cheap_op[1].track_running_stats = False  # its buffers stay as they are
    m.primary_conv[1].num_batches_tracked = None
    twin = copy.deepcopy(m)
    before = m.cheap_op[1].running_mean.clone()
    assert_same_step(m, twin, torch.randn(3, 6, 5, 4, dtype=torch.float64))
    assert torch.equal(m.cheap_op[1].running_mean, before)


def test_frozen_batchnorm_in_a_training_module():
    m, twin = pair(6, 9)
    for module in (m, twin):
        for norm in (module.primary_conv[1], module.cheap_op[1]):
            norm.eval().requires_grad_(False)
            norm.running_mean.fill_(0.1)
    a, b = (
        torch.randn(2, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        for _ in "ab"
    )
    out, expected = m(a), unfused(twin, b)
    torch.testing.assert_close(out, expected)
    for t in (out, expected):
        t.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert m.primary_conv[1].weight.grad is None
    assert torch.equal(m.primary_conv[1].running_mean, torch.full((5,), 0.1, dtype=torch.float64))


@pytest.mark.usefixtures("trained_by_kernels")
def test_one_value_per_channel_is_an_error_as_in_batchnorm():
    m = FusedGhostModule(4, 8).train()
    x = torch.randn(1, 4, 1, 1)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        unfused(m, x)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        m(x)


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_module(dtype):
    """As .half() makes it, its norms and running statistics too."""
    m = FusedGhostModule(6, 9).to(dtype).train()
    x = torch.randn(4, 6, 8, 8, dtype=dtype)
    exact = copy.deepcopy(m).double()
    m(x).float().square().sum().backward()
    unfused(exact, x.double()).square().sum().backward()
    for p, q in zip(m.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == dtype
        assert relative_error(p.grad, q.grad) < 20 * torch.finfo(dtype).eps
    for p, q in zip(m.buffers(), exact.buffers(), strict=True):
        assert relative_error(p, q.double()) < 4 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_leaves_the_running_statistics_as_batchnorm_does(momentum):
    module = FusedGhostModule(4, 6).train()
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = momentum
    module(torch.randn(3, 4, 5, 5))
    expected = copy.deepcopy(norms)
    for norm in expected:
        assert norm(torch.empty(0, norm.num_features, 5, 5)).shape[0] == 0
    assert module(torch.empty(0, 4, 5, 5)).shape == (0, 6, 5, 5)
    for norm, other in zip(norms, expected, strict=True):
        assert norm.num_batches_tracked == 2
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, other.get_buffer(name)), name


def test_empty_batches_of_all_processes_leave_the_running_statistics():
    """Their joint statistics are 0 / 0."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(5)
    before = copy.deepcopy(norm.state_dict())
    update_running_statistics(norm, torch.full((3,), torch.nan), torch.full((3,), torch.nan), torch.zeros(1))
    assert torch.equal(norm.running_mean, before["running_mean"])
    assert torch.equal(norm.running_var, before["running_var"])
