"""The activations: their numbers, and of each PyTorch's module, function and ops. Recognition, the reference, its derivative
and ``capture`` follow this table; the kernels have their own code for each."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

aten = torch.ops.aten


class Act(enum.IntEnum):
    """Activation after either half. The numbers are the kernels' (``csrc/common/parameters.h``)."""

    NONE = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4
    LEAKY_RELU = 5
    PRELU = 6
    GELU = 7
    GELU_TANH = 8
    MISH = 9


# A dictionary, since torch 2.11's compiler traces neither an enum's iteration nor its ``__members__``.
BY_NAME = {act.name.lower(): act for act in Act}


class Activation(NamedTuple):
    module: Callable[..., nn.Module]
    function: Callable[[Tensor, float, Any], Tensor]
    """Of (x, LeakyReLU's negative slope, PReLU's weight)."""
    ops: tuple
    """What ``torch.export`` makes of it, where a program may hold it."""
    calls: tuple = ()
    """The functions and the tensor's methods by which a forward may call it, of those without a slope."""


def _leaky_relu(x: Tensor, slope: float, _: Any) -> Tensor:
    if x.dtype != torch.float64 and _FLOAT32_MAX < abs(slope) < math.inf:
        slope = math.copysign(math.inf, slope)  # as in the kernels; PyTorch takes no number beyond float32
    return F.leaky_relu(x, slope)


_FLOAT32_MAX = torch.finfo(torch.float32).max


def _gelu_tanh() -> nn.Module:
    return nn.GELU("tanh")


TABLE = {
    Act.RELU: Activation(
        nn.ReLU, lambda x, _, __: F.relu(x), (aten.relu,), (torch.relu, torch.relu_, F.relu, "relu", "relu_")
    ),
    Act.RELU6: Activation(nn.ReLU6, lambda x, _, __: F.relu6(x), (aten.hardtanh, aten.relu6), (F.relu6,)),
    Act.SILU: Activation(nn.SiLU, lambda x, _, __: F.silu(x), (aten.silu,), (F.silu,)),
    Act.HARDSWISH: Activation(nn.Hardswish, lambda x, _, __: F.hardswish(x), (aten.hardswish,), (F.hardswish,)),
    Act.LEAKY_RELU: Activation(nn.LeakyReLU, _leaky_relu, (aten.leaky_relu,)),
    Act.PRELU: Activation(nn.PReLU, lambda x, _, weight: F.prelu(x, weight), ()),
    Act.GELU: Activation(nn.GELU, lambda x, _, __: F.gelu(x), (aten.gelu,), (F.gelu,)),
    Act.GELU_TANH: Activation(_gelu_tanh, lambda x, _, __: F.gelu(x, approximate="tanh"), ()),
    Act.MISH: Activation(nn.Mish, lambda x, _, __: F.mish(x), (aten.mish,), (F.mish,)),
}
WITHOUT_SLOPE = tuple(act for act in TABLE if act not in (Act.LEAKY_RELU, Act.PRELU))
BY_MODULE: dict[type[nn.Module], Act] = {
    activation.module: act for act, activation in TABLE.items() if isinstance(activation.module, type)
}
BY_OP: dict[Any, Act] = {op: act for act, activation in TABLE.items() for op in activation.ops}
BY_CALL: dict[Any, Act] = {call: act for act, activation in TABLE.items() for call in activation.calls}


def with_settings(act: Act | None, settings: Mapping[str, Any]) -> Act | None:
    """The activation of these attributes or arguments, of a class, function or op that one of the tables has as ``act``."""
    if act is Act.GELU:
        return {"none": Act.GELU, "tanh": Act.GELU_TANH}.get(settings.get("approximate", "none"))
    if act is Act.RELU6 and (settings.get("min_val", 0), settings.get("max_val", 6)) != (0, 6):
        return None  # nn.ReLU6 is an nn.Hardtanh
    return act


def of_layer(layer: nn.Module) -> Act | None:
    """The activation that ``layer`` is, if it is one of PyTorch's layers."""
    return with_settings(BY_MODULE.get(type(layer)), layer.__dict__)
