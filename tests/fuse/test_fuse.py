"""fuse(model) and unfuse(model): which families are found, that nothing else changes, and the report."""

import pytest
import torch
import users_networks
from modules import EXACT, randomized
from public_networks import FAMILIES, timm_model
from torch import nn

import ghostfused
from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, fuse_with_report, unfuse
from ghostfused.models import paper, seed


def run(model, x):
    with torch.no_grad():
        out = model(x)
    return out[0] if isinstance(out, tuple) else out


def deployed(model):
    """timm's GhostNetV3 is re-parameterized first, which changes its state_dict."""
    from timm.utils import reparameterize_model

    return reparameterize_model(model)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "timm_ghostnetv3_100"])
def test_a_fused_network_is_the_same_network(family):
    make, modules, bottlenecks, left = FAMILIES[family]
    model = randomized(make())
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    expected = run(model, x)
    kinds = [type(m) for m in model.modules()]
    fused, report = fuse_with_report(model)
    assert [type(m) for m in model.modules()] == kinds, "not in place: the model stays as it was"
    report = [swap for swap in report if swap.kind != "Sequential"]  # which may be one op as well
    swapped = [swap for swap in report if swap.fused]
    assert len(swapped) == modules + bottlenecks, str(report)
    assert len(report) - len(swapped) == left, str(report)
    assert sum(isinstance(m, FusedGhostBottleneck) for m in fused.modules()) == bottlenecks
    torch.testing.assert_close(run(fused, x), expected, **EXACT)

    base = deployed(model) if "ghostnetv3" in family else model
    state, after = base.state_dict(), fused.state_dict()
    assert list(after) == list(state)
    if "ghostnetv3" not in family:
        assert all(torch.equal(a, b) for a, b in zip(after.values(), state.values(), strict=True))
    again, report = fuse_with_report(fused)
    assert not any(swap.fused for swap in report), "a second call is a no-op"
    assert [type(m) for m in again.modules()] == [type(m) for m in fused.modules()]

    back = unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in base.modules()]
    assert list(back.state_dict()) == list(state)
    if "ghostnetv3" not in family:
        assert torch.equal(run(back, x), expected), "bit for bit"
        for a, b in zip(back.modules(), model.modules(), strict=True):
            assert a.__dict__.keys() == b.__dict__.keys(), "no trace is left"


@pytest.mark.parametrize(
    ("wide", "narrow"),
    [
        ("ghostnet_130", "ghostnet_050"),
        ("ghostnetv2_130", "ghostnetv2_100"),
        ("ghostnetv2_160", "ghostnetv2_100"),
        ("ghostnetv3_100", "ghostnetv3_050"),
        ("ghostnetv3_130", "ghostnetv3_050"),
        ("ghostnetv3_160", "ghostnetv3_050"),
    ],
)
def test_a_wider_network_has_more_channels_and_is_else_the_same(wide, narrow):
    """So that what is fused in the narrow one, which is tried above, is fused in the wide one."""

    def without_channels(name):
        with torch.device("meta"):
            model = timm_model(name)
        kept = (bool, float, str, tuple)  # which are kernels, strides, norms' eps, …; channels are the integers
        return [(type(m), {k: v for k, v in vars(m).items() if isinstance(v, kept)}) for m in model.modules()]

    assert without_channels(wide) == without_channels(narrow)


def test_training_form_is_left_alone_where_it_can_not_be_changed():
    model = timm_model("ghostnetv3_050")
    for reason, mode, inplace in (("eval mode", True, False), ("inplace=False", False, True)):
        report = fuse_with_report(model.train(mode), inplace=inplace)[1]
        assert not any(swap.fused for swap in report)
        assert len(report) == 32
        assert all("training form" in swap.reason and reason in swap.reason for swap in report)


@pytest.mark.parametrize("family", ["seed", "official_v1", "official_v2", "ghostfacenets", "yolov8n_ghost"])
def test_gradients_and_running_statistics(family, training):
    torch.manual_seed(0)
    model = randomized(FAMILIES[family][0]()).train(training)
    twin = fuse(model, backend="reference")
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    grads = []
    for each in (model, twin):
        torch.manual_seed(0)
        given = x.clone().requires_grad_()
        out = each(given)
        while not isinstance(out, torch.Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        out.square().mean().backward()
        grads.append([given.grad, *(p.grad for p in each.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
    for (name, a), b in zip(twin.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)


def test_root_itself_and_shared_modules():
    root = randomized(paper.GhostModule(6, 8))
    fused = fuse(root)
    assert isinstance(fused, FusedGhostModule)
    assert type(unfuse(fused)) is paper.GhostModule
    assert isinstance(fuse(paper.GhostBottleneck(6, 12, 8)), FusedGhostBottleneck)
    shared = paper.GhostModule(6, 6)
    model = randomized(nn.Sequential(shared, nn.ReLU(), shared))
    weight = shared.primary_conv[0].weight
    assert fuse(model, inplace=True) is model
    assert model[0] is model[2]
    assert isinstance(model[0], FusedGhostModule)
    assert model[0].primary_conv[0].weight is weight
    assert unfuse(model, inplace=True) is model
    assert model[0] is model[2]
    assert type(model[0]) is paper.GhostModule
    assert model[0].primary_conv[0].weight is weight


def test_shared_bottleneck_and_tied_weights():
    block = paper.GhostBottleneck(6, 12, 6)
    tied = paper.GhostBottleneck(6, 12, 6)
    tied.ghost1.primary_conv[0].weight = block.ghost1.primary_conv[0].weight
    model = randomized(nn.Sequential(block, tied, block))
    fused = fuse(model)
    assert fused[0] is fused[2]
    assert fused[1].ghost1.primary_conv[0].weight is fused[0].ghost1.primary_conv[0].weight
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(fused(x), model(x), **EXACT)


def test_levels_and_filter():
    model = randomized(users_networks.official())
    by_module, report = fuse_with_report(model, level="module")
    assert {swap.kind for swap in report} == {"OfficialGhost"}
    assert not any(isinstance(m, FusedGhostBottleneck) for m in by_module.modules())
    assert sum(isinstance(m, FusedGhostBottleneck) for m in fuse(by_module).modules()) == 4
    asked = []

    def keep_third(fqn, module):
        asked.append((fqn, type(module).__name__))
        return not fqn.startswith("5")

    partly, report = fuse_with_report(model, filter_fn=keep_third, strict=True)
    assert ("5.ghost1", "OfficialGhost") in asked
    assert sum(isinstance(m, FusedGhostBottleneck) for m in partly.modules()) == 3
    assert {swap.fqn: swap.reason for swap in report if not swap.fused} == {
        "5.ghost1": "filter_fn says no", "5.ghost2": "filter_fn says no",
    }  # fmt: skip


def test_an_error_of_the_filter_leaves_the_model_as_it_was():
    """So does strict: with what an earlier call has fused."""
    model = randomized(users_networks.official())
    fuse(model, inplace=True, filter_fn=lambda fqn, module: fqn.startswith("5"))
    before = {fqn: id(module) for fqn, module in model.named_modules()}
    calls = []

    def fails(fqn, module):
        calls.append(fqn)
        if len(calls) > 3:
            raise KeyError(fqn)
        return True

    with pytest.raises(KeyError):
        fuse(model, inplace=True, filter_fn=fails)
    kinds = [type(module).__name__ for module in model.modules()]
    assert {fqn for fqn, _ in model.named_modules()} == before.keys()
    assert kinds.count("FusedGhostModule") == 2
    model.append(paper.GhostModule(6, 8))
    model[-1].primary_conv[0].padding_mode = "circular"
    with pytest.raises(ValueError, match="strict"):
        fuse(model, inplace=True, strict=True)
    assert [type(module).__name__ for module in model.modules()].count("FusedGhostModule") == 2


def test_backend_is_that_of_the_call():
    fused, report = fuse_with_report(randomized(users_networks.official()).float(), backend="reference")
    assert {m.backend for m in fused.modules() if hasattr(m, "backend")} == {"reference"}
    assert {swap.backend for swap in report} == {"reference"}
    for wrong in ({"backend": "x"}, {"level": "network"}):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}: expected .* got '{wrong[name]}'"):
            fuse(nn.ReLU(), **wrong)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        fuse("model")


def test_report_as_a_table_and_as_data(capsys):
    model = nn.Sequential(paper.GhostModule(4, 8), nn.Sequential(yolo_k3()))
    fuse(model, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "class", "fused", "backend", "reason"]
    report = fuse_with_report(model)[1]
    assert [(s.fqn, s.kind, s.fused) for s in report] == [("0", "GhostModule", True), ("1.0", "Ghost3x3", False)]
    assert "3×3 primary conv" in report[1].reason
    assert all(s.reason is None or s.reason in str(report) for s in report)


def yolo_k3():
    class Ghost3x3(seed.GhostModule):
        pass

    return Ghost3x3(132, 8, 2, 3, 2)


def test_strict_raises_and_leaves_the_model_as_it_was():
    model = nn.Sequential(paper.GhostModule(4, 8), yolo_k3())
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="strict: left unfused: 1: no kernel for a 3×3 primary conv"):
        fuse(model, strict=True, inplace=True)
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ValueError, match="no Ghost module that can be fused"):
        fuse(nn.Conv2d(1, 1, 1), strict=True)
    fused = fuse(nn.Sequential(paper.GhostModule(4, 8)), strict=True)
    assert fuse(fused, strict=True) is not fused


def test_unfuse_keeps_new_values_and_built_modules():
    model = nn.Sequential(paper.GhostBottleneck(6, 12, 8), FusedGhostModule(8, 4))
    fused = fuse(model)
    with torch.no_grad():
        fused[0].ghost1.primary_conv[0].weight.fill_(3)
    fused.train()
    back = unfuse(fused)
    assert isinstance(back[1], FusedGhostModule)
    assert type(back[0]) is paper.GhostBottleneck
    assert back.training
    assert back[0].ghost1.primary_conv[0].weight.min().item() == 3
    assert isinstance(fused[0], FusedGhostBottleneck), "not in place"


def test_public_names():
    assert all(hasattr(ghostfused, name) for name in ghostfused.__all__)


def test_somebody_else_has_patched_every_module(monkeypatch):
    """As tracers and exporters do, some of them for good."""
    call = nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda self, *args: call(self, *args))
    assert fuse(paper.GhostModule(6, 12)).__class__ is FusedGhostModule
