"""The blog's and the paper's GhostNet: keys, what they compute, and the blog's oddities one by one."""

import pytest
import torch
import torch.nn.functional as F
from modules import randomize
from torch import Tensor, nn

from ghostfused.models import paper, seed

# ---- the seed blog's network, once more and independently: keys and forward as functions of a state_dict

SEED_BLOCKS = [  # in, mid, out, stride, SE divide
    (16, 16, 16, 1, None), (16, 64, 24, 2, None), (24, 72, 24, 1, None), (24, 72, 40, 2, 28), (40, 120, 40, 1, 28),
    (40, 120, 40, 1, 28), (40, 240, 80, 1, None), (80, 200, 80, 1, None), (80, 184, 80, 2, None),
    (80, 184, 80, 1, None), (80, 480, 112, 1, 14), (112, 672, 112, 1, 14), (112, 672, 160, 2, 7),
    (160, 960, 160, 1, 7), (160, 960, 160, 1, 7),
]  # fmt: skip
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def conv_bn_keys(prefix: str, bias: bool = False) -> list[str]:
    conv = [f"{prefix}.0.weight", *([f"{prefix}.0.bias"] if bias else [])]
    return [*conv, *(f"{prefix}.1.{name}" for name in BN)]


def pair(prefix: str) -> list[str]:
    return [f"{prefix}.weight", f"{prefix}.bias"]


def seed_keys() -> list[str]:
    keys = conv_bn_keys("first_conv", bias=True)
    for i, (_, _, _, stride, divide) in enumerate(SEED_BLOCKS):
        b = f"features.{i}.bottleneck"
        keys += conv_bn_keys(f"{b}.0.primary_conv") + conv_bn_keys(f"{b}.0.cheap_op")
        if stride == 2:
            keys += conv_bn_keys(f"{b}.1")
        if divide:
            keys += pair(f"{b}.2.SEblock.0") + pair(f"{b}.2.SEblock.2")
        keys += conv_bn_keys(f"{b}.3.primary_conv") + conv_bn_keys(f"{b}.3.cheap_op")
        keys += conv_bn_keys(f"features.{i}.shortcut") if stride == 2 else pair(f"features.{i}.shortcut")
    return keys + conv_bn_keys("last_stage", bias=True) + pair("last_stage.4") + pair("classifier")


def seed_forward(p: dict[str, Tensor], x: Tensor, training: bool) -> Tensor:
    """The blog's GhostNet from its state_dict alone, for 224×224."""

    def conv_bn(x: Tensor, key: str, stride: int = 1, groups: int = 1) -> Tensor:
        w = p[f"{key}.0.weight"]
        x = F.conv2d(x, w, p.get(f"{key}.0.bias"), stride, w.shape[2] // 2, 1, groups)
        mean, var = p[f"{key}.1.running_mean"].clone(), p[f"{key}.1.running_var"].clone()
        return F.batch_norm(x, mean, var, p[f"{key}.1.weight"], p[f"{key}.1.bias"], training)

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    def ghost(x: Tensor, key: str, relu: bool) -> Tensor:
        x1 = conv_bn(x, f"{key}.primary_conv")
        x1 = x1.clamp_min(0) if relu else x1
        return torch.cat([x1, relu6(conv_bn(x1, f"{key}.cheap_op", groups=x1.shape[1]))], 1)

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ p[f"{key}.weight"].T + p[f"{key}.bias"]

    x = relu6(conv_bn(x, "first_conv", 2))
    for i, (_, mid, _, stride, divide) in enumerate(SEED_BLOCKS):
        b = f"features.{i}.bottleneck"
        y = ghost(x, f"{b}.0", True)
        if stride == 2:
            y = relu6(conv_bn(y, f"{b}.1", 2, mid))
        if divide:
            gate = relu6(linear(relu6(linear(y.mean((2, 3)), f"{b}.2.SEblock.0")), f"{b}.2.SEblock.2"))
            assert p[f"{b}.2.SEblock.0.weight"].shape[0] == mid // divide
            y = y * gate[:, :, None, None]
        y = ghost(y, f"{b}.3", False)
        s = f"features.{i}.shortcut"
        x = y + (relu6(conv_bn(x, s, 2)) if stride == 2 else F.conv2d(x, p[f"{s}.weight"], p[f"{s}.bias"]))
    x = F.avg_pool2d(relu6(conv_bn(x, "last_stage")), 7, 1)
    x = relu6(F.conv2d(x, p["last_stage.4.weight"], p["last_stage.4.bias"]))
    return linear(x.reshape(len(x), -1), "classifier")


def test_seed_state_dict_keys():
    assert list(seed.GhostNet().state_dict()) == seed_keys()


def test_seed_network_against_an_independent_computation(training):
    model = randomize(seed.GhostNet(num_classes=7)).double().train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(1 + training, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        expected = seed_forward(state, x, training)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_seed_takes_other_image_sizes():
    model = seed.GhostNet(num_classes=3).eval()
    with torch.no_grad():
        for size in ((32, 32), (65, 130), (256, 64)):
            assert model(torch.randn(2, 3, *size)).shape == (2, 3)


def test_seed_ghost_module_ends_in_relu6_without_relu_too():
    m = randomize(seed.GhostModule(4, 8, use_relu=False)).double().eval()
    out = m(torch.randn(1, 4, 9, 9, dtype=torch.float64) * 20)
    assert out[:, :4].min() < 0
    assert out[:, :4].max() > 6
    assert out[:, 4:].min() == 0
    assert out[:, 4:].max() == 6


@pytest.mark.parametrize(("out_channels", "s", "init"), [(7, 2, 4), (16, 3, 6), (5, 4, 2), (1, 2, 1), (3, 5, 1)])
def test_seed_ghost_module_slices_what_s_does_not_divide(out_channels, s, init):
    m = seed.GhostModule(6, out_channels, s)
    assert m.primary_conv[0].out_channels == init
    assert m.cheap_op[0].out_channels == init * (s - 1)
    x = torch.randn(2, 6, 5, 5)
    out = m.eval()(x)
    x1 = m.primary_conv(x)
    assert torch.equal(out, torch.cat([x1, m.cheap_op(x1)], 1)[:, :out_channels])


def test_seed_ghost_module_strides_once():
    m = seed.GhostModule(3, 8, 2, 3, 2)
    assert m(torch.randn(2, 3, 9, 12)).shape == (2, 8, 5, 6)
    assert m.primary_conv[0].padding == (1, 1)


@pytest.mark.parametrize("s", [1, 0, -1])
def test_seed_ghost_module_refuses_s_below_2(s):
    with pytest.raises(ValueError, match=rf"s: expected at least 2, got {s}.*nn\.Conv2d"):
        seed.GhostModule(3, 8, s)


def test_seed_squeeze_and_excite():
    se = seed.SqueezeAndExcite(12, 12, 4)
    assert [(m.in_features, m.out_features) for m in se.SEblock if isinstance(m, nn.Linear)] == [(12, 3), (3, 12)]
    nn.init.constant_(se.SEblock[2].bias, 50.0)
    x = torch.randn(2, 12, 3, 3)
    torch.testing.assert_close(se(x), 6 * x)
    assert seed.SqueezeAndExcite(12, 12, 5).SEblock[0].out_features == 2
    with pytest.raises(ValueError, match="divide: expected 1 to in_channels = 12, got 13"):
        seed.SqueezeAndExcite(12, 12, 13)
    with pytest.raises(ValueError, match=r"out_channels: expected in_channels = 12.* got 8"):
        seed.SqueezeAndExcite(12, 8)


def test_seed_bottleneck_shortcuts_and_ignored_kernel_size():
    down = seed.GhostBottleneck(8, 16, 24, 5, 2, True, 4)
    conv = down.shortcut[0]
    assert (conv.kernel_size, conv.groups, conv.bias, type(down.shortcut[2])) == ((3, 3), 1, None, nn.ReLU6)
    assert down.bottleneck[1][0].kernel_size == (3, 3)
    assert down.bottleneck[2].SEblock[0].out_features == 4
    same = seed.GhostBottleneck(8, 16, 8, 5, 1, False)
    assert isinstance(same.shortcut, nn.Conv2d)
    assert same.shortcut.kernel_size == (1, 1)
    assert same.shortcut.bias is not None


def test_seed_init_params_takes_convs_without_bias():
    model = seed.GhostNet(num_classes=2)
    model.init_params()
    assert (model.classifier.weight == 1).all()
    assert (model.first_conv[0].bias == 0).all()
    assert (model.last_stage[1].weight == 1).all()
    assert model.features[0].bottleneck[0].primary_conv[0].weight.std() > 0


# ---- the paper's


def count_macs(model: nn.Module, size: int) -> int:
    total = 0

    def count(module, _inputs, out):
        nonlocal total
        per_output = module.weight[0].numel()
        total += per_output * out.numel()

    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, size, size))
    return total


def test_paper_size_at_width_1():
    model = paper.GhostNet()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 5.18
    assert round(count_macs(model, 224) / 1e6) == 141
    assert sum(isinstance(m, paper.GhostBottleneck) for m in model.modules()) == 16
    assert sum(isinstance(m, paper.GhostModule) for m in model.modules()) == 32


@pytest.mark.parametrize(("name", "width"), [("ghostnet_050", 0.5), ("ghostnet_100", 1.0), ("ghostnet_130", 1.3)])
def test_paper_network_is_timms(name, width):
    timm = pytest.importorskip("timm", reason="timm's GhostNet is what the paper's network is compared with")
    theirs = randomize(timm.create_model(name, num_classes=11)).double()
    ours = paper.GhostNet(num_classes=11, width=width).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for training in (False, True):
            outs = []
            for model in (ours, theirs):
                torch.manual_seed(1)  # dropout
                outs.append(model.train(training)(x))
            torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, 4), (8, 8), (10, 12), (9.9, 12), (17, 16), (18, 20), (6.1, 8), (40 * 1.3, 52)]
)
def test_make_divisible(channels, expected):
    assert paper.make_divisible(channels) == expected


def test_paper_ghost_module():
    m = paper.GhostModule(5, 10, kernel_size=3, ratio=3, dw_size=5, stride=2, relu=False).eval()
    assert m.primary_conv[0].weight.shape == (4, 5, 3, 3)
    assert m.cheap_operation[0].weight.shape == (8, 1, 5, 5)
    assert [k for k in m.state_dict() if k.endswith("0.weight")] == [
        "primary_conv.0.weight",
        "cheap_operation.0.weight",
    ]
    out = m(torch.randn(2, 5, 7, 8))
    assert out.shape == (2, 10, 4, 4)
    assert out.min() < 0
    with pytest.raises(ValueError, match="ratio: expected at least 2, got 1"):
        paper.GhostModule(5, 10, ratio=1)
