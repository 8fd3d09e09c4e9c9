"""FusedSequential: fused modules that run one after the other, as one op."""

from __future__ import annotations

from torch import Tensor, nn

from .attention import FusedAttentionGhostModule
from .bottleneck import FusedConvNormAct, FusedGhostBottleneck
from .module import FusedGhostModule
from .replay import Replay, Replayed
from .twin import make_twin


class FusedSequential(Replayed, nn.Sequential):
    """An ``nn.Sequential`` of fused modules, for which inference needs one call of one op (``replay``). Made by ``fuse``."""

    @classmethod
    def of(cls, sequential: nn.Sequential) -> FusedSequential:
        """The twin of ``sequential``, with its very children."""
        return make_twin(cls, sequential, _replay=Replay())

    def forward(self, x: Tensor) -> Tensor:
        """The modules of x, one after the other."""
        return self._replay(self, x, super().forward)


def is_recordable(module: nn.Module) -> bool:
    """Whether in inference ``module`` runs our ops and nothing else."""
    if isinstance(module, FusedGhostBottleneck | FusedConvNormAct):
        if any(run.kind(module) is None for run in module.runs()):
            return False
    elif not isinstance(module, FusedGhostModule):
        return False
    return not any(isinstance(m, FusedAttentionGhostModule) for m in module.modules())
