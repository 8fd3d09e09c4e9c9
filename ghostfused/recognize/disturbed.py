"""torch.fx in another thread: while it traces, calls of all modules of the process are its own, and raise errors of its."""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from torch import fx, nn

P = ParamSpec("P")
R = TypeVar("R")
_TRACERS = fx._symbolic_trace.__file__
PATIENCE = 10.0
"""Seconds for which what has been disturbed is tried anew."""


class Disturbed(BaseException):
    """Another thread traced all the time. No ``except Exception`` takes it for an error of the module that is tried."""

    def __str__(self) -> str:
        return "torch.fx traces in another thread, and nn.Module.__call__ is its own meanwhile: expected it to end within 10 s"


@contextlib.contextmanager
def named(function: str) -> Iterator[None]:
    """Tells users of ``Disturbed`` by an error that they may catch."""
    try:
        yield
    except Disturbed as disturbed:
        raise RuntimeError(f"{function}: {disturbed}") from disturbed


class _ByATracer(BaseException):
    """An error of another thread's tracer."""


def refuse_another_tracer(error: Exception) -> None:
    """Raises if torch.fx's tracer, which nothing of ours runs, is where the error comes from."""
    if any(frame.filename == _TRACERS for frame in traceback.extract_tb(error.__traceback__)):
        raise _ByATracer from error


def undisturbed(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, tried anew where another thread's tracer has disturbed it."""

    @functools.wraps(function)
    def tried(*args: P.args, **kwargs: P.kwargs) -> R:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    refuse_another_tracer(error)
                    raise
            except _ByATracer as error:
                if time.monotonic() > end:
                    raise Disturbed from error.__cause__
            while (
                getattr(nn.Module.__call__, "__module__", "") == fx._symbolic_trace.__name__ and time.monotonic() < end
            ):
                time.sleep(1e-3)

    return tried
