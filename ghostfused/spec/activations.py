"""The activations: their numbers, and of each PyTorch's module, function and ops. Recognition, the reference, its derivative
and ``capture`` follow this table; the kernels have their own code for each."""

from __future__ import annotations

import enum
from collections.abc import Callable
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


class Activation(NamedTuple):
    module: type[nn.Module]
    function: Callable[[Tensor, float, Any], Tensor]
    """Of (x, LeakyReLU's negative slope, PReLU's weight)."""
    ops: tuple
    """What ``torch.export`` makes of it, where a program may hold it."""


TABLE = {
    Act.RELU: Activation(nn.ReLU, lambda x, _, __: F.relu(x), (aten.relu,)),
    Act.RELU6: Activation(nn.ReLU6, lambda x, _, __: F.relu6(x), (aten.hardtanh, aten.relu6)),
    Act.SILU: Activation(nn.SiLU, lambda x, _, __: F.silu(x), (aten.silu,)),
    Act.HARDSWISH: Activation(nn.Hardswish, lambda x, _, __: F.hardswish(x), (aten.hardswish,)),
    Act.LEAKY_RELU: Activation(nn.LeakyReLU, lambda x, slope, _: F.leaky_relu(x, slope), (aten.leaky_relu,)),
    Act.PRELU: Activation(nn.PReLU, lambda x, _, weight: F.prelu(x, weight), ()),
    Act.GELU: Activation(nn.GELU, lambda x, _, __: F.gelu(x), ()),
}
BY_MODULE: dict[type[nn.Module], Act] = {activation.module: act for act, activation in TABLE.items()}
BY_OP: dict[Any, Act] = {op: act for act, activation in TABLE.items() for op in activation.ops}
