"""What PyTorch's modes and compilers make of a model: for test_transforms.py."""

from __future__ import annotations

from typing import Any

import torch
from derivatives import direction, gradient_penalty, gradients, replayed
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

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


class Doubled(torch.Tensor):
    """Does so to what a convolution makes of it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out * 2 if func is torch.conv2d else out


class Wrapped(torch.Tensor):
    """As ``Doubled``, of operations."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        out = func(*args, **kwargs)
        out = out * 2 if func is torch.ops.aten.convolution.default else out
        return tree_map_only(torch.Tensor, Wrapped, out)


def input_of_another_class(model, x):
    results = []
    for grads in (True, False, False):
        with torch.set_grad_enabled(grads):
            doubled, wrapped = model(x.as_subclass(Doubled)), model(Wrapped(x))
        results += [type(doubled), doubled.as_subclass(torch.Tensor), type(wrapped), wrapped.inner]
    return results


def weights_of_another_class(model, x):
    replayed(model, x)
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight = torch.nn.Parameter(m.weight.detach().as_subclass(Doubled))
    outs = [model(x), *replayed(model, x)]
    return [[type(y) for y in outs], [y.as_subclass(torch.Tensor) for y in outs]]


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


def negative_bit_of_what_is_kept(model, x):
    """One tensor at a time, of other numbers, after programs that read them are kept."""
    results = [replayed(model, x)]
    # PyTorch's own BatchNorm doesn't update such statistics
    buffers = [] if model.training else [b for b in model.buffers() if b.is_floating_point()]
    for t in [*model.parameters(), *buffers]:
        t.data = torch.complex(t.data, -1.5 * t.data).conj().imag  # 1.5 of it
        assert t.is_neg()
        results.append(replayed(model, x)[1:])
    return results


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
    negative_bit, negative_bit_of_what_is_kept, empty_batch, settings, input_of_another_class, weights_of_another_class,
]  # fmt: skip
SLOW = [fake, made_by_make_fx_of_gradients]


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


def vmap_of_compiled(model, x):
    torch._dynamo.reset()
    with torch.no_grad():
        return vmap(torch.compile(model, backend="aot_eager"))(x[:, None])


COMPILERS = [
    scripted, traced, traced_by_fx, exported, compiled, compiled_gradients, compiled_second_derivative, compiled_vmap,
    compiled_func_grad, vmap_of_compiled,
]  # fmt: skip
