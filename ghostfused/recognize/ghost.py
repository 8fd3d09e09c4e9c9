"""Reads Ghost modules, other people's too, by structure and by what they compute; never by class name.

``read_half`` says what one half (conv → norm → activation) holds at this moment, or why it can't be read; the
forward of FusedGhostModule asks it at every call, so nothing goes stale. ``read`` finds the two halves of
somebody's module; ``equivalence.py`` then runs that module beside its fused twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import MethodType
from typing import NamedTuple

from torch import Tensor, nn

from ..spec import Act, BatchNorm
from ..spec.activations import BY_MODULE as ACTIVATIONS
from .equivalence import substituted
from .reads import Reads, reads
from .swap import PACKAGE

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Half(NamedTuple):
    """What one half of a Ghost module holds: the modules' own tensors, not copies."""

    conv: nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    act: Act
    slope: float | Tensor | None
    """LeakyReLU's slope or PReLU's weight."""
    batch_norm: nn.Module | None
    """The norm, if it would use the batch's statistics, not stored ones."""

    @property
    def batch_statistics(self) -> bool:
        return self.batch_norm is not None


class Adopted(NamedTuple):
    """Where a Ghost module keeps its halves."""

    primary: str
    """Name of the child that is conv → norm → activation."""
    cheap: str
    """Name of the child that is depthwise conv → norm → activation."""
    in_channels: int
    out_channels: int
    """Of its output: at most those of both halves together."""
    reads: Reads
    """What its forward reads beside tensors and children."""
    attention: str | None = None
    """Name of the child that makes the gate of GhostNetV2's DFC attention."""


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def forward_replaced(block: nn.Module) -> bool:
    """Whether a block's forward is no method of its class but one put on the instance, as offloading tools do.

    Switching to another method of the class (ultralytics' ``forward_fuse``) is the class's own business.
    """
    forward = block.__dict__.get("forward")
    return forward is not None and not (
        isinstance(forward, MethodType) and getattr(type(block), forward.__name__, None) is forward.__func__
    )


def read_half(block: nn.Module) -> Half | str:
    """The tensors and settings of ``block``'s convolution, norm and activation; or why it can't be taken apart.

    The children count in the order of registration: one Conv2d, at most one BatchNorm, at most one activation.
    """
    if has_hooks(block) or forward_replaced(block):
        return f"{type(block).__name__} has hooks or another forward"
    return read_layers(block._modules.values())


def read_layers(layers: Iterable[nn.Module | None]) -> Half | str:
    """What ``layers``, run one after the other, hold; or why they can't be taken apart.

    Every call of a fused module comes through here: this reads instance dictionaries, since ``nn.Module.__getattr__``
    costs more than all the rest.
    """
    conv: nn.Conv2d | None = None
    norm: BatchNorm | None = None
    act: Act | None = None
    slope: float | Tensor | None = None
    batch_norm: nn.Module | None = None
    normed = False
    for child in _with_activations(layers):
        if child is None:
            continue
        kind = type(child)
        if has_hooks(child) or "forward" in child.__dict__:
            return f"{kind.__name__} has hooks or another forward"
        if kind is nn.Conv2d and conv is None:
            conv = child  # type: ignore[assignment]
        elif (kind in NORMS or _has_activation(child)) and conv is not None and act is None and not normed:
            normed = True
            affine, buffers = child._parameters, child._buffers
            if "weight" not in affine or "bias" not in affine:
                return f"{kind.__name__}, whose weight or bias is no parameter of it"
            mean, var = buffers["running_mean"], buffers["running_var"]
            if child.training or mean is None or var is None:
                batch_norm, mean, var = child, None, None
            norm = BatchNorm(mean, var, affine["weight"], affine["bias"], child.eps)  # type: ignore[arg-type]
        elif kind in ACTIVATIONS and conv is not None and act is None:
            act = ACTIVATIONS[kind]
            if kind is nn.LeakyReLU:
                slope = child.negative_slope  # type: ignore[assignment]
            elif kind is nn.PReLU:
                slope = child._parameters["weight"]
            elif kind is nn.GELU and child.approximate != "none":
                return f"GELU with approximate={child.approximate!r}"
        elif kind is not nn.Identity and (kind is not nn.Sequential or child._modules):
            return f"{kind.__name__} at a place where it is not understood"
    if conv is None:
        return "no Conv2d"
    parameters = conv._parameters
    if "weight" not in parameters or "bias" not in parameters:  # torch.nn.utils.weight_norm, DataParallel's replicas
        return "Conv2d, whose weight or bias is no parameter of it"
    weight: Tensor = parameters["weight"]  # type: ignore[assignment]
    return Half(conv, weight, parameters["bias"], norm, Act.NONE if act is None else act, slope, batch_norm)


def _has_activation(layer: nn.Module | None) -> bool:
    """Whether ``layer`` may be a norm with the activation as its child, such as timm's BatchNormAct2d."""
    return isinstance(layer, nn.BatchNorm2d) and type(layer) not in NORMS and len(layer._modules) > 0


def _with_activations(layers: Iterable[nn.Module | None]) -> Iterator[nn.Module | None]:
    for layer in layers:
        yield layer
        if _has_activation(layer):
            yield from layer._modules.values()  # type: ignore[union-attr]


def mismatch(primary: Half, cheap: Half) -> str | None:
    """Why ``functional.ghost_module`` can't do what these two convolutions do one after the other; None if it can.

    It takes odd square kernels, zero padding that keeps the size, equal strides and dilations in both directions,
    and a cheap operation that is depthwise, at stride and dilation 1.
    """
    conv = primary.conv
    channels, _, k, k2 = primary.weight.shape
    stride, dilation, padding = conv.stride, conv.dilation, conv.padding
    if k != k2 or k % 2 == 0 or stride[0] != stride[1] or dilation[0] != dilation[1]:
        return "the primary conv's kernel is even, or its kernel, stride or dilation is not square"
    same = dilation[0] * (k // 2)
    if (padding != (same, same) and padding != "same") or conv.padding_mode != "zeros":
        return f"the primary conv's padding is {padding} ({conv.padding_mode}), not {same} zeros"
    conv = cheap.conv
    new_channels, per_group, d, d2 = cheap.weight.shape
    if conv.groups != channels or per_group != 1 or new_channels % channels:
        return f"the second conv is not depthwise over the {channels} maps of the first"
    if d != d2 or d % 2 == 0 or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return "the cheap operation's kernel is not odd and square, or its stride or dilation is not 1"
    padding = conv.padding
    if (padding != (d // 2, d // 2) and padding != "same") or conv.padding_mode != "zeros":
        return f"the cheap operation's padding is {padding} ({conv.padding_mode}), not {d // 2} zeros"
    return None


# Overriding these changes no behaviour that a fused module has to keep, or is what ``prove`` is for.
_MAY_OVERRIDE = {"__init__", "__repr__", "__dir__", "extra_repr", "forward"}
_METHODS = {name for name, value in vars(nn.Module).items() if inspect.isfunction(value)} - _MAY_OVERRIDE


def _is_torchs_or_ours(kind: type[nn.Module], name: str) -> bool:
    method = getattr(kind, name)
    return method is getattr(nn.Module, name) or method.__module__.partition(".")[0] == PACKAGE


def unusual(module: nn.Module) -> str | None:
    """Why ``module`` is more than its children and its class's forward; None if it isn't."""
    kind = type(module)
    overridden = sorted(name for name in _METHODS if not _is_torchs_or_ours(kind, name))
    if overridden:
        return f"{kind.__name__} overrides {', '.join(overridden)} of nn.Module"
    return "its forward is replaced on the instance" if "forward" in module.__dict__ else None


def read(module: nn.Module) -> Adopted | str:
    """Where ``module``'s halves are and how many channels it gives out; or why it is no Ghost module that can be fused.

    Runs ``module.forward`` once, on a small random input with random weights in place of its own.
    """
    if reason := unusual(module):
        return reason
    halves: dict[str, Half] = {}
    refusals = []
    for name, child in module._modules.items():
        if child is None:
            continue
        half = read_half(child)
        if not isinstance(half, str):
            halves[name] = half
        elif child._modules or child._parameters:
            refusals.append(f"{name}: {half}")
    pairs = [(p, c) for p in halves for c in halves if p != c and mismatch(halves[p], halves[c]) is None]
    if not pairs:
        if len(halves) >= 2:
            first, second, *_ = halves
            refusals.append(f"{first}, {second}: {mismatch(halves[first], halves[second])}")
        found = f"{len(halves)} children of the form conv, BatchNorm, activation; a Ghost module has 2"
        return "; ".join(refusals) or found
    primary, cheap = pairs[0]  # where both orders fit, the order of registration: ``prove`` tells if that is wrong

    known = [primary, cheap]
    attention = next((name for name, m in module._modules.items() if name not in known and _may_make_a_gate(m)), None)
    if attention is not None:
        known.append(attention)
    blocks = nn.ModuleList([module._modules[name] for name in known])  # type: ignore[misc]
    ids = {id(t) for t in (*blocks.parameters(), *blocks.buffers())}
    further = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if id(t) not in ids]
    if further:
        return f"it has tensors beside {' and '.join(known)}: {', '.join(further[:3])}"
    inner = [name for name, child in module.named_modules() if child is not module and has_hooks(child)]
    if inner:
        return f"hooks on {', '.join(inner)}"

    read_by_it = reads(module)
    if isinstance(read_by_it, str):  # before it runs: it might write into a log
        return read_by_it
    try:
        with substituted(module, halves[primary].conv.in_channels, training=False) as x:
            out = module.forward(x)
    except Exception as error:
        return f"it doesn't run on a float64 tensor on the CPU: {type(error).__name__}: {error}"
    if not isinstance(out, Tensor) or out.dim() != 4:
        return "it doesn't return one 4-dimensional tensor"
    init_channels = halves[primary].weight.shape[0]
    channels = init_channels + halves[cheap].weight.shape[0]
    if not init_channels <= out.shape[1] <= channels:
        return f"it returns {out.shape[1]} channels, no concatenation of {init_channels} and {channels - init_channels}"
    return Adopted(primary, cheap, halves[primary].conv.in_channels, out.shape[1], read_by_it, attention)


def _may_make_a_gate(child: nn.Module | None) -> bool:
    """Whether ``child`` could be the convolutions of DFC attention; the proof tells whether it is."""
    return type(child) is nn.Sequential and sum(type(m) is nn.Conv2d for m in child) == 3
