"""Inference on a fused module for next to no host time: its ops are recorded once and replayed as one.

Reading a module's layers afresh at every call, as forward does, and handing thirty arguments to the dispatcher takes
longer than the kernel of a small map runs. So what forward ran is kept as a ``program``, together with a copy of all that
it depended on: the attributes, children, parameters, buffers and hooks of every module inside. While that has not changed,
the next call runs the program. Values aren't copied: what is written into a parameter takes effect.

Only forwards of this package are recorded, of which that copy is all they depend on; somebody else's forward runs as it is.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
import weakref
from collections.abc import Callable
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import BACKENDS
from ..ops import KeptProgram, encoding
from ..ops.recording import Recording, is_recording, recording
from ..ops.transforms import undisturbed
from ..recognize.classes import Own
from ..recognize.swap import is_ours, original
from ..recognize.watch import CALLED, Absent, Watched, any_changed, has_hooks, hides_any, same
from ..spec.subclasses import OWN_KINDS
from ..spec.takes import COMMON


class _State:
    """All that a module's forward depends on but its input, and the programs that hold for it.

    It belongs to the module and must not own it in turn: the memory of a model that is deleted should be free at once,
    not when Python next looks for cycles. So the module itself and its own dictionary aren't kept.
    """

    def __init__(self, module: nn.Module, extension: Any):
        modules = list(module.modules())
        self.kind, self.attributes = type(module), _attributes(module)
        self.modules = modules[1:]
        # the dictionaries in which modules keep all that they are
        self.states: list[dict] = [m.__dict__ for m in modules[1:]]
        for m in modules:
            self.states += m._parameters, m._buffers, m._modules, m._forward_hooks, m._forward_pre_hooks  # type: ignore[arg-type]
        self.shared: dict = {}
        for m in modules:
            if isinstance(watched_by_it := m.__dict__.get("_watched"), Watched):
                self.shared.update(watched_by_it.shared)
        owns = {key: owner for key, (owner, _, _) in self.shared.items() if isinstance(owner, Own)}
        for key, own in owns.items():  # as dictionaries these cost next to nothing
            del self.shared[key]
            self.states.append(own.dictionary())
        self.weights = [p for m in modules for p in m._parameters.values() if p is not None and p.dim() == 4]
        self.sizes = [p.numel() for p in self.weights]
        self.seen = [d.copy() for d in self.states]  # the guard borrows what is in them
        self.guard = extension.Guard(module, self.states, self.modules, list(self.shared.values()), Absent)
        watched = any(has_hooks(m) or hides_any(m, CALLED) for m in modules[1:])
        # a class of somebody's tensors may take operations later
        theirs = any(type(t) not in OWN_KINDS for m in modules for d in (m._parameters, m._buffers) for t in d.values())
        self.recordable = not watched and not theirs and is_recordable(module)
        self.programs: dict[tuple, KeptProgram | None] = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether everything is as it was."""
        try:
            return self.guard.holds(module) or (  # an equal object may be in the place of another
                type(module) is self.kind
                and self.guard.dicts_hold()
                and _same_attributes(_attributes(module), self.attributes)
                and not any_changed(self.shared.values())
            )
        except Exception:  # two tensors, say, whose ``==`` is no bool
            return False

    def resized(self) -> bool:
        """Whether a weight has another kernel size by now, by its ``.data``: a program refuses to run then."""
        return [p.numel() for p in self.weights] != self.sizes


def _same_attributes(now: dict, then: dict) -> bool:
    return now.keys() == then.keys() and all(
        value is then[name] or same(value, then[name]) for name, value in now.items()
    )


def _attributes(module: nn.Module) -> dict:
    attributes = module.__dict__.copy()
    del attributes["_cache"]
    return attributes


_CALL = nn.Module.__call__


def may_replay(x: Tensor) -> bool:
    """Whether a forward on x may be recorded, or replayed if it has been."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not torch.is_grad_enabled()
        and x.dtype in COMMON.dtypes
        and (x.is_cpu or x.is_cuda)
        and not is_recording()
        and undisturbed()
        and not torch.is_autocast_enabled(x.device.type)
        # these see every module's call
        and not nn.modules.module._has_any_global_hook()
        and nn.Module.__call__ is _CALL
    )


def _kind(x: Tensor) -> tuple:
    """What of x and of PyTorch's settings a program depends on: it is the same for all sizes."""
    return x.dtype, x.device, x.is_cuda and torch.backends.cuda.matmul.fp32_precision


_MOST_PROGRAMS = 32
"""Programs kept of one module, for as many kinds of input."""
_MOST_MISSES = 64
"""Recordings in a row of which none was replayed, after which a module is left alone: it changes with every call."""


class ProgramCache:
    """A module's memory of its forwards without gradients. Copies and pickles of the module get an empty one."""

    def __init__(self) -> None:
        self._state: _State | None = None
        self._misses = 0
        self._around: tuple[weakref.ref[ProgramCache], ...] = ()
        """The caches of modules around this one, whose programs have its tensors as well."""

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __call__(self, module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """``forward(x)``, ``module``'s, of an x that ``may_replay`` takes: replayed if nothing has changed."""
        state, kind = self._state, _kind(x)
        if state is None or kind not in state.programs or not state.holds(module):
            return self._record(state, kind, module, x, forward)
        self._misses = 0
        known = state.programs.get(kind)
        if known is not None:
            try:
                return known(x)
            except RuntimeError:  # an x that the kernels refuse: forward knows others, or says what is wrong
                if state.resized():
                    return self._record(None, kind, module, x, forward)
        return forward(x)

    def forget(self) -> None:
        """Lets go of all that is remembered, also by modules around this one."""
        self._state = None
        for reference in self._around:
            if around := reference():
                around._state = None

    def _record(
        self, state: _State | None, kind: tuple, module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        extension = BACKENDS[x.device.type].extension.module
        if self._misses >= _MOST_MISSES or extension is None:
            return forward(x)
        self._misses += 1
        with contextlib.suppress(Exception):  # a module too odd to be remembered still runs
            if state is None or not state.holds(module):
                state = _State(module, extension)
        with recording() as recorded:
            out = forward(x)
        with contextlib.suppress(Exception):
            if state is not None and state.holds(module):  # else forward itself changes it
                state.programs[kind] = _encode(module, x, recorded, out) if state.recordable else None
                while len(state.programs) > _MOST_PROGRAMS:
                    del state.programs[next(iter(state.programs))]
                for inner in state.modules:
                    if isinstance(inner, CachesPrograms):
                        inner._cache._is_inside(self)
                self._state = state
        return out

    def _is_inside(self, around: ProgramCache) -> None:
        if all(reference() is not around for reference in self._around):
            alive = (reference for reference in self._around if reference() is not None)
            self._around = (*alive, weakref.ref(around))


class CachesPrograms:
    """The module of a ProgramCache. A kept program shares the module's tensors, and ``torch.utils.swap_tensors``, by which
    PyTorch may convert or load them (``torch.__future__.set_swap_module_params_on_conversion``), wants each for itself."""

    _cache: ProgramCache

    def runs_our_ops(self) -> bool:
        """Whether in inference its forward runs our ops and nothing else."""
        return True

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` compiles in place of this, and puts in its place."""
        module: Any = self
        if not is_ours(module):
            return module
        warnings.warn(
            "torch.jit.script: the fused modules of the model that it is given become unfused ones; "
            "script copy.deepcopy(model) to keep them",
            stacklevel=2,
        )
        plain = original(module)
        return self.unfused() if plain is None else plain

    def unfused(self) -> nn.Module:
        """The plain module of the same children, where this was made from none."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: Any) -> None:
        made_from = self.__dict__.get("_original")
        # a property that can be set is one of the class that this was made from; what lies in slots is that class's alone
        descriptor = None if made_from is None else inspect.getattr_static(made_from.kind, name, None)
        if hasattr(type(descriptor), "__set__") and not isinstance(descriptor, MemberDescriptorType):
            descriptor.__set__(self, value)  # type: ignore[union-attr]
        else:
            super().__setattr__(name, value)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache.forget()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # also where a module around this one loads, and before those inside it do
        self._cache.forget()
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]


def is_recordable(module: nn.Module) -> bool:
    """Whether in inference ``module`` runs our ops and nothing else. A subclass that somebody made may run anything."""
    if type(module) is nn.Sequential:
        return all(map(is_recordable, module))
    return (
        isinstance(module, CachesPrograms)
        and is_ours(module)
        and module.runs_our_ops()
        and all(is_recordable(m) for m in module.modules() if isinstance(m, CachesPrograms) and m is not module)
    )


def _encode(module: nn.Module, x: Tensor, recorded: Recording, out: Tensor) -> KeptProgram | None:
    """What has been recorded, if it is all that ran, on one backend that has programs."""
    calls = recorded.calls
    names = {backend for backend, _, _ in calls}
    if recorded.void or len(names) != 1 or not names <= {"cuda", "cpu"} or out is not calls[-1][2]:
        return None
    tensors = {id(t) for m in module.modules() for d in (m._parameters, m._buffers) for t in d.values()}
    found = encoding.encode([(args, result) for _, args, result in calls], x, tensors)
    name = names.pop()
    return found and KeptProgram(name, found, BACKENDS[name].extension.module.drop_program)
