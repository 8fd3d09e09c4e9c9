"""What a forward depends on beside its input, its tensors and its children: found in its code, before a fused module leaps over it.

A fused module runs in place of somebody's forward, once it was seen to compute the same. If that forward reads a flag, a dict, a
global or the clock, it may compute something else later. Plain values of attributes are *watched*: where one has changed, the
original forward runs. A forward that reads what can't be watched, or that changes an attribute, is left unfused.
"""

from __future__ import annotations

import dis
import enum
import functools
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from .swap import PACKAGE

Path = tuple[str, ...]
Reads = dict[Path, dict[str, Any]]
"""By the path of each module that is leapt over: the values of the attributes that its forward reads."""

_LIBRARIES = {
    "torch",
    "math",
    "typing",
    "functools",
    "operator",
    "itertools",
    "collections",
    "builtins",
    "timm",
    "ultralytics",
}
"""Roots of modules whose functions depend on their arguments alone, or are ours to trust as PyTorch's are."""
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, type, enum.Enum, torch.dtype, torch.device, torch.Size,
              torch.memory_format, FunctionType, BuiltinFunctionType)  # fmt: skip
_OF_EVERY_MODULE = set(nn.Module().__dict__)
"""``training``, for whose two values a fused module is tried, and where a module keeps its children, tensors and hooks."""

_NORM = nn.modules.batchnorm._NormBase
_OF_A_NORM = {"eps", "momentum", "track_running_stats", "affine", "num_features"}
"""A fused module reads a norm's settings afresh."""


class _Names(NamedTuple):
    """What a function's code names."""

    globals: frozenset[str]
    attributes: frozenset[str]
    changed: frozenset[str]
    """Attributes and globals that it sets or deletes."""


@functools.cache
def _names(code: CodeType) -> _Names:
    globals_, attributes, changed = set(), set(), set()
    for instruction in dis.get_instructions(code):
        name = instruction.opname
        if name.startswith(("STORE_ATTR", "STORE_GLOBAL", "DELETE_ATTR", "DELETE_GLOBAL")):
            changed.add(instruction.argval)
        elif name.startswith("LOAD_GLOBAL") or name == "LOAD_NAME":
            globals_.add(instruction.argval)
        elif name.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER")):
            attributes.add(instruction.argval)
        elif isinstance(instruction.argval, CodeType):
            inner = _names(instruction.argval)
            globals_ |= inner.globals
            attributes |= inner.attributes
            changed |= inner.changed
    return _Names(frozenset(globals_), frozenset(attributes), frozenset(changed))


def reads(module: nn.Module) -> Reads | str:
    """The attributes that the forwards of ``module`` and of all inside it read; or what one depends on that can't be watched.

    Modules of PyTorch's and of ours depend on nothing else, and are not looked into.
    """
    found: Reads = {}
    for path, each in _strangers(module, ()):
        own = _Reader(each).read()
        if isinstance(own, str):
            return f"{type(each).__name__}.forward {own}"
        if own:
            found[path] = own
    return found


def _strangers(module: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    ours = any(base.__module__.partition(".")[0] == PACKAGE for base in type(module).__mro__)
    if ours and "backend" in module.__dict__:
        return  # a fused one, or somebody's subclass of one: nobody leaps over its forward
    if type(module).__module__.partition(".")[0] not in ("torch", PACKAGE):
        yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _strangers(child, (*path, name))


def changed(module: nn.Module, found: Reads, get: Callable[[nn.Module, Path], nn.Module]) -> bool:
    """Whether an attribute has another value than in ``found``, or is gone."""
    for path, values in found.items():
        attributes = get(module, path).__dict__
        for name, value in values.items():
            now = attributes.get(name, _GONE)
            if now is not value and (type(now) is not type(value) or now != value):
                return True
    return False


_GONE = object()


class _Reader:
    """Goes through the functions that one module's forward calls, as far as their code tells."""

    def __init__(self, module: nn.Module):
        self.module, self.kind = module, type(module)
        self.values: dict[str, Any] = {}
        self.seen: set[int] = set()

    def read(self) -> dict[str, Any] | str:
        """The attributes that it reads, by name; or what it does that can't be watched."""
        return self._function(self.kind.forward) or self.values

    def _function(self, function: Any) -> str | None:
        if isinstance(function, MethodType):
            function = function.__func__
        if not isinstance(function, FunctionType) or id(function) in self.seen:
            return None
        self.seen.add(id(function))
        names = _names(function.__code__)
        if names.changed:
            return f"changes {', '.join(sorted(names.changed))}"
        modules: list[ModuleType] = []
        for name in sorted(names.globals):
            value = function.__globals__.get(name, _GONE)
            if isinstance(value, ModuleType) and not _is_library(value.__name__):
                modules.append(value)
            elif value is not _GONE and (reason := self._value(value, f"the global {name}")):
                return reason
        for cell in function.__closure__ or ():
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            if value is not self.kind and (reason := self._value(value, "a variable of the function around it")):
                return reason
        for name in sorted(names.attributes):
            if reason := self._attribute(name):
                return reason
        return self._of_modules(modules, names.attributes)

    def _value(self, value: Any, what: str) -> str | None:
        """Whatever a global or a closure holds."""
        if isinstance(value, type) or (isinstance(value, ModuleType) and _is_library(value.__name__)):
            return None
        if not callable(value) or isinstance(value, nn.Module):
            return f"reads {what}"
        return None if _is_library(getattr(value, "__module__", None)) else self._function(value)

    def _attribute(self, name: str) -> str | None:
        """One of that name of the module, if there is one; the name may be of something else."""
        if name in _OF_EVERY_MODULE or name in self.values or (name in _OF_A_NORM and isinstance(self.module, _NORM)):
            return None
        if name in self.module.__dict__:
            value = self.module.__dict__[name]
            if not _is_immutable(value):
                return f"reads its attribute {name}, a {type(value).__name__}, whose contents may change"
            self.values[name] = value
            return self._function(value) if not _is_library(getattr(value, "__module__", None)) else None
        for base in self.kind.__mro__:  # all that have it: super() may mean any of them
            theirs = name in vars(base) and base.__module__.partition(".")[0] not in ("torch", "builtins")
            if theirs and (reason := self._of_class(name, vars(base)[name])):
                return reason
        return None

    def _of_class(self, name: str, value: Any) -> str | None:
        for function in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
            if isinstance(function, FunctionType):
                return self._function(function)
        return None if isinstance(value, type) else f"reads the class's attribute {name}"

    def _of_modules(self, modules: list[ModuleType], attributes: frozenset[str]) -> str | None:
        """What the code reads of Python modules that are no library's."""
        for module in modules:
            if module.__name__.partition(".")[0] in _UNSTEADY:
                return f"uses the module {module.__name__}"
            for name in sorted(attributes & vars(module).keys()):
                value = vars(module)[name]
                if isinstance(value, ModuleType):
                    continue
                if reason := self._value(value, f"{module.__name__}.{name}"):
                    return reason
        return None


_UNSTEADY = {
    "random",
    "time",
    "datetime",
    "os",
    "sys",
    "secrets",
    "uuid",
    "threading",
    "numpy",
    "socket",
    "io",
    "pathlib",
}
"""Python modules whose functions give something else at every call, or do more than compute."""


def _is_library(name: str | None) -> bool:
    return name is not None and name.partition(".")[0] in (*_LIBRARIES, PACKAGE)


def _is_immutable(value: Any) -> bool:
    return all(map(_is_immutable, value)) if type(value) is tuple else isinstance(value, _IMMUTABLE)
