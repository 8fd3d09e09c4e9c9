"""The Triton kernel as a backend."""

from __future__ import annotations

from torch import Tensor

from ..spec import GhostArgs


def unavailable() -> str | None:
    return "not written yet"


def supports(args: GhostArgs) -> str | None:
    return unavailable()


def forward(args: GhostArgs) -> Tensor:
    raise NotImplementedError
