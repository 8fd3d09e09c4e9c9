"""What a FusedGhostModule is built of, by its arguments."""

from __future__ import annotations

from torch import nn

from .. import backends
from ..spec import Act
from ..spec.activations import BY_MODULE, BY_NAME, TABLE


class ConvNormAct(nn.Sequential):
    """conv, bn and act under these names."""


def activation(name: str, act: str | Act | nn.Module, channels: int, to: dict) -> nn.Module:
    """The activation module for ``act``; ``name`` is the argument's, for errors."""
    if isinstance(act, nn.Module):
        if type(act) not in BY_MODULE and not isinstance(act, nn.Identity):
            raise ValueError(
                f"{name}: expected a module among {sorted(k.__name__ for k in BY_MODULE)}, got {type(act).__name__}"
            )
        if isinstance(act, nn.PReLU) and act.num_parameters not in (1, channels):
            raise ValueError(f"{name}: expected a PReLU of 1 or {channels} parameters, got {act.num_parameters}")
        return act
    try:
        kind = BY_NAME[act.lower()] if isinstance(act, str) else Act(act)
    except (KeyError, ValueError):
        raise ValueError(f"{name}: expected one of {[*BY_NAME]} or a module, got {act!r}") from None
    if kind == Act.NONE:
        return nn.Sequential()
    if kind == Act.PRELU:
        return nn.PReLU(**to)
    if kind in (Act.RELU, Act.RELU6):
        return TABLE[kind].module(inplace=True)
    return TABLE[kind].module()


def check_int(name: str, value: int, least: int, hint: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}{hint}")


def check_backend(backend: str) -> None:
    if backend != "auto" and backend not in backends.BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(backends.BACKENDS)}, got {backend!r}")
