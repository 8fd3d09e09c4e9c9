"""What the graph of a forward says: chains of layers, and the two halves of a Ghost module in it."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..spec import Act
from .activations import called, watch_settings
from .trace import Traced, is_look, more_than_one_tensor, shown
from .watch import ChildPath, get

Layer = ChildPath | tuple[ChildPath, Act] | Act
"""Where a layer is; with the activation that somebody's own layer computes; or an activation that is no layer."""

_CAT = (torch.cat, torch.concat, torch.concatenate)
_REARRANGES = (
    "view", "reshape", "permute", "transpose", "swapaxes", "flatten", "unflatten", "contiguous", "chunk", "unbind", "data",
    torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.flatten, torch.chunk, torch.unbind, torch.stack,
    torch.channel_shuffle, F.channel_shuffle, *_CAT,
)  # fmt: skip
_MOVING = (nn.ChannelShuffle, nn.Flatten, nn.Unflatten)
"""Layers that do the same."""
_GATING = (F.avg_pool2d, torch.sigmoid, F.sigmoid, F.interpolate, operator.mul, operator.imul, torch.mul)


def _without(traced: Traced, nothing: Collection[str]) -> Traced:
    """The same but the calls of the layers ``nothing``, which give out what they are given."""
    nodes: list[fx.Node] = []
    given: dict[Any, Any] = {}
    for node in traced.nodes:
        argument = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if node.op == "call_module" and node.target in nothing and isinstance(argument, fx.Node):
            node.args = ()
            node.replace_all_uses_with(argument)
            given[node] = argument
        else:
            nodes.append(node)
    return traced._replace(nodes=nodes, result=fx.node.map_aggregate(traced.result, lambda n: given.get(n, n)))


def halves_of(
    traced: Traced, root: nn.Module, attention: str | None, acts: dict[ChildPath, Act]
) -> tuple[tuple[Layer, ...], tuple[Layer, ...], int | None, bool] | str:
    """The layers of both halves, in the order they run, where the output is cut, and whether its numbers change places
    after that; or why ``root``, of which the graph is, isn't such."""
    layers = {
        str(node.target): get(root, tuple(str(node.target).split(".")))
        for node in traced.nodes
        if node.op == "call_module"
    }
    traced = _without(traced, {name for name, layer in layers.items() if type(layer) is nn.Identity})
    moving = {name for name, layer in layers.items() if isinstance(layer, _MOVING)}
    for name in moving:
        watch_settings(layers[name], tuple(name.split(".")), traced.watched)
    if reason := more_than_one_tensor(traced):
        return reason
    cats = [node for node in traced.nodes if node.op == "call_function" and node.target in _CAT]
    rearranged = _rearranged(traced, cats[0], moving) if cats else set()
    if not rearranged.issuperset(cats[1:]):
        return "it concatenates more than once"
    given = cats[0].args[0] if cats and cats[0].args else None
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(isinstance(n, fx.Node) for n in given):
        return "its output is no concatenation of two tensors"
    cat, one, two = cats[0], cast(fx.Node, given[0]), cast(fx.Node, given[1])
    dim = cat.args[1] if len(cat.args) == 2 else cat.kwargs.get("dim", cat.kwargs.get("axis", 0))
    if dim not in (1, -3) or len(cat.args) + len(cat.kwargs) > 2:
        return f"it concatenates along dimension {dim}, not 1"
    first, second = chain(one, traced.start), chain(two, one)
    if isinstance(first, str) and one is not two and isinstance(chain(one, two), list):
        return "it concatenates its ghost maps before its primary maps"
    if isinstance(first, str) or isinstance(second, str):
        return first if isinstance(first, str) else str(second)
    if not first or not second:
        return "one of the tensors that it concatenates is not the result of a convolution"
    known = {traced.start, cat, *first, *second, *rearranged}
    cuts: list[int] = []
    for node in traced.nodes:
        if node in known or is_look(node):
            continue
        gates = node.op == "call_function" and node.target in _GATING
        gates |= node.op == "call_method" and node.target in ("sigmoid", "mul", "mul_")
        # the proof tells whether a layer of torch's beside the halves is a sigmoid
        gates |= node.op == "call_module" and (
            str(node.target).partition(".")[0] == attention or "." not in str(node.target)
        )
        if (cut := _cut_of(node)) and rearranged.isdisjoint(node.all_input_nodes):
            cuts.append(cut)
        elif attention is not None and gates:
            name = str(node.target)
            if (
                node.op == "call_module" and name.partition(".")[0] != attention
            ):  # its pooling, say, which is leapt over
                watch_settings(layers[name], (name,), traced.watched)
        else:
            return f"{shown(node)} ({node.op.removeprefix('call_')}) is no step of a Ghost module"
    if len(cuts) > 1:
        return "its output is cut more than once"
    if rearranged and attention is not None:
        return "it gives out its maps in another order"
    places = [tuple(layer_of(node, acts) for node in chain) for chain in (first, second)]
    return places[0], places[1], cuts[0] if cuts else None, bool(rearranged)


def _rearranged(traced: Traced, cat: fx.Node, moving: Collection[str]) -> set[fx.Node]:
    """The steps that only move the numbers of ``cat``, such as GSConv's shuffle; the proof tells whether it is that one."""
    found, start = set[fx.Node](), {cat, *(user for user in cat.users if _cut_of(user))}
    for node in traced.nodes:
        tensors = {given for given in node.all_input_nodes if not is_look(given)}
        moves = node.target in moving if node.op == "call_module" else _moves(node)
        if moves and tensors and tensors <= start | found and node not in start and not is_look(node):
            found.add(node)
    return found


def _moves(node: fx.Node) -> bool:
    if node.target is operator.getitem:  # one of several, of a tuple or along a dimension
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(i, int) or i in (slice(None), Ellipsis) for i in index)
    return (node.args[1] if node.target is getattr else node.target) in _REARRANGES


def gate_form(traced: Traced, attention: str) -> str:
    """How the child ``attention`` makes a gate of x: of pooled x, with a sigmoid behind it ("pooled first"); of x, with
    pooling and a sigmoid behind it ("pooled last"); or by itself ("whole")."""
    calls = [n for n in traced.nodes if n.op == "call_module" and str(n.target).partition(".")[0] == attention]
    if not calls or traced.start not in calls[0].all_input_nodes:
        return "pooled first"
    behind = {user for user in calls[-1].users if not is_look(user)}
    scales = (F.interpolate, operator.mul, operator.imul, torch.mul, "mul", "mul_")
    return "whole" if all(node.target in scales for node in behind) else "pooled last"


def layer_of(node: fx.Node, acts: dict[ChildPath, Act]) -> Layer:
    """Where the layer is that a step calls."""
    if node.op != "call_module":
        act = called(node)
        assert act is not None
        return act
    path = tuple(str(node.target).split("."))
    return (path, acts[path]) if path in acts else path


def chain(node: object, start: fx.Node) -> list[fx.Node] | str:
    """The calls of layers and activations from ``start`` to ``node``, each on the result of the one before."""
    calls: list[fx.Node] = []
    while node is not start:
        if not isinstance(node, fx.Node):
            return f"{node} is no tensor that is computed from its input"
        layer = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
        if not (layer or called(node) is not None) or not isinstance(node.args[0], fx.Node):
            return f"{shown(node)} is no layer that is called on the result of one other"
        if calls and sum(not is_look(user) for user in node.users) > 1:
            return f"the result of {shown(node)} is used more than once"
        calls.insert(0, node)
        node = node.args[0]
    return calls


def _cut_of(node: fx.Node) -> int | None:
    """n of a step ``[:, :n]``."""
    index = node.args[1] if node.op == "call_function" and node.target is operator.getitem else None
    if (
        not isinstance(index, tuple)
        or len(index) < 2
        or not all(isinstance(i, slice) and i.step is None for i in index)
    ):
        return None
    whole = all(i.start is None and i.stop is None for i in (index[0], *index[2:]))
    stop = index[1].stop
    return stop if whole and index[1].start in (None, 0) and isinstance(stop, int) and stop > 0 else None
