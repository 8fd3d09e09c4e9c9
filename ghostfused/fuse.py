"""``fuse(model)``: swaps the Ghost modules of a model that somebody already has for fused ones."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn

from . import adopt
from .module import FusedGhostModule


class Swap(NamedTuple):
    """What ``fuse`` did with one Ghost module."""

    fqn: str
    """Fully qualified name in the model; empty for the model itself."""
    fused: bool
    reason: str | None
    """Why it was left as it was."""


def fuse(model: nn.Module, *, inplace: bool = False, backend: str = "auto") -> nn.Module:
    """``model`` with every Ghost module that can be swapped for a ``FusedGhostModule``; parameters, state_dict keys,
    hooks and training flags stay.

    Args:
        model: any module; Ghost modules are found by structure and by what they compute (``adopt``), not by name.
        inplace: change ``model`` itself, sharing its parameters, rather than a deep copy.
        backend: what the fused modules run on, "auto" or a backend's name.
    """
    return fuse_with_report(model, inplace=inplace, backend=backend)[0]


def fuse_with_report(model: nn.Module, *, inplace: bool = False, backend: str = "auto") -> tuple[nn.Module, list[Swap]]:
    """As ``fuse``; also says what became of each module that reads as a Ghost module."""
    if not inplace:
        model = copy.deepcopy(model)
    report = []
    swapped: dict[nn.Module, nn.Module] = {}  # a module that occurs twice is swapped for one fused module
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FusedGhostModule) or isinstance(adopt.read(module), str):
            continue
        try:
            fused = swapped.get(module) or FusedGhostModule.from_module(module, backend=backend)
        except ValueError as error:
            report.append(Swap(fqn, False, str(error)))
            continue
        swapped[module] = fused
        report.append(Swap(fqn, True, None))
        if not fqn:
            return fused, report
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, fused)
    return model, report
