"""Plain PyTorch as a backend: runs everything, everywhere."""

from __future__ import annotations

from ..reference import run as forward
from ..spec import Args

__all__ = ["DEVICES", "forward", "supports", "unavailable"]

DEVICES = None


def unavailable() -> str | None:
    return None


def supports(args: Args) -> str | None:
    return None
