"""A graph of ``torch.export`` as programs of the CPU's kernels, with what no kernel computes between them.

``lower`` makes three passes. The first finds *steps* (``steps``). The second groups them into programs, each of one input and
one result. The third writes the graph anew, with one call per program.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from .. import ops
from ..backends import cpu
from ..ops import encoding
from ..spec import DTYPES, CastArgs, ConcatArgs, GlobalPoolArgs
from .frozen import ACTIVE, Frozen
from .graph_steps import Item, Steps, given_tensors, is_free

aten = torch.ops.aten


class Lowered(NamedTuple):
    """What ``lower`` makes."""

    graph: fx.GraphModule
    """Takes the network's inputs, returns the list of its results."""
    programs: list[ops.KeptProgram]
    """Kept for the graph, which calls them by number."""
    left: list[fx.Node]
    """What PyTorch computes, but for views and copies."""


def lower(exported: torch.export.ExportedProgram, frozen: Frozen | None = None) -> Lowered:
    """``exported``'s graph, which must be functional and on the CPU, by our kernels where there are any. It reads the model's
    tensors where they lie, or those of ``frozen``."""
    for node in reversed(exported.graph.nodes):  # a loaded graph picks all results, needed or not
        if node.target is operator.getitem and not node.users:
            exported.graph.erase_node(node)
    given = given_tensors(exported)
    steps = Steps(exported.graph, given)
    items, results = steps.live_items()
    return _Writer(exported, given, items, results, frozen).written()


def _in_dtype(calls: list[tuple[Any, Tensor]], x: Tensor, dtype: torch.dtype) -> list[tuple[Any, Tensor]]:
    """``calls``, of float32 on x, in ``dtype``: on what a first call casts x to, and with a last one that casts back."""
    if others := {args.x.dtype for args, _ in calls} - {torch.float32}:
        raise ValueError(f"dtype: expected a network of float32, got one that computes in {others.pop()} as well")
    inside, last = torch.empty(0), calls[-1][1]
    out = torch.empty(0)
    cast = [
        (args._replace(**{name: inside for name in ACTIVE if getattr(args, name, None) is x}), result)
        for args, result in calls
    ]
    back = CastArgs(last, DTYPES.index(torch.float32)), out
    return [(CastArgs(x, DTYPES.index(dtype)), inside), *cast, back]


class _Writer:
    """The second and the third pass: items join the program that is open as long as they read nothing else than its input
    and its own results."""

    def __init__(
        self,
        exported: torch.export.ExportedProgram,
        given: dict[fx.Node, Tensor],
        items: list[Item],
        results: list[Any],
        frozen: Frozen | None,
    ):
        self.given, self.results, self.frozen = given, results, frozen
        self.users: dict[fx.Node, set[fx.Node | None]] = {}
        """The items that read each node's value, by their nodes; None is the network's result."""
        for node in results:
            self.users.setdefault(node, set()).add(None)
        for item in items:
            for node in item.inputs:
                self.users.setdefault(node, set()).add(item.node)
        self.new = fx.Graph()
        self.tensors: dict[str, Tensor] = {}
        self.programs: list[ops.KeptProgram] = []
        self.left: list[fx.Node] = []
        self.open: list[Item] = []
        self.written_as: dict[fx.Node, fx.Node] = {}
        for name in exported.graph_signature.user_inputs:
            node = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name == name)
            self.written_as[node] = self.new.placeholder(node.name)
        for item in items:
            self._add(item)
        self._close()

    def written(self) -> Lowered:
        self.new.output([self._new(node) if isinstance(node, fx.Node) else node for node in self.results])
        return Lowered(fx.GraphModule(self.tensors, self.new), self.programs, self.left)

    def _new(self, node: fx.Node) -> fx.Node:
        """What stands for ``node`` in the new graph."""
        if node not in self.written_as and node not in self.given:  # a copy or a view that steps look through
            self._copy(node)
        elif node not in self.written_as:
            name = f"tensor_{len(self.tensors)}"
            given = self.given[node]
            self.tensors[name] = self.frozen.tensor(given) if self.frozen else given
            self.written_as[node] = self.new.get_attr(name)
        return self.written_as[node]

    def _add(self, item: Item) -> None:
        made = {each.node for each in self.open}
        if item.args is None:
            if made.intersection(item.inputs):
                self._close()
            self._write_node(item)
        elif self.open and set(item.inputs) <= made | set(self.open[0].inputs):
            self.open.append(item)
        else:
            self._close()
            if len(item.inputs) == 1:
                self.open.append(item)
            else:  # a program has one input, an op of ours may have more
                self._write_node(item)

    def _close(self) -> None:
        """Writes what is open: all as one program, or as far as one result is all that is read later, and then the rest."""
        while self.open:
            items, self.open = self.open, []
            end = max(i for i in range(1, len(items) + 1) if self._is_program(items[:i]))
            self._write_program(items[:end])
            for item in items[end:]:
                self._add(item)

    def _is_program(self, items: list[Item]) -> bool:
        inside = {item.node for item in items}
        return all(self.users.get(item.node, set()) <= inside for item in items[:-1])

    def _copy(self, node: fx.Node) -> None:
        """Leaves ``node`` to PyTorch."""
        copy = self.new.node_copy(node, self._new)
        if copy.target is aten.view.default:  # a program's result may lie in another format than what PyTorch made
            copy.target = aten.reshape.default
        self.written_as[node] = copy

    def _write_node(self, item: Item) -> None:
        self._copy(item.node)
        if isinstance(item.args, ConcatArgs) or (item.args is None and not is_free(item.node)):
            self.left.append(item.node)

    def _write_program(self, items: list[Item]) -> None:
        (start,) = items[0].inputs
        x = start.meta["val"]
        calls: list[tuple[Any, Tensor]] = [
            (self.frozen.step(item.args) if self.frozen else item.args, item.node.meta["val"]) for item in items
        ]
        stand_ins = {id(x), *(id(result) for _, result in calls)}
        known = {id(t) for args, _ in calls for t in args.tensors if t is not None} - stand_ins  # type: ignore[union-attr]
        if known and self.frozen is not None and self.frozen.dtype is not None:  # else there is nothing to multiply
            calls = _in_dtype(calls, x, self.frozen.dtype)
        found = encoding.encode(calls, x, known)  # type: ignore[arg-type]
        assert found is not None
        if all(isinstance(item.args, GlobalPoolArgs | CastArgs) for item in items):  # for which no program is needed
            for item in items:
                self._copy(item.node)
                if not isinstance(item.args, CastArgs):
                    self.left.append(item.node)
            return
        kept = ops.KeptProgram(
            "cpu",
            found,
            cpu.extension.module.drop_program,  # type: ignore[union-attr]
            any_format=True,
            packs=self.frozen.packs if self.frozen else None,
        )
        self.programs.append(kept)
        call = self.new.call_function(ops.replay_cpu, (self._new(start), kept.number))
        self.written_as[items[-1].node] = call
