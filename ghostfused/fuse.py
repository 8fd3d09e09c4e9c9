"""``fuse(model)``: swaps the Ghost modules and bottlenecks of a model that somebody already has for fused ones.

``unfuse(model)`` gives the original back.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from . import backends
from .nn.bottleneck import FusedConvNormAct, FusedGhostBottleneck
from .nn.cache import is_recordable
from .nn.ghost_module import FusedGhostModule
from .nn.sequential import FusedSequential
from .numerics import relative_error
from .recognize import ghost
from .recognize.disturbed import named, undisturbed
from .recognize.equivalence import SAME, substituted
from .recognize.swap import original
from .spec import GhostArgs, memory_format
from .spec.takes import COMMON, TAKES, form_refusal

LEVELS = ("auto", "module")
Filter = Callable[[str, nn.Module], bool]
M = TypeVar("M", bound=nn.Module)


class Swap(NamedTuple):
    """What ``fuse`` did with one module."""

    fqn: str
    """Fully qualified name in the model; empty for the model itself."""
    kind: str
    """Name of the class it had."""
    fused: bool
    backend: str | None = None
    """What it will run on with its tensors where they are, in eval mode."""
    reason: str | None = None
    """Why it was left as it was."""


class Report(list[Swap]):
    """What became of each Ghost module and bottleneck, and of each Sequential of these; prints as a table."""

    def __str__(self) -> str:
        rows = [("name", "class", "fused", "backend", "reason")]
        rows += [(s.fqn or "(root)", s.kind, "yes" if s.fused else "no", s.backend or "", s.reason or "") for s in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def fuse(
    model: M,
    *,
    inplace: bool = False,
    level: str = "auto",
    filter_fn: Filter | None = None,
    strict: bool = False,
    verbose: bool = False,
    backend: str = "auto",
) -> M:
    """``model`` with everything fused that can be; parameters, state_dict keys, hooks and training flags stay.

    Each swap is proved: the module and its fused twin run once in float64 on a random input, in eval and train mode.
    What can't be fused is left as it was. A second call changes nothing.

    Args:
        model: any module; Ghost modules and bottlenecks are found by their structure and by what they compute, not by
            name. The models of this package, the official repository, timm and ultralytics are among them.
        inplace: change ``model`` itself, sharing its parameters, rather than a deep copy.
        level: "module" for Ghost modules alone; "auto" for the bottlenecks around them as well, and for Sequentials of these.
        filter_fn: given a module's fully qualified name and the module, whether it may be swapped.
        strict: raise if a Ghost module or bottleneck is left unfused, other than by ``filter_fn``.
        verbose: print what became of each, and why.
        backend: what the fused modules run on, "auto" or a backend's name.

    Raises:
        ValueError: under ``strict``, with the modules left and the reasons; or ``level`` or ``backend`` is unknown.
        RuntimeError: another thread traces by torch.fx all the while, which nobody can call a module beside.
    After an error, also one of ``filter_fn``, ``model`` is as it was.

    Modules in a training form of several branches (GhostNetV3) are re-parameterized first, by their own method: in a
    copy and in eval mode only, since their state_dict changes.
    """
    fused, report = fuse_with_report(
        model, inplace=inplace, level=level, filter_fn=filter_fn, strict=strict, backend=backend
    )
    if verbose:
        print(report)
    _warn(fused, report, backend)
    return fused


def fuse_with_report(
    model: M,
    *,
    inplace: bool = False,
    level: str = "auto",
    filter_fn: Filter | None = None,
    strict: bool = False,
    backend: str = "auto",
) -> tuple[M, Report]:
    """As ``fuse``, but returns what became of each Ghost module and bottleneck, where that warns."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {list(LEVELS)}, got {level!r}")
    if backend != "auto" and backend not in backends.BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(backends.BACKENDS)}, got {backend!r}")
    if not inplace:
        model = copy.deepcopy(model)
    surgery = _Surgery(model, not inplace, filter_fn or (lambda fqn, module: True), backend)
    order = {fqn: i for i, (fqn, _) in enumerate(_occurrences(model))}
    with named("fuse"):
        try:
            surgery.ghost_modules()
            if level != "module":
                surgery.bottlenecks()
                surgery.sequences()
        except BaseException:
            _restored(surgery.model, surgery.swapped.values())
            raise
    surgery.report.sort(key=lambda swap: order[swap.fqn])
    if strict:
        unfused = [(s.fqn or "(root)", s.reason or "") for s in surgery.report if not s.fused and s.reason != _FILTERED]
        left = [f"{fqn}: {reason}" for fqn, reason in unfused if not reason.startswith(_NO_SINGLE_OP)]
        if not any(isinstance(m, FusedGhostModule) for m in surgery.model.modules()):
            left.append("the model has no Ghost module that can be fused")
        if left:
            _restored(surgery.model, surgery.swapped.values())
            raise ValueError("strict: left unfused: " + "; ".join(left))
    return surgery.model, surgery.report  # type: ignore[return-value]


def _warn(fused: nn.Module, report: Report, backend: str) -> None:
    """Says so if ``fuse`` was of no use."""
    ours = [m for m in fused.modules() if isinstance(m, FusedGhostModule)]
    if not ours:
        reasons = list(dict.fromkeys(f"{s.fqn or '(root)'}: {s.reason}" for s in report if s.reason))
        found = "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "") or "no Ghost module was found"
        warnings.warn(f"fuse: nothing is fused: {found}", stacklevel=3)
    elif backend == "auto" and all(_backend(m) == "reference" for m in ours):
        example = _example(ours[0])
        reasons = [
            f"{name}: {reason}"
            for name in backends.AUTO.get(example.x.device.type, ())
            if (reason := backends.BACKENDS[name].supports(example) or backends.declines(name, example))
        ]
        found = "; ".join(reasons) or f"no kernel takes tensors on {example.x.device}"
        warnings.warn(f"fuse: all fused modules run on the slow reference: {found}", stacklevel=3)


def unfuse(model: M, *, inplace: bool = False) -> M:
    """``model`` with the modules that ``fuse`` swapped as they were, with the values that their tensors have now.

    A ``FusedGhostModule`` that was built as one stays. Modules that were re-parameterized come back in that form.

    Args:
        model: what ``fuse`` returned, or a module that contains it.
        inplace: change ``model`` itself rather than a deep copy. If ``model`` itself was swapped, the original is a
            new object all the same.
    """
    return _restored(model if inplace else copy.deepcopy(model))


def _restored(model: M, made: Collection[nn.Module] | None = None) -> M:
    """``model`` with the originals of its twins, or of those ``made``, in their places."""
    restored: dict[nn.Module, nn.Module] = {}
    while True:  # a bottleneck first, then the Ghost modules in it
        twins = ((n, m) for n, m in _occurrences(model) if "_original" in m.__dict__ and (made is None or m in made))
        fqn, twin = next(twins, ("", None))
        if twin is None:
            return model
        if twin not in restored:
            restored[twin] = original(twin)  # type: ignore[assignment]
        model = _replace(model, fqn, restored[twin])  # type: ignore[assignment]


def _occurrences(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every name, outermost first."""
    return model.named_modules(remove_duplicate=False)


def _members(sequential: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    """What a Sequential runs, those inside it laid open, under the names that it has in it."""
    for name, module in sequential.named_children():
        if type(module) is nn.Sequential:
            yield from ((f"{name}.{inner}", m) for inner, m in _members(module))
        else:
            yield name, module


def _replace(model: nn.Module, fqn: str, module: nn.Module) -> nn.Module:
    """``model`` with ``module`` at ``fqn``."""
    if not fqn:
        return module
    parent, _, name = fqn.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
    return model


_FILTERED = "filter_fn says no"
_NO_SINGLE_OP = "its members are not one op: "
_TRAINING_FORM = "in its training form: fuse a copy (inplace=False) in eval mode, which is re-parameterized first"


class _Surgery:
    """The swaps of one call of ``fuse``."""

    def __init__(self, model: nn.Module, may_deploy: bool, allowed: Filter, backend: str):
        self.model, self.may_deploy, self.allowed, self.backend = model, may_deploy, allowed, backend
        self.report = Report()
        self.swapped: dict[nn.Module, nn.Module] = {}  # what occurs twice is swapped for one fused module

    def ghost_modules(self) -> None:
        for fqn, module in self._candidates():
            deployed, recognized = module, ghost.read(module)
            if isinstance(recognized, str):
                # a container is no Ghost module that failed, if there is one in it
                if not ghost.claims_to_be_one(module) or self._handled_inside(fqn):
                    continue
                deployed, reason = self._deployed(module), recognized
                if deployed is not module:
                    recognized = ghost.read(deployed)
                elif _deploy_method(module) is not None:
                    reason = _TRAINING_FORM
                if isinstance(recognized, str):
                    self._leave(fqn, module, reason)
                    continue
            self._settle(fqn, module, functools.partial(self._ghost_module, deployed, recognized))

    def bottlenecks(self) -> None:
        for fqn, module in self._candidates():
            kinds = [type(m) for m in module.modules()]
            ghosts = sum(issubclass(kind, FusedGhostModule) for kind in kinds)
            holds = getattr(type(module), "forward", None) in (nn.Module.forward, nn.Sequential.forward)
            if holds or ghosts != 2 or FusedGhostBottleneck in kinds:
                continue
            self._settle(fqn, module, functools.partial(self._bottleneck, module))

    def sequences(self) -> None:
        """Sequentials of fused modules alone, outermost first; 1×1 convs between these are fused for it."""
        fused: list[str] = []
        for fqn, module in list(_occurrences(self.model)):
            if any(fqn.startswith(f"{name}.") for name in fused):
                continue
            # the model itself stays the object that it is
            if fqn and type(module) is nn.Sequential and self.allowed(fqn, module):
                members = [(f"{fqn}.{name}", m) for name, m in _members(module)]
                if sum(is_recordable(m) for _, m in members) < 2:
                    continue
                other = next((member for member in members if self._as_recordable(member) is None), None)
                if other is not None:
                    self._leave(
                        fqn, module, f"{_NO_SINGLE_OP}{other[0]}, a {type(other[1]).__name__}, runs other ops than ours"
                    )
                else:
                    for name, m in members:
                        self.model = _replace(self.model, name, self.swapped.get(m, m))
                    original, module = module, self.swapped.get(module) or FusedSequential.of(module)
                    self._swap(fqn, original, module)
            if isinstance(module, FusedSequential | FusedGhostBottleneck | FusedGhostModule):
                fused.append(fqn)

    def _as_recordable(self, member: tuple[str, nn.Module]) -> nn.Module | None:
        """``member``, a module and its name, or its fused twin, if all that it runs is our ops."""
        fqn, module = member
        if is_recordable(module):
            return module
        if module not in self.swapped and self.allowed(fqn, module):
            fused = FusedConvNormAct.try_module(module, self.backend)
            if not isinstance(fused, str):
                self.swapped[module] = fused
        return self.swapped.get(module)

    def _candidates(self) -> Iterator[tuple[str, nn.Module]]:
        """Innermost first, what is not fused yet; where a module that has been swapped occurs again, it is swapped too."""
        for fqn, module in reversed(list(_occurrences(self.model))):
            if module in self.swapped:
                self._swap(fqn, module, self.swapped[module])
            elif not isinstance(module, FusedGhostModule | FusedGhostBottleneck):
                yield fqn, module

    def _ghost_module(self, module: nn.Module, recognized: ghost.Recognized) -> nn.Module | str:
        fused = FusedGhostModule.from_recognized(module, recognized, self.backend)
        if not isinstance(fused, str) and (reason := _form_refusal(_example(fused), self.backend)):
            return f"no kernel for {reason}"
        return fused

    def _bottleneck(self, module: nn.Module) -> nn.Module | str:
        return FusedGhostBottleneck.try_module(self._deployed(module), self.backend)

    def _deployed(self, module: nn.Module) -> nn.Module:
        """``module``, re-parameterized if it has a method for it, may be changed, and computes the same afterwards."""
        return (_deployed(module) if self.may_deploy else None) or module

    def _handled_inside(self, fqn: str) -> bool:
        prefix = f"{fqn}." if fqn else ""
        return any(swap.fqn.startswith(prefix) for swap in self.report)

    def _settle(self, fqn: str, module: nn.Module, fuse_it: Callable[[], nn.Module | str]) -> None:
        """Swaps ``module`` if it may be, or reports the reason that comes instead."""
        fused = fuse_it() if self.allowed(fqn, module) else _FILTERED
        if isinstance(fused, str):
            self._leave(fqn, module, fused)
        else:
            self._swap(fqn, module, fused)

    def _leave(self, fqn: str, module: nn.Module, reason: str) -> None:
        self.report.append(Swap(fqn, type(module).__name__, False, None, reason))

    def _swap(self, fqn: str, module: nn.Module, fused: nn.Module) -> None:
        self.swapped[module] = fused
        self.model = _replace(self.model, fqn, fused)
        ghost = next(m for m in fused.modules() if isinstance(m, FusedGhostModule))
        self.report.append(Swap(fqn, type(module).__name__, True, _backend(ghost)))


def _form_refusal(example: GhostArgs, backend: str) -> str | None:
    """Why no kernel that ``backend`` may choose takes the form of ``example``; None if one does."""
    names = backends.AUTO.get(example.x.device.type, ()) if backend == "auto" else (backend,)
    reasons: list[str] = []
    for name in names or ("reference",):
        reason = form_refusal(example, TAKES.get(name, COMMON))
        if reason is None and backend == "auto":
            reason = backends.declines(name, example)
        if reason is None:
            absent = backends.BACKENDS[name].unavailable() if reasons else None  # the first decides where there is none
            if absent is None:
                return None
            reason = f"{name} would take it, but {absent}"
        reasons.append(reason)
    return "; ".join(dict.fromkeys(reasons))


def _deploy_method(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reparameterize", None) or getattr(module, "switch_to_deploy", None)


def _deployed(module: nn.Module) -> nn.Module | None:
    """``module`` re-parameterized by its own method, if it has one and computes the same afterwards."""
    conv = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    if _deploy_method(module) is None or module.training or conv is None:
        return None
    try:
        with substituted(module, conv.in_channels, training=False) as (twin, x):
            expected = undisturbed(twin.forward)(x)
            _deploy_method(twin)()  # type: ignore[misc]
            if relative_error(undisturbed(twin.forward)(x), expected) >= SAME:
                return None
        twin = copy.deepcopy(module)
        with torch.no_grad():
            _deploy_method(twin)()  # type: ignore[misc]
        return twin.eval()
    except Exception:  # whatever its method does, it doesn't do it here
        return None


def _example(fused: FusedGhostModule) -> GhostArgs:
    """A call of ``fused`` on a small input, for what a backend says to it; norms are left out."""
    primary, cheap = (ghost.read_place(fused, place) for place in fused._halves)
    assert not isinstance(primary, str)
    assert not isinstance(cheap, str)
    conv, weight = primary.conv, primary.weight
    side = 8 * conv.stride[0]
    x = torch.empty(1, conv.in_channels, side, side, dtype=weight.dtype, device=weight.device)
    if weight.shape[2] > 1:  # else its strides don't tell the model's layout
        x = x.contiguous(memory_format=memory_format(weight))
    settings = fused._channels(primary, cheap), conv.stride[0], conv.dilation[0], conv.groups, False
    acts = 1e-5, int(primary.act), 0.0, 1e-5, int(cheap.act), 0.0
    none = [None] * 6
    return GhostArgs(x, weight, *none, cheap.weight, *none, None, None, None, *acts, *settings)  # type: ignore[arg-type,call-arg]


def _backend(fused: FusedGhostModule) -> str:
    """The backend that will run ``fused``, asked for by name or chosen."""
    return backends.choose(_example(fused), "auto") if fused.backend == "auto" else fused.backend
