"""One captured network for one shape: what ``torch.export`` sees of the model, as programs of our kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ops.transforms import ops_in_exports
from ..spec import memory_format
from . import equivalence
from .equivalence import Inputs
from .frozen import Frozen
from .lowering import Lowered, lower
from .writes import without_writes

Key = tuple[tuple[torch.Size, torch.dtype], ...]


class NotCaptured(ValueError):
    """The model does something that no program of our kernels stands for; the message names the op and the module."""


_exporting = threading.RLock()
"""One at a time: ``torch.export`` keeps what it traces in variables of the process."""


def key_of(inputs: Inputs, dynamic_batch: bool = False) -> Key:
    return tuple([(x.shape[1:] if dynamic_batch else x.shape, x.dtype) for x in inputs])


def shown(key: Key, batch: str | None = None) -> str:
    each = [f"({', '.join(map(str, [*([batch] if batch else []), *shape]))}) {dtype}" for shape, dtype in key]
    return " and ".join(each) if each else "no inputs"


def export(model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """What ``torch.export`` sees of ``model``, with no op left that writes into a tensor."""
    shapes = None
    if dynamic_batch:  # sizes 0 and 1 would be taken for constants
        inputs = tuple(torch.cat([x[:1], x[:1]]) if x.dim() else x for x in inputs)
        shapes = tuple({0: torch.export.Dim.DYNAMIC} if x.dim() else None for x in inputs)
        if all(shape is None for shape in shapes):
            raise ValueError("dynamic_batch: expected an input of at least one dimension, got none")
    try:
        with _exporting, ops_in_exports():
            return without_writes(torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False))
    except Exception as error:
        what = "for any batch, torch.export" if dynamic_batch else "torch.export"
        raise NotCaptured(f"{what} can't trace {type(model).__name__}: {type(error).__name__}: {error}") from error


class Variant:
    """An exported graph, lowered."""

    def __init__(
        self, exported: torch.export.ExportedProgram, inputs: Inputs, partial: bool, frozen: Frozen | None = None
    ):
        signature = exported.graph_signature
        if written := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
            raise NotCaptured(f"the forward writes into {written[0]}")
        if attributes := [node for node in exported.graph.nodes if node.op == "get_attr"]:
            raise NotCaptured(f"the forward has a graph of its own inside, {_where(next(iter(attributes[0].users)))}")
        self.exported = exported
        self.rounds_to = _coarsest(exported.graph)
        self.lowered: Lowered = lower(exported, frozen)
        # whose tensors somebody may make negative views of: a look costs some 60 ns for each
        self.exposed = [] if frozen else self.lowered.programs
        left = self.lowered.left
        if left and not partial:
            others = f", and {len(left) - 1} more" if len(left) > 1 else ""
            raise NotCaptured(f"no kernel computes {_where(left[0])}{others}; partial=True leaves them to PyTorch")
        self.formats = [memory_format(x) if x.dim() == 4 else None for x in inputs]
        self.structure = exported.call_spec.out_spec
        self.one_tensor = self.structure is not None and self.structure.is_leaf()
        self.run: Callable[..., list] = self.lowered.graph.forward

    def __call__(self, *inputs: Tensor) -> Any:
        for kept in self.exposed:
            kept.refuse_negative_views()
        # a graph's views hold for the example's memory format
        pairs = zip(inputs, self.formats, strict=True)
        outs = self.run(*(x if f is None else x.contiguous(memory_format=f) for x, f in pairs))
        return outs[0] if self.one_tensor else pytree.tree_unflatten(outs, self.structure)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        count = len(self.lowered.programs)
        names = dict.fromkeys(str(node.target) for node in self.lowered.left)
        by_torch = f", by PyTorch {', '.join(names)}" if names else ""
        return f"{count} program{'s' if count != 1 else ''}{by_torch}"


def _coarsest(graph: fx.Graph) -> torch.dtype:
    """Of the types that the network computes in."""
    values = (node.meta.get("val") for node in graph.nodes)
    dtypes = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _where(node: fx.Node) -> str:
    """``aten.sort.default in blocks.3 (Block)``."""
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = next(reversed(stack.values()), ("", ""))
    name = str(kind).rpartition(".")[2]
    return f"{node.target} in {path or 'the model'} ({name})"


def prove(program: Variant, model: nn.Module, inputs: Inputs, dynamic_batch: bool) -> None:
    for call in equivalence.calls(inputs, dynamic_batch):

        def run(*inputs: Tensor, text: str = shown(key_of(call))) -> Any:
            try:
                return program(*inputs)
            except RuntimeError as error:  # a kernel refuses
                raise NotCaptured(f"the program doesn't run on {text}: {error}") from error

        def run_model(*inputs: Tensor, text: str = shown(key_of(call))) -> Any:
            try:
                return model(*inputs)
            except Exception as error:  # it takes another batch than the example's, say, only by its looks
                name = type(model).__name__
                raise NotCaptured(f"{name} itself doesn't run on {text}: {type(error).__name__}: {error}") from error

        if not equivalence.computes_the_same(run, run_model, call, program.rounds_to):
            raise NotCaptured(
                f"the program computes something else than {type(model).__name__} for {shown(key_of(call))}: its forward may "
                "depend on more than its tensors, or draw random numbers"
            )
