"""The planted faults. ``old`` must occur once in ``file``: code that moves breaks these tables, so they can't rot unseen."""

from __future__ import annotations

from . import bottleneck, general, nchw, nhwc, training, window
from .mutant import Mutant

MUTANTS: list[Mutant] = [
    *general.MUTANTS,
    *nhwc.MUTANTS,
    *nchw.MUTANTS,
    *window.MUTANTS,
    *bottleneck.MUTANTS,
    *training.MUTANTS,
]
