"""FusedGhostBottleneck: what reads as a bottleneck and what doesn't, and what happens when it changes afterwards."""

import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrize
import users_networks
from modules import EXACT, independent_copy, randomized
from torch import nn

from ghostfused import FusedAttentionGhostModule, FusedGhostBottleneck, fuse, fuse_with_report
from ghostfused.models import paper, seed
from ghostfused.nn import layers
from ghostfused.numerics import TOLERANCES, relative_error

X = {"dtype": torch.float64}


def bottleneck(**kwargs) -> nn.Module:
    settings = {"in_channels": 6, "mid_channels": 13, "out_channels": 9, "stride": 2, "se_ratio": 0.25} | kwargs
    return randomized(paper.GhostBottleneck(**settings))


class ScaledShortcut(paper.GhostBottleneck):
    def forward(self, x):
        return super().forward(x) + 0.1 * self.shortcut(x)


class WithReLU(paper.GhostBottleneck):
    """An activation after the sum."""

    def __init__(self, *args):
        super().__init__(*args)
        self.last = nn.ReLU()

    def forward(self, x):
        return self.last(super().forward(x))


class Difference(paper.GhostBottleneck):
    def forward(self, x):
        return self.ghost2(self.ghost1(x)) - self.shortcut(x)


class GateLast(paper.GhostBottleneck):
    """The squeeze-and-excite after the second Ghost module."""

    def forward(self, x):
        return self.se(self.ghost2(self.ghost1(x))) + self.shortcut(x)


class NotAGate(nn.Module):
    """Two matrices, and yet no squeeze-and-excite: it takes the maximum."""

    def __init__(self, channels):
        super().__init__()
        self.reduce, self.act, self.expand = nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * self.expand(self.act(self.reduce(x.amax((2, 3), keepdim=True)))).sigmoid()


class DropsInTraining(paper.GhostBottleneck):
    def forward(self, x):
        return (self.ghost2(self.ghost1(x)) * (0.5 if self.training else 1)) + self.shortcut(x)


class Branches(paper.GhostBottleneck):
    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + self.shortcut(x) if x.sum() > 0 else x


class TwoResults(paper.GhostBottleneck):
    def forward(self, x):
        y = self.ghost1(x)
        return self.ghost2(y) + self.shortcut(x) * y.mean()


def with_not_a_gate():
    m = paper.GhostBottleneck(6, 12, 6, se_ratio=0.25)
    m.se = NotAGate(12)
    return m


def with_attribute(name, value):
    m = paper.GhostBottleneck(6, 12, 6)
    setattr(m, name, value)
    return m


REFUSED = {
    "scaled_shortcut": (lambda: ScaledShortcut(6, 12, 8), "add is no layer"),
    "relu_after": (lambda: WithReLU(6, 12, 6), "not the sum"),
    "difference": (lambda: Difference(6, 12, 6), "not the sum"),
    "gate_last": (lambda: GateLast(6, 6, 6, 3, 1, 0.5), "not one branch that ends in a Ghost module"),
    "training": (lambda: DropsInTraining(6, 12, 6), "does something else in train mode than in eval mode"),
    "data_dependent": (lambda: Branches(6, 12, 6), "decides by its input"),
    "two_results": (lambda: TwoResults(6, 12, 6), "is no layer|used more than once"),
    "forward_on_instance": (lambda: with_attribute("forward", lambda x: x), "forward is replaced"),
}


@pytest.mark.parametrize("trap", REFUSED)
def test_refused_with_a_reason(trap):
    make, message = REFUSED[trap]
    block = randomized(make())
    fused, report = fuse_with_report(nn.Sequential(block))
    assert [swap.fused for swap in report] == [False, True, True], str(report)
    with pytest.raises(ValueError, match=message):
        FusedGhostBottleneck.from_module(fused[0])
    x = torch.randn(2, 6, 9, 7, **X)
    if trap != "forward_on_instance":
        torch.testing.assert_close(fused(x), block(x), **EXACT)


def test_a_step_that_is_not_understood_runs_itself():
    block = randomized(with_not_a_gate())
    fused = fuse(block)
    assert isinstance(fused, FusedGhostBottleneck)
    x = torch.randn(2, 6, 9, 7, **X)
    torch.testing.assert_close(fused(x), block(x), **EXACT)
    for m in (block, fused):
        m.se.act = nn.SiLU()
    torch.testing.assert_close(fused(x), block(x), **EXACT)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("se_ratio", [0, 0.25])
@pytest.mark.parametrize("kernel", [3, 5])
def test_every_form_of_the_papers(stride, se_ratio, kernel):
    for out_channels in (6, 9):
        block = bottleneck(stride=stride, se_ratio=se_ratio, dw_kernel_size=kernel, out_channels=out_channels)
        fused = fuse(block)
        assert isinstance(fused, FusedGhostBottleneck)
        for shape in ((1, 6, 1, 1), (2, 6, 9, 7), (3, 6, 2, 5)):
            x = torch.randn(shape, **X)
            torch.testing.assert_close(fused(x), block(x), **EXACT)
        x = torch.randn(2, 6, 8, 6, **X).to(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x), block(x), **EXACT)


def test_dense_and_activated_shortcuts_of_the_seed():
    for stride in (1, 2):
        block = randomized(seed.GhostBottleneck(6, 12, 8, 3, stride, True, 3))
        fused = fuse(block)
        assert isinstance(fused, FusedGhostBottleneck)
        x = torch.randn(2, 6, 9, 7, **X)
        torch.testing.assert_close(fused(x), block(x), **EXACT)


def _hook(m):
    m.register_forward_hook(lambda module, given, out: out * 2)


CHANGES = {
    "hook_on_ghost1": lambda m: _hook(m.ghost1),
    "hook_on_ghost2": lambda m: _hook(m.ghost2),
    "hook_on_conv": lambda m: _hook(m.conv_dw),
    "hook_in_ghost": lambda m: _hook(m.ghost1.cheap_operation[0]),
    "hook_on_se": lambda m: _hook(m.se),
    "hook_on_se_conv": lambda m: _hook(m.se.conv_reduce),
    "hook_on_shortcut": lambda m: _hook(m.shortcut),
    "se_replaced": lambda m: setattr(m, "se", nn.Identity()),
    "se_act_replaced": lambda m: setattr(m.se, "act1", nn.SiLU()),
    "se_conv_replaced": lambda m: setattr(m.se, "conv_reduce", randomized(nn.Conv2d(13, 4, 1))),
    "dw_replaced": lambda m: setattr(
        m, "conv_dw", randomized(nn.Conv2d(13, 13, 3, 2, 2, dilation=2, groups=13, bias=False))
    ),
    "ghost_wrapped": lambda m: setattr(m, "ghost2", nn.Sequential(m.ghost2, nn.ReLU())),
    "layer_added": lambda m: m.shortcut.append(nn.Tanh()),
    "norm_added": lambda m: m.shortcut.append(randomized(nn.BatchNorm2d(9))),
    "layer_removed": lambda m: delattr(m.shortcut, "3"),
    "norm_folded": lambda m: setattr(m, "bn_dw", nn.Identity()),
    "parametrized": lambda m: torch.nn.utils.parametrize.register_parametrization(m.conv_dw, "weight", nn.Tanh()),
    "forward_of_layer": lambda m: setattr(m.conv_dw, "forward", lambda x: x[:, :, ::2, ::2]),
    "weights_changed": lambda m: [p.data.mul_(1.5) for p in m.parameters()],
    "eps_changed": lambda m: setattr(m.bn_dw, "eps", 0.5),
    "norm_in_training": lambda m: m.bn_dw.train(),
    "ghost_in_training": lambda m: m.ghost1.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_it_takes_effect(change):
    block = bottleneck()
    fused = fuse(block)
    x = torch.randn(2, 6, 9, 7, **X)
    assert not fused._is_observed()
    before = fused(x)
    for m in (block, fused):
        torch.manual_seed(0)
        CHANGES[change](m)
    expected = block(x)
    torch.testing.assert_close(fused(x), expected, **EXACT)
    assert not torch.allclose(before, expected)


def test_a_hook_that_is_removed_leaves_no_trace():
    fused = fuse(bottleneck())
    handle = fused.ghost2.register_forward_hook(lambda *_: None)
    assert fused._is_observed()
    handle.remove()
    assert not fused._is_observed()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(duplicate):
    fused = fuse(nn.Sequential(bottleneck(), fuse(randomized(users_networks.OfficialGhost(9, 12, mode="attn")))))
    assert isinstance(fused[1], FusedAttentionGhostModule)
    x = torch.randn(2, 6, 9, 7, **X)
    independent_copy(fused, x, duplicate)


def test_half_precision_models():
    for dtype in (torch.bfloat16, torch.float16):
        block = bottleneck().to(dtype)
        fused = fuse(block)
        x = torch.randn(2, 6, 9, 7, dtype=dtype)
        out = fused(x)
        assert out.dtype == dtype
        exact = copy.deepcopy(block).double()(x.double())
        error, own = ((t.double() - exact).abs().max() for t in (out, block(x)))
        assert error <= 2 * own


def test_output_is_fresh():
    fused = fuse(bottleneck(stride=1, out_channels=6))
    x = torch.randn(2, 6, 5, 5, **X)
    kept = x.clone()
    with torch.no_grad():
        out = fused(x)
        out.add_(1)
    assert torch.equal(x, kept)


def test_attention_gate_is_its_own():
    fused = fuse(randomized(users_networks.OfficialGhost(6, 9, mode="attn")))
    x, gate = torch.randn(2, 6, 8, 8, **X), torch.rand(2, 6, **X)
    torch.testing.assert_close(fused(x, input_gate=gate), fused(x * gate[:, :, None, None]), **EXACT)
    with pytest.raises(ValueError, match="output_gate: expected None"):
        fused(x, output_gate=torch.rand(2, 9, 4, 4, **X))
    expected = fused(x)
    fused.short_conv.register_forward_hook(lambda module, given, out: out + 1)
    assert not torch.allclose(fused(x), expected)


def test_compiled_and_traced_whole():
    fused = fuse(bottleneck())
    x = torch.randn(2, 6, 9, 7, **X)
    expected = fused(x)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, **EXACT)
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(fused))(x), expected, **EXACT)


def test_bottleneck_needs_fused_ghost_modules():
    with pytest.raises(ValueError, match="expected a bottleneck that can be fused, got GhostBottleneck: "):
        FusedGhostBottleneck.from_module(bottleneck())
    assert isinstance(FusedGhostBottleneck.from_module(fuse(bottleneck(), level="module")), FusedGhostBottleneck)


@pytest.mark.parametrize("kernel", [7, 9])
def test_layers_that_no_kernel_takes_run_as_they_are(kernel):
    """Also where a backend is asked for by name, which then refuses what it can't run."""
    block = bottleneck(dw_kernel_size=kernel).float()
    fused = fuse(block, backend="reference")
    weights, depthwise = [], layers.depthwise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "depthwise", lambda x, w, **kwargs: weights.append(w) or depthwise(x, w, **kwargs))
        torch.testing.assert_close(fused(torch.ones(1, 6, 9, 7)), block(torch.ones(1, 6, 9, 7)))
    assert any(w is fused.conv_dw.weight for w in weights) == (kernel == 7)


def test_second_derivatives_through_a_gate_of_relu6():
    """The official code writes the gate as ``relu6(x + 3) / 6``, of which there is a second derivative."""
    exact = randomized(users_networks.OfficialBottleneck(6, 12, 9, 3, 2, se=True))
    model, x = copy.deepcopy(exact).float(), torch.randn(2, 6, 8, 9)
    fused = fuse(model)

    def penalty(module: nn.Module, given: torch.Tensor) -> list[torch.Tensor]:
        given.requires_grad_()
        (grad,) = torch.autograd.grad(module(given).square().sum(), given, create_graph=True)
        weights = [p for p in module.parameters() if p.dim() > 1]
        return list(torch.autograd.grad(grad.square().sum(), [given, *weights]))

    assert isinstance(fused, FusedGhostBottleneck)
    found = zip(penalty(fused, x.clone()), penalty(model, x.clone()), penalty(exact, x.double()), strict=True)
    tolerance = TOLERANCES[torch.float32]
    for ours, theirs, right in found:
        limit = max(
            tolerance.factor * relative_error(theirs, right), 20 * tolerance.floor
        )  # of some 20 steps back and forth
        assert relative_error(ours, right) <= limit
