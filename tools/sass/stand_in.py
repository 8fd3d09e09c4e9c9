"""PyTorch's own operations on tensors of the stand-in device, which has no kernels of PyTorch."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_ALLOCATING = {"aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like"}


def on_cpu(t: Tensor) -> Tensor:
    """A CPU tensor in the memory of ``t``."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    data = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=t.dtype).set_(data, t.storage_offset(), t.shape, t.stride())


def on_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


class TorchOperations(TorchDispatchMode):
    """``compute``: by the CPU's operations, in the same memory; else results are made and never filled, for counting
    what our kernels do between them needs no values."""

    def __init__(self, compute: bool) -> None:
        super().__init__()
        self.compute = compute
        self.made: list[tuple[str, int]] = []
        """Of each operation, its name and the bytes of the tensors it takes and gives."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        is_ours = func.namespace == "ghostfused"
        touches = any(
            (isinstance(v, Tensor) and v.is_cuda) or v == torch.device("cuda") for v in leaves if v is not None
        )
        if is_ours or not touches or func._schema.name in _ALLOCATING or func.is_view:
            return func(*args, **kwargs)
        return self._run(func, args, kwargs)

    def _run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        twins: dict[int, tuple[Tensor, Tensor]] = {}
        elsewhere = torch.device("cpu" if self.compute else "meta")

        def away(v: Any) -> Any:
            if isinstance(v, Tensor) and (v.is_cuda or not self.compute):
                return twins.setdefault(id(v), (v, on_cpu(v) if self.compute else on_meta(v)))[1]
            return elsewhere if isinstance(v, torch.device) and v.type == "cuda" else v

        there_args, there_kwargs = tree_map(away, (args, kwargs))
        result = func(*there_args, **there_kwargs)
        is_nhwc = any(own.dim() == 4 and not own.is_contiguous() for own, _ in twins.values())  # meta tensors forget it
        owners = {id(twin): own for own, twin in twins.values()}

        def back(v: Any) -> Any:
            if not isinstance(v, Tensor):
                return v
            if id(v) in owners:
                return owners[id(v)]
            if self.compute:
                new = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
                on_cpu(new).copy_(v)
                return new
            layout = torch.channels_last if v.dim() == 4 and is_nhwc else torch.contiguous_format
            return torch.empty(v.shape, dtype=v.dtype, device="cuda", memory_format=layout)

        given = tree_map(back, result)
        tensors = {id(t): t for t in tree_leaves((args, kwargs, given)) if isinstance(t, Tensor)}
        self.made.append((str(func), sum(t.numel() * t.element_size() for t in tensors.values())))
        return given
