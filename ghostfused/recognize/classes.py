"""What a class defines in place of ``nn.Module``'s ways, now or later: how its modules are called, and how attributes are found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")
_WAYS = (*CALLS, "__getattr__", "__getattribute__")


class Own:
    """What one class itself defines of these names, as something to be watched. What ``nn.Module`` has doesn't count: torch.fx
    and torch.export patch that while they trace."""

    NAME = "defined"

    def __init__(self, kind: type):
        self._kind = weakref.ref(kind)  # even the view that vars gives would keep the class
        self.names = dict.fromkeys(_WAYS)
        """And those of children, which an attribute of the class would hide."""

    @property
    def kind(self) -> type | None:
        return self._kind()

    @property
    def defined(self) -> tuple:
        has = self._kind().__dict__  # type: ignore[union-attr]  # who watches has the class
        return tuple([(name, has[name]) for name in self.names if name in has])

    def dictionary(self) -> dict:
        """All that the class defines: the very dictionary."""
        return gc.get_referents(vars(self._kind()))[0]  # behind the view


_OF: weakref.WeakKeyDictionary[type, Own] = weakref.WeakKeyDictionary()


def of_bases(kind: type, names: Iterable[str] = ()) -> list[Own]:
    """Those of ``kind`` and its bases below ``nn.Module``, which also tell of ``names`` from now on."""
    found = []
    for base in kind.__mro__:
        if base in nn.Module.__mro__:
            continue
        own = _OF.get(base)
        if own is None:
            own = _OF[base] = Own(base)
        own.names.update(dict.fromkeys(name for name in names if name not in vars(base)))
        found.append(own)
    return found


def calls_by_itself(kind: type[nn.Module]) -> bool:
    """Whether calling a module of ``kind`` isn't what it is of ``nn.Module``."""
    return any(name in vars(base) for base in kind.__mro__ if base not in nn.Module.__mro__ for name in CALLS)


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``module.forward``, or where its class has another call that, without hooks, which run around this."""
    if not calls_by_itself(type(module)):
        return module.forward(*args, **kwargs)
    for name, value in module.__dict__.items():
        if "hooks" in name and isinstance(value, dict):
            module.__dict__[name] = type(value)()
    return module(*args, **kwargs)
