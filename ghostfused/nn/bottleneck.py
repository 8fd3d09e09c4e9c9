"""FusedGhostBottleneck: a whole GhostBottleneck in few kernels.

Between and around the two fused Ghost modules: the depthwise conv of a stride-2 step with its norm in one kernel; of the
squeeze-and-excite only the gate, which the second Ghost module applies as it loads its input; the shortcut's depthwise
and 1×1 convs in a kernel each; its sum in the second Ghost module's epilogue.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, fx, nn

from ..ops.recording import note_others
from ..ops.transforms import runs_plain
from ..recognize import ghost
from ..recognize.equivalence import prove
from ..recognize.reads import Reads, changed, reads
from ..recognize.swap import make_twin, original
from . import cache, layers
from .ghost_module import FusedGhostModule
from .layers import Path, Run, SqueezeExcite, get


class Ghost(NamedTuple):
    """Where a fused Ghost module is."""

    path: Path


Step = Ghost | Run | SqueezeExcite


class _FusedTwin(cache.CachesPrograms, nn.Module):
    """Somebody's module that runs as ``_steps``, unless what lies inside it is looked at or changed."""

    _layout: dict[Path, dict[str, type]]
    """Names and kinds of the children of each module down to the layers and the Ghost modules, by its path."""
    _reads: Reads
    """What the forwards that it leaps over read beside tensors and children."""
    backend: str

    @classmethod
    def _prove(cls, module: nn.Module, in_channels: int, backend: str, **attributes: Any) -> Self | str:
        """The twin of ``module``; or how they differ."""
        found = reads(module)
        if isinstance(found, str):
            return found
        attributes |= {"_layout": _layout(module, ()), "_reads": found}
        attributes |= {"backend": "reference", "_cache": cache.ProgramCache()}
        fused = make_twin(cls, module, **attributes)
        reason = prove(module, fused, in_channels)
        fused.backend = backend
        return fused if reason is None else reason

    def forward(self, x: Tensor) -> Tensor:
        """The module of x."""
        return self._cache(self, x, self._run) if cache.may_replay(x) else self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        """As ``forward``, read afresh."""
        if self._is_observed() or runs_plain(self.backend):
            note_others()
            return original(self).forward(x)  # type: ignore[union-attr]
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
        attribute, or layers added, removed or of another kind. Only norms may have gone, folded into their convolutions."""
        if changed(self, self._reads, get):
            return True
        for path, kinds in self._layout.items():
            children: dict[str, nn.Module | None] = get(self, path).__dict__["_modules"]
            for name, child in children.items():
                if child is None or type(child) is nn.Identity:
                    continue
                if kinds.get(name) is not type(child) or ghost.has_hooks(child) or ghost.forward_replaced(child):
                    return True
            for name, kind in kinds.items():
                if name not in children and kind not in ghost.NORMS:
                    return True
        return False

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
        main, shortcut = found
        return cls._prove(module, _in_channels(module, main), backend, _main=main, _shortcut=shortcut)

    def runs(self) -> tuple[Run, ...]:
        return (*self._shortcut, *(step for step in self._main if isinstance(step, Run)))

    def _steps(self, x: Tensor) -> Tensor:
        residual = x
        for run in self._shortcut:
            residual = run(self, residual, self.backend)
        gate = None
        last = self._main[-1]
        for step in self._main:
            if isinstance(step, SqueezeExcite):
                gate = step(self, x, self.backend)
                continue
            # the Ghost module's input gate and epilogue are where a gate and the residual go
            rest = residual if step is last else None
            if isinstance(step, Ghost):
                x = get(self, step.path)(x, input_gate=gate, residual=rest)
            else:
                x = step(self, x, self.backend, gate, rest)
            gate = None
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
        result, start, tracer = found
        branch = _branch(result, start, tracer, module)
        if isinstance(branch, str):
            return branch
        if len(branch) != 1 or not isinstance(branch[0], Run) or branch[0].kind(module) != "conv1x1":
            return "not one 1×1 conv with what follows it"
        return cls._prove(module, _in_channels(module, tuple(branch)), backend, _layers=branch[0])

    def runs(self) -> tuple[Run, ...]:
        return (self._layers,)

    def _steps(self, x: Tensor) -> Tensor:
        return self._layers(self, x, self.backend)


def _layout(module: nn.Module, path: Path) -> dict[Path, dict[str, type]]:
    if isinstance(module, FusedGhostModule) or not module._modules:
        return {}
    children = {name: m for name, m in module._modules.items() if m is not None}
    layout = {path: {name: type(m) for name, m in children.items() if type(m) is not nn.Identity}}
    for name, child in children.items():
        layout |= _layout(child, (*path, name))
    return layout


def _in_channels(module: nn.Module, main: tuple[Step, ...]) -> int:
    first = main[0]
    layer = get(module, first.path if isinstance(first, Ghost) else first.paths[0])
    if isinstance(layer, FusedGhostModule):
        layer = layer._modules[layer._halves[0]]  # type: ignore[assignment]
    matrix = next(m for m in layer.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    return matrix.in_channels if isinstance(matrix, nn.Conv2d) else matrix.in_features


class _Tracer(fx.Tracer):
    """Sees fused Ghost modules, squeeze-and-excite blocks and torch's own layers as one call each."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.squeeze_excites = {
            name: found
            for name, m in root.named_modules()
            if (found := layers.read_squeeze_excite(m, tuple(name.split(".")))) is not None
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, FusedGhostModule) or module_qualified_name in self.squeeze_excites
        return ours or isinstance(m, nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


_ADD = (operator.add, operator.iadd, torch.add)


def read(module: nn.Module) -> tuple[tuple[Step, ...], tuple[Run, ...]] | str:
    """The steps of ``module``'s main branch, which ends in a Ghost module, and of its shortcut; or why it has none."""
    found = _trace(module)
    if isinstance(found, str):
        return found
    total, start, tracer = found
    if (
        not isinstance(total, fx.Node)
        or total.target not in (*_ADD, "add", "add_")
        or len(total.args) != 2
        or total.kwargs
    ):
        return "its output is not the sum of a branch and a shortcut"
    branches = [_branch(node, start, tracer, module) for node in total.args]
    if errors := [branch for branch in branches if isinstance(branch, str)]:
        return errors[0]
    with_ghosts = [branch for branch in branches if branch and isinstance(branch[-1], Ghost)]
    without = [branch for branch in branches if all(isinstance(step, Run) for step in branch)]
    if not with_ghosts or not without:
        return "not one branch that ends in a Ghost module and one without any"
    return tuple(with_ghosts[0]), tuple(without[0])  # type: ignore[arg-type]


def _trace(module: nn.Module) -> tuple[object, fx.Node, _Tracer] | str:
    """What ``module`` returns and what it takes, as torch.fx sees it; or why that fails."""
    if reason := ghost.unusual(module):
        return reason
    if isinstance(found := reads(module), str):  # before it runs: it might write into a log
        return found
    tracer = _Tracer(module)
    try:
        graph = tracer.trace(module)
    except Exception as error:
        return f"torch.fx can't trace it: {type(error).__name__}: {error}"
    start = next(node for node in graph.nodes if node.op == "placeholder")
    return next(node for node in graph.nodes if node.op == "output").args[0], start, tracer


def _branch(node: object, start: fx.Node, tracer: _Tracer, root: nn.Module) -> list[Step] | str:
    """The steps from ``start`` to ``node``, each of which must be a layer's call on the result of the one before."""
    calls: list[str] = []
    while node is not start:
        if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return f"{node} is no layer that is called on the result of one other"
        if len(node.users) > 1:
            return f"the result of {node.target} is used more than once"
        calls.insert(0, str(node.target))
        node = node.args[0]
    steps: list[Step] = []
    run: list[tuple[Path, nn.Module]] = []
    for name in calls:
        path = tuple(name.split("."))
        layer = get(root, path)
        if isinstance(layer, FusedGhostModule) or name in tracer.squeeze_excites:
            steps += layers.split(run)
            run = []
            steps.append(Ghost(path) if isinstance(layer, FusedGhostModule) else tracer.squeeze_excites[name])
        else:
            run.append((path, layer))
    return steps + layers.split(run)
