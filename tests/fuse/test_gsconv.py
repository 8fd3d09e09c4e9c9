"""GSConv of Slim-neck: a Ghost module whose maps are shuffled. One kernel makes them, PyTorch puts them into their order."""

import copy

import pytest
import torch
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostModule, capture, fuse, unfuse
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


FORMS = [GSConv, Exported, Function]


def made(form, act=nn.Mish):
    torch.manual_seed(0)
    model = calibrate(nn.Sequential(form(6, 12, act), form(12, 16, act)), torch.randn(4, 6, 9, 8))
    fused = fuse(model)
    assert all(isinstance(m, FusedGhostModule) for m in fused)
    return model, fused, torch.randn(2, 6, 9, 7)


@pytest.mark.parametrize("act", [nn.Mish, nn.SiLU])
@pytest.mark.parametrize("form", FORMS)
def test_inference_and_copies(form, act):
    model, fused, x = made(form, act)
    with torch.no_grad():
        for each in (fused, copy.deepcopy(fused), fuse(fused), fused[:]):
            for given in (x, x, x[:, :, :5], x.to(memory_format=torch.channels_last)):
                assert_same(each(given), model, given)
        if form is Function:  # PyTorch can't reshape the others' maps of no image
            assert fused(x[:0]).shape == model(x[:0]).shape
        assert type(unfuse(fused)[0]) is form
        torch.testing.assert_close(unfuse(fused)(x), model(x), rtol=0, atol=0)
        assert_same(capture(fused, x, partial=True)(x), model, x)
    assert_same(fused(x), model, x)
    assert_same(torch.compile(fused, backend="eager")(x), model, x)


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
