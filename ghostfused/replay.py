"""Inference on a fused module for next to no host time: its ops are recorded once and replayed as one.

Reading a module's layers afresh at every call, as forward does, and handing thirty arguments to the dispatcher takes
longer than the kernel of a small map runs. So what forward ran is kept as a ``program``, together with a copy of all that
it depended on: the attributes, children, parameters, buffers and hooks of every module inside. While that has not changed,
the next call runs the program. Values aren't copied: what is written into a parameter takes effect.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from . import adopt, ops, program
from .backends.common import KERNEL_DTYPES
from .spec import Args


class _Recorder(threading.local):
    calls: list[tuple[str, Args, Tensor]] | None = None
    """What ran since recording began: backend, arguments, result."""


_recorder = _Recorder()


def note(backend: str, args: Args, out: Tensor) -> None:
    """Tells whoever is recording that ``backend`` has made ``out`` of ``args``."""
    if not torch.compiler.is_compiling() and _recorder.calls is not None:
        _recorder.calls.append((backend, args, out))


@contextlib.contextmanager
def _recording(calls: list | None) -> Iterator[None]:
    before, _recorder.calls = _recorder.calls, calls
    try:
        yield
    finally:
        _recorder.calls = before


def unrecorded() -> contextlib.AbstractContextManager[None]:
    """Within, nothing is recorded: what runs there may do more than it computes."""
    return _recording(None)


class _Recording:
    """One module's program, and what it holds for.

    It belongs to the module and must not own it in turn: the memory of a model that is deleted should be free at once,
    not when Python next looks for cycles. So the module itself and its own dictionary aren't kept.
    """

    def __init__(self, module: nn.Module, x: Tensor, calls: list[tuple[str, Args, Tensor]], out: Tensor):
        modules = list(module.modules())
        self.place = x.dtype, x.device
        self.kind, self.attributes = type(module), _attributes(module)
        self.modules, self.kinds = modules[1:], list(map(type, modules[1:]))
        # the dictionaries in which modules keep all that they are; most are empty, and looked at faster
        states: list[dict] = [m.__dict__ for m in modules[1:]]
        for m in modules:
            states += m._parameters, m._buffers, m._modules, m._forward_hooks, m._forward_pre_hooks  # type: ignore[arg-type]
        self.empty, self.states = [d for d in states if not d], [d for d in states if d]
        self.seen = [d.copy() for d in self.states]
        self.op: Callable[..., Tensor]
        self.program: program.Program | None = None
        names = {backend for backend, _, _ in calls}
        watched = any(adopt.has_hooks(m) or "forward" in m.__dict__ for m in modules[1:])
        if len(names) == 1 and names <= {"cuda", "cpu"} and not watched and calls[-1][2] is out:
            tensors = {id(t) for m in modules for d in (m._parameters, m._buffers) for t in d.values()}
            self.program = program.encode([(args, result) for _, args, result in calls], x, tensors)
            self.op = ops.forward_op(names.pop(), "program")

    def holds(self, module: nn.Module, x: Tensor) -> bool:
        """Whether everything is as it was."""
        if self.place != (x.dtype, x.device) or type(module) is not self.kind:
            return False
        try:  # identical entries are equal, so the comparison goes on to ``==`` only for what has changed
            return (
                not any(self.empty)
                and self.states == self.seen
                and list(map(type, self.modules)) == self.kinds
                and _attributes(module) == self.attributes
            )
        except Exception:  # two tensors, say, whose ``==`` is no bool
            return False


def _attributes(module: nn.Module) -> dict:
    attributes = module.__dict__.copy()
    del attributes["_replay"]
    return attributes


def _may_replay(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and x.dtype in KERNEL_DTYPES
        and (x.is_cpu or x.is_cuda)
        and _recorder.calls is None
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled(x.device.type)
    )


class Replay:
    """A module's memory of its last forward without gradients. Copies and pickles of the module get an empty one."""

    def __init__(self) -> None:
        self._recording: _Recording | None = None

    def __reduce__(self) -> tuple:
        return Replay, ()

    def __call__(self, module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """``forward(x)``, ``module``'s: replayed where it can be."""
        if not _may_replay(x):
            return forward(x)
        known = self._recording
        if known is not None and known.holds(module, x):
            if known.program is None:
                return forward(x)
            try:
                return known.op(x, *known.program)
            except RuntimeError:  # an x that the kernels refuse: forward knows others, or says what is wrong
                return forward(x)
        calls: list[tuple[str, Args, Tensor]] = []
        with _recording(calls):
            out = forward(x)
        self._recording = _Recording(module, x, calls, out)
        return out
