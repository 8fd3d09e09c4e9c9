"""Activations that are no layer of PyTorch's: functions in a forward, subclasses, and what people write themselves."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..spec import Act
from ..spec.activations import BY_CALL, BY_MODULE, TABLE, WITHOUT_SLOPE, with_settings
from .disturbed import undisturbed
from .equivalence import SAME
from .trace import is_fused, is_layer, more_than_one_tensor, shadow, trace
from .watch import Absent, ChildPath, Watched, is_immutable

_OF_NUMBERS = {getattr(call, "__name__", call) for call in BY_CALL} | {
    "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "sigmoid", "sigmoid_", "hardsigmoid", "tanh", "softplus", "exp", "erf", "log", "log1p",
    "add", "add_", "iadd", "sub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv", "pow",
}  # fmt: skip
_LAYERS_OF_NUMBERS = (
    *(module for module, act in BY_MODULE.items() if act in WITHOUT_SLOPE),
    nn.Hardtanh,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Tanh,
    nn.Softplus,
)


class Known(NamedTuple):
    """An activation by what it computes, and the layer that it is, if it is one."""

    act: Act
    layer: nn.Module | None

    def __call__(self, x: Tensor) -> Tensor:
        return TABLE[self.act].function(x, 0.0, None) if self.layer is None else self.layer(x)


def called(node: fx.Node) -> Act | None:
    """The activation that a step of a graph is, if it is a function's call."""
    settings = node.kwargs.keys() - {"inplace", "approximate"}
    if node.op not in ("call_function", "call_method") or len(node.args) != 1 or settings:
        return None
    return with_settings(BY_CALL.get(node.target), node.kwargs)  # type: ignore[call-overload]


class Activations(NamedTuple):
    """Modules that compute an activation, by their paths, and what their forwards read."""

    acts: dict[ChildPath, Act]
    watched: Watched

    @classmethod
    def of(cls, root: nn.Module) -> Activations:
        found = cls({}, Watched())
        found._add(root, ())
        return found

    def _add(self, module: nn.Module, path: ChildPath) -> None:
        for name, child in module._modules.items():
            if child is None or is_fused(child) or (is_layer(child) and type(child) is not nn.Hardtanh):
                continue
            at = (*path, name)
            if type(child) is not nn.Sequential and (read := _read(child)) is not None:
                self.acts[at] = read[0]
                self.watched.update(read[1], at)
            else:
                self._add(child, at)


def _read(module: nn.Module) -> tuple[Act, Watched] | None:
    """What ``module`` computes, if it is a function of single numbers and one of these activations on all that are tried."""
    if any(m._parameters or m._buffers or "forward" in m.__dict__ for m in module.modules()):
        return None
    traced = trace(module)
    if isinstance(traced, str) or more_than_one_tensor(traced) or len(traced.nodes) > 16:
        return None
    layers = dict(module.named_modules())
    for node in traced.nodes[1:]:
        name = getattr(node.target, "__name__", str(node.target))
        known = isinstance(layers.get(name), _LAYERS_OF_NUMBERS) if node.op == "call_module" else name in _OF_NUMBERS
        constants = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
        numbers = [a for a in constants if a is not None and not isinstance(a, str)]  # F.gelu has approximate="tanh"
        if not known or not all(isinstance(a, bool | int | float) and abs(a) < 1e6 for a in numbers):
            return None
    far = torch.logspace(-9, 8, 200, dtype=torch.float64, device="cpu")
    x = torch.cat([-far, torch.linspace(-9, 9, 1801, dtype=torch.float64, device="cpu"), far])
    try:
        with torch.no_grad():
            out = undisturbed(lambda: shadow(module).forward(x.clone()))()
            for act in WITHOUT_SLOPE:
                expected = TABLE[act].function(x, 0.0, None)
                if out.shape == expected.shape and bool(((out - expected).abs() <= SAME * (1 + expected.abs())).all()):
                    watched = Watched()
                    watched.update(traced.watched)
                    for name, m in layers.items():
                        watch_settings(m, tuple(name.split(".")) if name else (), watched)
                    return act, watched
    except Exception:  # whatever it does, it isn't one of these
        return None
    return None


def watch_settings(layer: nn.Module, path: ChildPath, watched: Watched) -> None:
    """The kernel size of a convolution, the size that is pooled to, …: a forward reads them when it runs. And that no method
    which it calls, such as ``_conv_forward``, is hidden by one on the instance."""
    for base in type(layer).__mro__:
        for name, value in vars(base).items() if base not in nn.Module.__mro__ else ():
            if inspect.isfunction(value) and name.startswith("_") and not name.startswith("__"):
                watched.attribute(path, name, Absent)
    for name, value in layer.__dict__.items():
        if name != "training" and is_immutable(value):
            watched.attribute(path, name, value)
