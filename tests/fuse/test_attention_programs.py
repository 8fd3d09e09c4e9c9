"""On a CPU a Ghost module with attention keeps a program, pooling and sigmoid included, and so do the bottlenecks around it. What
is changed afterwards takes effect as in the unfused model."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same, network
from spies import needs_cpu_kernels, ops_of, replays
from torch import nn
from users_networks import OfficialBottleneck, OfficialGhost

from ghostfused import FusedAttentionGhostModule, FusedGhostBottleneck, fuse
from ghostfused.cli.verify import calibrate
from ghostfused.nn.cache import is_recordable
from ghostfused.nn.sequential import FusedSequential

pytestmark = needs_cpu_kernels


class PooledByLayer(OfficialGhost):
    def __init__(self, cin, cout, **kwargs):
        super().__init__(cin, cout, mode="attn")
        self.pool = nn.AvgPool2d(2)

    def forward(self, x):
        one = self.primary_conv(x)
        gate = self.gate_fn(self.short_conv(self.pool(x)))
        out = torch.cat([one, self.cheap_operation(one)], 1)[:, : self.oup]
        return out * F.interpolate(gate, size=out.shape[-2:], mode="nearest")


class PooledLast(PooledByLayer):
    def forward(self, x):
        one = self.primary_conv(x)
        gate = torch.sigmoid(self.pool(self.short_conv(x)))
        out = torch.cat([one, self.cheap_operation(one)], 1)[:, : self.oup]
        return out * F.interpolate(gate, size=out.shape[-2:], mode="nearest")


class FirstOfTwo(nn.Module):
    def __init__(self, ghost):
        super().__init__()
        self.ghost1, self.ghost2 = ghost(6, 13, mode="attn"), OfficialGhost(13, 6)

    def forward(self, x):
        return self.ghost2(self.ghost1(x)) + x


MODELS = {
    "official": lambda: OfficialBottleneck(6, 13, 9, mode="attn", stride=2, se=True),
    "pooled by a layer": lambda: FirstOfTwo(PooledByLayer),
    "pooled last": lambda: FirstOfTwo(PooledLast),
}


@functools.cache
def _pair(name):
    torch.manual_seed(0)
    model = calibrate(nn.Sequential(MODELS[name]()), torch.randn(4, 6, 10, 8))
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostBottleneck)
    assert isinstance(fused[0].ghost1, FusedAttentionGhostModule)
    return model, fused


def pair(name="official"):
    return copy.deepcopy(_pair(name))


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((2, 10, 8), (1, 9, 7), (3, 2, 3), (1, 33, 20))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_program_is_the_module(name, dtype, layout):
    """Also of maps that the windows don't divide."""
    model, fused = (each.to(dtype, memory_format=layout) for each in pair(name))
    for n, h, w in SIZES:
        x = torch.randn(n, 6, h, w).to(dtype, memory_format=layout)
        for part, unfused in ((fused[0], model[0]), (fused[0].ghost1, model[0].ghost1)):
            with torch.no_grad():
                first = part(x)
                assert_same(first, unfused, x)
                assert replays(part, x)
                second = part(x)
            assert torch.equal(second, first)
            assert second.stride() == first.stride()
            with torch.inference_mode():
                assert torch.equal(part(x), first)


@pytest.mark.parametrize("name", ["ghostnetv2", "attention"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_network_is_one_op_and_a_few_layers(name, layout):
    model = network(name)
    fused, x = fuse(model), torch.randn(2, 3, 75, 64).to(memory_format=layout)
    assert name == "attention" or any(isinstance(m, FusedSequential) for m in fused.modules())
    bottlenecks = [m for m in fused.modules() if isinstance(m, FusedGhostBottleneck)]
    assert any(isinstance(b.ghost1, FusedAttentionGhostModule) for b in bottlenecks)
    with torch.inference_mode():
        fused(x)
        called = ops_of(fused, x)
        assert_same(fused(x), model, x)
    assert {op for op in called if op.startswith("ghostfused.")} == {"ghostfused.replay_cpu"}, called
    assert not {"aten.sigmoid", "aten.avg_pool2d"}.intersection(called)


# ---- what is changed afterwards


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def scale(name):
    def change(m):
        with torch.no_grad():
            m.get_submodule(name).weight.mul_(-1.5)

    return change


def put(name, make):
    return lambda m: m.set_submodule(name, make(m.get_submodule(name)))


def child(name, change):
    return lambda m: change(m.get_submodule(name))


def another_tensor(conv):
    conv.weight = nn.Parameter(conv.weight.detach() * -1.5)


def another_conv(conv):
    other = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1)
    with torch.no_grad():
        other.weight.copy_(torch.arange(other.weight.numel()).sin().view_as(other.weight))
        other.bias.zero_()
    return other


def hook(m):
    m.register_forward_hook(lambda module, given, out: out * 2)


CHANGES = {
    "a conv's values": scale("short_conv.0"),
    "a conv's weight": child("short_conv.2", another_tensor),
    "a conv's padding": child("short_conv.2", lambda m: setattr(m, "padding", (0, 0))),
    "a conv": put("short_conv.4", another_conv),
    "a norm's eps": child("short_conv.1", lambda m: setattr(m, "eps", 1.0)),
    "a norm's mean": child("short_conv.3", lambda m: setattr(m, "running_mean", m.running_mean + 1)),
    "a norm": put("short_conv.5", lambda m: nn.Identity()),
    "a norm in train mode": child("short_conv.1", lambda m: m.train()),
    "all in train mode": lambda m: m.train(),
    "one layer more": child("short_conv", lambda m: m.append(nn.ReLU())),
    "the attention": put("short_conv", lambda m: nn.Sequential(*m, nn.Tanh()).eval()),
    "the attention's forward": child("short_conv", lambda m: setattr(m, "forward", doubled(m.forward))),
    "a layer's forward": child("short_conv.2", lambda m: setattr(m, "forward", doubled(m.forward))),
    "a hook on a layer": child("short_conv.2", hook),
    "a hook on the attention": child("short_conv", hook),
    "a hook on the gate": child("gate_fn", hook),
    "the gate": put("gate_fn", lambda m: nn.Hardsigmoid()),
    "the gate's class": child("gate_fn", lambda m: setattr(m, "__class__", nn.Tanh)),
    "the gate's forward": child("gate_fn", lambda m: setattr(m, "forward", torch.tanh)),
    "mode": lambda m: setattr(m, "mode", "original"),
    "the cut": lambda m: setattr(m, "oup", 12),
}  # fmt: skip
POOLING = {
    "kernel": lambda m: (setattr(m.pool, "kernel_size", 3), setattr(m.pool, "stride", 3)),
    "stride": lambda m: setattr(m.pool, "stride", 1),
    "ceil_mode": lambda m: setattr(m.pool, "ceil_mode", True),
    "padding": lambda m: setattr(m.pool, "padding", 1),
    "divisor": lambda m: setattr(m.pool, "divisor_override", 3),
    "another of its class": put("pool", lambda m: nn.AvgPool2d(3)),
    "another class": put("pool", lambda m: nn.MaxPool2d(2)),
    "a hook": child("pool", hook),
    "forward": child("pool", lambda m: setattr(m, "forward", doubled(m.forward))),
}


def check_change(name, change, ran, part="ghost1"):
    """``change`` of the module with attention, seen from ``part`` of the bottleneck that it is in."""
    model, fused = pair(name)
    (outer, ours), x = (each[0].get_submodule(part) for each in (model, fused)), torch.randn(2, 6, 9, 11)
    with torch.no_grad():
        before = outer(x)
        for _ in range(2 if ran else 0):
            ours(x)
        assert not ran or replays(ours, x)
    for each in (model, fused):
        change(each[0].ghost1)
    for grad in (False, True, False, False):
        with torch.set_grad_enabled(grad):
            try:
                expected = outer(x)
            except RuntimeError as error:
                with pytest.raises(type(error)):
                    ours(x)
            else:
                torch.testing.assert_close(ours(x), expected, rtol=1e-3, atol=1e-4)
                assert expected.shape != before.shape or not torch.allclose(expected, before, rtol=1e-3)


@pytest.mark.parametrize("part", ["", "ghost1"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change, ran, part):
    check_change("official", CHANGES[change], ran, part)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", ["pooled by a layer", "pooled last"])
@pytest.mark.parametrize("change", POOLING)
def test_a_change_of_the_pooling_takes_effect(change, name, ran):
    check_change(name, POOLING[change], ran)


PATCHES = {
    "F.avg_pool2d": (F, "avg_pool2d"),
    "F.interpolate": (F, "interpolate"),
    "F.conv2d": (F, "conv2d"),
    "torch.cat": (torch, "cat"),
    "Sigmoid.forward": (nn.Sigmoid, "forward"),
    "Conv2d.forward": (nn.Conv2d, "forward"),
    "BatchNorm2d.forward": (nn.BatchNorm2d, "forward"),
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_takes_effect(patch, ran, monkeypatch):
    owner, name = PATCHES[patch]
    check_change("official", lambda m: monkeypatch.setattr(owner, name, doubled(PLAIN[patch])), ran)


PLAIN = {patch: getattr(owner, name) for patch, (owner, name) in PATCHES.items()}


def test_what_was_changed_and_changed_back_is_replayed_again():
    _, fused = pair()
    x, bottleneck = torch.randn(2, 6, 9, 11), fused[0]
    with torch.no_grad():
        before = bottleneck(x)
        handle = bottleneck.ghost1.gate_fn.register_forward_hook(lambda module, given, out: out * 2)
        assert not torch.allclose(bottleneck(x), before, rtol=1e-3)
        assert not replays(bottleneck, x)
        handle.remove()
        bottleneck(x)
        assert replays(bottleneck, x)
        assert torch.equal(bottleneck(x), before)


# ---- where a program would be wrong


def test_read_afresh_with_gradients_and_under_autocast():
    model, fused = pair()
    x = torch.randn(2, 6, 9, 11)
    with torch.no_grad():
        for _ in range(2):
            fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = fused(x), model(x)
        assert out.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)
    gradients = []
    for each in (model, fused):
        given = x.clone().requires_grad_()
        each(given).square().sum().backward()
        gradients.append([given.grad, *(p.grad for p in each.parameters())])
    for ours, theirs in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    for each in (model, fused):  # a gradient of x alone, through pooling and sigmoid
        each.requires_grad_(False)
    ours, theirs = (
        each(given).sin().sum() for each, given in zip((fused, model), (x.requires_grad_(), x), strict=True)
    )
    for one, other in zip(torch.autograd.grad(ours, x), torch.autograd.grad(theirs, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    x = x.detach()
    with torch.no_grad():
        torch.testing.assert_close(fused.double()(x.double()), model.double()(x.double()), rtol=1e-10, atol=1e-10)
        fused.float()(x)
        assert replays(fused[0], x)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_by_name(backend):
    model = _pair("official")[0]
    fused, x = fuse(model, backend=backend), torch.randn(2, 6, 9, 11)
    with torch.no_grad():
        for _ in range(2):
            assert_same(fused(x), model, x)
        assert replays(fused[0], x) == (backend == "cpu")
        assert ("aten.avg_pool2d" in ops_of(fused, x)) == (backend == "reference")


@pytest.mark.parametrize("shape", [(2, 6, 1, 5), (2, 6, 1, 1), (2, 5, 8, 8), (2, 6, 0, 4)])
def test_an_input_that_does_not_fit_is_an_error_and_no_more(shape):
    model, fused = pair()
    for each in (fused[0].ghost1, fused[0]):
        x = torch.randn(2, 6, 9, 11)
        with torch.no_grad():
            expected = each(x)
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    model(torch.randn(shape))
                with pytest.raises(RuntimeError):
                    each(torch.randn(shape))
            assert replays(each, x)
            assert torch.equal(each(x), expected)


def test_an_empty_batch():
    _, fused = pair()
    with torch.no_grad():
        for _ in range(3):
            assert fused(torch.randn(0, 6, 8, 8)).shape == (0, 9, 4, 4)


def test_on_other_devices_pytorch_pools():
    """Their programs have no such steps."""
    _, fused = pair()
    assert is_recordable(fused[0])
    assert not is_recordable(copy.deepcopy(fused[0]).to("meta"))
    pairs = nn.Sequential(nn.Sequential(*(FirstOfTwo(OfficialGhost) for _ in range(2)))).eval()
    assert type(fuse(pairs)[0]) is FusedSequential
    with pytest.warns(UserWarning, match="slow reference"):
        assert type(fuse(pairs.to("meta"))[0]) is nn.Sequential


def test_a_gate_that_a_child_makes_is_no_program():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = OfficialGhost(6, 13, mode="attn").short_conv

        def forward(self, x):
            return torch.sigmoid(self.convs(F.avg_pool2d(x, 2)))

    class AsChild(OfficialGhost):
        def __init__(self):
            super().__init__(6, 13)
            self.gate = Gate()

        def forward(self, x):
            out = super().forward(x)
            return out * F.interpolate(self.gate(x), size=out.shape[-2:], mode="nearest")

    model = calibrate(nn.Sequential(AsChild()), torch.randn(4, 6, 10, 8))
    fused, x = fuse(model), torch.randn(2, 6, 9, 11)
    assert isinstance(fused[0], FusedAttentionGhostModule)
    assert not is_recordable(fused[0])
    with torch.no_grad():
        for _ in range(3):
            assert_same(fused(x), model, x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", ["shortcut.2", "ghost1.short_conv.4"])
def test_one_channel_for_all(place, grad):
    """Where a layer is replaced by one of a single channel, PyTorch multiplies or adds that to each."""
    torch.manual_seed(0)
    model = calibrate(OfficialBottleneck(6, 12, 9, mode="attn", se=True).eval(), torch.randn(4, 6, 8, 8))
    fused, x = fuse(model), torch.randn(2, 6, 8, 8)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            fused(x)
        parent, _, number = place.rpartition(".")
        torch.manual_seed(1)
        conv, norm = nn.Conv2d(model.get_submodule(place).in_channels, 1, 1), nn.BatchNorm2d(1).eval()
        for each in (model, fused):
            layers = each.get_submodule(parent)
            layers[int(number)], layers[int(number) + 1] = conv, norm
        for _ in range(2):
            assert_same(fused(x), model, x)
