"""A graph of ``torch.export`` without ops that write into tensors, as the passes of ``lowering`` need it.

``ExportedProgram.run_decompositions`` makes one of any graph, by tracing it once more: most of what ``capture`` takes. The
networks that people capture write only what ``nn.ReLU(inplace=True)`` and ``x += shortcut`` write, over values that nothing
else reads. There the op without the write has the same result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from ..spec.activations import BY_OP

aten = torch.ops.aten
_FRESH = {
    aten.conv2d, aten.batch_norm, aten.linear, aten.add, aten.mul, aten.cat, aten.mean, aten.sigmoid, aten.hardsigmoid,
    aten.adaptive_avg_pool2d, aten.avg_pool2d, aten.max_pool2d, aten.upsample_nearest2d, *BY_OP,
}  # fmt: skip
"""Their result is a new tensor. None writes into another, but a norm in train mode."""
_READING = {
    aten.alias, aten.slice, aten.view, aten.flatten, aten.reshape, aten.sym_size, aten.dropout, aten.to, aten._to_copy,
    aten._assert_tensor_metadata,
}  # fmt: skip


def without_writes(exported: ExportedProgram) -> ExportedProgram:
    """``exported``, changed or traced again."""
    calls = [node for node in exported.graph.nodes if node.op not in ("placeholder", "output")]
    renamed = {node: op for node in calls if (op := _overwrites(node)) is not None}
    if not all(node in renamed or _only_reads(node) for node in calls):
        return exported.run_decompositions({})
    for node, op in renamed.items():
        node.target = op
    for node in calls:
        if _packet(node) is aten.dropout:  # of eval mode
            node.replace_all_uses_with(node.args[0])
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _only_reads(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
    if arguments.get("training") or arguments.get("train"):
        return False
    packet = _packet(node)
    if packet is aten.dropout:  # whose result goes by its own name
        return all(user.op != "output" for user in node.users)
    return packet in _FRESH or packet in _READING or node.target.namespace == "ghostfused"


def _overwrites(node: fx.Node) -> Any:
    """The op without the write, where ``node`` overwrites a tensor of its result's dtype that an op has just made and that
    nothing else reads; else None."""
    name, _, overload = str(node.target).removeprefix("aten.").partition(".")
    plain = getattr(aten, name[:-1], None) if name.endswith("_") else None
    if plain not in _FRESH or overload not in plain.overloads():  # type: ignore[union-attr]
        return None
    made, others = node.args[0], node.all_input_nodes
    fresh = isinstance(made, fx.Node) and (_packet(made) in _FRESH or _overwrites(made) is not None)
    dtypes = {value.dtype for other in others if isinstance(value := other.meta.get("val"), Tensor)}
    alone = fresh and len(made.users) == 1 and len(dtypes) == 1  # type: ignore[union-attr]
    return getattr(plain, overload) if alone else None
