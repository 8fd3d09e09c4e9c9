"""Op schemas and fakes: the only file that talks to torch.library.

One forward op per kernel backend, ``ghostfused::forward_<backend>``, all of one schema; the CUDA one's kernel is
registered by ``csrc/binding.cpp`` when the extension loads. Training has two more ops for each backend that can:
``train_forward_<backend>``, with BatchNorm by the batch's statistics, and ``backward_<backend>``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .spec import TENSORS, GhostArgs

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}

SCHEMA = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in GhostArgs.__annotations__.items())
"""The schema of GhostArgs: ``Tensor x, Tensor primary_weight, Tensor? primary_bias, …``."""

FORWARD_OPS = ("cuda", "cpu", "triton", "triton_two_kernel", "reference")

_library = torch.library.Library("ghostfused", "DEF")


def _fake_forward(*args) -> Tensor:
    return GhostArgs(*args).new_output()


for _backend in FORWARD_OPS:
    _library.define(f"forward_{_backend}({SCHEMA}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"ghostfused::forward_{_backend}", _fake_forward, lib=_library)


def implement(backend: str, kernel: Callable[[GhostArgs], Tensor], *dispatch_keys: str) -> None:
    """Registers ``kernel`` as ``ghostfused::forward_<backend>`` under each of ``dispatch_keys``."""
    for key in dispatch_keys:
        _library.impl(f"forward_{backend}", lambda *args: kernel(GhostArgs(*args)), key)


def forward_op(backend: str) -> Callable[..., Tensor]:
    """The op ``ghostfused::forward_<backend>``; call it with ``*GhostArgs``."""
    return getattr(torch.ops.ghostfused, f"forward_{backend}").default


STATISTICS = ("primary_mean", "primary_var", "cheap_mean", "cheap_var")
TRAIN_FIELDS = [name for name in GhostArgs.__annotations__ if name not in STATISTICS]
"""GhostArgs' fields but for the statistics, which the training forward computes."""
TRAINING_OPS = ("cuda", "triton", "reference")
"""The backends with training kernels: ``train_forward_<backend>`` and ``backward_<backend>``."""

_TRAIN_SCHEMA = ", ".join(f"{_TYPES[GhostArgs.__annotations__[name]]} {name}" for name in TRAIN_FIELDS)


def _fake_train_forward(*args) -> tuple[Tensor, ...]:
    *fields, group_name = args
    a = train_args(fields)
    dtype = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    sizes = [a.init_channels] * 2 + [a.cheap_weight.shape[0]] * 2 + [1 if group_name else 0]
    return a.new_output(), *(torch.empty(size, dtype=dtype, device=a.x.device) for size in sizes)


def _fake_backward(grad_output: Tensor, *args) -> list[Tensor]:
    fields, needs_grad = args[: len(TENSORS)], args[-1]
    return [torch.empty_like(t) for t, need in zip(fields, needs_grad, strict=True) if need]


for _backend in TRAINING_OPS:
    _library.define(
        f"train_forward_{_backend}({_TRAIN_SCHEMA}, str group_name) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        tags=torch.Tag.pt2_compliant_tag,
    )
    _library.define(
        f"backward_{_backend}(Tensor grad_output, {SCHEMA}, bool batch_statistics, str group_name, bool[] needs_grad)"
        " -> Tensor[]",
        tags=torch.Tag.pt2_compliant_tag,
    )
    torch.library.register_fake(f"ghostfused::train_forward_{_backend}", _fake_train_forward, lib=_library)
    torch.library.register_fake(f"ghostfused::backward_{_backend}", _fake_backward, lib=_library)


def train_args(fields: Iterable) -> GhostArgs:
    """The GhostArgs of a training forward's arguments (``TRAIN_FIELDS``), with no statistics."""
    values: dict[str, Any] = dict(zip(TRAIN_FIELDS, fields, strict=True))
    return GhostArgs(**values, **dict.fromkeys(STATISTICS))  # type: ignore[arg-type]


def implement_training(
    backend: str, forward: Callable[[GhostArgs, str], tuple[Tensor, ...]], backward: Callable, *dispatch_keys: str
) -> None:
    """Registers both training ops of ``backend`` under each of ``dispatch_keys``.

    ``forward(args, group_name)`` and ``backward(grad_output, args, batch_statistics, group_name, needs_grad)`` are
    ``backends.training.train_forward`` and ``backward`` with the backend's kernels.
    """

    def run_forward(*args) -> tuple[Tensor, ...]:
        return forward(train_args(args[:-1]), args[-1])

    def run_backward(grad_output: Tensor, *args) -> list[Tensor]:
        return backward(grad_output, GhostArgs(*args[:-3]), *args[-3:])

    for key in dispatch_keys:
        _library.impl(f"train_forward_{backend}", run_forward, key)
        _library.impl(f"backward_{backend}", run_backward, key)


def training_op(kind: str, backend: str) -> Callable[..., Any]:
    """The op ``ghostfused::<kind>_<backend>``, ``kind`` being "train_forward" or "backward"."""
    return getattr(torch.ops.ghostfused, f"{kind}_{backend}").default


implement("reference", reference.ghost_module, "CPU", "CUDA")
