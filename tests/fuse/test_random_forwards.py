"""Forwards drawn at random from what Python lets them read: fused or not, they compute what they did, also after a change.

Each draw is a source text: what decides (``DECIDES``), how it is written (``FORMS``), and where it stands (``PLACES``).
"""

import copy
import functools
import gc
import random
import sys
import threading
import types

import pytest
import torch
from torch import nn

from ghostfused import fuse_with_report
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.recognize.observe import Observer

SOURCE = '''
import enum, functools, logging, math, operator, random, sys
import torch
import torch.nn.functional as F
from torch import nn
from ghostfused.models import paper

FLAG, TABLE = True, {{"on": True}}
LOGGER = logging.getLogger("somebodys")
LOGGER.setLevel("ERROR")
class Kind(enum.Enum):
    A, B = 1, 2
class CFG:
    on = True
class Switch:
    on = True
    def __call__(self): return self.on
    def tell(self): return self.on
def told(): return FLAG
def passed(on=True): return on
SWITCH, PART, TELL = Switch(), functools.partial(passed, on=True), Switch().tell
CACHED = functools.lru_cache(None)(told)
CFG.object = Switch()

class Base(nn.Module):
    keep = True
    def settings(self):
        self.skip, self.pair, self.kind, self.table, self.log, self.cfg = True, (1, 0.5), Kind.A, {{"on": True}}, [1], Switch()
        self.off, self.child, self.none = torch.tensor(False), nn.ReLU(), None
        self.child.on = True
        if {counts}:
            self.register_buffer("count", torch.zeros(1))
    @property
    def on(self): return self.skip
    @staticmethod
    def static(): return FLAG
    def helped(self): return self.skip
    def decided(self, x): return {condition}

class Bottleneck(Base):
    def __init__(self):
        super().__init__()
        self.settings()
        self.ghost1, self.ghost2 = paper.GhostModule(6, 12), paper.GhostModule(12, 6, relu=False)
    def yes(self, x): return self.ghost2(self.ghost1(x)) + x
    def no(self, x): return self.ghost2(self.ghost1(x))
    def forward(self, x{default}):
{form}

class Ghost(Base):
    def __init__(self):
        super().__init__()
        self.settings()
        ghost = paper.GhostModule(6, 12)
        self.primary_conv, self.cheap_operation = ghost.primary_conv, ghost.cheap_operation
    def yes(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], 1)
    def no(self, x): return self.yes(x) * 2
    def forward(self, x{default}):
{form}

class Block(Base):
    """A half of a Ghost module."""
    def __init__(self):
        super().__init__()
        self.settings()
        self.conv, self.bn, self.act = paper.GhostModule(6, 12).primary_conv
    def yes(self, x): return self.act(self.bn(self.conv(x)))
    def no(self, x): return self.yes(x) * 2
    def forward(self, x{default}):
{form}
'''
FORMS = [
    "        return self.yes(x) if {c} else self.no(x)",
    "        if (found := {c}):\n            return self.yes(x)\n        return self.no(x)",
    "        return [self.no, self.yes][bool({c})](x)",
    "        return (self.yes if any([{c} for _ in (1,)]) else self.no)(x)",
    "        def inner():\n            return {c}\n        return self.yes(x) if inner() else self.no(x)",
    "        while {c}:\n            return self.yes(x)\n        return self.no(x)",
    "        return self.yes(x) if self.decided(x) else self.no(x)",
]


def attribute(name, value):
    return lambda m, space: setattr(m, name, value)


def in_space(name, value):
    return lambda m, space: setattr(space, name, value)


def nothing(m, space):
    """It depends on the call."""


WATCHED = {
    "self.skip": attribute("skip", False),
    "self.skip is True": attribute("skip", 1),
    "self.skip != 2": attribute("skip", 2),
    "getattr(self, 'skip')": attribute("skip", False),
    "getattr(self, 'keep', False)": attribute("keep", False),
    "not hasattr(self, 'extra')": attribute("extra", 1),
    "self.pair == (1, 0.5)": attribute("pair", (1, 0.25)),
    "self.pair[0] is not True": attribute("pair", (True, 0.5)),
    "self.kind is Kind.A": lambda m, space: setattr(m, "kind", space.Kind.B),
    "self.keep": lambda m, space: setattr(space.Base, "keep", False),
    "self.on": attribute("skip", False),
    "self.static()": in_space("FLAG", False),
    "self.helped()": attribute("skip", False),
    "self.helped() ": attribute("helped", lambda: False),
    "self.helped()  ": lambda m, space: setattr(space.Base, "helped", lambda self: False),
    "Base.helped(self)": attribute("skip", False),
    "self.child.on": lambda m, space: setattr(m.child, "on", False),
    "self.none is None": lambda m, space: setattr(m, "none", nn.Identity()),
    "self.child is not None": attribute("child", None),
    "CFG.on": lambda m, space: setattr(space.CFG, "on", False),
    "FLAG": in_space("FLAG", False),
    "told()": in_space("FLAG", False),
    "told() ": in_space("told", lambda: False),
    "passed()": lambda m, space: setattr(space.passed, "__defaults__", (False,)),
    "told()  ": lambda m, space: setattr(space.told, "__code__", (lambda: False).__code__),
    "self.__class__.__name__ != 'x'": nothing,
    "LOGGER.debug('x') is None": lambda m, space: space.LOGGER.setLevel("DEBUG"),
    "math.sqrt(self.pair[0]) == 1": attribute("pair", (4, 0)),
}
"""What decides, and what changes it: these are fused."""
REFUSED = {
    "self.table['on']": lambda m, space: m.table.update(on=False),
    "self.log": lambda m, space: m.log.clear(),
    "self.cfg.on": lambda m, space: setattr(m.cfg, "on", False),
    "self.__dict__['skip']": attribute("skip", False),
    "vars(self)['skip']": attribute("skip", False),
    "globals()['FLAG']": in_space("FLAG", False),
    "eval('FLAG')": in_space("FLAG", False),
    "TABLE['on']": lambda m, space: space.TABLE.update(on=False),
    "SWITCH()": lambda m, space: setattr(space.SWITCH, "on", False),
    "CFG.object.on": lambda m, space: setattr(space.CFG.object, "on", False),
    "PART()": lambda m, space: space.PART.keywords.update(on=False),
    "TELL()": lambda m, space: setattr(space.TELL.__self__, "on", False),
    "CACHED()": lambda m, space: (setattr(space, "FLAG", False), space.CACHED.cache_clear()),
    "operator.attrgetter('skip')(self)": attribute("skip", False),
    "d['on']": lambda m, space: space.TABLE.update(on=False),
    "not self.off": lambda m, space: m.off.fill_(True),
    "not self.count": lambda m, space: m.count.fill_(1),
    "bool(self.bn.weight.sum() < 1e9) if hasattr(self, 'bn') else not self.count": lambda m, space: m.count.fill_(1),
    "random.random() < self.pair[0]": attribute("pair", (0, 0)),
    "torch.rand(1) < self.pair[0]": attribute("pair", (0, 0)),
    "torch.is_grad_enabled()": nothing,
    "torch.is_inference_mode_enabled()": nothing,
    "torch.is_autocast_enabled('cpu')": nothing,
    "torch.get_default_dtype() is torch.float32": lambda m, space: torch.set_default_dtype(torch.float64),
    "torch.get_num_threads() < 99": nothing,
    "x.shape[-1] > 16": nothing,
    "x.shape[-1] % 2": nothing,
    "len(x) == 1": nothing,
    "x.dtype is torch.float32": nothing,
    "x.requires_grad": nothing,
    "x.is_contiguous()": nothing,
    "x.max() < 4": nothing,
    "isinstance(x, torch.Tensor)": nothing,
    "hasattr(x, 'no_such_thing')": nothing,
    "sys.maxsize == 1": nothing,
    "LOGGER.critical('x') is None": nothing,
    "LOGGER.level == 40": lambda m, space: space.LOGGER.setLevel("DEBUG"),
    "self.training": nothing,
    "__import__('sys').maxsize": nothing,
    "setattr(self, 'extra', 1) is None": nothing,
    "self.log.append(1) is None": nothing,
}
"""What decides, and what changes it: what can't be watched is left as it is."""
INPUTS = [torch.randn(2, 6, 9, 8), torch.randn(1, 6, 20, 18) * 3, torch.randn(3, 6, 8, 8).mT]
PLACES = ["Bottleneck", "Ghost", "Block"]


@functools.cache
def draws() -> list[tuple[str, str, str]]:
    """Each thing that decides, in a form and a place that chance picks."""
    chance = random.Random(20)
    every = [*WATCHED, *REFUSED] * 2
    return [(condition, chance.choice(FORMS), chance.choice(PLACES)) for condition in every]


def made(condition: str, form: str, place: str) -> tuple[nn.Module, types.ModuleType]:
    """A model with such a module first, and the Python module that its class is in."""
    space = types.ModuleType("somebodys_module")
    sys.modules[space.__name__] = space
    default = ", d=TABLE" if condition.startswith("d[") else ""
    inside = form.format(c=condition.replace("d[", "TABLE[") if "decided" in form else condition)
    counts = "self.count" in condition  # a Ghost module with tensors of its own is left unfused
    written = condition.replace("d[", "TABLE[")
    exec(SOURCE.format(condition=written, form=inside, default=default, counts=counts), space.__dict__)
    module = getattr(space, place)()
    if place == "Block":
        ghost = space.paper.GhostModule(6, 12)
        ghost.primary_conv, module = module, ghost
    return calibrate(nn.Sequential(module), torch.randn(4, 6, 9, 8)), space


def outcome(model: nn.Module, x: torch.Tensor) -> torch.Tensor | type[Exception]:
    random.seed(7), torch.manual_seed(7)
    try:
        return model(x).detach()
    except Exception as error:
        return type(error)


def check_same(model: nn.Module, fused: nn.Module) -> None:
    for x in INPUTS:
        for grad in (False, True):
            for _ in range(3 - grad):  # recorded, replayed
                with torch.set_grad_enabled(grad):
                    expected, ours = (outcome(m, x.clone().requires_grad_(grad)) for m in (model, fused))
                if isinstance(expected, type):
                    assert ours is expected
                else:
                    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("draw", range(len(draws())))
def test_what_a_forward_reads_is_watched_or_leaves_it_unfused(draw):
    condition, form, place = draws()[draw]
    model, space = made(condition, form, place)
    try:
        fused, report = fuse_with_report(model)
        own = next(swap for swap in report if swap.fqn == "0")
        assert own.fused == (condition in WATCHED), own.reason
        check_same(model, fused)
        for each in (model, fused):
            module = each[0].primary_conv if place == "Block" else each[0]
            (WATCHED | REFUSED)[condition](module, space)
        check_same(model, fused)
    finally:
        torch.set_default_dtype(torch.float32)
        del sys.modules[space.__name__]


GRADIENTS = {
    "detach": "x1 = self.primary_conv(x)\n        return torch.cat([x1, self.cheap_operation(x1.detach())], 1)",
    "no_grad": "with torch.no_grad():\n            return self.yes(x)",
    "enable_grad": "with torch.enable_grad():\n            return self.yes(x)",
    "clamp": "return self.yes(x.clamp(-1e4, 1e4))",
    "hook": "x1 = self.primary_conv(x)\n        x1.register_hook(lambda g: g * 2) if x1.requires_grad else None\n"
    "        return torch.cat([x1, self.cheap_operation(x1)], 1)",
    "autocast": "with torch.autocast('cpu', torch.bfloat16):\n            return self.yes(x)",
    "checkpoint": "return torch.utils.checkpoint.checkpoint(self.yes, x, use_reentrant=False)",
}


@pytest.mark.parametrize("what", GRADIENTS)
def test_gradients_are_what_they_were(what):
    model, _ = made("True", "        " + GRADIENTS[what], "Ghost")
    fused, report = fuse_with_report(model)
    assert not any(swap.fused for swap in report)
    grads = []
    for each in (model, fused):
        x = torch.linspace(-3e4, 3e4, 2 * 6 * 20).view(2, 6, 4, 5).requires_grad_()
        out = each(x)
        if out.requires_grad:
            out.float().square().mean().backward()
        grads.append([out.detach(), x.grad, *(p.grad for p in each.parameters())])
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_copies_of_a_watching_module_watch_as_well():
    model, space = made("FLAG and self.skip and self.keep", FORMS[0], "Bottleneck")
    fused = copy.deepcopy(fuse_with_report(model)[0])
    check_same(model, fused)
    space.FLAG = False
    check_same(model, fused)


def test_what_a_collection_runs_is_no_part_of_a_forward(monkeypatch):
    """Somebody's suspended generator and destructor, in a cycle that is garbage by then."""

    class Destroyed:
        def __init__(self):
            self.itself = self
            self.generator = self.suspended()
            next(self.generator)

        def suspended(self):
            try:
                yield
            finally:
                seen.append("generator")

        def __del__(self):
            seen.append("destructor")

    def run(self, function):
        Destroyed()  # to be collected while the forward runs
        return observed(self, function)

    seen: list[str] = []
    model, _ = made("True", FORMS[0], "Bottleneck")
    observed, thresholds = Observer.run, gc.get_threshold()
    monkeypatch.setattr(Observer, "run", run)
    gc.collect()
    gc.set_threshold(60)
    try:
        _, report = fuse_with_report(model)
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert set(seen) == {"generator", "destructor"}
    assert all(swap.fused for swap in report), report
    assert gc.isenabled()


def test_another_thread_may_run_the_same_forward_meanwhile():
    """Only the instructions of the run that is observed are judged: Python 3.12 and later tell of all threads'."""
    models = [nn.Sequential(*(paper.GhostModule(4, 4) for _ in range(3))).eval() for _ in range(2)]
    x, stop, errors = torch.randn(1, 4, 5, 5), threading.Event(), []

    def run():
        while not stop.is_set():
            try:
                models[0](x)
            except BaseException as error:
                errors.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(3):
            assert all(swap.reason is None for swap in fuse_with_report(models[1])[1])
    finally:
        stop.set()
        thread.join()
    assert errors == []


@pytest.mark.skipif(not hasattr(sys, "monitoring"), reason="Python 3.11 traces instructions by itself")
def test_where_no_tool_can_monitor_nothing_is_fused_unseen():
    tools = [tool for tool in range(6) if sys.monitoring.get_tool(tool) is None]
    for tool in tools:
        sys.monitoring.use_tool_id(tool, "somebody's")
    try:
        _, report = fuse_with_report(nn.Sequential(paper.GhostModule(4, 4)).eval())
    finally:
        for tool in tools:
            sys.monitoring.free_tool_id(tool)
    assert "without being seen" in report[0].reason
