"""What a forward may load: all else leaves it unfused."""

from __future__ import annotations

import builtins
import collections
import enum
import functools
import itertools
import logging
import math
import operator
import sys
import typing

import torch
from torch import nn

from .swap import PACKAGE

_MODELS = f"{PACKAGE}.models"
PURE = {math, operator, itertools, functools, collections, typing, builtins, enum}
"""Modules whose functions depend on their arguments alone."""
BUILTINS = {
    "abs", "all", "any", "bool", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "int", "isinstance", "issubclass",
    "iter", "len", "list", "map", "max", "min", "next", "pow", "range", "reversed", "round", "set", "slice", "sorted", "str", "sum",
    "super", "tuple", "zip", "NotImplementedError", "AssertionError", "Exception", "RuntimeError", "TypeError", "ValueError",
}  # fmt: skip
BY_NAME = {"getattr", "hasattr"}
OF_EVERY_MODULE = set(nn.Module().__dict__) | {"__dict__", "__slots__", "__getattr__", "__getattribute__"}
MODULE_METHODS = {
    "forward",
    "__call__",
    "children",
    "named_children",
    "modules",
    "named_modules",
    "get_submodule",
    "_modules",
}
NORM = nn.modules.batchnorm._NormBase
CONSTANTS_OF_CLASSES = {"__name__", "__qualname__", "__module__", "__doc__"}


UNSTEADY = {
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
HARMLESS = {("torchvision.utils", "_log_api_usage_once")}
"""Functions that count calls for their makers."""
LEVELS = {name: getattr(logging, name.upper()) for name in ("debug", "info", "warning", "error", "critical")}


@functools.cache
def on_tensors() -> frozenset:
    """PyTorch's functions of tensors: with a traced one, they are steps of its graph."""
    listed = {f for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    return frozenset(listed | {torch.jit.is_scripting, torch.jit.is_tracing})


def root_of(name: str | None) -> str:
    return (name or "").partition(".")[0]


def is_strangers(name: str | None) -> bool:
    """Whether the code of the Python module of that name is looked into."""
    root = root_of(name)
    if root == PACKAGE:
        return name == _MODELS or str(name).startswith(f"{_MODELS}.")
    # collections.namedtuple's: torch.fx makes one where a forward unpacks a size
    made = root.startswith("namedtuple_")
    return root != "torch" and not made and root not in sys.stdlib_module_names - {"__main__"}
