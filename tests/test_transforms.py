"""A fused model under each of PyTorch's transforms, modes and compilers gives what the unfused one gives, no further from
float64 than that by the table of tolerances; or the same type of error."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from families import OfficialGhost
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ghostfused import FusedGhostBottleneck, FusedGhostModule, backends, capture, functional, fuse
from ghostfused.backends import reference
from ghostfused.cli.verify import calibrate
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


# ---- models


class Layers(nn.Module):
    """The layers of a FusedGhostModule, unfused."""

    def __init__(self, ghost: FusedGhostModule):
        super().__init__()
        self.primary_conv, self.cheap_op = copy.deepcopy(ghost.primary_conv), copy.deepcopy(ghost.cheap_op)
        self.out_channels = ghost.out_channels

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_op(x1)[:, : self.out_channels - x1.shape[1]]], 1)


def own() -> tuple[nn.Module, nn.Module]:
    """A FusedGhostModule that was built as one; activations with a second derivative, and PReLU."""
    ghost = FusedGhostModule(4, 7, act_primary="silu", act_cheap="prelu")
    return Layers(ghost), ghost


def twin() -> tuple[nn.Module, nn.Module]:
    module = paper.GhostModule(4, 6)
    return module, FusedGhostModule.from_module(module)


def attention() -> tuple[nn.Module, nn.Module]:
    module = OfficialGhost(4, 6, mode="attn")
    return module, FusedGhostModule.from_module(module)


def network() -> tuple[nn.Module, nn.Module]:
    """All that lies between Ghost modules: a 1×1 conv, a stride-2 step, a squeeze-and-excite, both shortcuts."""
    first = paper.GhostBottleneck(4, 10, 6, stride=2, se_ratio=0.25)
    first.se.gate = nn.Sigmoid()  # PyTorch has no second derivative of the hard one
    model = nn.Sequential(nn.Sequential(first, paper.ConvBnAct(6, 6), paper.GhostBottleneck(6, 8, 6)), nn.Identity())
    fused = fuse(model)
    assert sum(isinstance(m, FusedGhostBottleneck) for m in fused.modules()) == 2
    return model, fused


MODELS = {f.__name__: f for f in (own, twin, attention, network)}


def pair(name: str, training: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """An unfused model, the fused one with the same values, and an input."""
    torch.manual_seed(0)
    unfused, fused = MODELS[name]()
    calibrate(unfused, torch.randn(4, 4, 6, 5))
    fused.load_state_dict(unfused.state_dict())
    return unfused.train(training).to(dtype), fused.train(training).to(dtype), torch.randn(3, 4, 6, 5).to(dtype)


# ---- comparison

Way = Callable[[nn.Module, Tensor], Any]


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


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.float64), *(t.detach().double().flatten() for t in tensors)])


def assert_alike(way: Way, unfused: nn.Module, fused: nn.Module, x: Tensor) -> None:
    """``way`` gives the same types, dtypes and shapes of both, and tensors that are as near to float64's."""
    expected, got = outcome(way, unfused, x), outcome(way, fused, x)
    if isinstance(expected, Exception):
        assert type(got) is type(expected), f"unfused: {expected!r}; fused: {type(got)}"
        return
    if isinstance(got, Exception):
        raise got
    exact = outcome(way, unfused.double(), x.double())
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


# ---- derivatives


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def direction(t: Tensor) -> Tensor:
    """Numbers that look random, and are the same in each dtype."""
    return torch.arange(1, t.numel() + 1, dtype=t.dtype).mul(0.7).sin().reshape(t.shape)


def forward(model, x):
    return model(x)


def replayed(model, x):
    with torch.no_grad():
        return [model(x) for _ in range(3)]


def inference(model, x):
    with torch.inference_mode():
        return [model(x).clone() for _ in range(2)]


def gradients(model, x):
    x.requires_grad_()
    (model(x) * direction(model(x))).sum().backward()
    return [x.grad, [p.grad for p in model.parameters()]]


def gradient_penalty(model, x):
    x.requires_grad_()
    (of_x,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (of_x.norm() - 1).square().backward()
    return [of_x.detach(), x.grad, [p.grad for p in model.parameters()]]


def hessian_vector_product(model, x):
    wanted = [x.requires_grad_(), *model.parameters()]
    first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
    along = sum((g * direction(g)).sum() for g in first)
    return torch.autograd.grad(along, wanted, allow_unused=True, materialize_grads=True)


def third_derivative(model, x):
    y = model(x.requires_grad_()).square().sum()
    for _ in range(3):
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        y = (g * direction(g)).sum()
    return g


def reused_graph(model, x):
    """Both kinds of backward over one graph."""
    y = model(x.requires_grad_()).square().sum()
    wanted = [x, *model.parameters()]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    second = torch.autograd.grad(y, wanted, create_graph=True)
    return [first, [g.detach() for g in second]]


def batched_gradients(model, x):
    y = model(x.requires_grad_())
    seeds = torch.stack([direction(y), direction(y).cos()])
    return torch.autograd.grad(y, [x, *model.parameters()], seeds, is_grads_batched=True)


def jacobian(model, x):
    return torch.autograd.functional.jacobian(lambda x: model(x).mean((2, 3)), x[:2])


def jacobian_vectorized(model, x):
    return torch.autograd.functional.jacobian(lambda x: model(x).mean((2, 3)), x[:2], vectorize=True)


def jacobian_forward(model, x):
    f = lambda x: model(x).mean((2, 3))  # noqa: E731
    return torch.autograd.functional.jacobian(f, x[:2, :, :2, :3], vectorize=True, strategy="forward-mode")


def hessian(model, x):
    return torch.autograd.functional.hessian(lambda x: model(x).square().sum(), x[:2, :, :2, :2])


# ---- forward mode


def forward_mode(model, x):
    with forward_ad.dual_level():
        y = model(forward_ad.make_dual(x, direction(x)))
        return list(forward_ad.unpack_dual(y))


def forward_mode_frozen(model, x):
    model.requires_grad_(False)
    with torch.no_grad():
        return forward_mode(model, x)


def forward_mode_after_replays(model, x):
    return [replayed(model, x), forward_mode_frozen(model, x), replayed(model, x)]


def forward_mode_of_parameters(model, x):
    with forward_ad.dual_level(), torch.no_grad():
        dual = {name: forward_ad.make_dual(p, direction(p)) for name, p in parameters(model).items()}
        return list(forward_ad.unpack_dual(functional_call(model, dual, (x,))))


def forward_over_reverse(model, x):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.requires_grad_(), direction(x))
        (g,) = torch.autograd.grad(model(dual).square().sum(), dual, create_graph=True)
        return list(forward_ad.unpack_dual(g))


def backward_in_dual_level(model, x):
    """The forward has run before."""
    y = model(x.requires_grad_())
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(direction(y), direction(y).cos())
        (g,) = torch.autograd.grad(y, x, seed)
        return list(forward_ad.unpack_dual(g))


# ---- torch.func


def func_jvp(model, x):
    return jvp(model, (x,), (direction(x),))


def func_vjp(model, x):
    y, pull = vjp(model, x)
    return [y, pull(direction(y))]


def func_jacobians(model, x):
    f = lambda x: model(x).mean((2, 3))  # noqa: E731
    return [jacfwd(f)(x[:2, :, :2, :3]), jacrev(f)(x[:2, :, :2, :3])]


def func_grad(model, x):
    return grad(lambda p: functional_call(model, p, (x,)).square().sum())(parameters(model))


def func_grad_twice(model, x):
    f = lambda x: model(x).square().sum()  # noqa: E731
    return grad(lambda x: (grad(f)(x) * direction(x)).sum())(x)


def func_gradients_of_each_image(model, x):
    loss = lambda p, x: functional_call(model, p, (x[None],)).square().sum()  # noqa: E731
    return vmap(grad(loss), (None, 0))(parameters(model), x)


def func_vmap(model, x):
    with torch.no_grad():
        return vmap(model)(x.unflatten(2, (2, 3)).movedim(2, 0))


def func_vmap_of_parameters(model, x):
    models = [copy.deepcopy(model) for _ in range(2)]
    for p in models[1].parameters():
        p.data.mul_(1.5)
    stacked, buffers = stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(stacked, buffers)


def func_call(model, x):
    with torch.no_grad():
        model(x)
        changed = {name: 1.5 * p for name, p in parameters(model).items()}
        return [functional_call(model, changed, (x,)) for _ in range(2)] + [model(x)]


DERIVATIVES = [
    forward, replayed, inference, gradients, gradient_penalty, hessian_vector_product, third_derivative, reused_graph,
    batched_gradients, jacobian, jacobian_vectorized, jacobian_forward, hessian, forward_mode, forward_mode_frozen,
    forward_mode_after_replays, forward_mode_of_parameters, forward_over_reverse, backward_in_dual_level, func_jvp, func_vjp,
    func_jacobians, func_grad, func_grad_twice, func_gradients_of_each_image, func_vmap, func_vmap_of_parameters, func_call,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", DERIVATIVES, ids=lambda way: way.__name__)
def test_derivatives(way, name, training):
    assert_alike(way, *pair(name, training))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", [gradient_penalty, forward_mode_frozen, func_grad], ids=lambda way: way.__name__)
def test_derivatives_in_half_precision(way, dtype):
    for training in (False, True):
        assert_alike(way, *pair("own", training, dtype))


# ---- modes


class Doubles(TorchFunctionMode):
    """Doubles what each convolution gives, and keeps the names of all functions."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append(getattr(func, "__name__", str(func)))
        return out * 2 if func is torch.conv2d else out


class DoublesOps(TorchDispatchMode):
    """As ``Doubles``, of operations."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen.append(str(func))
        return out * 2 if func is torch.ops.aten.convolution.default else out


def function_mode(model, x):
    with torch.no_grad():
        model(x)
        with Doubles() as mode:
            out = model(x)
    return [out, sorted(name for name in mode.seen if name in ("conv2d", "batch_norm", "cat"))]


def dispatch_mode(model, x):
    replayed(model, x)
    with torch.no_grad(), DoublesOps() as mode:
        out = model(x)
    return [out, mode.seen]


def dispatch_mode_around_training(model, x):
    with DoublesOps() as mode:
        result = gradients(model, x)
    return [result, mode.seen]


def flops(model, x):
    """Around both passes, and around the backward alone."""
    x.requires_grad_()
    with FlopCounterMode(display=False) as both:
        model(x).sum().backward()
    y = model(x).sum()
    with FlopCounterMode(display=False) as backward:
        y.backward()
    return [both.get_total_flops(), backward.get_total_flops()]


def device_mode(model, x):
    with torch.device("cpu"):
        return replayed(model, x)


def device_mode_elsewhere(model, x):
    with torch.device("meta"):
        return [replayed(model, x), gradients(model, x)]


def described(result: Any) -> Any:
    return [(t.shape, t.dtype, t.stride(), type(t), t.device, t.requires_grad) for t in tree_leaves(result)]


def fake(model, x):
    replayed(model, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = [described(replayed(model, x)), described(model(mode.from_tensor(x)))]
    return [result, replayed(model, x)]


def fake_without_leave(model, x):
    replayed(model, x)
    with FakeTensorMode():
        return described(model(x))


def fake_model(model, x):
    with FakeTensorMode() as mode:
        tensors = {name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        y = functional_call(model, tensors, (mode.from_tensor(x),))
        y.sum().backward()
        return described([y, [t.grad for t in tensors.values() if t.requires_grad]])


def functional_tensors(model, x):
    with torch.no_grad():
        model(x)
        return torch.func.functionalize(model)(x)


def functional_mode(model, x):
    replayed(model, x)
    with FunctionalTensorMode(), torch.no_grad():
        return [model(x) for _ in range(2)]


def made_by_make_fx(model, x):
    with torch.no_grad():
        model(x)
        graph = make_fx(model)(x)
        assert not any(name in graph.code for name in ("replay", "program"))
        return [graph(x), graph(x + 1)]


def made_by_make_fx_of_gradients(model, x):
    graph = make_fx(lambda x: torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))(
        x.requires_grad_()
    )
    return graph(x + 1)


def made_by_make_fx_of_fakes(model, x):
    with torch.no_grad():
        return make_fx(model, tracing_mode="fake")(x)(x + 1)


def autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return [model(x).dtype, [y.dtype for y in replayed(model, x)]]


def autocast_around_backward(model, x):
    y = model(x.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        (y * direction(y)).sum().backward()
    return [x.grad, [p.grad for p in model.parameters()]]


def autocast_around_second_backward(model, x):
    (g,) = torch.autograd.grad(model(x.requires_grad_()).square().sum(), x, create_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        g.square().sum().backward()
    return x.grad


def on_meta(model, x):
    return described(model.to("meta")(x.to("meta")))


def negative_bit(model, x):
    with torch.no_grad():
        for p in model.parameters():
            p.data = torch._neg_view(p.data.neg())
            assert p.is_neg()
        return [model(x), model(torch._neg_view(x)), model(x)]


def empty_batch(model, x):
    empty = x[:0].detach().requires_grad_()
    y = model(empty)
    y.sum().backward()
    with torch.no_grad():
        return [y, empty.grad, [p.grad for p in model.parameters()], model(empty), model(x), model(empty)]


def settings(model, x):
    results = []
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            results += [replayed(model, x), gradients(model, x.detach())]
    finally:
        torch.set_default_dtype(default)
    with torch.backends.mkldnn.flags(enabled=False):
        results += [replayed(model, x), gradients(model, x.detach())]
    torch.use_deterministic_algorithms(True)
    try:
        return [*results, replayed(model, x), gradients(model, x.detach())]
    finally:
        torch.use_deterministic_algorithms(False)


MODES = [
    function_mode, dispatch_mode, dispatch_mode_around_training, flops, device_mode, device_mode_elsewhere, fake,
    fake_without_leave, fake_model, functional_tensors, functional_mode, made_by_make_fx, made_by_make_fx_of_gradients,
    made_by_make_fx_of_fakes, autocast, autocast_around_backward, autocast_around_second_backward, on_meta,
    negative_bit, empty_batch, settings,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", MODES, ids=lambda way: way.__name__)
def test_modes(way, name, training):
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


# ---- compilers


def scripted(model, x):
    with torch.no_grad():
        return [torch.jit.script(model)(x), model(x)]


def traced(model, x):
    """With gradients on, and after programs are kept."""
    replayed(model, x)
    trace = torch.jit.trace(model, x)
    return [trace(x), trace(x + 1)]


def traced_by_fx(model, x):
    return torch.fx.symbolic_trace(model)(x + 1)


def exported(model, x):
    return torch.export.export(model, (x,)).module()(x + 1)


def compiled(model, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend="eager")(x)


def compiled_gradients(model, x):
    torch._dynamo.reset()
    return gradients(torch.compile(model, backend="aot_eager"), x)


def compiled_second_derivative(model, x):
    torch._dynamo.reset()
    return gradient_penalty(torch.compile(model, backend="aot_eager"), x)


def compiled_vmap(model, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(vmap(model), backend="aot_eager")(x[:, None])


def compiled_func_grad(model, x):
    torch._dynamo.reset()
    return torch.compile(grad(lambda x: model(x).square().sum()), backend="aot_eager")(x)


def compiled_jvp(model, x):
    torch._dynamo.reset()
    return torch.compile(lambda x, t: jvp(model, (x,), (t,)), backend="aot_eager")(x, direction(x))


def vmap_of_compiled(model, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return vmap(torch.compile(model, backend="aot_eager"))(x[:, None])


COMPILERS = [
    scripted, traced, traced_by_fx, exported, compiled, compiled_gradients, compiled_second_derivative, compiled_vmap,
    compiled_func_grad, compiled_jvp, vmap_of_compiled,
]  # fmt: skip


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
    with FlopCounterMode(display=False) as ours, torch.no_grad():
        captured(x)
    with FlopCounterMode(display=False) as theirs:
        model(x)
    assert ours.get_total_flops() == theirs.get_total_flops()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(captured(x), expected)


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
