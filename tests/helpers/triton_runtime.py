"""What the tests of Triton's kernels share: whether those can run here."""

from __future__ import annotations

import pytest
import torch
from cuda_runtime import ON_CPU

from ghostfused.backends import triton


def _interpreter_fault() -> str | None:
    """What is wrong with Triton's interpreter where its kernels can't loop; see findings/triton_interpreter_numpy.sh."""
    if not triton.INTERPRETED or triton.unavailable() is not None:
        return None
    import numpy
    from triton import __version__, jit
    from triton.runtime.errors import InterpreterError

    @jit
    def loop(n):
        for _ in range(n):
            pass

    try:
        loop[(1,)](2)
    except InterpreterError as error:
        if "0-dimensional arrays" in str(error):
            return f"the interpreter of Triton {__version__} can't run a loop under numpy {numpy.__version__}: {error}"
        raise
    return None


def _unavailable() -> str | None:
    if triton.INTERPRETED:
        return triton.unavailable() or _interpreter_fault()
    if ON_CPU or not torch.cuda.is_available():
        return "needs a GPU, or TRITON_INTERPRET=1 before Python starts"
    return triton.unavailable()


unavailable = _unavailable()
"""Why Triton's kernels can't run here; None if they can."""
if triton.INTERPRETED and unavailable is None:
    import quick_interpreter

    quick_interpreter.install()
needs_triton = pytest.mark.skipif(unavailable is not None, reason=str(unavailable))
DEVICE = "cpu" if triton.INTERPRETED else "cuda"
