"""Fused modules of which the original's forward isn't called as ``forward(x)`` alone: its input has another name, or there are
further arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, fx, nn

from ..ops.recording import note_others
from ..recognize.classes import call
from ..recognize.swap import Fused, original
from ..recognize.watch import Absent, Watched, is_plain, same
from .attention import FusedAttentionGhostModule
from .bottleneck import FusedConvNormAct, FusedGhostBottleneck
from .ghost_module import FusedGhostModule

_GATES = {"input_gate", "residual", "output_gate"}


class _Argument(NamedTuple):
    name: str
    kind: int
    """By ``inspect.Parameter``."""
    default: Any
    """``Absent`` where there is none that may be told from others."""


_ALL_BY_NAME = int(inspect.Parameter.VAR_KEYWORD)
_BY_PLACE = (int(inspect.Parameter.POSITIONAL_ONLY), int(inspect.Parameter.POSITIONAL_OR_KEYWORD))
_BY_NAME = (int(inspect.Parameter.POSITIONAL_OR_KEYWORD), int(inspect.Parameter.KEYWORD_ONLY))


def called_as(module: nn.Module, kind: type[Fused]) -> tuple[type[Fused], dict[str, Any]]:
    """The class of the twin of ``module``, ``kind`` or one of those below, and its attributes."""
    # of a decorated forward what the decorator takes: it is what runs
    parameters = inspect.signature(module.forward, follow_wrapped=False).parameters.values()
    plain = [(p.name, p.kind) for p in parameters] == [("x", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    if plain or kind not in _KINDS:
        return kind, {}
    arguments = [_Argument(p.name, int(p.kind), p.default if is_plain(p.default) else Absent) for p in parameters]
    return cast(type[Fused], _KINDS[kind]), {"_arguments": tuple(arguments)}


class CalledAsOriginal:
    """Takes the very arguments that the original takes; it runs fused where these are the input alone, or else those that are there
    by default. The original's forward runs of any others."""

    _arguments: tuple[_Argument, ...]
    _watched: Watched

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        # ``super().forward`` each time: of super() alone Dynamo makes nothing on Python 3.13
        if isinstance(args, fx.Proxy) or (len(args) == 1 and not kwargs):  # torch.fx hands its own in place of all args
            return super().forward(args[0])  # type: ignore[misc]
        if len(args) == 1 and kwargs.keys() <= _GATES and not self._takes(kwargs):
            return super().forward(args[0], **kwargs)  # type: ignore[misc]
        given = self._input_alone(args, kwargs)
        if given is None:
            note_others()
            return call(cast(nn.Module, original(cast(nn.Module, self))), *args, **kwargs)
        return super().forward(given[0])  # type: ignore[misc]

    @property
    def takes_gates(self) -> bool:
        """Whether what the fused module multiplies and adds can be given by its name, which means nothing else here."""
        return not self._takes(_GATES)

    def _takes(self, names: Iterable[str]) -> bool:
        return any(argument.name in names or argument.kind == _ALL_BY_NAME for argument in self._arguments)

    def _input_alone(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any] | None:
        """The input, if nothing else is given that isn't there by default."""
        first, *others = self._arguments
        by_place = [argument.name for argument in self._arguments if argument.kind in _BY_PLACE]
        by_name = {argument.name for argument in self._arguments if argument.kind in _BY_NAME}
        given = dict(zip(by_place, args, strict=False))
        if len(args) > len(by_place) or not kwargs.keys() <= by_name - given.keys():
            return None
        given.update(kwargs)
        if any(argument.name in given and not same(given[argument.name], argument.default) for argument in others):
            return None
        if self._watched.changed(cast(nn.Module, self)):  # the defaults may be others by now
            return None
        return (given[first.name],) if first.name in given else None

    def _get_name(self) -> str:
        return next(kind for kind, other in _KINDS.items() if other is type(self)).__name__


class _GhostModule(CalledAsOriginal, FusedGhostModule):  # type: ignore[override]
    """A FusedGhostModule that is called as the original is."""


class _AttentionGhostModule(CalledAsOriginal, FusedAttentionGhostModule):  # type: ignore[override]
    """A FusedAttentionGhostModule that is called as the original is."""


class _Bottleneck(CalledAsOriginal, FusedGhostBottleneck):
    """A FusedGhostBottleneck that is called as the original is."""


class _ConvNormAct(CalledAsOriginal, FusedConvNormAct):
    """A FusedConvNormAct that is called as the original is."""


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    FusedGhostModule: _GhostModule,
    FusedAttentionGhostModule: _AttentionGhostModule,
    FusedGhostBottleneck: _Bottleneck,
    FusedConvNormAct: _ConvNormAct,
}
