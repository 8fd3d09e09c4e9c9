"""The same Triton code in two launches, x1 going through memory: the baseline that the single kernel has to beat."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..spec import Args, GhostArgs
from . import triton
from .triton import has_ghosts, launch, scratch, supports
from .triton_launch import DEVICES, register, unavailable

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


for _op in ops.OPS:
    register("triton_two_kernel", forward, _op)
