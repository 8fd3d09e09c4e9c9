"""Triton's launches, compiled for sm_90 and given to the simulator in place of Triton's driver."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from ghostfused.backends.triton.compile import compile_launch, describe

from . import kernel
from .build import CACHE
from .device import Device
from .machine import Launch

_FORMATS = {"fp32": "<f", "i32": "<i", "i64": "<q"}


def launch_of(function: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Launch:
    """What ``function[grid](**arguments)`` would ask a GPU of sm_90 for."""
    compiled = compile_launch(arguments, "sm_90", function)
    signature = describe(arguments, function)[0]
    cubin = compiled.asm["cubin"]
    path = CACHE / "triton" / f"{hashlib.sha256(cubin).hexdigest()[:16]}.cubin"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cubin)
    code = kernel.load(path, compiled.metadata.name)
    raw = bytearray(max(offset + size for offset, size in code.parameters))  # scratch memory's addresses stay 0
    given = [(name, kind) for name, kind in signature.items() if kind != "constexpr"]
    for (name, kind), (offset, size) in zip(given, code.parameters, strict=False):
        value = arguments[name]
        form = "<Q" if isinstance(value, torch.Tensor) else _FORMATS[kind]
        raw[offset : offset + size] = struct.pack(form, value.data_ptr() if form == "<Q" else value)
    x, y, z = (*grid, 1, 1)[:3]
    return Launch(code, (x, y, z), (32 * compiled.metadata.num_warps, 1, 1), compiled.metadata.shared, bytes(raw))


@contextlib.contextmanager
def intercepted(device: Device) -> Iterator[None]:
    """Within, Triton's launches go to the handler of ``device``."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bound = dict(zip((p.name for p in self.params), args, strict=False)) | kwargs
        device.take(launch_of(self, grid, bound))

    with mock.patch.object(JITFunction, "run", run):
        yield
