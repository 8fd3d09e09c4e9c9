"""FusedNetwork: a whole model whose inference is one op, where all that it runs is."""

from __future__ import annotations

import copyreg
import functools
from typing import Any

import torch
from torch import Tensor, fx, nn

from .replay import NetworkReplay, Replayed


class FusedNetwork(Replayed):
    """What ``fuse`` adds to the model's own class: on a CPU, one call of one op stands for the whole forward
    (``replay``), with the stem, the pooling and the classifier in our kernels too.

    That is so for forwards of one tensor, without gradients, of ours and of PyTorch's convolutions with odd kernels,
    BatchNorm, activations, global pooling and fully connected layers. All others run as they are. Like
    ``torch.jit.trace``, it takes for granted that a forward depends on nothing but its module and its input's shape.
    """

    _replay: NetworkReplay

    def __reduce_ex__(self, protocol: Any) -> tuple:
        reduced: Any = super().__reduce_ex__(protocol)
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        return _new, (type(self).__bases__[1],), *reduced[2:]


@functools.cache
def _fused(kind: Any) -> Any:
    """``kind``, a module's class, as a FusedNetwork; the same at every call."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is Tensor and args[0].is_cpu:
            return self._replay(self, args[0], functools.partial(kind.forward, self))
        return kind.forward(self, *args, **kwargs)

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (FusedNetwork, kind), {"forward": forward, **names})


def _new(kind: Any) -> nn.Module:
    fused = _fused(kind)  # type: ignore[arg-type]
    return fused.__new__(fused)


def make_network(model: nn.Module) -> None:
    """Makes ``model`` a FusedNetwork, unless it is one or is more than its class's forward."""
    special = isinstance(model, FusedNetwork | fx.GraphModule | torch.jit.ScriptModule)
    if not special and "forward" not in model.__dict__:
        model.__dict__["_replay"] = NetworkReplay()
        model.__class__ = _fused(type(model))  # type: ignore[arg-type]


def unmake_network(model: nn.Module) -> None:
    """The reverse."""
    if isinstance(model, FusedNetwork):
        model.__class__ = type(model).__bases__[1]
        del model.__dict__["_replay"]
