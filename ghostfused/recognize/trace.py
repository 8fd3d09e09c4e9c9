"""The graph of somebody's forward, and what it reads: run once in eval and once in train mode on a traced input.

What runs is a shadow of the module: other objects of the same classes that hold the same tensors and attributes. So nothing
is written to the module, which may serve other threads meanwhile, and nothing of PyTorch is patched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .allowed import root_of
from .classes import Own, of_bases
from .disturbed import refuse_another_tracer, undisturbed
from .observe import LayerForward, Observer, Refused
from .swap import PACKAGE
from .watch import ChildPath, Watched

IsLeaf = Callable[[nn.Module, ChildPath], bool]
Tensors = Callable[[str, Tensor], Tensor]
_BELOW: list[tuple[Any, str]] = [
    *((vars(F), name) for name in ("conv2d", "batch_norm", "relu")),
    *((vars(torch), name) for name in ("batch_norm", "relu", "relu_")),
    (nn.Sequential, "__iter__"), (nn.Module, "_call_impl"),
]  # fmt: skip
"""What every module runs by, and somebody may patch for all; but Module's ``__call__`` and ``__getattr__``, which torch.export and
torch.fx patch while they trace."""
_HOOKS = [name for name, value in nn.Module().__dict__.items() if "hooks" in name and isinstance(value, dict)]


def shadow(module: nn.Module, tensors: Tensors | None = None) -> nn.Module:
    """Another object that is as ``module``, and so on for all inside it, without hooks.

    What is inside under two names becomes two objects. ``tensors`` gives what is held in place of a parameter or buffer,
    by its name.
    """
    kind = type(module)
    twin = object.__new__(kind)
    for name in _all_slots(kind):
        if hasattr(module, name):
            object.__setattr__(twin, name, getattr(module, name))
    state = twin.__dict__
    state.update(module.__dict__)
    for name in _HOOKS:
        state[name] = type(state[name])()
    for name in ("_parameters", "_buffers"):
        held = module.__dict__[name].items()
        state[name] = {n: t if t is None or tensors is None else tensors(n, t) for n, t in held}
    state["_modules"] = {n: m if m is None else shadow(m, tensors) for n, m in module._modules.items()}
    for name, value in state.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            state[name] = MethodType(value.__func__, twin)
    return twin


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return tuple(n for n in ([slots] if isinstance(slots, str) else slots) if n not in ("__dict__", "__weakref__"))


def _all_slots(kind: type) -> set[str]:
    """Its own and its bases'."""
    if kind not in _KNOWN_SLOTS:
        _KNOWN_SLOTS[kind] = {name for base in kind.__mro__ for name in _slots(base)}
    return _KNOWN_SLOTS[kind]


_KNOWN_SLOTS: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()


def is_fused(module: nn.Module) -> bool:
    """Whether it is one of ours that runs kernels, or somebody's subclass of one."""
    return "backend" in module.__dict__ and any(root_of(base.__module__) == PACKAGE for base in type(module).__mro__)


def is_layer(module: nn.Module) -> bool:
    """Whether it is one step of a graph: what PyTorch brings along, but containers; a norm; a fused module."""
    torchs = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
    return is_fused(module) or isinstance(module, nn.BatchNorm2d) or (torchs and not isinstance(module, containers))


class Traced(NamedTuple):
    """What a forward does in both modes."""

    start: fx.Node
    result: Any
    nodes: list[fx.Node]
    watched: Watched


def trace(module: nn.Module, is_leaf: IsLeaf = lambda module, path: is_layer(module)) -> Traced | str:
    """The graph of ``module.forward``, in which each leaf is one step; or why there is none, or not one alone."""
    if reason := hidden(module):
        return reason
    both = []
    for training in (False, True):
        found = _trace(module, is_leaf, training)
        if isinstance(found, str):
            return found
        both.append(found)
    if _form(both[0]) != _form(both[1]):
        return f"{type(module).__name__}.forward does something else in train mode than in eval mode"
    both[0].watched.update(both[1].watched)
    if both[0].watched.looks and (twice := _twice(module)):
        return f"{type(module).__name__}.forward may compare its modules, and {twice} is there under two names"
    for owner, name in _BELOW:
        both[0].watched.of(owner, name)
    return both[0]


def _twice(module: nn.Module) -> str | None:
    """The second name of a module inside that has two: a shadow has two modules there."""
    seen: set[nn.Module] = set()
    for name, m in module.named_modules(remove_duplicate=False):
        if m in seen:
            return name
        seen.add(m)
    return None


def idle_in_eval(module: nn.Module) -> Watched | None:
    """What the forward of ``module`` reads, if in eval mode it returns its input, as DropPath does; else None."""
    if isinstance(module, nn.modules.dropout._DropoutNd) and is_layer(module):  # a subclass of somebody's may do more
        return Watched()
    if is_layer(module) or hidden(module) or any(True for _ in (*module.parameters(), *module.buffers())):
        return None
    traced = _trace(module, lambda m, path: is_layer(m), False)
    if isinstance(traced, str) or traced.result is not traced.start:
        return None
    return traced.watched if all(node is traced.start or is_look(node) for node in traced.nodes) else None


def hidden(module: nn.Module) -> str | None:
    """Why the attributes of ``module`` or of one inside it can't be told by looking; None if they can."""
    if reason := scripted(module):
        return reason
    for m in module.modules():
        for base in type(m).__mro__:
            if "__getattribute__" in vars(base) and base is not object:
                return f"{type(m).__name__} has a __getattribute__ of its own"
            if root_of(base.__module__) not in ("torch", PACKAGE, "builtins") and _slots(base):
                return f"{type(m).__name__} keeps attributes in __slots__"
    return None


def scripted(module: nn.Module) -> str | None:
    """Which module, of ``module`` and those inside it, is no Python code; None if all are."""
    for name, m in module.named_modules():
        if isinstance(m, torch.jit.ScriptModule):
            return f"{name or 'it'} is compiled by TorchScript"
    return None


@undisturbed
def _trace(module: nn.Module, is_leaf: IsLeaf, training: bool) -> Traced | str:
    root = shadow(module)
    paths: dict[int, ChildPath] = {}
    recorder = _Recorder(fx.Graph())
    for path, m in _inside(root, ()):
        paths[id(m)] = path
        m.training = training
        if path and is_leaf(m, path):
            m.__dict__["forward"] = _Call(recorder, ".".join(path))
    observer = recorder.observer = Observer(paths, [m for _, m in _inside(root, ())])
    for m in observer.modules:
        observer.tells_children(m)
    name = f"{type(module).__name__}.forward"
    start = recorder.graph.placeholder("x")

    def run() -> Any:
        observer._of_module(root, "forward")
        return root.forward(fx.Proxy(start, recorder))

    try:
        out = observer.run(run)
    except Refused as refusal:
        return f"{name} {refusal}"
    except Exception as error:
        refuse_another_tracer(error)
        return f"{name} can't be traced: {type(error).__name__}: {error}"
    result = out.node if isinstance(out, fx.Proxy) else out
    observer.watched.modes = [tuple(sorted(observer.modes))] if len(observer.modes) > 1 else []
    for _, m in _inside(root, ()):  # their classes, of which somebody may replace a method later
        step = isinstance(m.__dict__.get("forward"), LayerForward)
        if step or isinstance(m, nn.Sequential):
            for method in ("forward", "_conv_forward", *(() if step else ("__iter__",))):
                if hasattr(type(m), method):
                    observer.watched.of(type(m), method)
        for own in of_bases(type(m), () if step else m._modules):
            observer.watched.of(own, Own.NAME)
    return Traced(start, result, list(recorder.graph.nodes), observer.watched)


def _inside(module: nn.Module, path: ChildPath) -> Iterator[tuple[ChildPath, nn.Module]]:
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _inside(child, (*path, name))


class _Call(LayerForward):
    """The forward of a leaf's shadow: a step of the graph."""

    def __init__(self, recorder: _Recorder, target: str):
        self.recorder, self.target = recorder, target

    def __call__(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        return self.recorder.create_proxy("call_module", self.target, args, kwargs)


class _Recorder(fx.proxy.GraphAppendingTracer):
    observer: Observer

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.observer.refuse(f"decides by its input ({obj.node.name})")

    def keys(self, obj: fx.Proxy) -> Any:
        self.observer.refuse("takes its input for a dict")

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            held = (
                (m, n)
                for m in self.observer.modules
                for d in (m._parameters, m._buffers)
                for n, t in d.items()
                if t is a
            )
            what = next((".".join((*self.observer.paths[id(m)], n)) for m, n in held), "a tensor of its own")
            self.observer.refuse(f"computes with {what} outside of the layers that are known")
        return super().create_arg(a)


def _form(traced: Traced) -> list:
    """The graph without names."""
    places = {node: place for place, node in enumerate(traced.nodes)}

    def plain(value: Any) -> Any:
        return ("step", places[value]) if isinstance(value, fx.Node) else value

    form = [
        (n.op, n.target, fx.node.map_aggregate(n.args, plain), fx.node.map_aggregate(n.kwargs, plain))
        for n in traced.nodes
    ]
    return [*map(repr, form), repr(fx.node.map_aggregate(traced.result, plain))]


def is_look(node: fx.Node) -> bool:
    """Whether the step reads shapes, and computes no tensor."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    if node.op == "call_method":
        return node.target in ("size", "dim")
    parents = node.all_input_nodes
    return bool(parents) and node.op == "call_function" and all(map(is_look, parents))


def shown(node: fx.Node) -> str:
    """A step for people: the layer's path, or the function's name."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def more_than_one_tensor(traced: Traced) -> str | None:
    """Why a graph isn't all for one tensor: its output is none, or a step's result is not used; looks at shapes don't count."""
    if not isinstance(traced.result, fx.Node):
        return f"its output is a {type(traced.result).__name__}, not a tensor"
    for node in traced.nodes:
        if not node.users and node is not traced.result and node is not traced.start and not is_look(node):
            return f"{shown(node)} is called, but its result is not used"
    return None
