"""Triton's interpreter, with less of its own work: it patches Triton's language once a launch, not once a call of a device
function, and checks products and sums of integers for overflow in NumPy, not by its own operations. It computes the same."""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    """Until the process ends. A Triton whose interpreter lacks one of these functions keeps all of its own."""
    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_semantic")
    if not all(hasattr(interpreter, name) for name in names) or hasattr(interpreter._patch_lang, "func"):
        return
    interpreter._patch_lang = functools.partial(_patch_once, interpreter._patch_lang)
    interpreter._get_np_dtype = functools.partial(_numpy_type, functools.cache(interpreter._get_np_dtype))
    semantic = interpreter.interpreter_semantic
    semantic.binary_op_sanitize_overflow_impl = types.MethodType(_refuse_overflow, semantic)


def _patch_once(patch: Any, fn: Any) -> Any:
    """What a kernel's launch has patched, until it ends, is so for the device functions that it calls."""
    patched = not any(tl.core.is_builtin(language.load) for language in _languages(fn))
    return interpreter._LangPatchScope() if patched else patch(fn)


@functools.cache
def _languages(fn: Any) -> tuple[Any, ...]:
    """By which names a function has Triton's language; Triton's own functions have another than ours."""
    return tuple(value for value in fn.__globals__.values() if value is tl or value is tl.core)


def _numpy_type(of_elements: Any, kind: Any) -> Any:
    """A map's is that of its elements; a pointer can't be a key."""
    element = kind.scalar
    return np.dtype(np.uint64) if isinstance(element, tl.pointer_type) else of_elements(element)


def _refuse_overflow(semantic: Any, a: Any, b: Any, operation: Any) -> None:
    kind = a.type.scalar
    if kind.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    exact = EXACT[operation.__name__](a.handle.data.astype(np.int64), b.handle.data.astype(np.int64))
    low, high = kind.get_int_min_value(), kind.get_int_max_value()
    assert exact.size == 0 or low <= exact.min() <= exact.max() <= high, f"{kind} overflow: {operation.__name__}"
