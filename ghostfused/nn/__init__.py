"""The fused modules, each an ``nn.Module`` with the original's children."""

from .attention import FusedAttentionGhostModule
from .bottleneck import FusedConvNormAct, FusedGhostBottleneck
from .ghost_module import FusedGhostModule
from .sequential import FusedSequential

__all__ = [
    "FusedAttentionGhostModule",
    "FusedConvNormAct",
    "FusedGhostBottleneck",
    "FusedGhostModule",
    "FusedSequential",
]
