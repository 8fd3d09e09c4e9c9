"""Tensors of somebody's class, which may do anything at an operation of PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

OWN_KINDS = frozenset((type(None), Tensor, nn.Parameter))
"""What next to all tensors are, and what is no tensor."""


def takes_operations(t: Any) -> bool:
    """Whether the class of ``t`` sees each operation, by ``__torch_function__`` or ``__torch_dispatch__``: it may make something
    else of it, and at least its results are of that class. Those of PyTorch's compilers, fake tensors and functional ones,
    know our ops."""
    kind = type(t)
    if kind in OWN_KINDS or not issubclass(kind, Tensor) or kind.__module__.startswith("torch._subclasses."):
        return False
    sees_functions = kind.__torch_function__ is not torch._C._disabled_torch_function_impl
    return sees_functions or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
