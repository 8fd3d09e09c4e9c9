"""Runs of layers (conv → norm → activation) and squeeze-and-excite blocks inside a fused module: found by their paths
and read afresh at every call, as the halves of a Ghost module are."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..backends import reference
from ..functional import conv1x1, depthwise, squeeze_excite
from ..ops.recording import note_others
from ..recognize import ghost
from ..recognize.activations import Known, called, watch_settings
from ..recognize.disturbed import undisturbed
from ..recognize.equivalence import substituted
from ..recognize.trace import Traced, is_fused, is_look, trace
from ..recognize.watch import ChildPath, Watched, children_of, forward_replaced, get, has_hooks, is_wrapper
from ..spec import Act, Gate, SqueezeExciteArgs
from ..spec.activations import of_layer
from ..spec.takes import COMMON, depthwise_form_refusal

for _name in ("conv1x1", "depthwise", "squeeze_excite"):
    torch.fx.wrap(_name)  # torch.fx's symbolic tracing records the call and doesn't look inside


class Layout(NamedTuple):
    """Names and kinds of the children of each module down to the layers, by its path: what a fused module leaps over."""

    kinds: dict[ChildPath, dict[str, type]]
    read_afresh: tuple[str, ...]
    """Children of the root that aren't leapt over."""
    exact: bool
    """Whether the forward sees each child and its class: then not even a norm may go, nor one child take another's place."""

    @classmethod
    def of(
        cls,
        module: nn.Module,
        beside: Collection[ChildPath] = (),
        read_afresh: Collection[str] = (),
        exact: bool = False,
    ) -> Layout:
        """That of ``module``, but what is inside fused modules and at the paths ``beside``, which run themselves, and in the
        children ``read_afresh``."""
        kinds = _kinds(module, (), {*beside, *((name,) for name in read_afresh)}, exact)
        return cls(kinds, tuple(read_afresh), exact)

    def holds(self, root: nn.Module) -> bool:
        """Whether nothing has been added, removed or replaced by another kind, and nobody looks on by hooks. Only norms may
        have gone, folded into their convolutions."""
        if nn.modules.module._has_any_global_hook():
            return False
        seen: set[int] = set()
        for path, kinds in self.kinds.items():
            free = () if path else self.read_afresh
            children = children_of(get(root, path))
            for name, child in children.items():
                if name in free:
                    continue
                kind = kinds.get(name)
                gone = type(child) is nn.Identity and kind in ghost.NORMS and not self.exact
                if type(child) is not kind and not gone:
                    return False
                if child is not None and (has_hooks(child) or forward_replaced(child)):
                    return False
            if self.exact:
                found = [id(child) for child in children.values() if child is not None]
                if list(children) != list(kinds) or len({*found}) < len(found) or not seen.isdisjoint(found):
                    return False
                seen.update(found)
            there = [name for name in kinds if name in children and name not in free]
            if there != [name for name in children if name not in free]:  # a Sequential runs them in this order
                return False
            for name, kind in kinds.items():
                if name not in children and kind not in ghost.NORMS and name not in free:
                    return False
        return True


def _kinds(
    module: nn.Module, path: ChildPath, beside: Collection[ChildPath], leaves: bool
) -> dict[ChildPath, dict[str, type]]:
    if is_fused(module) or (not module._modules and not leaves) or path in beside:
        return {}
    found: dict[ChildPath, dict[str, type]] = {path: {name: type(m) for name, m in module._modules.items()}}
    for name, child in module._modules.items():
        if child is not None:
            found |= _kinds(child, (*path, name), beside, leaves)
    return found


class Run(NamedTuple):
    """conv → norm → activation, of which the last two may be missing; or a single layer of any other kind."""

    paths: tuple[ghost.Layer, ...]

    def __call__(
        self, root: nn.Module, x: Tensor, backend: str, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """This of x * gate, plus residual: in one kernel where there is one, else layer by layer."""
        layers = [ghost.layer_at(root, layer) for layer in self.paths]
        half = ghost.read_layers(layers)
        if isinstance(half, str) or half.batch_statistics or (kind := _kind(half)) is None:
            note_others()
            out = x if gate is None else x * gate[:, :, None, None]
            for layer in layers:
                out = layer(out)
            return out if residual is None else out + residual
        conv = half.weight
        settings = {"bias": half.bias, "bn": half.norm, "act": half.act, "slope": half.slope, "backend": backend}
        if kind == "conv1x1":
            return conv1x1(x, conv, **settings, input_gate=gate, residual=residual)  # type: ignore[arg-type]
        if gate is not None:
            x = x * gate[:, :, None, None]
        out = depthwise(x, conv, **settings, stride=half.conv.stride[0])  # type: ignore[arg-type]
        return out if residual is None else out + residual

    def kind(self, root: nn.Module) -> str | None:
        """Which function computes this in a kernel, whatever the norm's mode: "conv1x1", "depthwise" or none."""
        half = ghost.read_layers([ghost.layer_at(root, layer) for layer in self.paths])
        return None if isinstance(half, str) else _kind(half)


def _kind(half: ghost.Half) -> str | None:
    """Which function computes ``half`` in a kernel: "conv1x1", "depthwise" or none."""
    conv = half.conv
    channels, per_group, kh, kw = half.weight.shape
    padding = (kh // 2, kw // 2)
    if (
        conv.padding_mode != "zeros"
        or min(conv.dilation) < 1
        or kh % 2 == 0
        or kw % 2 == 0
        or conv.stride[0] != conv.stride[1]
    ):
        return None
    if conv.padding != padding and not (conv.padding == "same" and conv.stride[0] == 1):
        return None
    if kh == kw == 1 and conv.groups == 1 and conv.stride[0] == 1:
        return "conv1x1"
    if conv.groups != channels or channels != conv.in_channels or per_group != 1 or conv.dilation != (1, 1):
        return None
    return None if depthwise_form_refusal((kh, kw), conv.stride[0], COMMON) else "depthwise"


def split(layers: Sequence[tuple[ghost.Layer, nn.Module | Known]]) -> list[Run]:
    """Groups layers that follow each other into runs; a layer that begins no conv and continues none stands alone."""
    runs: list[list[tuple[ghost.Layer, nn.Module | Known]]] = []
    for path, layer in layers:
        if isinstance(layer, nn.Module) and ghost.is_nothing(layer):
            continue
        if runs and not isinstance(ghost.read_layers(m for _, m in (*runs[-1], (path, layer))), str):
            runs[-1].append((path, layer))
        else:
            runs.append([(path, layer)])
    return [Run(tuple(path for path, _ in run)) for run in runs]


class SqueezeExcite(NamedTuple):
    """A squeeze-and-excite block: where its two 1×1 convolutions or Linear layers are, and what it does besides."""

    reduce: ChildPath
    expand: ChildPath
    act: Act
    gate: Gate

    @property
    def paths(self) -> tuple[ChildPath, ...]:
        return self.reduce, self.expand

    def __call__(self, root: nn.Module, x: Tensor, backend: str) -> Tensor:
        """The gate, (N, C)."""
        (reduce, reduce_bias), (expand, expand_bias) = (_held(get(root, path)) for path in self.paths)
        if is_wrapper(reduce) or is_wrapper(expand):
            note_others()
            return reference.run(
                SqueezeExciteArgs(x, reduce, reduce_bias, expand, expand_bias, self.act, self.gate)  # type: ignore[arg-type]
            )
        biases = {"reduce_bias": reduce_bias, "expand_bias": expand_bias}
        return squeeze_excite(x, reduce, expand, **biases, act=self.act, gate=self.gate, backend=backend)  # type: ignore[arg-type]


def _held(layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Its weight and bias: parameters, or else buffers or attributes, as in DataParallel's replicas."""
    held = layer._parameters
    return (held["weight"], held["bias"]) if "weight" in held and "bias" in held else (layer.weight, layer.bias)  # type: ignore[return-value]


def _matrices(block: nn.Module) -> list[tuple[ChildPath, nn.Module]]:
    """The descendants of ``block`` that have tensors: two of them, each a Linear or a 1×1 conv; else nothing."""
    found = [
        (tuple(name.split(".")), m)
        for name, m in block.named_modules()
        if m is not block and (m._parameters or m._buffers)
    ]
    for _, m in found:
        if type(m) is not nn.Linear and not (
            type(m) is nn.Conv2d
            and m.kernel_size == (1, 1)
            and m.groups == 1
            and m.stride == (1, 1)
            and m.padding == (0, 0)
        ):
            return []
    sizes = [tuple(m._parameters["weight"].shape[:2]) for _, m in found]  # type: ignore[union-attr]
    return found if len(found) == 2 and sizes[0] == sizes[1][::-1] and not (block._parameters or block._buffers) else []


def read_squeeze_excite(block: nn.Module, path: ChildPath) -> tuple[SqueezeExcite, Watched] | None:
    """``block`` as a squeeze-and-excite block, and what its forward reads; None if it doesn't compute x times such a gate.

    Its graph says that x goes through a mean, the two matrices with one activation between them, and functions of single
    numbers; which of the gates these are is tried on random numbers.
    """
    matrices = _matrices(block)
    if not matrices or ghost.unusual(block) or any(has_hooks(m) for m in block.modules()):
        return None
    traced = trace(block)
    (reduce, first), (expand, _) = matrices
    if isinstance(traced, str) or (act := _act_between(traced, block, reduce, expand)) not in COMMON.gate_acts:
        return None
    channels = first._parameters["weight"].shape[1]  # type: ignore[union-attr]
    try:
        with substituted(block, channels, training=False, draws=False) as (twin, x):
            expected = undisturbed(twin.forward)(x)
            for gate in Gate:
                found = SqueezeExcite(reduce, expand, act, gate)
                out = x * found(twin, x, "reference")[:, :, None, None]
                if out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-10, atol=1e-12):
                    watched = Watched()
                    watched.update(traced.watched, path)
                    for name, m in block.named_modules():
                        if m is not block:
                            watch_settings(m, path + tuple(name.split(".")), watched)
                    return found._replace(reduce=path + reduce, expand=path + expand), watched
    except Exception:  # whatever it does, it isn't this
        return None
    return None


_VIEWS = ("view", "reshape", "flatten", "squeeze", "unsqueeze", "expand_as")
_OF_NUMBERS = ("sigmoid", "hardsigmoid", "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "add", "add_",
               "iadd", "sub", "mul", "mul_", "imul", "div", "div_", "truediv", "itruediv", "silu", "hardswish", "sigmoid_")  # fmt: skip
_MEANS = ("mean", "adaptive_avg_pool2d", "avg_pool2d")
_MEAN_LAYERS = (nn.AdaptiveAvgPool2d,)
_LAYERS_OF_NUMBERS = (nn.Sigmoid, nn.Hardsigmoid, nn.ReLU6, nn.Hardtanh, nn.Identity, nn.Flatten, nn.Unflatten)


def _adds_dimensions(node: fx.Node) -> bool:
    """Whether a step is ``x[:, :, None, None]`` or the like."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    return all(index is None or index is Ellipsis or index == slice(None) for index in node.args[1])


def _act_between(traced: Traced, block: nn.Module, reduce: ChildPath, expand: ChildPath) -> Act | None:
    """The activation between the matrices, of which there is one at most. None unless it is known, and only a mean sees the
    input, but for the last product."""
    matrices = [".".join(reduce), ".".join(expand)]
    stage, acts = 0, []  # before the mean, after it, after the first matrix, after the second
    for node in traced.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node is traced.start or is_look(node):
            continue
        if node.op == "call_module":
            layer = get(block, tuple(str(node.target).split(".")))
            if node.target in matrices:
                stage += 1
                if stage < 2 or node.target != matrices[stage - 2]:
                    return None
            elif isinstance(layer, _MEAN_LAYERS) and stage <= 1:
                stage = 1
            elif stage == 2 and (act := of_layer(layer)) is not None:
                acts.append(act)
            elif not (isinstance(layer, _LAYERS_OF_NUMBERS) and stage in (1, 3)) and not ghost.is_nothing(layer):
                return None
        elif name in _MEANS and stage <= 1:
            stage = 1
        elif (name in _VIEWS or _adds_dimensions(node)) and stage > 0:
            continue
        elif stage == 2 and (act := called(node)) is not None:
            acts.append(act)
        elif name not in _OF_NUMBERS or stage != 3:
            return None
        last = node is traced.result
        if (
            traced.start in node.all_input_nodes
            and not last
            and not (stage == 1 and (name in _MEANS or node.op == "call_module"))
        ):
            return None
    return None if stage != 3 or len(acts) > 1 else acts[0] if acts else Act.NONE
