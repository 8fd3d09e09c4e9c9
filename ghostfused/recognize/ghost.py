"""Reads Ghost modules, other people's too, by structure and by what they compute; never by class name.

``read_half`` says what one half (conv → norm → activation) holds at this moment, or why it can't be read; the
forward of FusedGhostModule asks it at every call, so nothing goes stale. ``read`` finds the two halves of
somebody's module; ``equivalence.py`` then runs that module beside its fused twin.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

from torch import Tensor, nn

from ..spec import Act, BatchNorm
from ..spec.activations import BY_MODULE, of_layer
from .activations import Activations, Known
from .graph import Layer, gate_form, halves_of
from .swap import PACKAGE
from .trace import is_fused, is_layer, scripted, trace
from .watch import CALLED, ChildPath, Watched, forward_replaced, get, has_hooks, hides_any, is_wrapper

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_HIDDEN = {
    kind: CALLED.union(n for base in kind.__mro__ for n, value in vars(base).items() if inspect.isfunction(value))
    for kind in (nn.Conv2d, *NORMS, *BY_MODULE)
}
"""Names that, on an instance, hide a method of its class, such as ``_conv_forward``, which people replace."""


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


Place = str | tuple[Layer, ...]
"""Where a half is: the name of the child that is conv → norm → activation, or the layers in the order they run."""


def layer_at(root: nn.Module, layer: Layer) -> nn.Module | Known:
    """The layer of ``root`` that is there now."""
    if isinstance(layer, Act):
        return Known(layer, None)
    if len(layer) == 2 and isinstance(layer[1], Act):
        return Known(layer[1], get(root, cast(ChildPath, layer[0])))
    return get(root, cast(ChildPath, layer))


class Recognized(NamedTuple):
    """Where a Ghost module keeps its halves."""

    primary: Place
    cheap: Place
    """Depthwise over the primary's maps."""
    in_channels: int
    cut: int | None
    """How many channels it gives out at most."""
    watched: Watched
    """What its forward reads beside tensors and children."""
    attention: str | None = None
    """Name of the child that makes the gate of GhostNetV2's DFC attention."""
    gate_form: str = "pooled first"
    """How: see ``graph.gate_form``."""
    shuffled: bool = False
    """Whether its output has the maps in another order, as GSConv's has."""

    @property
    def read_afresh(self) -> tuple[str, ...]:
        """The children of which a fused module reads at each call what they are: its halves, and what makes the gate. None where
        the forward does something else for another layer in them."""
        if self.watched.looks:
            return ()
        names = tuple(place for place in (self.primary, self.cheap) if isinstance(place, str))
        return (*(names if len(names) == 2 else ()), *((self.attention,) if self.attention else ()))

    def out_channels(self, module: nn.Module) -> int:
        """Of the output of ``module``, as its tensors are."""
        channels = 0
        for place in (self.primary, self.cheap):
            half = read_place(module, place)
            assert not isinstance(half, str)
            channels += half.weight.shape[0]
        return channels if self.cut is None else min(self.cut, channels)


def read_place(root: nn.Module, place: Place) -> Half | str:
    """The half of ``root`` at ``place``."""
    if isinstance(place, str):
        # torch.export's stand-in for a module has another _modules
        return read_half(root.__dict__["_modules"].get(place) or nn.Identity())
    return read_layers(layer_at(root, layer) for layer in place)


def read_half(block: nn.Module) -> Half | str:
    """The tensors and settings of ``block``'s convolution, norm and activation; or why it can't be taken apart.

    The children count in the order of registration: one Conv2d, at most one BatchNorm, at most one activation.
    """
    if has_hooks(block) or forward_replaced(block):
        return f"{type(block).__name__} has hooks or another forward"
    if getattr(type(block), "forward", None) is nn.Sequential.forward and None in block._modules.values():
        return f"{type(block).__name__} has a child that is None"
    return read_layers([block] if type(block) is nn.Conv2d else block._modules.values())


def read_layers(layers: Iterable[nn.Module | Known | None]) -> Half | str:
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
        if isinstance(child, Known):
            if conv is None or act is not None:
                return f"{child.act.name.lower()} {_misplaced(conv, act)}"
            act = child.act
            continue
        kind = type(child)
        if has_hooks(child) or hides_any(child, _HIDDEN.get(kind, CALLED)):
            return f"{kind.__name__} has hooks or another forward"
        if kind is nn.Conv2d and conv is None:
            conv = child  # type: ignore[assignment]
        elif (kind in NORMS or _has_activation(child)) and conv is not None and act is None and not normed:
            normed = True
            affine, buffers = child._parameters, child._buffers
            if "weight" not in affine or "bias" not in affine:
                return f"{kind.__name__}, whose weight or bias is no parameter of it"
            if type(child.eps) is not float and type(child.eps) is not int:
                return f"{kind.__name__}, whose eps is a {type(child.eps).__name__}"
            if "running_mean" not in buffers or "running_var" not in buffers:
                return f"{kind.__name__}, whose statistics are no buffers of it"
            mean, var = buffers["running_mean"], buffers["running_var"]
            if child.training or mean is None or var is None:
                batch_norm, mean, var = child, None, None
            norm = BatchNorm(mean, var, affine["weight"], affine["bias"], child.eps)  # type: ignore[arg-type]
        elif kind in BY_MODULE and conv is not None and act is None:
            act = of_layer(child)
            if kind is nn.LeakyReLU:
                slope = child.negative_slope  # type: ignore[assignment]
                if type(slope) is not float and type(slope) is not int:
                    return f"LeakyReLU, whose slope is a {type(slope).__name__}"
            elif kind is nn.PReLU:
                slope = child._parameters.get("weight")
                if slope is None or slope.dim() != 1:  # PyTorch takes a single number as well
                    return "PReLU, whose weight is no vector among its parameters"
            elif act is None:
                names = ("approximate",) if kind is nn.GELU else ("min_val", "max_val")
                return f"{kind.__name__} with {', '.join(f'{n}={getattr(child, n)!r}' for n in names)}"
        elif kind is not nn.Identity and (kind is not nn.Sequential or child._modules):
            known = kind is nn.Conv2d or kind in NORMS or kind in BY_MODULE
            return f"{kind.__name__} {_misplaced(conv, act) if known else 'is no layer that a kernel computes'}"
    if conv is None:
        return "no Conv2d"
    parameters = conv._parameters
    if "weight" not in parameters or "bias" not in parameters:  # torch.nn.utils.weight_norm, DataParallel's replicas
        return "Conv2d, whose weight or bias is no parameter of it"
    if not _is_pair(conv.stride) or not _is_pair(conv.dilation):
        return f"Conv2d, whose stride or dilation, {conv.stride} and {conv.dilation}, is no pair of ints"
    weight: Tensor = parameters["weight"]  # type: ignore[assignment]
    if weight is None or weight.dim() != 4:
        return "Conv2d, whose weight has not four dimensions"
    if is_wrapper(weight):
        return f"Conv2d, whose weight is a {type(weight).__name__}"
    return Half(conv, weight, parameters["bias"], norm, Act.NONE if act is None else act, slope, batch_norm)


def _is_pair(value: object) -> bool:
    """Whether a convolution's setting is what Conv2d makes of it; PyTorch takes an int or a list as well."""
    return type(value) is tuple and len(value) == 2 and type(value[0]) is type(value[1]) is int


def _misplaced(conv: nn.Module | None, act: Act | None) -> str:
    if conv is None:
        return "before any Conv2d"
    return "after the Conv2d and its norm" if act is None else "after the activation"


def _has_activation(layer: object) -> bool:
    """Whether ``layer`` is a norm with the activation as its child, timm's BatchNormAct2d."""
    if type(layer) in NORMS or not isinstance(layer, nn.BatchNorm2d) or not layer._modules:
        return False
    return type(layer).__module__.partition(".")[0] == "timm"  # whose forward is known


def _with_activations(layers: Iterable[nn.Module | Known | None]) -> Iterator[nn.Module | Known | None]:
    for layer in layers:
        yield layer
        if isinstance(layer, nn.Module) and _has_activation(layer):
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


_COPIES = {
    "__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__", "__getstate__",
}  # fmt: skip


def unusual(module: nn.Module) -> str | None:
    """Why ``module`` is more than its children and its class's forward; None if it isn't."""
    kind = type(module)
    theirs = [base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins", PACKAGE)]
    overridden = sorted({name for base in theirs for name in vars(base).keys() & (_METHODS | _COPIES)})
    if overridden:
        return f"{kind.__name__} overrides {', '.join(overridden)} of nn.Module"
    return "its forward is replaced on the instance" if "forward" in module.__dict__ else None


def forward_is_known(module: nn.Module) -> bool:
    """Whether all that is unusual about ``module`` is ultralytics' switch to ``forward_fuse``."""
    return not has_hooks(module) and "forward" in module.__dict__ and not forward_replaced(module)


def read(module: nn.Module) -> Recognized | str:
    """Where ``module``'s halves are and how many channels it gives out; or why it is no Ghost module that can be fused."""
    if reason := scripted(module) or unusual(module):
        return reason
    if is_fused(module) and "_halves" in module.__dict__:
        return _of_fused(module)
    if is_layer(module):
        return f"{type(module).__name__} is one layer"
    halves = {n: read_half(child) for n, child in module._modules.items() if child is not None}
    reason = _by_structure(module, halves)
    convs = sum(isinstance(m, nn.Conv2d) for m in module.modules())
    if reason is not None and convs not in (2, 5):  # 3 are those of DFC attention
        return reason
    inner = [name for name, child in module.named_modules() if child is not module and has_hooks(child)]
    if inner:
        return reason or f"hooks on {', '.join(inner)}"
    attention = next((name for name, m in module._modules.items() if _may_make_a_gate(m)), None)
    own = Activations.of(module)
    whole = () if attention is None or type(module._modules[attention]) is nn.Sequential else (attention,)
    traced = trace(module, lambda m, path: is_layer(m) or path in own.acts or path == whole)
    if isinstance(traced, str):
        return traced if reason is None else f"{reason}; {traced}"
    traced.watched.update(own.watched)
    chains = halves_of(traced, module, attention, own.acts)
    if isinstance(chains, str):
        return reason or chains
    first, second, cut, shuffled = chains
    names = {layer[0] for layer in (*first, *second) if isinstance(layer, tuple) and isinstance(layer[0], str)}
    if len(names) == 1 and not any(isinstance(layer, Act) for layer in (*first, *second)):
        return f"all that it runs is inside {names.pop()}"
    primary, cheap = (_place(module, chain, halves) for chain in (first, second))
    both = [read_place(module, place) for place in (primary, cheap)]
    for name, half in zip((first, second), both, strict=True):
        if isinstance(half, str):
            return reason or f"{_name(name)}: {half}"
    one, two = both
    assert isinstance(one, Half)
    assert isinstance(two, Half)
    if refusal := mismatch(one, two):
        return f"{_name(primary)}, {_name(cheap)}: {refusal}"
    layers = [m for layer in (*first, *second) if isinstance(m := layer_at(module, layer), nn.Module)]
    blocks = nn.ModuleList(layers if attention is None else [*layers, module._modules[attention]])  # type: ignore[list-item]
    ids = {id(t) for t in (*blocks.parameters(), *blocks.buffers())}
    further = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if id(t) not in ids]
    if further:
        known = [_name(place) for place in (primary, cheap)] + ([] if attention is None else [attention])
        return f"it has tensors beside {' and '.join(known)}: {', '.join(further[:3])}"
    if attention is not None and not (isinstance(primary, str) and isinstance(cheap, str)):
        return f"{_name(primary)}, {_name(cheap)}: beside attention each half has to be one child"
    channels = one.weight.shape[0], two.weight.shape[0]
    if cut is not None and cut < channels[0]:  # it may be more than there are, after pruning
        return f"it returns {cut} channels, no concatenation of {channels[0]} and {channels[1]}"
    form = "pooled first" if attention is None else gate_form(traced, attention)
    return Recognized(primary, cheap, one.conv.in_channels, cut, traced.watched, attention, form, shuffled)


def claims_to_be_one(module: nn.Module) -> bool:
    """For reports only: whether somebody would expect ``module`` to be fused, by its name or by its halves."""
    if next(module.parameters(), None) is None:
        return False
    if any("ghost" in kind.__name__.lower() for kind in type(module).__mro__):
        return True
    halves = {n: read_half(child) for n, child in module._modules.items() if child is not None}
    names = getattr(getattr(getattr(type(module), "forward", None), "__code__", None), "co_names", ())
    if {"cat", "concat"}.isdisjoint(names) or len(halves) > 8:
        return False
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    cheap = [m for m in convs if m.groups == m.in_channels > 1]
    two = (
        len(convs) == 2
        and len(cheap) == 1
        and cheap[0].in_channels in {m.out_channels for m in convs if m not in cheap}
    )
    return two or _by_structure(module, halves) is None


def _of_fused(module: nn.Module) -> Recognized | str:
    """The same of one of ours."""
    state = module.__dict__
    primary, cheap = state["_halves"]
    half = read_place(module, primary)
    if isinstance(half, str):
        return f"{_name(primary)}: {half}"
    cut, watched = state.get("_cut", state["out_channels"]), state.get("_watched", Watched())
    attention, form, shuffled = state.get("_attention"), state.get("_gate_form", ""), state.get("_order") is not None
    return Recognized(primary, cheap, half.conv.in_channels, cut, watched, attention, form, shuffled)


def _by_structure(module: nn.Module, halves: dict[str, Half | str]) -> str | None:
    """Why no two children read as the halves of a Ghost module; None if two do."""
    found = {name: half for name, half in halves.items() if not isinstance(half, str)}
    if any(mismatch(found[p], found[c]) is None for p in found for c in found if p != c):
        return None
    refusals = [
        f"{name}: {half}"
        for name, half in halves.items()
        if isinstance(half, str) and (child := module._modules[name]) and (child._modules or child._parameters)
    ]
    if len(found) >= 2:
        first, second, *_ = found
        refusals.append(f"{first}, {second}: {mismatch(found[first], found[second])}")
    return "; ".join(refusals) or f"{next(iter(found), 'no child')} alone is conv, BatchNorm, activation, not two"


def _place(module: nn.Module, chain: tuple[Layer, ...], halves: dict[str, Half | str]) -> Place:
    """The child whose layers are these in the order of registration, or else the layers."""
    found = [layer_at(module, layer) for layer in chain]
    names = {layer[0] for layer in chain if isinstance(layer, tuple)}
    name = names.pop()
    if names or any(isinstance(m, Known) for m in found) or not isinstance(name, str) or isinstance(halves[name], str):
        return chain
    registered = list(_with_activations(module._modules[name]._modules.values()))  # type: ignore[union-attr]
    if any(map(_has_activation, registered)):  # the graph has it as one layer, with its activation
        registered = list(module._modules[name]._modules.values())  # type: ignore[union-attr]
    sides = ([id(m) for m in ms if isinstance(m, nn.Module) and not is_nothing(m)] for ms in (registered, found))
    return name if next(sides) == next(sides) else chain


def is_nothing(layer: nn.Module) -> bool:
    return type(layer) is nn.Identity or (type(layer) is nn.Sequential and not layer._modules)


def _name(place: Place) -> str:
    """A half's for people."""
    first = place if isinstance(place, str) else next(layer for layer in place if isinstance(layer, tuple))
    path = first[0] if isinstance(first[0], tuple) else first
    return path if isinstance(path, str) else ".".join(map(str, path))


def _may_make_a_gate(child: nn.Module | None) -> bool:
    """Whether ``child`` could be the convolutions of DFC attention, or make all of the gate; the proof tells whether it does."""
    return child is not None and sum(type(m) is nn.Conv2d for m in child.modules()) == 3
