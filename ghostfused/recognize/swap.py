"""A fused module that takes the place of somebody's: it shares all that module holds, and can give it back."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import nn

Fused = TypeVar("Fused", bound=nn.Module)
_DICTIONARIES = ("_parameters", "_buffers", "_modules")
PACKAGE = __name__.partition(".")[0]


def is_ours(module: nn.Module) -> bool:
    """Whether the class of ``module`` is this package's. A subclass that somebody made may run anything."""
    return type(module).__module__.partition(".")[0] == PACKAGE


class Original(NamedTuple):
    """What a fused module needs to become again what it was made from."""

    kind: type[nn.Module]
    overwritten: dict[str, Any]
    """Attributes of the original whose names the fused module uses itself."""
    added: tuple[str, ...]
    """Names of the fused module's own attributes."""


def make_twin(kind: type[Fused], module: nn.Module, **attributes: Any) -> Fused:
    """A ``kind`` that holds the very children, tensors, hooks and attributes of ``module``, and ``attributes``."""
    twin = kind.__new__(kind)
    # the hooks' dictionaries are shared, so that the handles users hold keep working
    twin.__dict__.update(module.__dict__)
    for name in _DICTIONARIES:
        twin.__dict__[name] = module.__dict__[name].copy()
    twin.__dict__.pop("_compiled_call_impl", None)  # module.compile() made it, for module's own forward
    overwritten = {name: module.__dict__[name] for name in attributes if name in module.__dict__}
    twin.__dict__.update(attributes)
    twin.__dict__["_original"] = Original(type(module), overwritten, tuple(attributes))
    return twin


def original(twin: nn.Module) -> nn.Module | None:
    """What ``twin`` was made from, with the tensors, flags and children that ``twin`` has now; None if it is no twin."""
    made_from: Original | None = twin.__dict__.get("_original")
    if made_from is None:
        return None
    module = made_from.kind.__new__(made_from.kind)
    module.__dict__.update(twin.__dict__)
    for name in _DICTIONARIES:
        module.__dict__[name] = twin.__dict__[name].copy()
    for name in (*made_from.added, "_original", "_compiled_call_impl"):
        module.__dict__.pop(name, None)
    module.__dict__.update(made_from.overwritten)
    return module
