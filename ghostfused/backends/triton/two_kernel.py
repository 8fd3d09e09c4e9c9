"""The same Triton code in two launches, x1 going through memory: the baseline that the single kernel has to beat."""

from __future__ import annotations

from torch import Tensor

from ...spec import Args, GhostArgs
from .. import triton
from . import has_ghosts, launch, scratch, supports
from .launch import DEVICES, unavailable

__all__ = ["DEVICES", "forward", "supports", "unavailable"]


def forward(args: Args) -> Tensor:
    """Runs a Ghost module in two launches, neither with a halo, and the other ops as ``triton`` does."""
    if not isinstance(args, GhostArgs):
        return triton.forward(args)
    out = args.new_output()
    if out.numel():
        x1 = scratch(args, out)
        launch(args, out, x1, cheap=False)
        if has_ghosts(args):
            launch(args, out, x1, primary=False)
    return out
