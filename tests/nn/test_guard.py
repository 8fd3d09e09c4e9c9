"""The guard of replays (csrc/guard.h) sees every change of an object and of the dictionaries in which it keeps its state,
by whichever means this Python has for that."""

import gc

import pytest
from spies import needs_cpu_kernels

from ghostfused.backends import cpu

pytestmark = needs_cpu_kernels


class Thing:
    def __init__(self):
        self.flag, self.tensors, self.hooks = True, {"weight": object(), "bias": None}, {}


class Other(Thing):
    pass


def guard_of(things):
    dicts = [t.__dict__ for t in things] + [d for t in things for d in (t.tensors, t.hooks)]
    kept = [d.copy() for d in dicts]
    return cpu.extension.module.Guard(dicts, things), kept


def set_often(thing, value):
    """As often as the interpreter needs to choose its fast way of storing."""
    for _ in range(100):
        thing.flag = value


CHANGES = {
    "attribute": (lambda t: setattr(t, "flag", False), lambda t: setattr(t, "flag", True)),
    "attribute, stored fast": (lambda t: set_often(t, False), lambda t: set_often(t, True)),
    "new attribute": (lambda t: setattr(t, "new", 1), lambda t: delattr(t, "new")),
    "entry": (lambda t: t.tensors.update(bias=1), lambda t: t.tensors.update(bias=None)),
    "hook": (lambda t: t.hooks.update({1: 2}), lambda t: t.hooks.clear()),
    "class": (lambda t: setattr(t, "__class__", Other), lambda t: setattr(t, "__class__", Thing)),
    "dictionary": (lambda t: t.__dict__.update(tensors={}), None),
    "own dictionary": (lambda t: setattr(t, "__dict__", dict(t.__dict__)), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_until_it_is_undone(change):
    things = [Thing() for _ in range(50)]
    guard, kept = guard_of(things)
    second, kept_too = guard_of(things)
    assert guard.holds()
    assert guard.holds()
    do, undo = CHANGES[change]
    do(things[7])
    assert not guard.holds()
    assert not guard.holds()
    assert not second.holds()
    if undo is not None:
        undo(things[7])
        assert guard.holds()
        assert guard.holds()
    del guard, kept
    assert second.holds() == (undo is not None)
    del kept_too


def test_guards_come_and_go_with_what_they_watch():
    things = [Thing() for _ in range(500)]
    guards = [guard_of([t]) for t in things]
    del things, guards
    gc.collect()
    things = [Thing() for _ in range(500)]
    guards = [guard_of([t]) for t in things]
    assert all(guard.holds() for guard, _ in guards)
    for t in things:
        t.hooks[1] = 1
    assert not any(guard.holds() for guard, _ in guards)


def test_each_object_needs_its_dictionary():
    with pytest.raises(ValueError, match="dicts: expected one for each of the objects"):
        cpu.extension.module.Guard([], [Thing()])
