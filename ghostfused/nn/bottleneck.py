"""FusedGhostBottleneck: a whole GhostBottleneck in few kernels.

Between and around the two fused Ghost modules: the depthwise conv of a stride-2 step with its norm in one kernel; of the
squeeze-and-excite only the gate, which the second Ghost module applies as it loads its input; the shortcut's depthwise
and 1×1 convs in a kernel each; its sum in the second Ghost module's epilogue.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..ops.recording import note_others
from ..recognize import ghost, graph
from ..recognize.activations import Activations, Known
from ..recognize.classes import call
from ..recognize.equivalence import prove
from ..recognize.swap import make_twin, original
from ..recognize.trace import Traced, idle_in_eval, is_fused, is_layer, is_look, more_than_one_tensor, scripted, trace
from ..recognize.watch import ChildPath, Watched, get
from ..spec import Act
from . import cache, layers
from .batch_statistics import runs_unfused
from .ghost_module import FusedGhostModule
from .ghost_steps import Ghost, Whole
from .layers import Run, SqueezeExcite

Step = Ghost | Whole | Run | SqueezeExcite


class _FusedTwin(cache.CachesPrograms, nn.Module):
    """Somebody's module that runs as ``_steps``, unless what lies inside it is looked at or changed."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError(f"{type(self).__name__} is made by ghostfused.fuse of somebody's module, not by its class")

    _layout: layers.Layout
    _watched: Watched
    """What the forwards that it leaps over read beside tensors and children."""
    _idle: tuple[ChildPath, ...]
    """Modules that it leaps over in eval mode, in which they return their input: DropPath and the like."""
    backend: str

    @classmethod
    def _prove(cls, module: nn.Module, in_channels: int, backend: str, found: _Found, **attributes: Any) -> Self | str:
        """The twin of ``module``; or how they differ."""
        layout = layers.Layout.of(module, found.beside, (), found.watched.looks)
        attributes |= {"_layout": layout, "_watched": found.watched, "_idle": found.idle}
        attributes |= {"backend": "reference", "_cache": cache.ProgramCache()}
        from .call_signature import called_as  # its classes derive from these

        kind, arguments = called_as(module, cls)
        fused = make_twin(kind, module, **attributes, **arguments)
        reason = prove(module, fused, in_channels, untraced=bool(found.idle or found.beside))
        fused.backend = backend
        return fused if reason is None else reason

    def forward(self, x: Tensor) -> Tensor:
        """The module of x."""
        return self._cache(self, x, self._run) if cache.may_replay(x) else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        """As ``forward``, read afresh."""
        if runs_unfused(self, x) or self._is_observed():
            note_others()
            return call(original(self), x)  # type: ignore[arg-type]
        return self._steps(x)

    def _steps(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def runs(self) -> tuple[Run, ...]:
        """The layers that it runs beside Ghost modules and squeeze-and-excite."""
        raise NotImplementedError

    def runs_our_ops(self) -> bool:
        return all(run.kind(self) is not None for run in self.runs())

    def _is_observed(self) -> bool:
        """Whether somebody looks at, or has changed, what the fused forward leaps over: by hooks, another forward, an
        attribute, or layers added, removed or of another kind; and whether a module that is idle in eval mode is at work."""
        if any(get(self, path).training for path in self._idle):
            return True
        return self._watched.changed(self) or not self._layout.holds(self)

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"


class FusedGhostBottleneck(_FusedTwin):
    """GhostBottleneck (Han et al., CVPR 2020, section 3.2), fused. (N, Cin, H, W) → (N, Cout, H', W').

    Made by ``from_module`` from somebody's bottleneck, whose children, names and tensors it keeps. They are read
    afresh when anything about them has changed: what uses batch statistics, or has been changed to something that no
    kernel computes, runs layer by layer; with hooks inside, the original's forward runs.
    """

    _main: tuple[Step, ...]
    _shortcut: tuple[Run, ...]
    _main_first: bool
    """Whether the original runs the main branch first: whichever does may write into x, once a layer in it is another."""

    @classmethod
    def from_module(cls, module: nn.Module, backend: str = "auto") -> FusedGhostBottleneck:
        """The fused twin of a bottleneck whose Ghost modules are fused already.

        The module is recognized by what it computes, as torch.fx traces it; both are run in float64 on a small random
        input to prove that they compute the same, in eval and train mode.

        Raises:
            ValueError: it is no bottleneck, or one that can't be fused; the message says why.
        """
        fused = cls.try_module(module, backend)
        if isinstance(fused, str):
            raise ValueError(f"module: expected a bottleneck that can be fused, got {type(module).__name__}: {fused}")
        return fused

    @classmethod
    def try_module(cls, module: nn.Module, backend: str) -> FusedGhostBottleneck | str:
        """As ``from_module``, but returns the reason where that raises an error."""
        found = read(module)
        if isinstance(found, str):
            return found
        main, shortcut = found.branches
        channels = _in_channels(module, (*shortcut, *main))
        steps = {"_main": main, "_shortcut": shortcut, "_main_first": found.main_first}
        return cls._prove(module, channels, backend, found, **steps)

    def runs(self) -> tuple[Run, ...]:
        return (*self._shortcut, *(step for step in self._main if isinstance(step, Run)))

    def runs_our_ops(self) -> bool:
        return super().runs_our_ops() and not any(isinstance(step, Whole) for step in self._main)

    def _steps(self, x: Tensor) -> Tensor:
        *before, last = self._main
        if not self._main_first:
            residual = self._run_shortcut(x)
        out, gate = x, None
        for step in before:
            if isinstance(step, SqueezeExcite):
                gate = step(self, out, self.backend)
            else:
                out, gate = self._step(step, out, gate, None), None
        if self._main_first:
            if not before and self._shortcut:
                return self._step(last, out, gate, None) + self._run_shortcut(x)
            residual = self._run_shortcut(x)
        if not isinstance(residual, fx.Proxy) and residual.shape[1] == 1:  # one for all channels
            note_others()
            return self._step(last, out, gate, None) + residual
        return self._step(last, out, gate, residual)

    def _step(self, step: Step, x: Tensor, gate: Tensor | None, residual: Tensor | None) -> Tensor:
        """``step`` of x. A Ghost module's input gate and epilogue are where a gate and the residual go."""
        if isinstance(step, Ghost | Whole):
            return step(self, x, gate, residual)
        return step(self, x, self.backend, gate, residual)  # type: ignore[call-arg]

    def _run_shortcut(self, x: Tensor) -> Tensor:
        for run in self._shortcut:
            x = run(self, x, self.backend)
        return x


class FusedConvNormAct(_FusedTwin):
    """1×1 conv → norm → activation, as between the bottlenecks and the head. (N, Cin, H, W) → (N, Cout, H, W).

    Made by ``fuse`` of somebody's module, which it stands for as a FusedGhostBottleneck does.
    """

    _layers: Run

    @classmethod
    def try_module(cls, module: nn.Module, backend: str) -> FusedConvNormAct | str:
        """The fused twin of ``module``; or why there is none."""
        found = _trace(module)
        if isinstance(found, str):
            return found
        traced, steps = found
        branch = _branch(traced.result, traced.start, steps, module)
        if isinstance(branch, str):
            return branch
        if len(branch) != 1 or not isinstance(branch[0], Run) or branch[0].kind(module) != "conv1x1":
            return "not one 1×1 conv with what follows it"
        result = steps.found(((branch[0],), ()), traced)
        return cls._prove(module, _in_channels(module, tuple(branch)), backend, result, _layers=branch[0])

    def runs(self) -> tuple[Run, ...]:
        return (self._layers,)

    def _steps(self, x: Tensor) -> Tensor:
        return self._layers(self, x, self.backend)


def _in_channels(module: nn.Module, steps: tuple[Step, ...]) -> int:
    """Of the input, by the first layer along ``steps`` that tells: pooling, activations and attention keep the channels."""
    for step in steps:
        for place in step.paths if isinstance(step, Run | SqueezeExcite) else (step.path,):
            layer = None if isinstance(place, Act) else ghost.layer_at(module, place)
            if isinstance(step, Whole):
                layer = next(m for m in layer.modules() if isinstance(m, FusedGhostModule))  # type: ignore[union-attr]
            if isinstance(layer, FusedGhostModule):
                half = ghost.read_place(layer, layer._halves[0])
                assert not isinstance(half, str)
                return half.conv.in_channels
            for kind, name in _TELLS.items():
                if isinstance(layer, kind):
                    return getattr(layer, name)
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels


_TELLS = {nn.Conv2d: "in_channels", nn.Linear: "in_features", nn.BatchNorm2d: "num_features"}


class _Found(NamedTuple):
    """What ``read`` finds."""

    branches: tuple[tuple[Step, ...], tuple[Run, ...]]
    watched: Watched
    beside: frozenset[ChildPath]
    """Modules that run themselves, as one step."""
    idle: tuple[ChildPath, ...]
    """Modules that return their input in eval mode."""
    main_first: bool = True
    """Whether the first branch's first step comes before the second's."""


class _Steps:
    """What is one step of a module's graph: layers, fused modules, squeeze-and-excite, and what no graph can be made of."""

    def __init__(self, root: nn.Module, whole: bool = False) -> None:
        self.whole = whole
        """Whether a module that isn't a Sequential is one step even if there is a Ghost module inside."""
        self.squeeze_excites: dict[ChildPath, tuple[SqueezeExcite, Watched]] = {}
        self.opaque: set[ChildPath] = set()
        self.idle: dict[ChildPath, Watched] = {}
        self.first: dict[ChildPath, Watched] = {}
        """Opaque steps that get the input itself."""
        self.own = Activations.of(root)
        self._find(root, ())

    def _find(self, module: nn.Module, path: ChildPath) -> None:
        for name, child in module._modules.items():
            at = (*path, name)
            if child is None or at in self.own.acts:
                continue
            if not ghost.is_nothing(child) and (idle := idle_in_eval(child)) is not None:
                self.idle[at] = idle
                continue
            if is_layer(child):
                continue
            if self.whole and _runs_ghosts(child):
                self.opaque.add(at)
                continue
            found = layers.read_squeeze_excite(child, at)
            if found is not None:
                self.squeeze_excites[at] = found
            elif not any(map(is_fused, child.modules())) and not ghost.is_nothing(child) and not _is_chain(child):
                self.opaque.add(at)
            else:
                self._find(child, at)

    def __call__(self, module: nn.Module, path: ChildPath) -> bool:
        steps = self.squeeze_excites.keys() | self.opaque | self.own.acts.keys() | self.idle.keys()
        return is_layer(module) or path in steps

    def found(self, branches: tuple[tuple[Step, ...], tuple[Run, ...]], traced: Traced) -> _Found:
        return _Found(branches, self.watched(traced), frozenset(self.opaque), tuple(self.idle))

    def watched(self, traced: Traced) -> Watched:
        """What the whole reads."""
        result = Watched()
        result.update(traced.watched)
        result.update(self.own.watched)
        for _, watched in self.squeeze_excites.values():
            result.update(watched)
        for path, watched in (*self.idle.items(), *self.first.items()):
            result.update(watched, path)
        return result


def _runs_ghosts(module: nn.Module) -> bool:
    """Whether it has fused modules inside, and a forward of its own."""
    return getattr(type(module), "forward", None) is not nn.Sequential.forward and any(map(is_fused, module.modules()))


_LEAVES = (
    F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.mean, torch.amax, torch.max, torch.sum,
    operator.mul, torch.mul, "mean", "amax", "max", "sum", "mul",
)  # fmt: skip
_LEAVING = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
            nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)  # fmt: skip


def _leaves_its_input(module: nn.Module) -> Watched | None:
    """What its forward reads, if that hands its input only to layers, fused modules and functions that neither change it nor
    give it out; else None."""
    traced = trace(module)
    if isinstance(traced, str):
        return None
    for node in traced.start.users:
        layer = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        harmless = isinstance(layer, _LEAVING) or (layer is not None and is_fused(layer))
        computes = node.op != "call_module" and node.target in _LEAVES
        asks = node.target == "expand_as" and node.args[0] is not traced.start
        if not (harmless or computes or asks or is_look(node)):
            return None
    return traced.watched


def _is_chain(module: nn.Module) -> bool:
    """Whether it runs layers one after the other and does nothing else."""
    if ghost.unusual(module) and not ghost.forward_is_known(module):
        return False
    traced = trace(module)
    return (
        not isinstance(traced, str)
        and isinstance(graph.chain(traced.result, traced.start), list)
        and more_than_one_tensor(traced) is None
    )


_ADD = (operator.add, operator.iadd, torch.add)


def read(module: nn.Module) -> _Found | str:
    """The steps of ``module``'s main branch, which ends in a Ghost module, and of its shortcut; or why it has none."""
    found = _read(module)
    if isinstance(found, str) and any(map(_runs_ghosts, module.children())):
        return _read(module, whole=True)
    return found


def _read(module: nn.Module, whole: bool = False) -> _Found | str:
    found = _trace(module, whole)
    if isinstance(found, str):
        return found
    traced, steps = found
    total = traced.result
    adds = isinstance(total, fx.Node) and total.target in (*_ADD, "add", "add_")
    if not adds or len(total.args) != 2 or total.kwargs:
        return "its output is not the sum of a branch and a shortcut"
    branches = [_branch(node, traced.start, steps, module) for node in total.args]
    if errors := [branch for branch in branches if isinstance(branch, str)]:
        return errors[0]
    with_ghosts = [branch for branch in branches if branch and isinstance(branch[-1], Ghost | Whole)]
    without = [branch for branch in branches if all(isinstance(step, Run) for step in branch)]
    if not with_ghosts or not without:
        return "not one branch that ends in a Ghost module and one without any"
    found_steps = steps.found((tuple(with_ghosts[0]), tuple(without[0])), traced)  # type: ignore[arg-type]
    main, shortcut = total.args if branches[0] is with_ghosts[0] else total.args[::-1]
    first, other = (traced.nodes.index([*graph.chain(node, traced.start), total][0]) for node in (main, shortcut))  # type: ignore[list-item]
    return found_steps._replace(main_first=first < other)


def _trace(module: nn.Module, whole: bool = False) -> tuple[Traced, _Steps] | str:
    """The graph of what ``module`` does, and what its steps are; or why there is none."""
    if reason := scripted(module) or ghost.unusual(module):
        return reason
    steps = _Steps(module, whole)
    traced = trace(module, steps)
    if isinstance(traced, str):
        return traced
    return more_than_one_tensor(traced) or (traced, steps)


def _branch(node: object, start: fx.Node, known: _Steps, root: nn.Module) -> list[Step] | str:
    """The steps from ``start`` to ``node``."""
    calls = graph.chain(node, start)
    if isinstance(calls, str):
        return calls
    at = [place for call in calls if (place := graph.layer_of(call, known.own.acts)) not in known.idle]
    if at and at[0] in known.opaque:
        path: ChildPath = at[0]  # type: ignore[assignment]
        if (watched := _leaves_its_input(get(root, path))) is None:
            return f"{'.'.join(path)}, which comes first, might change its input"
        known.first[path] = watched
    steps: list[Step] = []
    run: list[tuple[ghost.Layer, nn.Module | Known]] = []
    for place in at:
        layer = ghost.layer_at(root, place)
        gate = known.squeeze_excites.get(place)  # type: ignore[arg-type]
        whole = known.whole and isinstance(layer, nn.Module) and place in known.opaque and _runs_ghosts(layer)
        if isinstance(layer, FusedGhostModule) or gate is not None or whole:
            steps += layers.split(run)
            run = []
            step = Whole if whole else Ghost
            steps.append(gate[0] if gate is not None else step(place))  # type: ignore[arg-type]
        else:
            run.append((place, layer))
    return steps + layers.split(run)
