"""Compiles a launch for a GPU that need not be there, as Triton would on its first call there."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernels import ghost_kernel

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


def target(name: str) -> GPUTarget:
    """The target ``name``: "sm_90" or "gfx942", for example."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def describe(
    kwargs: dict[str, Any], kernel: Any = ghost_kernel
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list], dict[str, int]]:
    """(signature, constexprs, attributes, options) of a launch of ``kernel`` with ``kwargs``, for ASTSource."""
    signature, constexprs, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = kwargs[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            if value.device.type == "meta" or value.data_ptr() % 16 == 0:
                attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[index,] = [["tt.divisibility", 16]]
    return signature, constexprs, attributes, {name: kwargs[name] for name in _OPTIONS if name in kwargs}


def compile_launch(kwargs: dict[str, Any], target_name: str, kernel: Any = ghost_kernel) -> Any:
    """Triton's compiled kernel (``.asm``, ``.metadata``) for ``kernel[grid](**kwargs)``."""
    signature, constexprs, attributes, options = describe(kwargs, kernel)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=target(target_name), options=options)
