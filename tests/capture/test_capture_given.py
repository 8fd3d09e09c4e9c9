"""A captured model goes on with the model's own tensors, or names the one that isn't the model's any more."""

import copy

import pytest
import torch
from capture_network import made, scaled
from networks import assert_same
from spies import needs_cpu_kernels
from torch import nn
from torch.nn.utils import prune

from ghostfused import capture

pytestmark = needs_cpu_kernels


def assign(model):
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)


def overwritten(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half().float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def new_parameter(model):
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


CHANGES = {
    "half and back": lambda model: model.half().float(),
    "double and back": lambda model: model.to(torch.float64).to(torch.float32),
    "another device and back": lambda model: model.to("meta").to_empty(device="cpu"),
    "_apply": lambda model: model._apply(lambda t: t.clone()),
    "of a child": lambda model: model.norm.half().float(),
    "parameters overwritten": overwritten,
    "load_state_dict(assign=True)": assign,
    "a parameter": new_parameter,
    "a buffer": lambda model: setattr(model.norm, "running_var", model.norm.running_var * 2),
    "a pruned weight": lambda model: prune.random_unstructured(model.head, "weight", 0.5),
    "weight_norm": lambda model: nn.utils.parametrizations.weight_norm(model.head),
}


NAMED = r"^[a-z.0-9_]+: expected the (parameter|buffer) that was captured, got another"


@pytest.mark.parametrize("change", CHANGES)
def test_another_is_named(change):
    model, x = made()
    captured = capture(model, x)
    CHANGES[change](model)
    with pytest.raises(RuntimeError, match=NAMED):
        captured(x)


@pytest.mark.parametrize("change", ["half and back", "a parameter"])
def test_a_frozen_one_has_its_own_until_it_is_refreshed(change):
    model, x = made()
    captured = capture(model, x, freeze=True)
    before = captured(x)
    CHANGES[change](model)
    assert torch.equal(captured(x), before)
    for asks in (captured.refresh, lambda: captured.save("/nowhere")):
        with pytest.raises(RuntimeError, match=NAMED):
            asks()
    assert_same(capture(model, x)(x), model, x)


def converted(model):
    """All that Module._apply reaches, but for buffers in the same place."""
    for p in model.parameters():
        p.data = p.data.half().float()


def test_what_keeps_the_tensors_is_right():
    model, x = made()
    captured = capture(model, x)
    for change in (scaled, converted, nn.Module.share_memory, nn.Module.float, lambda m: m.requires_grad_(False),
                   lambda m: m.train().eval()):  # fmt: skip
        change(model)
        scaled(model)
        assert_same(captured(x), model, x)


def test_new_tensors_beside_them_take_nothing():
    model, x = made()
    captured = capture(model, x)
    model.register_buffer("note", torch.ones(1))
    for _ in range(2):
        assert_same(captured(x), model, x)
    copied = copy.deepcopy(model).half()
    assert copied.norm.running_mean.dtype == torch.float16
    assert_same(captured(x), model, x)
