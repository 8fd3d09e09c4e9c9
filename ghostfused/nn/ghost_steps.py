"""The steps of a bottleneck that are Ghost modules."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..ops.recording import note_others
from ..recognize.watch import ChildPath, get
from .ghost_module import FusedGhostModule


class Ghost(NamedTuple):
    """Where a fused Ghost module is."""

    path: ChildPath

    def __call__(self, root: nn.Module, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        module = get(root, self.path)
        if isinstance(module, FusedGhostModule) and module.takes_gates:
            return module(x, input_gate=gate, residual=residual)
        return Whole(self.path)(root, x, gate, residual)  # or another thread has just put the plain one back


class Whole(NamedTuple):
    """Where a module is that has a fused Ghost module inside, and does more than run it: a gate around it, say."""

    path: ChildPath

    def __call__(self, root: nn.Module, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        note_others()
        out = get(root, self.path)(x if gate is None else x * gate[:, :, None, None])
        return out if residual is None else out + residual
