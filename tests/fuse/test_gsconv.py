"""GSConv of Slim-neck: a Ghost module whose maps are shuffled. One kernel makes them, PyTorch puts them into their order."""

import copy

import pytest
import torch
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostModule, capture, fuse, fuse_with_report, unfuse
from ghostfused.cli.verify import calibrate


class Conv(nn.Module):
    def __init__(self, cin, cout, k=1, groups=1, act=nn.Mish):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, padding=k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = act()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class GSConv(nn.Module):
    """As its authors wrote it: every second map, and then the others."""

    def __init__(self, cin, cout, act=nn.Mish):
        super().__init__()
        self.cv1 = Conv(cin, cout // 2, act=act)
        self.cv2 = Conv(cout // 2, cout // 2, 5, cout // 2, act)

    def maps(self, x):
        x1 = self.cv1(x)
        return torch.cat((x1, self.cv2(x1)), 1)

    def forward(self, x):
        x2 = self.maps(x)
        b, n, h, w = x2.data.size()
        y = x2.reshape(b * n // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, n // 2, h, w)
        return torch.cat((y[0], y[1]), 1)


class Exported(GSConv):
    """As they wrote it for ONNX."""

    def forward(self, x):
        x2 = self.maps(x)
        y = x2.reshape(x2.shape[0], 2, x2.shape[1] // 2, x2.shape[2], x2.shape[3]).permute(0, 2, 1, 3, 4)
        return y.reshape(y.shape[0], -1, y.shape[3], y.shape[4])


class Function(GSConv):
    def forward(self, x):
        return torch.channel_shuffle(self.maps(x), 2)


class Child(GSConv):
    def __init__(self, cin, cout, act=nn.Mish, shuffle=lambda cout: nn.ChannelShuffle(2)):
        super().__init__(cin, cout, act)
        self.shuffle = shuffle(cout)

    def forward(self, x):
        return self.shuffle(self.maps(x))


class Nested(Child):
    def __init__(self, cin, cout, act=nn.Mish):
        super().__init__(cin, cout, act, lambda cout: nn.Sequential(nn.Identity(), nn.ChannelShuffle(cout // 2)))


class Layers(Child):
    def __init__(self, cin, cout, act=nn.Mish):
        super().__init__(cin, cout, act, lambda cout: nn.Unflatten(1, (2, cout // 2)))

    def forward(self, x):
        return super().forward(x).transpose(1, 2).flatten(1, 2)


class Contiguous(GSConv):
    """Not shuffled, but without channels_last."""

    def forward(self, x):
        return self.maps(x).contiguous()


FORMS = [GSConv, Exported, Function, Child, Nested, Layers, Contiguous]


def made(form, act=nn.Mish):
    torch.manual_seed(0)
    model = calibrate(nn.Sequential(form(6, 12, act), form(12, 16, act)), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert all(isinstance(m, FusedGhostModule) for m in fused)
    return model, fused, torch.randn(2, 6, 9, 7)


@pytest.mark.parametrize(("form", "act"), [(form, (nn.Mish, nn.SiLU)[i % 2]) for i, form in enumerate(FORMS)])
def test_inference_and_copies(form, act):
    model, fused, x = made(form, act)
    with torch.no_grad():
        for each in (fused, copy.deepcopy(fused), fuse(fused), fused[:]):
            for given in (x, x, x[:, :, :5], x.to(memory_format=torch.channels_last)):
                assert_same(each(given), model, given)
        if form is Contiguous:
            assert fused(x.to(memory_format=torch.channels_last)).is_contiguous()
        if form not in (GSConv, Exported):  # PyTorch can't reshape the others' maps of no image
            assert fused(x[:0]).shape == model(x[:0]).shape
        assert type(unfuse(fused)[0]) is form
        torch.testing.assert_close(unfuse(fused)(x), model(x), rtol=0, atol=0)
        assert_same(capture(fused, x, partial=True)(x), model, x)
    assert_same(fused(x), model, x)
    assert_same(torch.compile(fused, backend="eager")(x), model, x)


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("form", FORMS)
def test_training(form):
    model, fused, x = made(form)
    grads = []
    for each in (model, fused):
        given = x.clone().requires_grad_()
        out = each.train()(given)
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        grads.append([given.grad, *(p.grad for p in each.parameters()), *each.buffers()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_changes_take_effect(form):
    model, fused, x = made(form)
    with torch.no_grad():
        fused(x)
        for each in (model, fused):
            each[0].cv1.act = nn.ELU()  # which no kernel computes
        assert_same(fused(x), model, x)
        for each in (model, fused):
            each[1].cv2.register_forward_hook(lambda module, args, out: 2 * out)
        assert_same(fused(x), model, x)
        depthwise = model[0].cv2
        for each in (model, fused):
            each[0].cv1, each[0].cv2 = depthwise, nn.Identity()
        assert_same(fused(x), model, x)


CHANGES = {
    "groups": lambda m: setattr(m.shuffle[1], "groups", 3),
    "hook": lambda m: m.shuffle[1].register_forward_hook(lambda module, args, out: 2 * out),
    "hook on what does nothing": lambda m: m.shuffle[0].register_forward_hook(lambda module, args, out: 2 * out),
    "hook around": lambda m: m.shuffle.register_forward_hook(lambda module, args, out: 2 * out),
    "another": lambda m: setattr(m, "shuffle", nn.ReLU()),
    "another for what does nothing": lambda m: m.shuffle.__setitem__(0, nn.ReLU()),
    "one more": lambda m: m.shuffle.append(nn.Tanh()),
    "none": lambda m: setattr(m, "shuffle", nn.Sequential()),
    "forward": lambda m: setattr(m.shuffle[1], "forward", torch.neg),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("copied", [False, True])
def test_what_shuffles_is_changed(change, copied):
    model, fused, x = made(Nested)
    with torch.no_grad():
        fused(x)
        fused = copy.deepcopy(fused) if copied else fused
        for each in (model, fused):
            CHANGES[change](each[0])
        assert_same(fused(x), model, x)
    assert_same(fused(x), model, x)


def test_pruned():
    """A shuffle in groups of a number that is written down: of fewer maps it is another one."""
    model, fused, x = made(Nested)
    for each in (model, fused):
        for half, groups in ((each[0].cv1, 1), (each[0].cv2, 3)):
            old = half.conv
            half.conv = nn.Conv2d(
                6 if groups == 1 else 3, 3, old.kernel_size, padding=old.padding, groups=groups, bias=False
            )
            half.conv.weight.data = old.weight.data[:3].clone()
            half.bn = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        assert_same(fused[0](x), model[0], x)


def test_no_known_order():
    model = nn.Sequential(Child(6, 12, shuffle=lambda cout: nn.ChannelShuffle(3))).eval()
    _, (swap,) = fuse_with_report(model)
    assert not swap.fused
    assert swap.reason.startswith("it gives out its maps in an order that no fused module has")


class Ends(GSConv):
    """Not shuffled either."""

    end: str

    def forward(self, x):
        y = self.maps(x)
        if self.end == "view":
            return y.view(y.size())
        if self.end == "ellipsis":
            return y[...]
        if self.end == "contiguous":
            return y.contiguous()
        if self.end == "channels_last":
            return y.contiguous(memory_format=torch.channels_last)
        return y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


@pytest.mark.parametrize("end", ["view", "ellipsis", "contiguous", "channels_last", "permute"])
@pytest.mark.parametrize("channels", [12, 9])
def test_the_memory_format_of_the_output_is_the_unfused_one(end, channels):
    """Whoever views it by that format goes on."""
    form = type(end, (Ends,), {"end": end})
    block = form(6, channels + channels % 2, nn.SiLU)
    model = calibrate(nn.Sequential(block), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert isinstance(fused[0], FusedGhostModule)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(2, 6, 9, 7).contiguous(memory_format=memory_format)
            for _ in range(2):
                assert fused(x).stride() == model(x).stride()
                assert_same(fused(x), model, x)
