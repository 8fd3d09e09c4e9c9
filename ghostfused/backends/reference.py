"""Plain PyTorch as a backend: runs everything, everywhere."""

from __future__ import annotations

from ..reference import ghost_module as forward
from ..spec import GhostArgs

__all__ = ["forward", "supports", "unavailable"]


def unavailable() -> str | None:
    return None


def supports(args: GhostArgs) -> str | None:
    return None
