"""Other people's tools on a fused model: the same numbers as on the unfused one. Those that aren't installed are skipped."""

import copy

import pytest
import torch
from networks import first, fused_inside, network
from torch import nn

from ghostfused import FusedGhostBottleneck, fuse, fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_alike(tool, model, x=X):
    """``tool`` makes a list of tensors of both."""
    fused = fuse(model)
    assert fused_inside(fused) > (0, 0)
    expected, got = tool(copy.deepcopy(model), x), tool(fused, x)
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-4)


@torch.no_grad()
def thrice(model, x):
    return [model(x) for _ in range(3)]


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_quantizes_what_is_linear(config):
    """The classifier, and the squeeze-and-excite inside a fused bottleneck."""
    quantization = pytest.importorskip("torchao.quantization")
    block = paper.GhostBottleneck(6, 32, 6)
    block.se = LinearSE()
    model = nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    calibrate(model, torch.randn(4, 6, 9, 8))
    assert isinstance(fuse(model)[0], FusedGhostBottleneck)

    def tool(m, x):
        thrice(m, x)
        quantization.quantize_(m, getattr(quantization, config)())
        assert type(m[3].weight) is not nn.Parameter
        return thrice(m, x)

    assert_alike(tool, model, torch.randn(2, 6, 9, 8))


class LinearSE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


def test_torchao_quantizes_1x1_convolutions():
    """Of a squeeze-and-excite, a shortcut and the halves: tensors that know conv2d and next to nothing else."""
    quantization = pytest.importorskip("torchao.quantization")
    blocks = paper.GhostBottleneck(6, 32, 8, se_ratio=0.25), paper.GhostModule(8, 8)
    model = calibrate(nn.Sequential(*blocks), torch.randn(4, 6, 9, 8))
    assert isinstance(fuse(model)[0], FusedGhostBottleneck)

    def tool(m, x):
        thrice(m, x)
        config = quantization.IntxWeightOnlyConfig()
        quantization.quantize_(m, config, lambda m, name: isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
        return thrice(m, x)

    assert_alike(tool, model, torch.randn(2, 6, 9, 8))


def test_torch_pruning_makes_layers_smaller():
    pruning = pytest.importorskip("torch_pruning")

    def tool(m, x):
        thrice(m, x)
        importance, keep = pruning.importance.MagnitudeImportance(p=2), [m.classifier]
        pruner = pruning.pruner.MagnitudePruner(m, x[:1], importance=importance, pruning_ratio=0.5, ignored_layers=keep)
        before = sum(p.numel() for p in m.parameters())
        pruner.step()
        assert sum(p.numel() for p in m.parameters()) < 0.6 * before
        outs = thrice(m, x)
        m.zero_grad()
        m(x).square().mean().backward()
        return [*outs, m.conv_stem.weight.grad, torch.tensor([t.numel() for t in m.parameters()])]

    assert_alike(tool, network("ghostnet_100"))


def test_a_pruned_network_is_fused():
    """torch-pruning leaves ``out_channels`` as it was, beyond which the forward cuts nothing off."""
    pruning = pytest.importorskip("torch_pruning")
    blocks = paper.GhostBottleneck(8, 16, 12, stride=2), paper.GhostBottleneck(12, 24, 12)
    model, x = nn.Sequential(paper.ConvBnAct(3, 8), *blocks, nn.Conv2d(12, 5, 1)), torch.randn(2, 3, 9, 8)
    importance = pruning.importance.MagnitudeImportance(p=2)
    pruner = pruning.pruner.MagnitudePruner
    pruner(model, x[:1], importance=importance, pruning_ratio=0.5, ignored_layers=[model[3]]).step()
    ghost = blocks[1].ghost1
    assert ghost.out_channels == 24 > 2 * ghost.primary_conv[0].out_channels
    calibrate(model, torch.randn(4, 3, 9, 8))
    fused, report = fuse_with_report(model)
    assert all(swap.fused for swap in report if not swap.fqn.startswith("0")), report
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


def test_timms_surgery():
    pytest.importorskip("timm")

    def pruned(m, x):
        m.prune_intermediate_layers([0, 3], prune_head=False)
        with torch.no_grad():
            return [*thrice(m, x), *m.forward_intermediates(x, intermediates_only=True)]

    def headless(m, x):
        m.set_grad_checkpointing(True)
        m.reset_classifier(0)
        return thrice(m, x)

    for tool in (pruned, headless):
        assert_alike(tool, network("ghostnet_100"))


def test_timms_features():
    timm = pytest.importorskip("timm")
    model = timm.create_model("ghostnet_100", features_only=True)
    assert_alike(lambda m, x: [t for maps in thrice(m, x) for t in maps], calibrate_features(model))


def calibrate_features(model):
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.8, 1.2)
            nn.init.normal_(m.running_mean, std=0.1)
    return model.eval()


@torch.no_grad()
def test_ultralytics_folds_norms():
    """Its own ``model.fuse()``, of a detector that fuse has fused, and that has run."""
    pytest.importorskip("ultralytics")

    def tool(m, x):
        expected = first(m(x))
        m.fuse(verbose=False)
        assert not any(isinstance(each, nn.BatchNorm2d) for each in m.modules())
        return [expected, *(first(m(x)) for _ in range(3))]

    assert_alike(tool, network("yolov8n-ghost"))


def test_tensors_swapped_by_hand():
    """As ``torch.__future__.set_swap_module_params_on_conversion`` does at ``.to()`` and at load_state_dict."""

    def tool(m, x):
        outs = thrice(m, x)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            m[1].double().float()
            m.load_state_dict({key: t * 0.75 if t.is_floating_point() else t for key, t in m.state_dict().items()})
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        outs += thrice(m, x)
        m.float()  # lets go of the programs, which hold the parameters
        for p in m[2].parameters():
            torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.25))
        return outs + thrice(m, x)

    assert_alike(tool, network("small"))


@pytest.mark.parametrize("seen_by", [None, torch.export.export], ids=["traced", "exported"])
def test_openvino_converts_it(seen_by):
    """A tracer and torch.export see the layers."""
    openvino = pytest.importorskip("openvino")

    def tool(m, x):
        thrice(m, x)
        converted = openvino.convert_model(
            seen_by(m, (x,)) if seen_by else m, **({} if seen_by else {"example_input": x})
        )
        run = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return [torch.from_numpy(run(each.numpy())[0].copy()) for each in (x, x + 1)]

    assert_alike(tool, network("small"))
