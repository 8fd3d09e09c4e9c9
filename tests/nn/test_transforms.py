"""A fused model under each of PyTorch's transforms, modes and compilers gives what the unfused one gives, no further from
float64 than that by the table of tolerances; or the same type of error."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import derivatives
import modes
import pytest
import torch
from derivatives import (
    DERIVATIVES,
    MODELS,
    Way,
    batched_gradients,
    direction,
    forward_mode,
    forward_mode_after_replays,
    forward_mode_frozen,
    forward_mode_of_parameters,
    func_grad,
    func_gradients_of_each_image,
    func_jvp,
    func_vmap,
    gradient_penalty,
    gradients,
    pair,
    replayed,
)
from modes import (
    COMPILERS,
    MODES,
    autocast_around_backward,
    dispatch_mode_around_training,
    empty_batch,
    exported,
    flops,
    function_mode,
    functional_mode,
    traced,
    traced_by_fx,
)
from spies import train_by_kernels
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ghostfused import FusedGhostModule, backends, capture, functional, fuse
from ghostfused.backends import reference
from ghostfused.models import paper
from ghostfused.numerics import TOLERANCES
from ghostfused.ops import STATISTICS
from ghostfused.ops.autograd import call, call_with_batch_statistics
from ghostfused.spec import Args, tensor_names
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None,
    reason=f"no CPU kernel: {backends.BACKENDS['cpu'].unavailable()}",
)


# ---- comparison


def outcome(way: Way, model: nn.Module, x: Tensor) -> Any:
    """What ``way`` gives for a copy of ``model``, with the buffers that it leaves; or its error."""
    model, x = copy.deepcopy(model), x.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = way(model, x)
        except Exception as error:
            return error
    return [result, list(model.buffers())]


def kind(result: Any) -> type:
    """Its class; of an error in which Dynamo wraps one, that one's: torch 2.11 does so more often than 2.14."""
    return RuntimeError if isinstance(result, torch._dynamo.exc.TorchRuntimeError) else type(result)


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])


def assert_alike(way: Way, unfused: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """``way`` gives the same types, dtypes and shapes of both, and tensors that are as near to float64's."""
    expected, got = outcome(way, unfused, x), outcome(way, fused, x)
    if isinstance(expected, Exception):
        assert kind(got) is kind(expected), f"unfused: {expected!r}; fused: {type(got)}"
        return
    if isinstance(got, Exception):
        raise got
    exact = outcome(way, copy.deepcopy(unfused).double(), x.double())
    theirs, ours, right = (tree_leaves(each) for each in (expected, got, exact))
    numbers = []
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        assert type(a) is type(b)
        if not isinstance(a, Tensor):
            assert a == b
            continue
        for name in ("shape", "dtype", "device", "requires_grad"):
            assert getattr(a, name) == getattr(b, name), name
        if a.is_meta:
            continue
        if a.is_floating_point():
            numbers.append(i)
        else:
            assert torch.equal(a, b)
    # all as one vector: what is zero but for rounding, as a bias's gradient before a norm, has no scale of its own
    theirs, ours, right = (vector([each[i] for i in numbers]) for each in (theirs, ours, right))
    if len(right):
        tolerance = TOLERANCES[x.dtype]
        # root mean squares: the largest of the errors of so few numbers is a matter of chance
        error, limit = (ours - right).norm(), (theirs - right).norm() * tolerance.factor
        assert error <= max(limit, right.norm() * tolerance.floor)


@pytest.fixture(autouse=True)
def _trained_by_kernels(monkeypatch):
    train_by_kernels(monkeypatch)


def cases(ways: list[Way], training: tuple[bool, ...] = (False, True)) -> list:
    """Each way of both models in both modes, but for the slow ones of the larger model."""
    return [
        pytest.param(way, name, mode, id=f"{way.__name__}-{name}-{'train' if mode else 'eval'}")
        for way in ways
        for name in ("own", "network")
        for mode in training
        if name == "own" or way not in derivatives.SLOW + modes.SLOW
    ]


@pytest.mark.parametrize(
    ("way", "name", "training"), cases(DERIVATIVES) + cases(derivatives.WITH_STORED_STATISTICS, (False,))
)
def test_derivatives(way, name, training):
    assert_alike(way, *pair(name, training))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["twin", "attention"])
def test_derivatives_of_other_modules(name, training):
    for way in (gradients, gradient_penalty, batched_gradients, forward_mode_after_replays, func_grad, func_vmap):
        assert_alike(way, *pair(name, training))


@pytest.mark.parametrize("name", ["own", "network"])
def test_derivatives_with_the_batch_s_statistics_alone(name):
    """Without running statistics, which PyTorch's transforms can't update, train mode gets further."""
    unfused, fused, x = pair(name, True)
    for norm in (m for model in (unfused, fused) for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    for way in (
        gradient_penalty,
        func_grad,
        func_jvp,
        func_vmap,
        func_gradients_of_each_image,
        forward_mode_of_parameters,
    ):
        assert not isinstance(outcome(way, unfused, x), Exception)
        assert_alike(way, unfused, fused, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [gradient_penalty, forward_mode_frozen, func_grad], ids=lambda way: way.__name__)
def test_derivatives_in_half_precision(way, dtype):
    for training in (False, True):
        assert_alike(way, *pair("own", training, dtype))


@pytest.mark.parametrize(("way", "name", "training"), cases(MODES))
def test_modes(way, name, training):
    assert_alike(way, *pair(name, training))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["twin", "attention"])
def test_modes_of_other_modules(name, training):
    for way in (
        function_mode,
        dispatch_mode_around_training,
        flops,
        functional_mode,
        autocast_around_backward,
        empty_batch,
    ):
        assert_alike(way, *pair(name, training))


@pytest.mark.parametrize("name", MODELS)
def test_a_parameter_on_the_meta_device_is_named(name):
    """PyTorch's own convolution computes from whatever lies there."""
    _, model, x = pair(name, False)
    replayed(model, x)
    for path, p in list(model.named_parameters()):
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        owner._parameters[leaf] = nn.Parameter(p.detach().to("meta"))
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, pytest.raises((ValueError, RuntimeError), match=r"expected .*device cpu"):
                model(x)
        owner._parameters[leaf] = p


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("way", COMPILERS, ids=lambda way: way.__name__)
def test_compilers(way, training):
    assert_alike(way, *pair("own", training))


@pytest.mark.parametrize("name", ["network", "attention"])
@pytest.mark.parametrize("way", [traced, traced_by_fx, exported], ids=lambda way: way.__name__)
def test_tracers(way, name):
    assert_alike(way, *pair(name, False))


def test_scripting_compiles_the_original_modules():
    model = nn.Sequential(
        paper.GhostModule(4, 6), nn.Sequential(FusedGhostModule(6, 8), paper.GhostModule(8, 6))
    ).eval()
    fused, x = fuse(model), torch.randn(2, 4, 5, 5)
    expected, keys = fused(x), fused.state_dict().keys()
    with pytest.warns(UserWarning, match=r"script copy.deepcopy\(model\) to keep them"):
        script = torch.jit.script(copy.deepcopy(fused))
    assert script.state_dict().keys() == keys
    torch.testing.assert_close(script(x), expected)
    assert sum(isinstance(m, FusedGhostModule) for m in fused.modules()) == 3
    torch.jit.script(fused)
    torch.testing.assert_close(fused(x), expected)


# ---- captured models


def test_a_captured_model_refuses_what_it_has_no_rule_for():
    model, _, x = pair("network", False)
    captured = capture(model, x)
    expected = captured(x)
    for transform in (
        lambda: jvp(captured, (x,), (x,)),
        lambda: vmap(captured)(x[None]),
        lambda: grad(lambda x: captured(x).sum())(x),
        lambda: forward_mode(captured, x),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match="expected no transform"):
            transform()
    for mode in (modes.Doubles(), modes.DoublesOps()):
        with torch.no_grad(), mode, pytest.raises(ValueError, match=f"expected no {type(mode).__name__} around it"):
            captured(x)
    for tracer, name in (
        (torch.jit.trace, "trace by torch.jit"),
        (lambda f, x: make_fx(f)(x), "ProxyTorchDispatchMode"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=f"expected no {name}"):
            tracer(lambda x: captured(x), x)
    for other in (x.as_subclass(modes.Doubled), modes.Wrapped(x)):
        with pytest.raises(ValueError, match=f"input 0: expected a plain tensor, .* got a {type(other).__name__}"):
            captured(other)
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        captured(x)
    with FlopCounterMode(display=False) as theirs:
        model(x)
    assert ours.get_total_flops() == theirs.get_total_flops()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(captured(x), expected)
    with torch.device("cpu"):
        assert torch.equal(captured(x), expected)
    compiled = torch.compile(lambda x: captured(x * 1) + 1, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), expected + 1)
        assert torch.equal(torch.compile(captured, backend="aot_eager")(x), expected)


def test_a_captured_model_names_a_parameter_that_has_become_a_negative_view():
    model, _, x = pair("network", False)
    captured = capture(model, x)
    p = next(model.parameters())
    p.data = torch._neg_view(-1.5 * p.data)
    with pytest.raises(RuntimeError, match=r"^tensors\[[0-9]+\]: expected no negative view"):
        captured(x)
    p.data = p.data.resolve_neg()
    torch.testing.assert_close(captured(x), model(x).detach(), rtol=1e-3, atol=1e-4)


# ---- ops and functions


def draw(case: Any) -> tuple[Args, list[str]]:
    """A call, and the names of what it has gradients by: all but stored statistics, for which PyTorch has none."""
    args = make(case)
    tensors = zip(tensor_names(type(args)), args.tensors, strict=True)
    names = [name for name, t in tensors if t is not None and not name.endswith(("mean", "var"))]
    for name in names:
        getattr(args, name).requires_grad_()
    return args, names


CALLS = [
    Case(1, 4, 4, 3, 7, act_primary="silu", act_cheap="hardswish", input_gate=True, residual=True, output_gate=True),
    DepthwiseCase(1, 4, 4, 5, act="silu"),
    SqueezeExciteCase(2, 4, 3, 2, 3, gate="sigmoid", act="silu"),
]


@pytest.mark.parametrize("case", CALLS, ids=lambda case: type(case).__name__)
def test_functions_under_transforms(case):
    args = make(case)
    f = lambda x: functional.run(args._replace(x=x))  # noqa: E731
    exact = lambda x: reference.run(args._replace(x=x))  # noqa: E731
    x, t = args.x, direction(args.x)
    pairs = [
        (jvp(f, (x,), (t,)), jvp(exact, (x,), (t,))),
        (vmap(f)(torch.stack([x, t])), torch.stack([exact(x), exact(t)])),
        (jacrev(f)(x), jacrev(exact)(x)),
        (hessian_of(f, x), hessian_of(exact, x)),
    ]
    for ours, right in pairs:
        torch.testing.assert_close(ours, right)
    with pytest.raises(RuntimeError, match=r"backend='cpu' can't run under torch.func's transforms"):
        jvp(lambda x: functional.run(args._replace(x=x), "cpu"), (x,), (t,))


def hessian_of(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad((g * direction(g)).sum(), x)[0]


@pytest.mark.parametrize("case", CALLS, ids=lambda case: type(case).__name__)
def test_second_derivatives_of_the_functions(case):
    args, wanted = draw(dataclasses.replace(case, dtype=torch.float64))

    def f(*tensors: Tensor) -> Tensor:
        return call("reference", args._replace(**dict(zip(wanted, tensors, strict=True))))

    assert torch.autograd.gradgradcheck(f, [getattr(args, n) for n in wanted], fast_mode=True)


def test_second_derivatives_with_the_batch_s_statistics():
    args, wanted = draw(dataclasses.replace(CALLS[0], batch=2, dtype=torch.float64))
    args = args._replace(**dict.fromkeys(STATISTICS))

    def f(*tensors: Tensor) -> Tensor:
        return call_with_batch_statistics("reference", args._replace(**dict(zip(wanted, tensors, strict=True))), "")[0]

    assert torch.autograd.gradgradcheck(f, [getattr(args, n) for n in wanted], fast_mode=True)
    _, *statistics = call_with_batch_statistics("reference", args, "")
    assert not any(t.requires_grad for t in statistics)


@pytest.mark.parametrize(
    "case", [dataclasses.replace(CALLS[0], input_gate=False), *CALLS[1:]], ids=lambda c: type(c).__name__
)
def test_backward_ops_count_what_the_layers_count(case):
    args, names = draw(case)
    wanted = [getattr(args, name) for name in names]
    with FlopCounterMode(display=False) as theirs:
        grads = torch.autograd.grad(reference.run(args).sum(), wanted)
    counts = theirs.get_total_flops()
    out = call("cpu", args)
    with FlopCounterMode(display=False) as ours:
        call("cpu", args)
    forward_only = ours.get_total_flops()
    with FlopCounterMode(display=False) as ours:
        mine = torch.autograd.grad(out.sum(), wanted)
    assert forward_only + ours.get_total_flops() == counts
    torch.testing.assert_close(mine, grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_what_a_recorded_forward_raises_comes_out(error, monkeypatch):
    """And the next call runs."""
    _, model, x = pair("network", False)
    expected = model(x).detach()

    def fails(*_):
        raise error("mine")

    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr("ghostfused.functional.call", fails)
        patch.setattr("ghostfused.functional.reference.run", fails)
        with pytest.raises(error, match="mine"):
            model(x)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(x), expected)
