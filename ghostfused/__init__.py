"""ghostfused: GhostNet's Ghost module as one kernel."""

from . import functional
from .functional import ghost_module
from .spec import Act, BatchNorm

__version__ = "0.1.0"
__all__ = ["Act", "BatchNorm", "functional", "ghost_module"]
