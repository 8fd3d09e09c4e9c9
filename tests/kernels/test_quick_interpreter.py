"""Triton's interpreter as the tests have it, in less time: what it refuses and what it leaves behind."""

import pytest
import torch
from triton_runtime import needs_triton

from ghostfused.backends import triton as backend

triton = pytest.importorskip("triton")
import quick_interpreter  # noqa: E402
from triton import language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    needs_triton,
    pytest.mark.skipif(not backend.INTERPRETED, reason="needs TRITON_INTERPRET=1 before Python starts"),
]
INT32 = 2**31 - 1


@triton.jit
def calculated(a, b, OPERATION: tl.constexpr):
    if OPERATION == "add":
        result = a + b
    elif OPERATION == "sub":
        result = a - b
    else:
        result = a * b
    return result


@triton.jit
def kernel(out, a, b, OPERATION: tl.constexpr):
    tl.store(out, calculated(tl.load(out) + a, b, OPERATION))


def calculate(a: int, b: int, operation: str) -> int:
    out = torch.zeros((), dtype=torch.int32)
    kernel[(1,)](out, a, b, operation)
    return int(out)


@pytest.mark.parametrize(
    ("operation", "a", "b", "result"),
    [("add", INT32 - 1, 1, INT32), ("sub", -INT32, 1, -INT32 - 1), ("mul", 46341, 46340, 46341 * 46340)],
)
def test_integers_up_to_the_last(operation, a, b, result):
    assert calculate(a, b, operation) == result
    with pytest.raises(InterpreterError, match=f"int32 overflow.*{operation}"):
        calculate(a, b + 1, operation)


def test_the_language_is_tritons_own_again():
    before = tl.load
    calculate(1, 2, "add")
    assert tl.load is before
    assert tl.core.is_builtin(tl.load)


def test_installed_once():
    before = interpreter._patch_lang
    quick_interpreter.install()
    assert interpreter._patch_lang is before
