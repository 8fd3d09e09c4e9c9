"""Who listens to the ops that a forward runs: ``ops/autograd.py`` notes each, ``nn/cache.py`` records."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from ..spec import Step


class Recording:
    """What a forward has run: backend, arguments and result of each of our ops."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Step, Tensor]] = []
        self.void = False
        """Whether anything else has run that may have changed a tensor in place, or done more than compute."""


class _Recorder(threading.local):
    recording: Recording | None = None


_recorder = _Recorder()


def note(backend: str, args: Step, out: Tensor) -> None:
    """Tells whoever is recording that ``backend`` has made ``out`` of ``args``."""
    if not torch.compiler.is_compiling() and _recorder.recording is not None:
        _recorder.recording.calls.append((backend, args, out))


def note_others() -> None:
    """Tells whoever is recording that layers run which are no ops of ours."""
    if not torch.compiler.is_compiling() and _recorder.recording is not None:
        _recorder.recording.void = True


def is_recording() -> bool:
    """Whether somebody records in this thread."""
    return _recorder.recording is not None


@contextlib.contextmanager
def recording() -> Iterator[Recording]:
    """A Recording of what this thread runs meanwhile."""
    _recorder.recording = Recording()
    try:
        yield _recorder.recording
    finally:
        _recorder.recording = None
