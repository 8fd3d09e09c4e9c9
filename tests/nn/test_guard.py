"""The guard of replays (csrc/common/guard.h) sees every change of an object and of the dictionaries in which it keeps its state,
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


class Absent:
    pass


ROOT = Thing()


def guard(root, dicts=(), things=(), reads=()):
    return cpu.extension.module.Guard(root, list(dicts), list(things), list(reads), Absent)


def guard_of(things):
    dicts = [t.__dict__ for t in things] + [d for t in things for d in (t.tensors, t.hooks)]
    kept = [d.copy() for d in dicts]
    return guard(ROOT, dicts, things), kept


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
    assert guard.holds(ROOT)
    assert guard.holds(ROOT)
    do, undo = CHANGES[change]
    do(things[7])
    assert not guard.holds(ROOT)
    assert not guard.holds(ROOT)
    assert not second.holds(ROOT)
    if undo is not None:
        undo(things[7])
        assert guard.holds(ROOT)
        assert guard.holds(ROOT)
    del guard, kept
    assert second.holds(ROOT) == (undo is not None)
    del kept_too


def test_guards_come_and_go_with_what_they_watch():
    things = [Thing() for _ in range(500)]
    guards = [guard_of([t]) for t in things]
    del things, guards
    gc.collect()
    things = [Thing() for _ in range(500)]
    guards = [guard_of([t]) for t in things]
    assert all(guard.holds(ROOT) for guard, _ in guards)
    for t in things:
        t.hooks[1] = 1
    assert not any(guard.holds(ROOT) for guard, _ in guards)


def test_an_object_whose_dictionary_python_does_not_manage():
    """Exceptions have theirs elsewhere than other objects."""
    error = ValueError()
    error.flag = True
    held = guard(ROOT, [error.__dict__], [error])
    assert held.holds(ROOT)
    kept = error.__dict__
    error.__dict__ = dict(kept)
    assert not held.holds(ROOT)


def test_each_object_needs_its_dictionary():
    with pytest.raises(ValueError, match="dicts: expected one for each of the objects"):
        guard(Thing(), things=[Thing()])


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_root_is_seen_until_it_is_undone(change):
    root = Thing()
    kept = root.__dict__.copy()
    of_root = guard(root)
    assert of_root.holds(root)
    assert of_root.holds(root)
    assert not of_root.holds(Thing())
    do, undo = CHANGES[change]
    do(root)
    deep = change in ("entry", "hook")  # in a dictionary that is an attribute: of the list of dictionaries, if of any
    assert of_root.holds(root) == deep
    assert of_root.dicts_hold()
    if undo is not None:
        undo(root)
        assert of_root.holds(root)
    del kept


class Owner:
    """A class whose attribute is read."""

    value = ("first",)


def outer():
    x = ["first"]

    def function(y=1):
        return x, y

    def empty():
        nonlocal x
        del x

    return function, empty


@pytest.mark.parametrize("kind", ["class", "dictionary", "default", "cell", "emptied", "removed", "added", "raising"])
def test_a_read_is_seen_to_change(kind):
    function, empty = outer()
    names = {"value": ["first"]}

    class Mine(Owner):
        own = ("own",)

        @property
        def late(self):
            raise error

    mine, error = Mine(), AttributeError("none yet")
    owner, name, change = {
        "class": (Mine, "value", lambda: setattr(Mine, "value", ("second",))),
        "dictionary": (names, "value", lambda: names.update(value=["first"])),
        "default": (function, "__defaults__", lambda: setattr(function, "__defaults__", (2,))),
        "cell": (
            function.__closure__[0],
            "cell_contents",
            lambda: setattr(function.__closure__[0], "cell_contents", 1),
        ),
        "emptied": (function.__closure__[0], "cell_contents", empty),
        "removed": (names, "value", names.clear),
        "added": (names, "other", lambda: names.update(other=None)),
        "raising": (mine, "late", None),
    }[kind]
    now = Absent if kind in ("added", "raising") else owner[name] if owner is names else getattr(owner, name)
    of_reads = guard(ROOT, reads=[(Mine, "own", Mine.own), (owner, name, now)])
    assert of_reads.holds(ROOT)
    assert not guard(ROOT, reads=[(owner, name, Absent if now is not Absent else 1)]).holds(ROOT)
    if kind == "raising":  # not an absence, but somebody's fault, which the caller is to meet
        error = TypeError("a fault")
    else:
        change()
    assert not of_reads.holds(ROOT)


def test_reads_are_triples():
    with pytest.raises(TypeError):
        guard(ROOT, reads=[("an owner", "a name")])
