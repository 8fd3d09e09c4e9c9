"""``fuse`` changes no model's behaviour: whatever a forward reads, keeps or collects, it does so at every call."""

import copy
import pickle
import random

import networks
import pytest
import torch
import torch.nn.functional as F
from spies import Ops, needs_cpu_kernels, replays
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.nn import cache
from ghostfused.nn.cache import CachesPrograms
from ghostfused.nn.sequential import FusedSequential

pytestmark = needs_cpu_kernels

FLAG = 1.0
"""A setting that a forward below reads."""


class Net(nn.Module):
    """A stem, bottlenecks, a head and a classifier, with what a forward may do between them."""

    def __init__(self, between=None):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, 2, 1, bias=False), nn.BatchNorm2d(9), nn.ReLU())
        self.blocks = nn.Sequential(
            paper.GhostBottleneck(9, 20, 12, stride=2, se_ratio=0.25), paper.GhostBottleneck(12, 24, 12)
        )
        self.pool, self.flatten, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 7)
        self.options, self.scales, self.log, self.features = {"scale": 1.0}, [1.0], [], {}
        self.calls = 0
        self.between = between

    def forward(self, x):
        x = self.blocks(self.stem(x))
        if self.between is not None:
            x = self.between(self, x)
        return self.classifier(self.flatten(self.pool(x)))


def collects(self, x):
    self.log.append(float(x.mean()))
    self.features["blocks"] = x
    return x


def counts(self, x):
    self.calls += 1
    return x * self.calls


def in_place(self, x):
    x[:, 0] = 1
    return x


BETWEEN = {
    "dict": lambda self, x: x * self.options["scale"],
    "list": lambda self, x: x * self.scales[0],
    "global flag": lambda self, x: x * FLAG,
    "Python's random": lambda self, x: x * random.random(),
    "torch's random": lambda self, x: F.dropout(x, 0.5, training=True),
    "collects": collects,
    "counts": counts,
    "shape": lambda self, x: x if x.shape[-1] > 3 else F.relu6(-x),
    "in place": in_place,
    "in place through a view": lambda self, x: x[:, :2].neg_() is x or x,
    "reads numbers": lambda self, x: x * 0.5 if x.mean().item() > 0 else x,
    "data": lambda self, x: setattr(x, "data", -x) or x,
    "setting of autograd": lambda self, x: x * (2 if torch.is_inference_mode_enabled() else 1),
}


@pytest.mark.parametrize("what", BETWEEN)
def test_a_forward_does_at_every_call_what_it_did(what, monkeypatch):
    model = calibrate(Net(BETWEEN[what]), torch.randn(4, 3, 21, 18))
    fused = fuse(model)
    assert networks.fused_inside(fused) == (4, 2)
    for call in range(6):
        x = torch.randn(2, 3, 21, 18 if call % 2 else 12) + call - 2
        monkeypatch.setitem(globals(), "FLAG", 1.0 + call)
        results = []
        for m in (model, fused):
            m.options["scale"], m.scales[0] = 1.0 + call, 2.0 - call
            torch.manual_seed(call)
            random.seed(call)
            with torch.inference_mode(call == 3), torch.no_grad():
                results.append(m(x))
        torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)
        assert len(fused.log) == len(model.log)
        assert fused.calls == model.calls
        for name, kept in model.features.items():
            torch.testing.assert_close(fused.features[name], kept, rtol=1e-3, atol=1e-4)


CHANGES = {
    "weight": lambda m: m.stem[0].weight.data.mul_(2),
    "eps": lambda m: setattr(m.stem[1], "eps", 1.0),
    "classifier": lambda m: setattr(m, "classifier", nn.Linear(12, 4)),
    "stride": lambda m: setattr(m.stem[0], "stride", (1, 1)),
    "hook": lambda m: m.stem[1].register_forward_hook(lambda mod, args, out: out + 1),
    "hook inside": lambda m: m.blocks[0].ghost1.register_forward_hook(lambda mod, args, out: out + 1),
    "forward": lambda m: setattr(m.stem[2], "forward", torch.neg),
    "between": lambda m: setattr(m, "between", lambda self, x: x * 2),
    "loaded": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
    "train": lambda m: m.stem[1].train(),
    "appended": lambda m: m.blocks.append(nn.Softplus()),
    "a slice": lambda m: setattr(m, "blocks", m.blocks[:1]),
    "without the last": lambda m: m.blocks.__delitem__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change):
    model = calibrate(Net(), torch.randn(4, 3, 21, 18))
    fused, x = fuse(model), torch.randn(3, 3, 21, 18)
    with torch.no_grad():
        before = [fused(x) for _ in range(2)][1]
        for m in (fused, model):
            torch.manual_seed(1)
            CHANGES[change](m)
        for _ in range(3):
            out = fused(x)
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)
    assert out.shape != before.shape or not torch.allclose(out, before, rtol=1e-2)


def test_the_model_stays_what_it_is():
    model = calibrate(Net(), torch.randn(4, 3, 21, 18))
    fused, x = fuse(model), torch.randn(2, 3, 21, 18)
    assert type(fused) is Net
    assert fuse(fused, inplace=True) is fused
    with torch.no_grad():
        expected = [fused(x) for _ in range(2)][1]
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert type(other) is Net
            assert torch.equal(other(x), expected)
        again = type(fused)().eval()
        again.load_state_dict(fused.state_dict())
        networks.assert_same(expected, again, x)
        children = nn.Sequential(*list(fused.children())[:-1])
        networks.assert_same(children(x), nn.Sequential(*list(model.children())[:-1]), x)
    plain = copy.deepcopy(model)
    assert fuse(plain, inplace=True) is plain
    assert unfuse(plain, inplace=True) is plain
    assert vars(plain).keys() == vars(model).keys()
    assert plain.state_dict().keys() == fused.state_dict().keys() == model.state_dict().keys()


def test_slices_of_a_fused_sequential_are_plain():
    fused = fuse(calibrate(Net(), torch.randn(4, 3, 21, 18)))
    x = torch.randn(2, 9, 8, 8)
    with torch.no_grad():
        expected = fused.blocks(x)
        assert type(fused.blocks[:-1]) is nn.Sequential
        assert list(fused.blocks[1:]._modules) == ["1"]
        assert torch.equal(fused.blocks[1:](fused.blocks[:-1](x)), expected)
        assert torch.equal(type(fused.blocks)(*fused.blocks)(x), expected)


def test_torchscript_takes_what_it_took():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), paper.GhostModule(4, 8)).eval()
    x = torch.randn(1, 3, 5, 5)
    scripted = torch.jit.script(unfuse(fuse(model)))
    assert torch.equal(scripted(x), model(x))


class Logging(FusedGhostModule):
    """Somebody's subclass, whose forward does more than compute."""

    def forward(self, x, **kwargs):
        self.seen.append(tuple(x.shape))
        return super().forward(x, **kwargs)


def test_a_subclass_of_ours_runs_its_own_forward_at_every_call():
    model = nn.Sequential(nn.Sequential(Logging(4, 8), FusedGhostModule(8, 6), FusedGhostModule(6, 6)))
    model[0][0].seen = []
    fused = fuse(model.eval())
    with torch.no_grad():
        for _ in range(4):
            fused(torch.randn(1, 4, 3, 3))
        assert len(fused[0][0].seen) == 4
        block = paper.GhostBottleneck(4, 8, 4).eval()
        block.ghost1 = Logging(4, 8).eval()
        block.ghost1.seen = []
        block.ghost2 = FusedGhostModule(8, 4, act_cheap="none", use_relu=False).eval()
        fused = FusedGhostBottleneck.from_module(block)
        fused.ghost1.seen.clear()
        for _ in range(4):
            fused(torch.randn(1, 4, 3, 3))
        assert len(fused.ghost1.seen) == 4


class Raises(nn.Module):
    error: BaseException

    def forward(self, x):
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), KeyError("mine"), RuntimeError("mine"), StopIteration()])
def test_an_exception_comes_out_as_itself_and_once(error):
    module, x = FusedGhostModule(4, 8).eval(), torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        expected = [module(x) for _ in range(2)][1]
        act, module.primary_conv[2] = module.primary_conv[2], Raises()
        module.primary_conv[2].error = error
        for _ in range(3):
            with pytest.raises(type(error)) as caught:
                module(x)
            assert caught.value is error
        module.primary_conv[2] = act
        for _ in range(2):
            assert torch.equal(module(x), expected)


def test_a_failed_call_runs_once():
    class Fails(nn.Module):
        calls = 0

        def forward(self, x):
            type(self).calls += 1
            if self.calls > 1:
                raise RuntimeError("mine")
            return x

    module, x = FusedGhostModule(4, 8).eval(), torch.randn(1, 4, 3, 3)
    module.primary_conv[2] = Fails()
    with torch.no_grad():
        module(x)  # recorded: nothing to replay
        with pytest.raises(RuntimeError, match="mine"):
            module(x)
    assert Fails.calls == 2


@pytest.mark.parametrize("part", ["_encode", "_State"])
def test_what_can_not_be_remembered_still_runs(part, monkeypatch):
    module, x = FusedGhostModule(4, 8).eval(), torch.randn(1, 4, 3, 3)
    expected = module(x).detach()

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(cache, part, fails)
    with torch.no_grad(), Ops() as called:
        for _ in range(3):
            assert torch.equal(module(x), expected)
    assert "ghostfused.replay_cpu" not in called.names


def test_the_oldest_program_goes_first(monkeypatch):
    monkeypatch.setattr(cache, "_MOST_PROGRAMS", 2)
    monkeypatch.setattr(cache, "_kind", lambda x: (x.shape[2],))
    module = FusedGhostModule(4, 8).eval()
    with torch.no_grad():
        for height in (1, 2, 3):
            module(torch.randn(1, 4, height, 3))
        assert list(module._cache._state.programs) == [(2,), (3,)]
        assert replays(module, torch.randn(1, 4, 2, 3))


class Between(nn.Module):
    """A bottleneck with an activation in place that no op takes in."""

    def __init__(self):
        super().__init__()
        self.ghost1, self.act = paper.GhostModule(6, 14, relu=False), nn.ELU(inplace=True)
        self.ghost2 = paper.GhostModule(14, 6, relu=False)

    def forward(self, x):
        return self.ghost2(self.act(self.ghost1(x))) + x


def test_an_activation_in_place_inside_a_bottleneck():
    model = nn.Sequential(calibrate(Between(), torch.randn(4, 6, 9, 8)))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    assert isinstance(fused[0], FusedGhostBottleneck)
    with torch.no_grad():
        for _ in range(3):
            networks.assert_same(fused(x), model, x)


def test_hooks_on_all_modules_see_every_call():
    fused, x = fuse(calibrate(Net(), torch.randn(4, 3, 21, 18))), torch.randn(2, 3, 21, 18)
    with torch.no_grad():
        before = [fused(x) for _ in range(2)][1]
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            for _ in range(2):
                torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-5)
        finally:
            handle.remove()
    assert seen.count(fused.blocks[0].ghost1) == 2


def test_patched_calls_of_all_modules_see_every_call(monkeypatch):
    fused, x = fuse(calibrate(Net(), torch.randn(4, 3, 21, 18))), torch.randn(2, 3, 21, 18)
    call, seen = nn.Module.__call__, []
    with torch.no_grad():
        fused(x)
        monkeypatch.setattr(
            nn.Module, "__call__", lambda self, *args, **kwargs: (seen.append(self), call(self, *args, **kwargs))[1]
        )
        for _ in range(2):
            fused(x)
    assert seen.count(fused.blocks[0].ghost1) == 2


@pytest.fixture
def swapping_tensors():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@torch.no_grad()
def test_swapped_tensors(swapping_tensors):
    model = calibrate(Net(), torch.randn(4, 3, 21, 18))
    fused, x = fuse(model), torch.randn(2, 3, 21, 18)
    fused(x)
    fused.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
    for _ in range(2):
        networks.assert_same(fused(x), model, x)
    fused.to(torch.bfloat16)
    model, x = model.to(torch.bfloat16), x.to(torch.bfloat16)
    for _ in range(2):
        networks.assert_same(fused(x), model, x)


@torch.no_grad()
def test_swapped_tensors_of_a_part(swapping_tensors):
    """Each part that is ours, while the programs of all that is around it are kept."""
    model = calibrate(Net(), torch.randn(4, 3, 21, 18))
    fused, x = fuse(model), torch.randn(2, 3, 21, 18)
    parts = [name for name, m in fused.named_modules() if isinstance(m, CachesPrograms)]
    kinds = {type(fused.get_submodule(name)) for name in parts}
    assert {FusedGhostModule, FusedGhostBottleneck, FusedSequential} <= kinds
    for name in parts:
        for _ in range(2):
            networks.assert_same(fused(x), model, x)
        for m in (fused, model):
            part = m.get_submodule(name)
            part.double().float()
            m(x)
            part.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in part.state_dict().items()})
    networks.assert_same(fused(x), model, x)


@pytest.mark.parametrize("level", ["bottleneck", "network", None])
def test_an_unknown_level_is_named(level):
    with pytest.raises(ValueError, match=r"level: expected one of \['auto', 'module'\], got"):
        fuse(nn.Sequential(), level=level)
