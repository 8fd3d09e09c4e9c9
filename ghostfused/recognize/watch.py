"""What somebody's forward reads beside its input, its tensors and its children, and whether it is still as it was.

A fused module runs in place of that forward. It compares what was read then with what is there now, and runs the
forward itself where anything differs.
"""

from __future__ import annotations

import enum
import functools
import importlib
import itertools
import logging
import weakref
from collections.abc import Iterable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..spec.subclasses import takes_operations
from ..spec.takes import constant_to_dynamo
from .allowed import root_of
from .classes import Own, of_bases

ChildPath = tuple[str, ...]


def get(root: nn.Module, path: ChildPath) -> nn.Module:
    """The descendant of ``root`` at ``path``; Identity if it has been removed, as a norm is when it is folded, or if
    TorchScript hides it."""
    for name in path:
        root = children_of(root).get(name) or _IDENTITY
    return root


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Its children by their names; none that TorchScript has compiled, whose modules keep them elsewhere."""
    # not module._modules, where torch.export has put a stand-in for module that hands out stand-ins
    children = module.__dict__.get("_modules")
    return children if isinstance(children, dict) else {}


_IDENTITY = nn.Identity()


def hides_any(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether the module itself has one of ``names``, which those of its class don't show through."""
    if (
        torch.compiler.is_compiling()
    ):  # torch 2.11's Dynamo looks a name up in that dictionary, but doesn't go through it
        return any(name in module.__dict__ for name in names)
    return not names.isdisjoint(module.__dict__)


CALLED = frozenset({"forward", "_call_impl", "_compiled_call_impl"})
"""Names that, on an instance, make its call another: by hand, by offloading tools, by ``Module.compile``."""


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def forward_replaced(block: nn.Module) -> bool:
    """Whether what runs when a block is called is no method of its class but one put on the instance, as offloading tools do.

    ultralytics switches to another method of its class, ``forward_fuse``, when it folds norms into convolutions.
    """
    if not hides_any(block, CALLED):
        return False
    forward = block.__dict__.get("forward")
    return not (
        type(block).__module__.partition(".")[0] == "ultralytics"
        and not hides_any(block, CALLED - {"forward"})
        and isinstance(forward, MethodType)
        and getattr(type(block), forward.__name__, None) is forward.__func__
    )


def is_wrapper(t: Any) -> bool:
    """Whether ``t`` stands for other tensors, such as quantized ones, or is of another class that knows what to do of PyTorch's
    operations alone."""
    return type(t) is not nn.Parameter and (is_traceable_wrapper_subclass(t) or takes_operations(t))


class Absent:
    """In place of a value: there is none."""


class Present:
    """In place of a child: some module, which is looked at elsewhere."""


class Foldable:
    """In place of a norm: some module, or none once it is folded into its convolution and another forward runs."""


IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device, torch.Size,
             torch.memory_format, FunctionType, BuiltinFunctionType)  # fmt: skip


def is_immutable(value: Any) -> bool:
    return all(map(is_immutable, value)) if type(value) is tuple else isinstance(value, IMMUTABLE)


def same(a: Any, b: Any) -> bool:
    """Whether two immutable values are of one kind and equal: 1 is neither True nor 1.0."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if type(a) is tuple:
        return len(a) == len(b) and all(map(same, a, b))
    if type(a) in (float, complex):  # 0.0 is equal to -0.0
        return repr(a) == repr(b)
    return type(a) in _COMPARED and bool(a == b)


_COMPARED = {int, str, bytes, MethodType, torch.device, torch.Size}
"""Kinds of equal values that need not be one object."""


_NUMBERS = itertools.count()
_BY_NAME: weakref.WeakValueDictionary[str, Watched] = weakref.WeakValueDictionary()


class Watched:
    """What has been read. It is filled once, and shared by the copies of the module that it is of."""

    def __init__(self) -> None:
        self.name = f"watched {next(_NUMBERS)}"
        _BY_NAME[self.name] = self
        self.attributes: dict[ChildPath, dict[str, Any]] = {}
        """By the path of each module: its attributes."""
        self.shared: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        """What belongs to no module: owner (a class, function, cell, or the dictionary of globals), name and value."""
        self.looks = False
        """Whether it also looks at which children there are, or of which classes."""
        self.modes: list[tuple[ChildPath, ...]] = []
        """Modules of which it reads whether they train: those of each entry are in one mode."""

    def attribute(self, path: ChildPath, name: str, value: Any) -> None:
        self.attributes.setdefault(path, {})[name] = value

    def of(self, owner: Any, name: str) -> Any:
        """Watches ``name`` of a class, function, cell or dictionary, and returns its value."""
        value = _now(owner, name)
        self.shared[id(owner), name] = owner, name, value
        return value

    def update(self, other: Watched, path: ChildPath = ()) -> None:
        """Adds what ``other`` watches, of which the root is at ``path``."""
        for inner, values in other.attributes.items():
            self.attributes.setdefault(path + inner, {}).update(values)
        self.shared.update(other.shared)
        self.looks |= other.looks
        self.modes += [tuple(path + inner for inner in paths) for paths in other.modes]

    def changed(self, root: nn.Module) -> bool:
        """Whether anything isn't as it was."""
        for path, values in self.attributes.items():
            module = get(root, path)
            for name, value in values.items():
                if not _still(module, name, value):
                    return True
        for first, *others in self.modes:
            training = get(root, first).training
            if any(get(root, path).training != training for path in others):
                return True
        return shared_changed(self.name)

    def __deepcopy__(self, memo: dict) -> Watched:
        return self

    def __reduce__(self) -> tuple:
        shared = [
            (name, where, value if is_plain(value) else Present)
            for owner, name, value in self.shared.values()
            if (where := _address(owner)) is not None
        ]
        return _load, (self.attributes, shared, self.looks, self.modes)


def _load(
    attributes: dict[ChildPath, dict[str, Any]],
    shared: list[tuple[str, tuple[str, ...], Any]],
    looks: bool = False,
    modes: list[tuple[ChildPath, ...]] | None = None,
) -> Watched:
    """Functions and classes are, as in every pickle, those that bear the names here and now."""
    watched = Watched()
    watched.attributes, watched.looks, watched.modes = attributes, looks, modes or []
    for name, (module, qualified, *names), value in shared:
        try:
            owner: Any = importlib.import_module(module)
            owner = functools.reduce(getattr, qualified.split("."), owner) if qualified else vars(owner)
        except (ImportError, AttributeError, ValueError):  # then nothing holds, and the module's own forward runs
            owner = {}
            watched.shared[id(owner), name] = owner, name, Present
            continue
        if name == Own.NAME and isinstance(owner, type):
            owner = next(iter(of_bases(owner, names)))
        found = watched.of(owner, name)
        if value is not Present:
            watched.shared[id(owner), name] = owner, name, value
        elif isinstance(found, FunctionType):
            watched.of(found, "__code__")
    return watched


def _address(owner: Any) -> tuple[str, ...] | None:
    """Where another process finds ``owner``, and of a class the names that are watched; None for what is part of a function."""
    if isinstance(owner, Own):
        where = _address(owner.kind)
        return None if where is None else (*where, *owner.names)
    if isinstance(owner, type):
        return owner.__module__, owner.__qualname__
    return (owner.get("__name__", ""), "") if type(owner) is dict else None


def is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(is_plain, value))
    return is_immutable(value) and not isinstance(value, type | enum.Enum | FunctionType | BuiltinFunctionType)


def _still(module: nn.Module, name: str, value: Any) -> bool:
    state = module.__dict__
    now = state.get(name, Absent)
    if now is Absent:
        now = children_of(module).get(name, Absent)
    if now is value:
        return True
    if value is Present or value is Foldable:
        return isinstance(now, nn.Module) or (value is Foldable and now is Absent and "forward" in state)
    return same(now.__func__ if type(now) is MethodType else now, value)


def _now(owner: Any, name: str) -> Any:
    if type(owner) is dict:
        return owner.get(name, Absent)
    try:
        return getattr(owner, name, Absent)
    except ValueError:  # an empty cell
        return Absent


@constant_to_dynamo  # by the name, which it guards on: torch 2.11 takes no object there
def shared_changed(name: str) -> bool:
    """Whether something that belongs to no module isn't as it was, of those which ``name`` watches."""
    return any_changed(_BY_NAME[name].shared.values())


def any_changed(shared: Iterable[tuple[Any, str, Any]]) -> bool:
    """The same of owners, names and values."""
    for owner, name, value in shared:
        now = _now(owner, name)
        if now is not value and not same(now, value):
            return True
    return False


class Level:
    """Whether a logger takes entries of a level, as something to be watched."""

    def __init__(self, logger: logging.Logger, level: int):
        self.logger, self.level = logger, level

    @property
    def enabled(self) -> bool:
        return self.logger.isEnabledFor(self.level)


def cell_of(cell: CellType) -> Any:
    return _now(cell, "cell_contents")


def in_class(kind: type, name: str) -> Any:
    """The attribute of the class, as its dictionary has it."""
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), Absent)


def has_own(module: nn.Module, name: str) -> bool:
    """Whether the module has an attribute of that name that PyTorch didn't give it."""
    if name in module.__dict__ or name in module._modules or name in module._parameters or name in module._buffers:
        return True
    return any(
        name in vars(base) and root_of(base.__module__) not in ("torch", "builtins") for base in type(module).__mro__
    )
