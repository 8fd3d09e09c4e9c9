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
from typing import Any

import torch
from torch import Tensor, nn

from . import adopt, ops, program
from .backends import BACKENDS, cpu, cuda
from .backends.common import KERNEL_DTYPES
from .listen import Listener
from .spec import Step, memory_format
from .testing import relative_error


class _Recorder(threading.local):
    listener: Listener | None = None


_recorder = _Recorder()


def note(backend: str, args: Step, out: Tensor) -> None:
    """Tells whoever is recording that ``backend`` has made ``out`` of ``args``."""
    if _recorder.listener is not None and not torch.compiler.is_compiling():
        _recorder.listener.note(backend, args, out)


@contextlib.contextmanager
def _recording(listener: Listener | None) -> Iterator[None]:
    before, _recorder.listener = _recorder.listener, listener
    try:
        with listener or contextlib.nullcontext():
            yield
    finally:
        _recorder.listener = before


def unrecorded() -> contextlib.AbstractContextManager[None]:
    """Within, nothing is recorded, and nothing around it: what runs there may do more than it computes."""
    if _recorder.listener is not None:
        _recorder.listener.lost = True
    return _recording(None)


class _State:
    """All that a module's forward depends on but its input, and the programs that hold for it.

    It belongs to the module and must not own it in turn: the memory of a model that is deleted should be free at once,
    not when Python next looks for cycles. So the module itself and its own dictionary aren't kept.
    """

    def __init__(self, module: nn.Module):
        modules = list(module.modules())
        self.kind, self.attributes = type(module), _attributes(module)
        self.modules, self.kinds = modules[1:], list(map(type, modules[1:]))
        # the dictionaries in which modules keep all that they are
        self.states: list[dict] = [m.__dict__ for m in modules[1:]]
        for m in modules:
            self.states += m._parameters, m._buffers, m._modules, m._forward_hooks, m._forward_pre_hooks  # type: ignore[arg-type]
        self.seen = [d.copy() for d in self.states]
        extension = cpu.extension.module or cuda.extension.module
        self.guard = extension.Guard(self.states, self.modules) if extension else None
        self.watched = any(adopt.has_hooks(m) or "forward" in m.__dict__ for m in modules[1:])
        self.programs: dict[tuple, ops.KeptProgram | None] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        if type(module) is not self.kind:
            return False
        try:  # identical entries are equal, so the comparison goes on to ``==`` only for what has changed
            inside = self.guard.holds() if self.guard else self._inside_holds()
            return inside and _attributes(module) == self.attributes
        except Exception:  # two tensors, say, whose ``==`` is no bool
            return False

    def _inside_holds(self) -> bool:
        """As ``guard``, where there is no extension, in several times its time."""
        return self.states == self.seen and list(map(type, self.modules)) == self.kinds


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
        and _recorder.listener is None
        and torch._C._get_tracing_state() is None
        and not torch.is_autocast_enabled(x.device.type)
        and not nn.modules.module._has_any_global_hook()  # those see every module's call
    )


_MOST_PROGRAMS = 32
"""Programs kept of one module, for as many kinds of input."""
_MOST_MISSES = 64
"""Recordings in a row of which none was replayed, after which a module is left alone: it changes with every call."""


class Replay:
    """A module's memory of its forwards without gradients. Copies and pickles of the module get an empty one."""

    translate = False

    def __init__(self) -> None:
        self._state: _State | None = None
        self._misses = 0

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __call__(self, module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """``forward(x)``, ``module``'s: replayed where it can be."""
        if not _may_replay(x):
            return forward(x)
        state, kind = self._state, self._kind(x)
        if state is not None and kind in state.programs and state.holds(module):
            self._misses = 0
            known = state.programs[kind]
            try:
                return forward(x) if known is None else known(x)
            except RuntimeError:  # an x that the kernels refuse: forward knows others, or says what is wrong
                return forward(x)
        if self._misses >= _MOST_MISSES:
            return forward(x)
        self._misses += 1
        if state is None or not state.holds(module) or len(state.programs) >= _MOST_PROGRAMS:
            state = _State(module)
        listener = Listener(self.translate)
        with _recording(listener):
            out = forward(x)
        if not state.holds(module):  # forward itself changes it
            return out
        self._state = state
        known = None if state.watched or not listener.result(out) else _encode(module, x, listener)
        return self._remember(state, kind, known, x, out)

    def forget(self) -> None:
        """Lets go of all that is remembered."""
        self._state = None

    def _kind(self, x: Tensor) -> tuple:
        """What of x a program depends on: our modules are the same for all sizes."""
        return x.dtype, x.device, x.is_cuda and torch.backends.cuda.matmul.fp32_precision

    def _remember(self, state: _State, kind: tuple, known: ops.KeptProgram | None, x: Tensor, out: Tensor) -> Tensor:
        """Returns ``out``, or what will come in its place."""
        state.programs[kind] = known
        return out


class NetworkReplay(Replay):
    """That of a whole network, somebody's own forward, with layers that our steps stand for.

    It may look at x's shape, so that each has a program of its own, which is tried beside the forward first.
    """

    translate = True

    def _kind(self, x: Tensor) -> tuple:
        return x.dtype, x.device, x.shape, memory_format(x) if x.dim() == 4 else None

    def _remember(self, state: _State, kind: tuple, known: ops.KeptProgram | None, x: Tensor, out: Tensor) -> Tensor:
        if known is not None:
            if not out.isfinite().all():  # tells nothing
                return out
            try:
                replayed = known(x)
            except RuntimeError:  # a layer that the kernels refuse
                replayed = None
            if replayed is not None and relative_error(replayed, out) < _SAME[x.dtype]:
                out = replayed
            else:
                known = None
        return super()._remember(state, kind, known, x, out)


class Replayed:
    """The module of a Replay. A kept program shares the module's tensors, and ``torch.utils.swap_tensors``, by which
    PyTorch may convert or load them (``torch.__future__.set_swap_module_params_on_conversion``), wants each for itself."""

    _replay: Replay

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._replay.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As that of ``nn.Module``."""
        self._replay.forget()
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]


_SAME = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
"""How far two ways of computing a network may differ, relative to the largest output: ten times what their rounding makes."""


def _encode(module: nn.Module, x: Tensor, listener: Listener) -> ops.KeptProgram | None:
    """What ``listener`` heard, if all of it ran on one backend that has programs."""
    names = {backend for backend, _, _ in listener.calls}
    if len(names) != 1 or not names <= {"cuda", "cpu"}:
        return None
    tensors = {id(t) for m in module.modules() for d in (m._parameters, m._buffers) for t in d.values()}
    found = program.encode([(args, result) for _, args, result in listener.calls], x, tensors)
    name = names.pop()
    return found and ops.KeptProgram(name, found, BACKENDS[name].extension.module.drop_program)
