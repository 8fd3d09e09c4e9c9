"""What ``fuse`` does around the modules that it swaps: their classes, other threads, warnings and reports."""

import contextlib
import copy
import gc
import sys
import threading

import pytest
import torch
from networks import assert_same
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, fuse_with_report, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper, seed
from ghostfused.recognize import equivalence

REGISTRY = {}


class Registered(paper.GhostModule):
    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        REGISTRY[cls.__name__] = cls


class Noted(type):
    def __call__(cls, *args, **kwargs):
        made = super().__call__(*args, **kwargs)
        made.noted = True
        return made


class Child(Registered):
    pass


class OfMeta(paper.GhostModule, metaclass=Noted):
    pass


class OnlyItself(paper.GhostModule):
    def forward(self, x):
        return super().forward(x) if type(self) is OnlyItself else -super().forward(x)


class OwnState(paper.GhostModule):
    def __getstate__(self):
        return self.__dict__ | {"saved": True}


class OwnCopy(paper.GhostModule):
    def __deepcopy__(self, memo):
        made = type(self)(6, 12)
        made.load_state_dict(self.state_dict())
        return made.eval()


@pytest.mark.parametrize("kind", [Child, OfMeta, OnlyItself, OwnState, OwnCopy])
def test_classes_that_do_more_than_hold_a_forward(kind):
    model, x = calibrate(nn.Sequential(kind(6, 12)), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 9, 8)
    registered = dict(REGISTRY)
    fused, report = fuse_with_report(model)
    assert registered == REGISTRY
    own = kind in (OwnState, OwnCopy)
    assert isinstance(fused[0], FusedGhostModule) == (not own)
    assert not own or "overrides __" in report[0].reason
    with torch.no_grad():
        for each in (fused, copy.deepcopy(fused)):
            assert_same(each(x), model, x)
    assert type(unfuse(fused)[0]) is kind


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("where", ["beside", "shortcut", "half"])
def test_what_torchscript_has_compiled_stays_as_it_is(where):
    block, script = paper.GhostBottleneck(6, 12, 6), torch.jit.script(nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU()))
    model = nn.Sequential(block, nn.Identity())
    if where == "beside":
        model[1] = script
    elif where == "shortcut":
        block.shortcut = script
    else:
        block.ghost1.primary_conv[2] = torch.jit.script(nn.ReLU())
    calibrate(model, torch.randn(4, 6, 9, 8))
    fused, report = fuse_with_report(model)
    left = {swap.fqn: swap.reason for swap in report if not swap.fused}
    named = {"beside": {}, "shortcut": {"0": "shortcut"}, "half": {"0.ghost1": "primary_conv.2"}}[where]
    assert left == {fqn: f"{name} is compiled by TorchScript" for fqn, name in named.items()}
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiler", ["script", "trace"])
def test_torchscript_in_the_place_of_any_child(compiler):
    """Put there after fuse, before a first call or after it."""
    model = nn.Sequential(paper.GhostBottleneck(6, 12, 8, stride=2, se_ratio=0.25))
    x = torch.randn(2, 6, 9, 8)
    calibrate(model, x)
    given: dict[str, torch.Tensor] = {}
    for fqn, module in model.named_modules():
        module.register_forward_hook(lambda _, inputs, out, fqn=fqn: given.update({fqn: inputs[0]}))
    with torch.no_grad():
        expected = model(x)
    for module in model.modules():
        module._forward_hooks.clear()
    assert len(given) > 20
    for fqn in filter(None, given):
        child = copy.deepcopy(model.get_submodule(fqn))
        compiled = torch.jit.script(child) if compiler == "script" else torch.jit.trace(child, given[fqn])
        parent, _, name = fqn.rpartition(".")
        for warm in (False, True):
            fused = fuse(model)
            with torch.no_grad():
                if warm:
                    fused(x), fused(x)
                fused.get_submodule(parent)._modules[name] = compiled
                for _ in range(2):
                    torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4, msg=fqn)


def test_fusing_leaves_other_threads_alone():
    plain, x, errors, stop = nn.Sequential(*(nn.Conv2d(6, 6, 1) for _ in range(4))), torch.randn(1, 6, 4, 4), [], []
    call, getter = nn.Module.__call__, nn.Module.__getattr__

    def runs():
        with torch.no_grad():
            while not stop:
                try:
                    plain(x)
                except Exception as error:
                    errors.append(error)

    def fuses(number):
        reports[number] = fuse_with_report(models[number], inplace=True)[1]

    models = [
        nn.Sequential(seed.GhostBottleneck(6, 12, 6, 3, 1, True), paper.GhostModule(6, 12)).eval() for _ in range(3)
    ]
    reports = [[]] * 3
    user = threading.Thread(target=runs)
    user.start()
    threads = [threading.Thread(target=fuses, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.append(True)
    user.join()
    assert not errors
    assert [[swap.fused for swap in report] for report in reports] == [[True] * 4] * 3
    assert nn.Module.__call__ is call
    assert nn.Module.__getattr__ is getter


class Dropping(nn.Module):
    """Draws random numbers while it is proved: by a layer, and by a child that nobody has traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(paper.GhostModule(6, 12), DropPath(), nn.Dropout(), paper.GhostModule(12, 6))

    def forward(self, x):
        return self.body(x) + x


class DropPath(nn.Module):
    def forward(self, x):
        if not self.training:
            return x
        return x * torch.rand(x.shape[0], 1, 1, 1, dtype=x.dtype).add(0.8).floor()


def test_other_threads_draw_the_random_numbers_that_they_would():
    model = nn.Sequential(Dropping(), paper.GhostBottleneck(6, 12, 8, stride=2)).eval()
    drawn, stop = [], []

    def draws():
        while not stop:
            drawn.append(float(torch.rand(())))

    torch.manual_seed(0)
    user = threading.Thread(target=draws)
    user.start()
    fused = fuse(model)
    stop.append(True)
    user.join()
    assert isinstance(fused[0], FusedGhostBottleneck)
    torch.manual_seed(0)
    assert drawn == [float(torch.rand(())) for _ in drawn]


def test_threads_that_begin_during_a_proof_see_nothing_of_it(monkeypatch):
    """A new thread takes its number of threads from what was set last, and keeps it."""
    model = Dropping().eval()
    seen, substituted, before = [], equivalence.substituted, torch.get_num_threads()

    def look():
        seen.append((torch.get_num_threads(), torch.get_rng_state().tolist()))

    @contextlib.contextmanager
    def looked_at(*args):
        with substituted(*args) as pair:
            for run in (lambda: None, lambda: pair[0](pair[1]), lambda: None):
                run()
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
            assert torch.get_num_threads() == 1
            yield pair

    torch.set_num_threads(3)
    monkeypatch.setattr(equivalence, "substituted", looked_at)
    state = torch.get_rng_state()
    try:
        fuse(model)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert len(seen) > 6
    assert all(threads == 3 and drawn == state.tolist() for threads, drawn in seen)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("after", ["gc.disable", "sys.settrace"])
def test_an_interrupt_between_two_calls_leaves_nothing_changed(after, monkeypatch):
    """Python looks for one where a call ends: here it comes after the calls that change what others see as well."""
    model = nn.Sequential(paper.GhostModule(6, 12))
    module, _, name = after.rpartition(".")
    owner = {"gc": gc, "sys": sys}[module]
    function, before, state = getattr(owner, name), torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)

    def interrupted(*args):
        monkeypatch.undo()
        function(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)
    try:
        with pytest.raises(KeyboardInterrupt):
            fuse(model)
        assert torch.get_num_threads() == 2
        assert gc.isenabled()
        assert sys.gettrace() is None
        assert torch.equal(torch.get_rng_state(), state)
        assert isinstance(fuse(model)[0], FusedGhostModule)
    finally:
        gc.enable()
        sys.settrace(None)
        torch.set_num_threads(before)


def test_a_model_that_serves_while_it_is_fused():
    model, x = (
        calibrate(nn.Sequential(paper.GhostBottleneck(6, 12, 6)), torch.randn(4, 6, 9, 8)),
        torch.randn(2, 6, 9, 8),
    )
    with torch.no_grad():
        expected, outputs, stop = model(x), [], []

        def serves():
            with torch.no_grad():
                while not stop:
                    outputs.append(model(x))

        user = threading.Thread(target=serves)
        user.start()
        fuse(model, inplace=True)
        stop.append(True)
        user.join()
    assert isinstance(model[0], FusedGhostBottleneck)
    assert outputs
    for out in outputs:
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


def test_a_forward_that_runs_while_another_thread_unfuses():
    """It has begun as a fused bottleneck's, whose Ghost modules become plain ones meanwhile."""
    block = nn.Sequential(seed.GhostModule(6, 12, 2, 1), nn.Sequential(), seed.GhostModule(12, 6, 2, 1, use_relu=False))
    model, x = calibrate(nn.Sequential(Sum(block)), torch.randn(4, 6, 9, 8)), torch.randn(2, 6, 9, 8)
    fused = fuse(model)
    running = fused[0]
    assert isinstance(running, FusedGhostBottleneck)
    assert not any(isinstance(m, FusedGhostModule) for m in unfuse(fused, inplace=True).modules())
    with torch.no_grad():
        torch.testing.assert_close(running._steps(x), model(x), rtol=1e-4, atol=1e-5)


class Sum(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x) + x


def test_fuse_warns_where_it_was_of_no_use():
    with pytest.warns(UserWarning, match="nothing is fused: no Ghost module was found"):
        fuse(nn.Conv2d(1, 1, 1))
    with pytest.warns(UserWarning, match="nothing is fused: 0: no kernel for a 5×5 primary conv"):
        fuse(nn.Sequential(seed.GhostModule(132, 8, 2, 5, 1)))
    with pytest.warns(UserWarning, match="all fused modules run on the slow reference: .*float64"):
        fuse(nn.Sequential(paper.GhostModule(6, 12)).double())


def test_a_module_that_is_refused_is_reported_whatever_its_name():
    class Plain(paper.GhostModule):
        def forward(self, x):
            one = self.primary_conv(x)
            return torch.cat([one, self.cheap_operation(one)], 1) if x.shape[0] > 1 else x

    Plain.__mro__[1].__name__ = "Module"
    try:
        (swap,) = fuse_with_report(nn.Sequential(Plain(6, 12)))[1]
    finally:
        Plain.__mro__[1].__name__ = "GhostModule"
    assert not swap.fused
    assert "decides by its input" in swap.reason
