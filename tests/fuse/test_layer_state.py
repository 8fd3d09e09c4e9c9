"""What layers hold in another way than PyTorch's constructors make it: settings as ints and lists, tensors that are no parameters
or buffers, another call on the instance or in a subclass of Sequential. Fused or not, it computes what it did."""

import copy
import functools

import pytest
import torch
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper


def layers(model: nn.Module, *kinds: type) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kinds)]


def held_as(how: str, module: nn.Module, *names: str) -> None:
    """The module's tensors of these names as its attributes, buffers or parameters, as in DataParallel's replicas."""
    for name in names:
        t = getattr(module, name)
        if t is None:
            continue
        delattr(module, name)
        t = t.detach().clone() * 1.5
        if how == "buffer":
            module.register_buffer(name, t)
        else:
            setattr(module, name, nn.Parameter(t, requires_grad=False) if how == "parameter" else t)


def setting(name: str, form):
    def change(model):
        for conv in layers(model, nn.Conv2d):
            setattr(conv, name, form(getattr(conv, name)))

    return change


def holding(how: str, kind: type, *names: str):
    def change(model):
        found = layers(model, kind)
        assert found
        for module in found:
            held_as(how, module, *names)

    return change


def clamping(**bounds):
    def change(model):
        for half in (model[0].ghost2.primary_conv, model[1].cheap_operation):
            half[2] = nn.ReLU6()
            vars(half[2]).update(bounds)

    return change


def in_squeeze_excite(how: str, *names: str):
    return lambda model: [held_as(how, m, *names) for m in (model[0].se.conv_reduce, model[0].se.conv_expand)]


def first(pair):
    return pair[0]


def first_alone(pair):
    return pair[:1]


CHANGES = {
    **{
        f"{name} as {form.__name__}": setting(name, form)
        for name in ("stride", "dilation")
        for form in (list, torch.Size, first, first_alone)
    },
    "statistics as parameters": holding("parameter", nn.BatchNorm2d, "running_mean", "running_var"),
    "statistics as attributes": holding("attribute", nn.BatchNorm2d, "running_mean", "running_var"),
    "a norm's weight as buffer": holding("buffer", nn.BatchNorm2d, "weight", "bias"),
    "a slope as buffer": holding("buffer", nn.PReLU, "weight"),
    "a slope as attribute": holding("attribute", nn.PReLU, "weight"),
    "a slope as a number": lambda model: setattr(
        model[0].ghost1.primary_conv[2], "weight", nn.Parameter(torch.tensor(0.3))
    ),
    "ReLU6 up to another number": clamping(max_val=0.5),
    "ReLU6 from another number": clamping(min_val=-1.0),
    "a conv's weight as attribute": holding("attribute", nn.Conv2d, "weight"),
    "a conv's weight as buffer": holding("buffer", nn.Conv2d, "weight", "bias"),
    "a gate's weights as buffers": in_squeeze_excite("buffer", "weight", "bias"),
    "a gate's weight as attribute": in_squeeze_excite("attribute", "weight"),
    "a gate's bias as attribute": in_squeeze_excite("attribute", "bias"),
}


@functools.cache
def _pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    block = paper.GhostBottleneck(6, 13, 10, stride=2, se_ratio=0.25)
    block.ghost1.primary_conv[2] = nn.PReLU(7)
    model = nn.Sequential(block, paper.GhostModule(10, 12))
    calibrate(model, torch.randn(4, 6, 9, 8))
    fused = fuse(nn.Sequential(model))[0]
    assert [type(m) for m in fused] == [FusedGhostBottleneck, FusedGhostModule]
    return model, fused


def pair() -> tuple[nn.Module, nn.Module]:
    """A model and its fused twin; fresh at every call."""
    return copy.deepcopy(_pair())


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_holds_in_another_way(change):
    (model, fused), x = pair(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        for _ in range(2):
            fused(x)
    for each in (model, fused):
        CHANGES[change](each)
    for grad in (False, False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)
    for each in (model, fused):
        each.train()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", ["0.ghost1.primary_conv.0", "0.conv_dw", "1.cheap_operation.0"])
@pytest.mark.parametrize("form", [lambda t: t.flatten(), lambda t: t[None], lambda t: t[0], lambda t: None])
def test_a_weight_of_other_dimensions_is_pytorchs_error(place, form):
    (model, fused), x = pair(), torch.randn(2, 6, 9, 8)
    errors = []
    for each in (model, fused):
        conv = each.get_submodule(place)
        weight = form(conv.weight.detach())
        conv.weight = None if weight is None else nn.Parameter(weight)
        with pytest.raises((RuntimeError, TypeError)) as caught:
            each(x)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


# ---- another call


def doubled(module: nn.Module, name: str) -> None:
    call = nn.Module._call_impl if name != "forward" else type(module).forward
    setattr(module, name, lambda *args: call(module, *args) * 2)


PLACES = ("0.ghost1.primary_conv", "0.ghost1.primary_conv.0", "0.ghost2.cheap_operation.1", "0.se", "0.se.conv_reduce", "0.se.gate",
          "0.conv_dw", "0.bn_dw", "0.shortcut", "0.shortcut.2", "0.ghost1", "0", "1", "1.primary_conv.2")  # fmt: skip


@pytest.mark.parametrize("name", ["forward", "_call_impl", "_compiled_call_impl"])
@pytest.mark.parametrize("place", PLACES)
def test_another_call_on_the_instance(place, name):
    """``_compiled_call_impl`` is what ``Module.compile`` sets: its backend may compute anything."""
    (model, fused), x = pair(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        before = [fused(x) for _ in range(2)][1]
        for each in (model, fused):
            doubled(each.get_submodule(place), name)
        expected = model(x)
        for _ in range(3):
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, expected, rtol=1e-3)


class Iterated(nn.Sequential):
    def __iter__(self):
        return (m for m in super().__iter__() if not isinstance(m, nn.PReLU | nn.ReLU))


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 2


class CalledBelow(nn.Sequential):
    def _call_impl(self, *args, **kwargs):
        return super()._call_impl(*args, **kwargs) * 2


@pytest.mark.parametrize("kind", [Iterated, Called, CalledBelow])
@pytest.mark.parametrize("how", ["replaced", "of another class"])
@pytest.mark.parametrize("place", ["0.ghost1.primary_conv", "1.primary_conv", "0.shortcut"])
def test_a_subclass_of_sequential_in_place_of_one(kind, how, place):
    (model, fused), x = pair(), torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        before = [fused(x) for _ in range(2)][1]
        for each in (model, fused):
            block = each.get_submodule(place)
            if how == "replaced":
                each.set_submodule(place, kind(*block).eval())
            else:
                block.__class__ = kind
        expected = model(x)
        for _ in range(3):
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert (place == "0.shortcut" and kind is Iterated) or not torch.allclose(before, expected, rtol=1e-3)
