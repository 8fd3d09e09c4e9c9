"""Whether a forward looks at what its modules hold, beyond calling them: how many children there are, their names and classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import nn

from .allowed import is_strangers, root_of
from .swap import PACKAGE

TELLING = {"isinstance", "issubclass", "type", "set", "frozenset", "dict"}
"""Builtins that tell one class from another, or one module from another."""
COMPARING = {
    "is_",
    "is_not",
    "eq",
    "ne",
    "contains",
    "countOf",
    "indexOf",
    "index",
    "count",
    "remove",
    "__contains__",
    "Counter",
}
"""And functions and methods, of operator, lists, tuples and collections."""
COMPARISONS = {"IS_OP", "COMPARE_OP", "CONTAINS_OP", "BUILD_SET", "BUILD_MAP", "SET_ADD", "MAP_ADD", "SET_UPDATE"}
"""And instructions."""
_GETATTR = getattr(nn.Module.__getattr__, "__code__", None)


class Children(dict):
    """``_modules`` of a module, which calls ``looked`` when somebody's forward reads it other than by an attribute's name.

    PyTorch's own forwards read it as well, to run what it holds; that is no look.
    """

    def __init__(self, children: dict[str, nn.Module | None], looked: Callable[[str], None]):
        super().__init__(children)
        self.looked = looked

    def _tell(self) -> None:
        frame: FrameType | None = sys._getframe(2)
        if frame is not None and frame.f_code is _GETATTR:
            frame = frame.f_back
            if frame is not None and is_strangers(frame.f_globals.get("__name__")):
                return  # of a name that is watched
        how = "looks into"
        while frame is not None:
            name = frame.f_globals.get("__name__")
            if is_strangers(name):
                return self.looked(how)
            if root_of(name) == PACKAGE or frame.f_code.co_name == "forward":
                return None
            if frame.f_code.co_name == "__repr__":
                how = "prints"
            frame = frame.f_back
        return None


def _telling(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: Children, *args: Any) -> Any:
        self._tell()
        return plain(self, *args)

    return method


for _name in ("__len__", "__iter__", "__reversed__", "__contains__", "__getitem__", "__eq__", "__ne__", "__or__", "__ror__",
              "get", "keys", "values", "items", "copy"):  # fmt: skip
    setattr(Children, _name, _telling(_name))
