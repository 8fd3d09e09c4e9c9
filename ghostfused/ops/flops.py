"""Formulas by which ``torch.utils.flop_counter.FlopCounterMode`` counts our ops: as it counts the layers that they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.training_step import UPSTREAM
from ..spec import OPS, DepthwiseArgs, GhostArgs, LinearArgs, SqueezeExciteArgs, Step, tensor_names
from . import encoding
from .after_import import after_import
from .programs import PROGRAM_BACKENDS, REPLAY_BACKENDS, kept_program
from .schemas import BACKENDS, TRAINING_OPS, train_args


class _Layer(NamedTuple):
    """A convolution or fully connected layer inside an op."""

    weight: str
    positions: int
    """In its output, those of all images."""
    in_channels: int
    upstream: tuple[str, ...]
    """What gets its gradient by way of this layer's input."""


def _layers(args: Step) -> Iterator[_Layer]:
    n = args.x.shape[0]
    if isinstance(args, GhostArgs):
        positions = n * math.prod(args.output_shape()[2:])
        yield _Layer("primary_weight", positions, args.x.shape[1], ("x", "input_gate"))
        if args.out_channels > args.init_channels:  # else it is a 1×1 conv
            yield _Layer("cheap_weight", positions, args.init_channels, UPSTREAM)
    elif isinstance(args, DepthwiseArgs):
        yield _Layer("weight", n * math.prod(args.output_shape()[2:]), args.x.shape[1], ("x",))
    elif isinstance(args, SqueezeExciteArgs):
        yield _Layer("reduce_weight", n, args.x.shape[1], ("x",))
        yield _Layer("expand_weight", n, args.reduce_weight.shape[0], ("x", "reduce_weight", "reduce_bias"))
    elif isinstance(args, LinearArgs):
        yield _Layer("weight", n, args.weight.shape[1], ("x",))


def forward_flops(args: Step) -> int:
    """Two for each multiplication."""
    return sum(2 * getattr(args, layer.weight).numel() * layer.positions for layer in _layers(args))


def backward_flops(args: Step, needs_grad: list[bool]) -> int:
    """As PyTorch counts a backward: what is recomputed isn't in it, and a weight's gradient counts as if ``groups`` were 1."""
    need = dict(zip(tensor_names(type(args)), needs_grad, strict=True))
    total = 0
    for layer in _layers(args):
        weight = getattr(args, layer.weight)
        if any(need[name] for name in layer.upstream):
            total += 2 * weight.numel() * layer.positions
        if need[layer.weight]:
            total += 2 * layer.in_channels * weight.shape[0] * math.prod(weight.shape[2:]) * layer.positions
    return total


def _program_flops(x: Tensor, tensors: list[Tensor], code: list[int], numbers: list[float]) -> int:
    total = 0

    def step(args: Step) -> Tensor:
        nonlocal total
        total += forward_flops(args)
        return args.new_output()

    def shape_of(t: Tensor) -> Tensor:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")

    encoding.run_program(step, shape_of(x), [shape_of(t) for t in tensors], code, numbers)
    return total


def _register(name: str, formula: Callable[..., int]) -> None:
    def with_result(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(getattr(torch.ops.ghostfused, name), get_raw=True)(with_result)


def _register_all() -> None:
    for op, kind in OPS.items():
        for backend in BACKENDS:
            _register(f"{op}_{backend}", lambda *args, kind=kind: forward_flops(kind(*args)))
        if op != "forward":
            _register(f"{op}_backward", lambda grad, *args, kind=kind: backward_flops(kind(*args[:-1]), args[-1]))
    for backend in TRAINING_OPS:
        _register(f"train_forward_{backend}", lambda *args: forward_flops(train_args(args[:-1])))
        _register(f"backward_{backend}", lambda grad, *args: backward_flops(GhostArgs(*args[:-3]), args[-1]))
    for backend in PROGRAM_BACKENDS:
        _register(f"program_{backend}", _program_flops)
    for backend in REPLAY_BACKENDS:
        _register(
            f"replay_{backend}", lambda x, number, backend=backend: _program_flops(x, *kept_program(backend, number))
        )


# It imports Triton, which takes as long as all of ours.
after_import("torch.utils.flop_counter", _register_all)
