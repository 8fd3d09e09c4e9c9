"""from_module: which Ghost modules are taken, what the twin keeps, and what is refused with which reason."""

import copy
import pickle

import pytest
import torch
from modules import FLOAT64, independent_copy, randomize, runs_fused
from torch import nn
from users_networks import LeakyNoSlice, PReLUGhost, timm_ghost, timm_v3_deployed, ultralytics_fuse, ultralytics_ghost

from ghostfused import FusedGhostModule
from ghostfused.models import paper, seed
from ghostfused.recognize import ghost

FAMILIES = {
    "seed": lambda: seed.GhostModule(6, 11, 3),
    "seed_no_relu": lambda: seed.GhostModule(6, 12, use_relu=False),
    "seed_k3_stride2": lambda: seed.GhostModule(6, 12, 2, 3, 2),
    "paper": lambda: paper.GhostModule(6, 11, ratio=3, dw_size=5),
    "paper_no_relu": lambda: paper.GhostModule(6, 13, relu=False),
    "timm": lambda: timm_ghost("GhostModule", 6, 13),
    "timm_identity": lambda: timm_ghost("GhostModule", 6, 13, act_layer=lambda inplace: nn.Identity()),
    "timm_v2": lambda: timm_ghost("GhostModuleV2", 6, 13),
    "timm_v3_deployed": timm_v3_deployed,
    "timm_v3_deployed_attention": lambda: timm_v3_deployed(mode="shortcut"),
    "ultralytics": lambda: ultralytics_ghost(6, 12),
    "ultralytics_k3_stride2": lambda: ultralytics_ghost(6, 12, 3, 2),
    "ultralytics_groups": lambda: ultralytics_ghost(6, 12, 1, 1, 2),
    "ultralytics_no_act": lambda: ultralytics_ghost(6, 12, act=False),
    "ultralytics_fused": lambda: ultralytics_ghost(6, 12, fused=True),
    "nanodet": lambda: LeakyNoSlice(6, 13, 3),
    "nanodet_linear": lambda: LeakyNoSlice(6, 12, activation=False),
    "ghostfacenets": lambda: PReLUGhost(6, 12),
    "fused_already": lambda: FusedGhostModule(6, 11, keys="ultralytics"),
}


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_twin_is_the_same_module(family):
    m = randomize(FAMILIES[family]()).double()
    m.primary_eps = 1  # attributes that others hang on their modules stay too
    state = {k: v.clone() for k, v in m.state_dict().items()}
    random_state = torch.get_rng_state()
    fused = FusedGhostModule.from_module(m, backend="reference")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert fused.backend == "reference"
    assert fused.primary_eps == 1
    assert fused.training == m.training
    for module in (m, fused):
        assert list(module.state_dict()) == list(state)
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), state.values(), strict=True))
    assert all(a is b for a, b in zip(m.parameters(), fused.parameters(), strict=True))
    assert all(a is b for a, b in zip(m.children(), fused.children(), strict=True))

    m.eval(), fused.eval()
    assert runs_fused(fused)
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64) * 4
    torch.testing.assert_close(fused(x), m(x), **FLOAT64)

    twin = copy.deepcopy(m)
    twin.train(), fused.train()
    out, expected = fused(x), twin(x)
    torch.testing.assert_close(out, expected, **FLOAT64)
    for a, b in zip(fused.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)
    if out.requires_grad:
        for result in (out, expected):
            result.square().sum().backward()
    for a, b in zip(fused.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **FLOAT64)


@pytest.mark.parametrize("family", ["seed", "ultralytics", "ultralytics_fused", "timm"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_twin_can_be_copied(family, duplicate):
    fused = FusedGhostModule.from_module(randomize(FAMILIES[family]()).eval())
    x = torch.randn(2, 6, 5, 5)
    independent_copy(fused, x, duplicate)


def test_twin_keeps_flags_hooks_and_norm_settings(training):
    m = seed.GhostModule(6, 12).train(training)
    m.primary_conv[1].eps, m.primary_conv[1].momentum = 0.25, 0.5
    m.cheap_op[1].eval()
    m.cheap_op[0].requires_grad_(False)
    calls = []
    handle = m.register_forward_hook(lambda *_: calls.append("forward"))
    m.register_forward_pre_hook(lambda *_, **__: calls.append("pre"), with_kwargs=True)
    fused = FusedGhostModule.from_module(m)
    assert calls == [], "the proof fires no hooks"
    assert [c.training for c in fused.modules()] == [c.training for c in m.modules()]
    assert fused.cheap_op[1].training is False
    assert (fused.primary_conv[1].eps, fused.primary_conv[1].momentum) == (0.25, 0.5)
    assert [p.requires_grad for p in fused.parameters()] == [p.requires_grad for p in m.parameters()]
    fused(torch.randn(2, 6, 5, 5))
    assert calls == ["pre", "forward"]
    handle.remove()
    fused(torch.randn(2, 6, 5, 5))
    assert calls == ["pre", "forward", "pre"]


PREPARE = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "meta": lambda m: m.to("meta"),
    "zeros": lambda m: [nn.init.zeros_(p) for p in m.parameters()],
}


@pytest.mark.parametrize("name", PREPARE)
def test_any_dtype_device_and_values(name):
    m = seed.GhostModule(6, 11)
    PREPARE[name](m)
    before = list(m.parameters())
    fused = FusedGhostModule.from_module(m)
    assert fused.out_channels == 11
    assert all(a is b for a, b in zip(before, fused.parameters(), strict=True))


def test_default_device_and_autocast_do_not_matter():
    m = seed.GhostModule(6, 12)
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        fused = FusedGhostModule.from_module(m)
    assert fused.primary_conv[0].weight is m.primary_conv[0].weight


def test_ultralytics_fuse_after_adoption():
    m = randomize(ultralytics_ghost(6, 12)).eval()
    fused = FusedGhostModule.from_module(m)
    x = torch.randn(2, 6, 5, 5)
    expected = fused(x)
    ultralytics_fuse(fused)
    assert runs_fused(fused)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


# ---- refusals: structures


class Rep(LeakyNoSlice):
    """As RepGhost has it: adds, where a Ghost module concatenates."""

    def __init__(self):
        super().__init__(6, 12)
        self.fusion_bn = nn.BatchNorm2d(6)

    def forward(self, x):
        x1 = self.primary_conv(x)
        return self.cheap_operation(x1) + self.fusion_bn(x1)


class RepDeployed(LeakyNoSlice):
    def forward(self, x):
        return self.cheap_operation(self.primary_conv(x))


class ConvSubclass(nn.Conv2d):
    """As ghost_resnet has it: a Conv2d with a cheap operation at its side."""

    def __init__(self):
        super().__init__(6, 12, 1)
        self.primary_conv = nn.Conv2d(6, 6, 1)
        self.cheap_operation = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], 1)


class NoCheap(nn.Module):
    def __init__(self):
        super().__init__()
        self.primary_conv = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, x1], 1)


# ---- refusals: the right structure with another forward


class Swapped(LeakyNoSlice):
    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([self.cheap_operation(x1), x1], 1)


class Shifted(LeakyNoSlice):
    def forward(self, x):
        return super().forward(x) + 1e-6


class Clamped(seed.GhostModule):
    def forward(self, x):
        return super().forward(x).clamp(max=8)


class Residual(seed.GhostModule):
    """Differs from a Ghost module by a weight that is zero at first."""

    def __init__(self):
        super().__init__(6, 12)
        nn.init.zeros_(self.cheap_op[1].weight)

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, x1.relu() * self.cheap_op[1].weight[:, None, None] + self.cheap_op(x1)], 1)


class DropoutInTraining(seed.GhostModule):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class ActBeforeNorm(seed.GhostModule):
    def forward(self, x):
        conv, bn, act = self.primary_conv
        x1 = bn(act(conv(x)))
        return torch.cat([x1, self.cheap_op(x1)], 1)


class TwoInputs(seed.GhostModule):
    def forward(self, x, y):
        return super().forward(x + y)


class FreezesNorms(seed.GhostModule):
    def train(self, mode=True):
        super().train(mode)
        self.primary_conv[1].eval()
        return self


def with_(change):
    def make():
        m = seed.GhostModule(6, 12)
        change(m)
        return m

    return make


def set_item(half, index, module):
    def change(m):
        getattr(m, half)[index] = module

    return with_(change)


REFUSED = {
    "rep": (Rep, "its output is no concatenation of two tensors"),
    "rep_deployed": (lambda: RepDeployed(6, 12), "its output is no concatenation of two tensors"),
    "timm_v3": (lambda: timm_ghost("GhostModuleV3", 6, 12), "primary_rpr_conv: ConvBnAct is no layer that a kernel"),
    "conv_subclass": (ConvSubclass, "tensors beside primary_conv and cheap_operation: weight"),
    "no_cheap": (
        NoCheap,
        "primary_conv alone is conv, BatchNorm, activation, not two",
    ),
    "plain_conv": (lambda: nn.Conv2d(6, 12, 1), "Conv2d is one layer"),
    "bottleneck": (
        lambda: seed.GhostBottleneck(6, 6, 6, 3, 1, True),
        "bottleneck: GhostModule is no layer that a kernel",
    ),
    "empty": (nn.Module, "Module is one layer"),
    "unknown_act": (set_item("primary_conv", 2, nn.Tanh()), "primary_conv: Tanh is no layer that a kernel"),
    "no_gelu": (set_item("cheap_op", 2, nn.GELU("exact")), "GELU with approximate='exact'"),
    "group_norm": (set_item("cheap_op", 1, nn.GroupNorm(2, 6)), "cheap_op: GroupNorm is no layer that a kernel"),
    "not_depthwise": (set_item("cheap_op", 0, nn.Conv2d(6, 6, 3, padding=1)), "not depthwise over the 6 maps"),
    "reflection": (
        set_item("cheap_op", 0, nn.Conv2d(6, 6, 3, padding=1, groups=6, padding_mode="reflect")),
        "padding is .*reflect.*not 1 zeros",
    ),
    "unpadded": (set_item("primary_conv", 0, nn.Conv2d(6, 6, 3)), r"primary conv's padding is \(0, 0\)"),
    "even_kernel": (set_item("primary_conv", 0, nn.Conv2d(6, 6, 2, padding=1)), "primary conv's kernel is even"),
    "inner_hook": (with_(lambda m: m.cheap_op[0].register_forward_hook(print)), "cheap_op: Conv2d has hooks"),
    "hook_on_half": (with_(lambda m: m.cheap_op.register_full_backward_hook(print)), "cheap_op: Sequential has hooks"),
    "parametrized": (
        with_(lambda m: torch.nn.utils.parametrizations.weight_norm(m.primary_conv[0])),
        "primary_conv: ParametrizedConv2d is no layer that a kernel",
    ),
    "forward_on_instance": (with_(lambda m: setattr(m, "forward", lambda x: x)), "forward is replaced"),
    "forward_of_conv": (
        with_(lambda m: setattr(m.cheap_op[0], "forward", lambda x: x)),
        "cheap_op: Conv2d has hooks or another forward",
    ),
    "own_parameter": (with_(lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1)))), "tensors.* scale"),
    "own_buffer": (with_(lambda m: m.register_buffer("count", torch.ones(1))), "tensors beside .* count"),
    "swapped": (lambda: Swapped(6, 12), "it concatenates its ghost maps before its primary maps"),
    "shifted": (lambda: Shifted(6, 12), "add .* is no step of a Ghost module"),
    "clamped": (lambda: Clamped(6, 12, use_relu=False), "clamp .* is no step of a Ghost module"),
    "zero_at_first": (Residual, "reads primary_conv.0.weight, a tensor whose values may change"),
    "dropout": (lambda: DropoutInTraining(6, 12), "does something else in train mode than in eval mode"),
    "act_before_norm": (lambda: ActBeforeNorm(6, 12), "BatchNorm2d after the activation"),
    "two_inputs": (lambda: TwoInputs(6, 12), "can't be traced: TypeError: .*'y'"),
    "train_overridden": (lambda: FreezesNorms(6, 12), "FreezesNorms overrides train of nn.Module"),
}


@pytest.mark.parametrize("trap", REFUSED)
def test_refused_with_a_reason_and_left_as_it_was(trap):
    make, message = REFUSED[trap]
    m = make()
    state = {k: v.clone() for k, v in m.state_dict().items()}
    tensors = [*m.parameters(), *m.buffers()]
    flags = [c.training for c in m.modules()]
    with pytest.raises(ValueError, match=f"module: expected a Ghost module that can be fused, got .*{message}"):
        FusedGhostModule.from_module(m)
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert all(a is b for a, b in zip(tensors, [*m.parameters(), *m.buffers()], strict=True))
    assert [c.training for c in m.modules()] == flags


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, got str"):
        FusedGhostModule.from_module("ghost")
    with pytest.raises(ValueError, match=r"backend: expected 'auto' or one of .* got 'x'"):
        FusedGhostModule.from_module(seed.GhostModule(4, 8), backend="x")


def test_read_says_where_the_halves_are():
    found = ghost.read(paper.GhostModule(6, 13))
    assert found[:4] == ("primary_conv", "cheap_operation", 6, 13)
    assert found.watched.attributes[()]["out_channels"] == 13
    assert isinstance(ghost.read(nn.ReLU()), str)


@pytest.mark.usefixtures("trained_by_kernels")
def test_half_registered_in_the_other_order():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.cheap = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU())
            self.main = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())

        def forward(self, x):
            x1 = self.main(x)
            return torch.cat([x1, self.cheap(x1)], 1)

    m = Backwards().eval()
    fused = FusedGhostModule.from_module(m)
    x = torch.randn(2, 3, 5, 5)
    assert runs_fused(fused)
    torch.testing.assert_close(fused(x), m(x))
    torch.testing.assert_close(fused.train()(x), m(x))
