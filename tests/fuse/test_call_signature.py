"""Forwards whose input has another name than x, or that take more: a fused module is called as its original is."""

import copy
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, capture, fuse, unfuse
from ghostfused.models import paper

SOURCE = """
import torch
from torch import nn
from ghostfused.models import paper

class Ghost(nn.Module):
    def __init__(self, cin=12, cout=12):
        super().__init__()
        ghost = paper.GhostModule(cin, cout)
        self.one, self.two = ghost.primary_conv, ghost.cheap_operation
    def forward(self, {taken}):
        {first}
        y = self.one({x})
        return torch.cat([y, self.two(y)], 1)

class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.ghost1, self.ghost2 = Ghost(12, 16), Ghost(16, 12)
    def forward(self, {taken}):
        {first}
        return self.ghost2(self.ghost1({x})) + {x}

class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(12, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()
    def forward(self, {taken}):
        {first}
        return self.act(self.bn(self.conv({x})))
"""
TAKEN = {
    "inp": ("pass", "inp"), "input": ("pass", "input"), "x, /": ("pass", "x"), "x: torch.Tensor": ("pass", "x"), "x, scale=1.0": ("pass", "x"),
    "inp, flag=False": ("if flag: inp = -inp", "inp"), "x, **kwargs": ("if kwargs: x = x * 2", "x"), "*args": ("x, = args", "x"),
    "*args, **kwargs": ("x = args[0] if args else kwargs['inp']", "x"), "x, y=None": ("if y is not None: x = x + y", "x"),
    "x, *, gate=None": ("if gate is not None: x = x * gate", "x"), "x, residual=None": ("if residual is not None: x = x * residual", "x"),
    "x, input_gate=None": ("if input_gate is not None: x = x - input_gate", "x"), "x, *further": ("if further: x = x * len(further)", "x"),
    "x, flag=False, /": ("if flag: x = -x", "x"), "x, flag=False, /, **kwargs": ("if flag or kwargs: x = -x", "x"),
    "x, *further, flag=False": ("if flag or further: x = -x", "x"), "x, *, flag=False": ("if flag: x = -x", "x"),
}  # fmt: skip
CALLS = {
    "f(x)": lambda m, x: m(x), "f(x=x)": lambda m, x: m(x=x), "f(inp=x)": lambda m, x: m(inp=x), "f(input=x)": lambda m, x: m(input=x),
    "f(x, scale=2)": lambda m, x: m(x, scale=2.0), "f(x, 2)": lambda m, x: m(x, 2.0), "f(x, True)": lambda m, x: m(x, True), "f(x, False)": lambda m, x: m(x, False),
    "f(x, flag=True)": lambda m, x: m(x, flag=True), "f(x, flag=False)": lambda m, x: m(x, flag=False), "f()": lambda m, x: m(),
    "f(x, y=x)": lambda m, x: m(x, y=x), "f(x, y=None)": lambda m, x: m(x, y=None), "f(x, gate=2)": lambda m, x: m(x, gate=2.0),
    "f(x, residual=2)": lambda m, x: m(x, residual=2.0), "f(x, residual=y)": lambda m, x: m(x, residual=x.flip(0)),
    "f(x, input_gate=y)": lambda m, x: m(x, input_gate=x[:, :, 0, 0][:, :, None, None]),
    "f([x])": lambda m, x: m([x]), "f(x, x=x)": lambda m, x: m(x, x=x), "f(inp=x, flag=True)": lambda m, x: m(inp=x, flag=True),
    "m.forward": lambda m, x: m.forward(x), "m.forward(inp=x)": lambda m, x: m.forward(inp=x),
}  # fmt: skip
GATES = ("f(x, residual=2)", "f(x, residual=y)", "f(x, input_gate=y)")
"""What a Ghost module of ours takes beyond its original: see FusedGhostModule.forward."""


@pytest.fixture(params=TAKEN)
def space(request):
    first, x = TAKEN[request.param]
    made = types.ModuleType("somebodys_forwards")
    sys.modules[made.__name__] = made
    exec(SOURCE.format(taken=request.param, first=first, x=x), made.__dict__)
    made.taken = request.param
    yield made
    del sys.modules[made.__name__]


def outcome(call, module, x):
    try:
        return call(module, x.clone()).detach()
    except Exception as error:
        return error


def check_same(space, module, fused, x):
    for name, call in CALLS.items():
        if (
            name in GATES
            and isinstance(fused, FusedGhostModule)
            and not {"residual", "input_gate", "**"} & {*space.taken.split()}
        ):
            continue
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                expected, ours = outcome(call, module, x), outcome(call, fused, x)
            if isinstance(expected, Exception):
                assert type(ours) is type(expected) or isinstance(ours, type(expected)), f"{name}: {ours!r}"
            else:
                assert not isinstance(ours, Exception), f"{name}: {ours!r}"
                torch.testing.assert_close(
                    ours, expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
                )


@pytest.mark.parametrize("kind", ["Ghost", "Bottleneck", "Head"])
def test_a_call_is_what_it_is_of_the_original(kind, space):
    module, x = getattr(space, kind)().eval(), torch.randn(2, 12, 9, 8)
    if kind == "Head":
        model = nn.Sequential(nn.Sequential(paper.GhostModule(12, 12), module, paper.GhostModule(12, 12))).eval()
        fused = fuse(model)[0][1]
    else:
        fused = fuse(nn.Sequential(module))[0]
    assert type(fused) is not type(module)
    check_same(space, module, fused, x)
    if space.taken in ("inp", "x, **kwargs"):
        for each in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            check_same(space, module, each, x)
    name = {"Ghost": "FusedGhostModule", "Bottleneck": "FusedGhostBottleneck", "Head": "FusedConvNormAct"}[kind]
    assert repr(fused).startswith(f"{name}(")
    assert type(unfuse(nn.Sequential(fused))[0]) is type(module)


def test_fused_even_so(space):
    """The Ghost modules inside still get gate and sum, where their own arguments mean nothing else."""
    fused = fuse(nn.Sequential(space.Bottleneck().eval()))
    assert isinstance(fused[0], FusedGhostBottleneck)
    assert isinstance(fused[0].ghost1, FusedGhostModule)
    assert fused[0].ghost2.takes_gates == (
        "**kwargs" not in space.taken and space.taken not in ("x, residual=None", "x, input_gate=None")
    )
    with torch.no_grad():
        for _ in range(2):
            fused(torch.randn(1, 12, 5, 5))


@pytest.mark.parametrize("kind", ["Ghost", "Bottleneck"])
@pytest.mark.parametrize("space", ["inp, flag=False"], indirect=True)
def test_a_default_that_is_another_later(kind, space):
    module, x = getattr(space, kind)().eval(), torch.randn(2, 12, 9, 8)
    fused = fuse(nn.Sequential(module))[0]
    module.forward.__func__.__defaults__ = (True,)
    check_same(space, module, fused, x)


class Asks(nn.Module):
    def __init__(self, space):
        super().__init__()
        self.block = space.Bottleneck()

    def forward(self, x):
        return self.block(inp=x) * 2


@pytest.mark.parametrize("space", ["inp", "inp, flag=False"], indirect=True)
def test_exported_compiled_and_traced(space):
    model, x = Asks(space).eval(), torch.randn(2, 12, 9, 8)
    fused = fuse(model)
    with torch.no_grad():
        expected = model(x)
        programs = [
            torch.export.export(fused, (x,)).module(),
            torch.compile(fused, backend="eager", fullgraph=True),
            torch.fx.symbolic_trace(fused),
        ]
        for program in (*programs, torch.jit.trace(fused, x)):
            torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)
    alone, x = fuse(nn.Sequential(space.Ghost().eval()))[0], torch.randn(2, 12, 9, 8)
    traced = torch.fx.symbolic_trace(alone)
    torch.testing.assert_close(traced(x), alone(x), rtol=1e-4, atol=1e-5)


def test_a_fused_sequential_takes_what_a_sequential_takes():
    model = nn.Sequential(nn.Sequential(paper.GhostModule(6, 12), paper.GhostModule(12, 6))).eval()
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(fused[0](input=x), model[0](input=x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="'x'"):
        fused[0](x=x)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_no_tensor_that_a_kernel_takes_is_named(grad):
    model = nn.Sequential(
        paper.GhostBottleneck(6, 12, 6),
        paper.GhostModule(6, 12),
        nn.Sequential(paper.GhostModule(12, 6), paper.GhostModule(6, 6)),
    )
    fused, x = fuse(model.eval()), torch.randn(2, 6, 8, 8)
    given = {
        "a nested one": torch.nested.nested_tensor([*x]),
        "list": [x],
        "dict": {"x": x},
        "ndarray": x.numpy(),
        "NoneType": None,
    }
    for module in fused:
        for what, each in given.items():
            with (
                torch.set_grad_enabled(grad),
                pytest.raises((TypeError, RuntimeError), match=f"^x: expected a (dense t|T)ensor, got {what}$"),
            ):
                module(each)
    for what in ("a nested one on cpu", "list"):
        with pytest.raises((TypeError, RuntimeError), match=f"^input 0: expected a .*tensor on cpu, got {what}$"):
            capture(model, x)(given[what.removesuffix(" on cpu")])
