"""The first pass over a graph of ``torch.export``: which of its nodes a kernel computes, with the norm and the activation that
follow each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ..backends import cpu
from ..spec import (
    DTYPES,
    OPS,
    POOL_KERNEL,
    Act,
    Args,
    AvgPoolArgs,
    CastArgs,
    ConcatArgs,
    DepthwiseArgs,
    Gate,
    GateArgs,
    GhostArgs,
    GlobalPoolArgs,
    LinearArgs,
    MaxPoolArgs,
    Step,
    UpsampleArgs,
    tensor_names,
)
from ..spec.activations import BY_OP, with_settings
from ..spec.takes import COMMON, kernel_refusal
from .frozen import ACTIVE

aten = torch.ops.aten
_NORMS = (aten._native_batch_norm_legit_no_training, aten.batch_norm)
_COPIES = (aten.clone, aten.contiguous, aten.alias, aten.detach, aten.lift_fresh_copy)
_VIEWS = (aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.squeeze)
_FREE = (*_COPIES, *_VIEWS, aten.sym_size, aten.slice, aten.select, aten.unsqueeze, aten.permute)
"""What costs PyTorch next to nothing, so that no kernel need compute it."""
_ASSERTIONS = (aten._assert_tensor_metadata,)
"""Of dtype and device, which a call's inputs are checked for."""


class Item:
    """A step, or one node that PyTorch runs."""

    def __init__(self, node: fx.Node, args: Step | None, inputs: Iterable[fx.Node]):
        self.node = node
        """The one whose value it makes; where it is a step, those before it have no other reader."""
        self.args = args
        """Of a step, with the nodes' example values in place of the tensors that the network computes."""
        self.inputs = list(dict.fromkeys(inputs))


def given_tensors(exported: torch.export.ExportedProgram) -> dict[fx.Node, Tensor]:
    """The model's own tensors by the nodes that stand for them."""
    signature = exported.graph_signature
    names = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants
    }  # fmt: skip
    tensors = {**exported.constants, **exported.state_dict}
    return {n: tensors[names[n.name]] for n in exported.graph.nodes if n.op == "placeholder" and n.name in names}


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def is_free(node: fx.Node) -> bool:
    is_tensor = isinstance(node.meta.get("val"), Tensor | tuple | list)  # else a size
    return not is_tensor or node.target is operator.getitem or _packet(node) in _FREE


class Steps:
    """The steps of a graph."""

    def __init__(self, graph: fx.Graph, given: dict[fx.Node, Tensor]):
        self.graph, self.given = graph, given
        self.items: dict[fx.Node, Item] = {}
        """By the node whose value each makes."""
        for node in graph.nodes:
            if node.op == "call_function" and _packet(node) not in _ASSERTIONS and not self._is_step(node):
                self.items[node] = Item(node, None, node.all_input_nodes)

    def live_items(self) -> tuple[list[Item], list[Any]]:
        """What the results depend on, in order, and the results."""
        (output,) = (node for node in self.graph.nodes if node.op == "output")
        results = list(output.args[0])  # type: ignore[arg-type]
        live = {node for node in results if isinstance(node, fx.Node)}
        for node, item in reversed(self.items.items()):
            if node in live:
                live.update(item.inputs)
        return [item for node, item in self.items.items() if node in live], results

    def _is_step(self, node: fx.Node) -> bool:
        """Adds the step that ``node`` is, or is part of."""
        packet = _packet(node)
        if node.target is operator.getitem:
            return self._is_first_result(node)
        if getattr(node.target, "namespace", None) == "ghostfused":
            return self._our_op(node)
        arguments = self._bound(node)
        if packet in BY_OP:
            act = with_settings(BY_OP[packet], arguments)
            return act is not None and self._activation(node, act, arguments)
        if packet in _NORMS:
            return self._batch_norm(node, arguments)
        method = _LAYERS.get(packet)
        return method is not None and method(self, node, arguments)

    def _bound(self, node: fx.Node) -> dict[str, Any]:
        """The node's arguments by the names in its op's schema, defaults included; the model's tensors for their nodes."""
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return {}
        names = [argument.name for argument in schema.arguments]
        bound = {argument.name: argument.default_value for argument in schema.arguments}
        bound |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        return {n: self.given.get(v, v) if isinstance(v, fx.Node) else v for n, v in bound.items()}

    def _source(self, node: Any, views: bool = False) -> fx.Node:
        """The node whose numbers these are; with ``views`` also where it is a map of one pixel and this a matrix."""
        while isinstance(node, fx.Node) and node not in self.given and node.op == "call_function":
            packet = _packet(node)
            before = node.args[0].meta["val"] if packet in (*_COPIES, *_VIEWS) else None  # type: ignore[union-attr]
            as_matrix = views and packet in _VIEWS and before.dim() == 4 and before.shape[2:] == (1, 1)  # type: ignore[union-attr]
            if packet in _COPIES or (as_matrix and node.meta["val"].shape == before.shape[:2]):  # type: ignore[union-attr]
                node = node.args[0]
            else:
                break
        return node

    def _map(self, node: Any) -> fx.Node | None:
        """``_source`` of a map; None of anything else."""
        source = self._source(node)
        return source if isinstance(source, fx.Node) and source.meta["val"].dim() == 4 else None

    def _add(self, node: fx.Node, args: Step, nodes: Iterable[fx.Node]) -> bool:
        """Adds a step, if the kernels take it."""
        x = args.x
        if not isinstance(x, Tensor) or x.dtype not in COMMON.dtypes or x.device.type != "cpu":
            return False
        for name, t in zip(type(args).__annotations__, args, strict=True):
            if name not in ACTIVE and isinstance(t, fx.Node):  # a weight that the network computes
                return False
        if isinstance(args, Args) and (kernel_refusal(args, "cpu") or cpu.declines(args, any_format=True)):
            return False
        self.items[node] = Item(node, args, nodes)
        return True

    def _our_op(self, node: fx.Node) -> bool:
        name, _, backend = _packet(node).__name__.rpartition("_")
        if name not in OPS or backend != "cpu":
            return False
        bound = self._bound(node)
        active = {n: self._source(v) for n, v in bound.items() if n in ACTIVE and v is not None}
        if not all(isinstance(source, fx.Node) for source in active.values()):
            return False
        weight = bound.get("primary_weight")
        if (
            isinstance(weight, Tensor) and bound["out_channels"] == weight.shape[0]
        ):  # no ghosts: of this only the shape counts
            bound["cheap_weight"] = weight[:, :1]
        args = OPS[name](**bound | {n: source.meta["val"] for n, source in active.items()})
        return self._add(node, args, active.values())

    def _conv_before(self, node: fx.Node) -> Item | None:
        """The convolution whose result only ``node`` reads, and which has no activation yet."""
        made = node.args[0]
        item = self.items.get(made)  # type: ignore[arg-type]
        if item is None or len(made.users) > 1 or not isinstance(item.args, GhostArgs | DepthwiseArgs):  # type: ignore[union-attr]
            return None
        if isinstance(item.args, DepthwiseArgs):
            return None if item.args.act else item
        a = item.args
        plain = a.out_channels == a.init_channels and a.residual is None and a.output_gate is None
        return item if plain and not a.primary_act else None

    def _extend(self, node: fx.Node, conv: Item, **fields: Any) -> bool:
        """Makes ``node`` a part of the step ``conv``."""
        prefix = "primary_" if isinstance(conv.args, GhostArgs) else ""
        args = conv.args._replace(**{prefix + name: value for name, value in fields.items()})  # type: ignore[union-attr]
        if not self._add(node, args, conv.inputs):
            return False
        del self.items[conv.node]
        return True

    def _activation(self, node: fx.Node, act: Act, a: dict[str, Any]) -> bool:
        conv = self._conv_before(node)
        if conv is None:
            return False
        return self._extend(node, conv, act=int(act), negative_slope=float(a.get("negative_slope", 0.0)))

    def _batch_norm(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """With stored statistics, of the convolution before it."""
        conv = self._conv_before(node)
        if (
            conv is None
            or a.get("training")
            or getattr(conv.args, "primary_mean", getattr(conv.args, "mean", None)) is not None
        ):
            return False
        names = {"mean": "running_mean", "var": "running_var", "gamma": "weight", "beta": "bias", "eps": "eps"}
        if _packet(node) is not aten.batch_norm and any(
            n.target is not operator.getitem or n.args[1] for n in node.users
        ):
            return False
        return self._extend(node, conv, **{ours: a[theirs] for ours, theirs in names.items()})

    def _is_first_result(self, node: fx.Node) -> bool:
        """Whether ``node`` picks the map out of the results of a norm or a pooling that is part of a step."""
        made: Any = node.args[0]
        item = self.items.get(made)
        if item is None or item.args is None or _packet(made) not in (*_NORMS, aten.max_pool2d_with_indices):
            return False
        del self.items[made]
        self.items[node] = Item(node, item.args, item.inputs)
        return True

    # ---- layers: the node and its arguments by name. They return whether there is a kernel.

    def conv2d(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """Padded by half an odd kernel: of all channels, or depthwise."""
        weight, groups = a["weight"], a["groups"]
        source = self._map(a["input"])
        if not isinstance(weight, Tensor) or source is None:
            return False
        channels, per_group, kh, kw = weight.shape
        (sh, sw), (dh, dw) = _pair(a["stride"]), _pair(a["dilation"])
        half = dh * (kh // 2), dw * (kw // 2)
        padding = half if a["padding"] == "same" else (0, 0) if a["padding"] == "valid" else _pair(a["padding"])
        if sh != sw or dh != dw or kh % 2 == 0 or kw % 2 == 0 or padding != half:
            return False
        x, none = source.meta["val"], [None] * 9
        if groups == 1 and kh == kw:
            unread = weight[:, :1, :1, :1]
            settings = 0.0, int(Act.NONE), 0.0, 0.0, int(Act.NONE), 0.0, channels, sh, dh, 1, False
            args = GhostArgs(x, weight, a["bias"], *none[:5], unread, *none, *settings)  # type: ignore[arg-type,call-arg]
            return self._add(node, args, [source])
        if groups != channels or per_group != 1 or x.shape[1] != channels or dh != 1:
            return False
        return self._add(node, DepthwiseArgs(x, weight, a["bias"], *none[:5], 0.0, int(Act.NONE), 0.0, sh), [source])  # type: ignore[arg-type,call-arg]

    def mean(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """Over height and width; where these go altogether, for matrix products alone, which take the map as it is."""
        source = self._map(a["self"])
        dims = [2, 3] if "output_size" in a else a.get("dim")
        if source is None or not isinstance(dims, list | tuple):
            return False
        if sorted(d % 4 for d in dims) != [2, 3] or list(a.get("output_size", [1, 1])) != [1, 1] or a.get("dtype"):
            return False
        stays = a.get("keepdim", True) or all(
            _packet(user) is aten.linear and user.args[0] is node for user in node.users
        )
        return stays and self._add(node, GlobalPoolArgs(source.meta["val"]), [source])

    def linear(self, node: fx.Node, a: dict[str, Any]) -> bool:
        source = self._source(a["input"], views=True)
        if not isinstance(source, fx.Node) or node.meta["val"].dim() != 2:
            return False
        return self._add(node, LinearArgs(source.meta["val"], a["weight"], a["bias"]), [source])

    def cast(self, node: fx.Node, a: dict[str, Any]) -> bool:
        source, to = self._source(a["self"]), node.meta["val"]
        if (
            not isinstance(source, fx.Node)
            or to.dtype not in DTYPES
            or to.device.type != "cpu"
            or to.dim() not in (2, 4)
        ):
            return False
        if a.get("layout") not in (None, torch.strided) or a.get("memory_format") not in (None, torch.preserve_format):
            return False
        return self._add(node, CastArgs(source.meta["val"], DTYPES.index(to.dtype)), [source])

    def concat(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """Of maps along the channels, of up to as many as the step takes."""
        names = tensor_names(ConcatArgs)
        sources = [self._source(part) for part in a["tensors"]]
        if not 2 <= len(sources) <= len(names) or any(source in self.given for source in sources):
            return False
        maps = [source.meta["val"] for source in sources]
        if a["dim"] not in (1, -3) or any(t.dim() != 4 or t.dtype != maps[0].dtype or t.shape[1] < 1 for t in maps):
            return False
        return self._add(node, ConcatArgs(*maps, *[None] * (len(names) - len(maps))), sources)

    def max_pool(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """Padded by half an odd square window."""
        source = self._map(a["self"])
        if source is None or a["ceil_mode"]:
            return False
        kernel, padding, dilation = _pair(a["kernel_size"]), _pair(a["padding"]), _pair(a["dilation"])
        stride = _pair(a["stride"]) if a["stride"] else kernel
        (k, other), half = kernel, kernel[0] // 2
        if k != other or k % 2 == 0 or k > POOL_KERNEL or padding != (half, half) or dilation != (1, 1):
            return False
        if stride not in ((1, 1), (2, 2)):
            return False
        return self._add(node, MaxPoolArgs(source.meta["val"], k, stride[0]), [source])

    def avg_pool(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """By a square window that moves by its own size, over whole windows."""
        source = self._map(a["self"])
        if source is None or a["ceil_mode"]:
            return False
        kernel, padding = _pair(a["kernel_size"]), _pair(a["padding"])
        stride = _pair(a["stride"]) if a["stride"] else kernel
        k = kernel[0]
        if kernel != (k, k) or stride != kernel or padding != (0, 0) or k > POOL_KERNEL:
            return False
        if a["divisor_override"] not in (None, k * k):
            return False
        return self._add(node, AvgPoolArgs(source.meta["val"], k), [source])

    def upsample(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """By a power of two: the indices of others PyTorch rounds."""
        source = self._map(a.get("input", a.get("self")))
        if source is None:
            return False
        before, after = source.meta["val"].shape, node.meta["val"].shape
        scale = after[-1] // before[-1]
        factors = a.get("scale_factors") or [a.get("scales_h"), a.get("scales_w")]
        if scale & (scale - 1) or after[2:] != (scale * before[2], scale * before[3]):
            return False
        if any(factor not in (None, scale) for factor in factors):
            return False
        return self._add(node, UpsampleArgs(source.meta["val"], scale), [source])

    def gate(self, node: fx.Node, a: dict[str, Any]) -> bool:
        source = self._source(a["self"])
        if not isinstance(source, fx.Node) or source.meta["val"].dim() not in (2, 4):
            return False
        return self._add(node, GateArgs(source.meta["val"], int(_GATES[_packet(node)])), [source])

    def max_pool_with_indices(self, node: fx.Node, a: dict[str, Any]) -> bool:
        """Whose indices nobody reads."""
        picked = all(n.target is operator.getitem and n.args[1] == 0 for n in node.users)
        return picked and self.max_pool(node, a)


_GATES = {aten.sigmoid: Gate.SIGMOID, aten.hardsigmoid: Gate.HARDSIGMOID}
_LAYERS: dict[Any, Callable[[Steps, fx.Node, dict[str, Any]], bool]] = {
    aten.conv2d: Steps.conv2d, aten.adaptive_avg_pool2d: Steps.mean, aten.mean: Steps.mean, aten.linear: Steps.linear,
    aten._to_copy: Steps.cast, aten.to: Steps.cast, aten.cat: Steps.concat, aten.max_pool2d: Steps.max_pool,
    aten.max_pool2d_with_indices: Steps.max_pool_with_indices, aten.avg_pool2d: Steps.avg_pool,
    aten.upsample_nearest2d: Steps.upsample,
    **dict.fromkeys(_GATES, Steps.gate),
}  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values  # type: ignore[return-value]
