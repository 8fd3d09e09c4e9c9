"""ghostfused: GhostNet's Ghost module as one kernel, in CUDA C++ and in Triton.

``fuse(model)`` swaps the Ghost modules of a model, ``FusedGhostModule`` is one of them, ``ghost_module`` the function
under it. ``python -m ghostfused info`` says which backends work on this machine.
"""

from . import functional, models
from .capture import Captured, NotCaptured, capture, graphed, load
from .functional import ghost_module
from .fuse import fuse, fuse_with_report, unfuse
from .nn.attention import FusedAttentionGhostModule
from .nn.bottleneck import FusedGhostBottleneck
from .nn.ghost_module import FusedGhostModule
from .spec import Act, BatchNorm

__version__ = "0.2.0"
__all__ = [
    "Act",
    "BatchNorm",
    "Captured",
    "FusedAttentionGhostModule",
    "FusedGhostBottleneck",
    "FusedGhostModule",
    "NotCaptured",
    "capture",
    "functional",
    "fuse",
    "fuse_with_report",
    "ghost_module",
    "graphed",
    "load",
    "models",
    "unfuse",
]


def __dir__() -> list[str]:
    return __all__
