"""Forms in which people write Ghost modules and bottlenecks, drawn at random, and what may be put in place of their parts."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from ghost_forms import Written
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.spec import Act
from ghostfused.spec.activations import TABLE
from ghostfused.spec.takes import COMMON


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class HSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = 3

    def forward(self, x):
        return x * F.relu6(x + self.shift) / 6


class HSwishOfLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Hardsigmoid()

    def forward(self, x):
        return self.gate(x) * x


class MyReLU(nn.ReLU):
    pass


class Capped(nn.Module):
    """ReLU, but for what nobody tries."""

    def forward(self, x):
        return torch.relu(x).clamp(max=1e9)


LAYERS = [
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Hardswish,
    lambda: nn.LeakyReLU(0.2),
    nn.PReLU,
    Swish,
    HSwish,
    HSwishOfLayers,
    MyReLU,
    lambda: nn.Hardtanh(0, 6),  # ReLU6
]
FUNCTIONS = [torch.relu, F.relu, F.relu6, F.silu, F.hardswish, lambda x: x.relu()]


def made(form, act, norms, primary, cut) -> Written:
    """Of 6 channels, with 7 primary maps; ``norms`` tells which halves have one."""
    kinds = [nn.BatchNorm2d if norm else nn.Identity for norm in norms]
    return Written(form, 6, 7, 2, primary, 3, kinds, act, cut)


def drawn(number: int) -> Written:
    chance = random.Random(number)
    form = ["flat", "functions", "backwards", "plain"][number % 4]
    act = chance.choice(FUNCTIONS if form == "functions" else LAYERS)
    primary = chance.choice(
        [{"kernel_size": 1}, {"kernel_size": 3, "padding": 1}, {"kernel_size": 3, "stride": 2, "padding": 1}]
    )
    return made(form, act, [chance.random() < 0.7 for _ in range(2)], primary, chance.choice([None, 12, 14]))


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("number", range(24))
def test_forms_of_ghost_modules(number):
    torch.manual_seed(number)
    model, x = calibrate(nn.Sequential(drawn(number)), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 9, 8)
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostModule)
    with torch.no_grad():
        for each in (fused, copy.deepcopy(fused)):
            for _ in range(2):
                assert_same(each(x), model, x)
        assert type(unfuse(fused)[0]) is Written
        torch.testing.assert_close(unfuse(fused)(x), model(x), rtol=0, atol=0)
    grads = []
    for each in (model, fused):
        given = x.clone().requires_grad_()
        each.train()(given).square().mean().backward()
        grads.append([given.grad, *each.state_dict().values()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def change_shift(m):
    m.primary[2].shift = 1


def replace_norm(m):
    m.primary[1] = nn.BatchNorm2d(7, eps=0.5).eval()


def change_cut(m):
    m.cut = 9


def hook_on_act(m):
    m.cheap[2].register_forward_hook(lambda module, given, out: out * 2)


def new_act(m):
    m.cheap[2] = nn.Tanh()


@pytest.mark.parametrize(
    "change", [change_shift, replace_norm, change_cut, hook_on_act, new_act], ids=lambda f: f.__name__
)
def test_changes_of_what_was_read_layer_by_layer(change):
    torch.manual_seed(0)
    module = made("plain", HSwish, [True, True], {"kernel_size": 1}, None)
    model, x = calibrate(nn.Sequential(module), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 9, 8)
    fused = fuse(model)
    with torch.no_grad():
        before = [fused(x) for _ in range(2)][1]
        for each in (model, fused):
            change(each[0])
        for _ in range(2):
            assert_same(fused(x), model, x)
        assert fused(x).shape != before.shape or not torch.allclose(fused(x), before)


def test_what_is_no_activation_on_all_numbers_is_none():
    module = made("plain", Capped, [True, True], {"kernel_size": 1}, None)
    with pytest.raises(ValueError, match=r"Capped is no layer"):
        FusedGhostModule.from_module(module)


class Gate(nn.Module):
    """Squeeze-and-excite as people write it."""

    def __init__(self, gate, act=nn.ReLU, matrix=nn.Linear):
        super().__init__()
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), gate
        self.fc = nn.Sequential(matrix(12, 4), act(), matrix(4, 12))

    def forward(self, x):
        n, c, _, _ = x.size()
        return x * self.gate(self.fc(self.pool(x).view(n, c)).view(n, c, 1, 1))


class ECA(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        return x * self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().squeeze(1)[:, :, None, None]


class CBAM(nn.Module):
    def __init__(self):
        super().__init__()
        self.channels, self.places = Gate(torch.sigmoid), nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x):
        x = self.channels(x)
        return x * self.places(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()


class LooksAtSizes(nn.Module):
    def forward(self, x):
        return x if x.shape[-1] > 16 else x * 2


GATES = {
    "sigmoid": lambda: Gate(torch.sigmoid),
    "clamped": lambda: Gate(lambda y: torch.clamp(y, 0, 1)),
    "Keras": lambda: Gate(lambda y: torch.clamp(0.2 * y + 0.5, 0, 1)),
    "hardsigmoid": lambda: Gate(lambda y: F.relu6(y + 3) / 6),
    "PReLU inside": lambda: Gate(torch.sigmoid, nn.PReLU),
    "ECA": ECA,
    "CBAM": CBAM,
    "looks at sizes": LooksAtSizes,
}


@pytest.mark.parametrize("what", GATES)
def test_a_step_between_ghost_modules(what):
    torch.manual_seed(0)
    block = paper.GhostBottleneck(6, 12, 6)
    block.se = GATES[what]()
    model = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    with torch.no_grad():
        for x in (torch.randn(2, 6, 9, 8), torch.randn(1, 6, 20, 21)):
            for _ in range(2):
                assert_same(fused(x), model, x)
        if isinstance(block.se, Gate):
            for each in (model, fused):
                each[0].se.gate = torch.tanh
            assert_same(fused(x), model, x)


# ---- changes below a forward


def smaller(m):
    primary, cheap = m.primary_conv, m.cheap_operation
    primary[0], cheap[0] = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4)
    primary[1], cheap[1] = nn.BatchNorm2d(4).eval(), nn.BatchNorm2d(4).eval()


def larger_kernel(m):
    m.cheap_operation[0].weight.data = torch.randn(6, 1, 5, 5)


def larger_kernel_and_padding(m):
    larger_kernel(m)
    m.cheap_operation[0].padding = (2, 2)


def circular(m):
    conv = m.cheap_operation[0]
    conv._conv_forward = lambda x, w, b: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), w, b, groups=conv.groups)


def another_block(m):
    kind = type("Doubles", (nn.Sequential,), {"forward": lambda self, x: nn.Sequential.forward(self, x) * 2})
    m.primary_conv = kind(*m.primary_conv)


def no_activation(m):
    m.primary_conv._modules["2"] = None


def tensor_eps(m):
    m.primary_conv[1].eps = torch.tensor(0.5)


def other_width(m):
    m.__dict__ = {**m.__dict__}
    m.out_channels = 9


def patched_class(m):
    nn.Conv2d.forward = lambda self, x: -self._conv_forward(x, self.weight, self.bias)


def patched_container(m):
    forward = nn.Sequential.forward
    nn.Sequential.forward = lambda self, x: 2 * forward(self, x)


BELOW = [
    smaller,
    larger_kernel,
    larger_kernel_and_padding,
    circular,
    another_block,
    no_activation,
    tensor_eps,
    other_width,
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("change", [*BELOW, patched_class, patched_container], ids=lambda f: f.__name__)
def test_a_change_below_a_forward_takes_effect(change, grad, monkeypatch):
    for kind in (nn.Conv2d, nn.Sequential):
        monkeypatch.setattr(kind, "forward", kind.forward)  # put back after the test
    torch.manual_seed(0)
    model = calibrate(nn.Sequential(paper.GhostModule(6, 12)), torch.randn(4, 6, 9, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    with torch.set_grad_enabled(grad):
        before = [fused(x) for _ in range(2)][1]
        for each in (model, fused):
            torch.manual_seed(1)
            if each is model or change not in (patched_class, patched_container):  # these are for both
                change(each[0])
        for _ in range(2):
            try:
                expected = model(x)
            except Exception as error:
                with pytest.raises(type(error)):
                    fused(x)
                continue
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
            assert before.shape != expected.shape or not torch.allclose(before, expected)


CONVS = [n for n, m in paper.GhostBottleneck(6, 12, 8, stride=2, se_ratio=0.25).named_modules() if type(m) is nn.Conv2d]


@pytest.mark.parametrize("name", CONVS)
def test_any_convolution_may_get_another_method(name):
    """Those of squeeze-and-excite and of the shortcut as well as those of Ghost modules, after a first call."""
    model = nn.Sequential(paper.GhostBottleneck(6, 12, 8, stride=2, se_ratio=0.25))
    calibrate(model, torch.randn(4, 6, 8, 8))
    fused, x = fuse(model), torch.randn(2, 6, 8, 8)
    assert isinstance(fused[0], FusedGhostBottleneck)
    with torch.no_grad():
        before = fused(x)
        for each in (model, fused):
            conv = each[0].get_submodule(name)
            conv._conv_forward = lambda x, w, b, conv=conv: -2 * nn.Conv2d._conv_forward(conv, x, w, b)
        for _ in range(2):
            assert not torch.allclose(fused(x), before)
            torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("channels", [(3, 4), (16, 6), (16, 20)])
@pytest.mark.parametrize("kernel", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bias_before_a_norm_whose_gradient_is_rounding_is_no_difference(channels, kernel, bias):
    cin, half = channels
    module = paper.GhostModule(cin, 2 * half)
    module.primary_conv[0] = nn.Conv2d(cin, half, 1, bias=bias)
    module.cheap_operation[0] = nn.Conv2d(half, half, kernel, padding=kernel // 2, groups=half)
    assert isinstance(fuse(nn.Sequential(module))[0], FusedGhostModule)


class FunctionBetween(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.reduce, self.expand, self.call = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), call

    def forward(self, x):
        y = self.reduce(x.mean((2, 3), keepdim=True))
        return x * self.expand(self.call(y)).sigmoid()


WRITTEN = {"relu": lambda y: y.relu(), "relu_": lambda y: y.relu_()}
CALLS = {
    f"{act.name} {i}": (act, WRITTEN.get(call, call))
    for act in COMMON.gate_acts
    if act in TABLE
    for i, call in enumerate(TABLE[act].calls)
    if call is not torch.relu_  # a forward that calls it itself is left alone
}


@pytest.mark.parametrize("name", [*CALLS, "none"])
def test_a_function_between_the_matrices_of_squeeze_and_excite(name):
    act, call = CALLS.get(name, (Act.NONE, nn.Identity()))
    torch.manual_seed(0)
    block = paper.GhostBottleneck(6, 12, 6)
    block.se = FunctionBetween(call)
    model, x = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 8, 9)
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    assert fused[0]._main[1].act == act
    with torch.no_grad():
        assert_same(fused(x), model, x)
