"""Models, fused and not, and what PyTorch differentiates and transforms of one: for test_transforms.py."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from users_networks import OfficialGhost

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper

Way = Callable[[nn.Module, Tensor], Any]


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


@functools.cache
def built(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    unfused, fused = MODELS[name]()
    calibrate(unfused, torch.randn(4, 4, 6, 5))
    fused.load_state_dict(unfused.state_dict())
    return unfused, fused


def pair(name: str, training: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Tensor]:
    """An unfused model, the fused one with the same values, and an input."""
    unfused, fused = (copy.deepcopy(model).train(training).to(dtype) for model in built(name))
    return unfused, fused, torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


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
    forward_mode_after_replays, forward_mode_of_parameters, forward_over_reverse, backward_in_dual_level,
    func_vmap_of_parameters, func_call,
]  # fmt: skip
WITH_STORED_STATISTICS = [
    func_jvp, func_vjp, func_jacobians, func_grad, func_grad_twice, func_gradients_of_each_image, func_vmap,
]  # fmt: skip
"""PyTorch's own BatchNorm can't update its running statistics under these."""
SLOW = [hessian, jacobian]
