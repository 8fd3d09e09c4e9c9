"""What the CUDA tests share: whether kernels can run here, and for what device and in what order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from ghostfused.backends import cuda

try:
    from ghostfused import _C
except ImportError:
    _C = None  # type: ignore[assignment]

ON_CPU = "libcudart-cpu" in os.environ.get("LD_PRELOAD", "")
"""Whether kernels run under ptx-on-cpu."""

needs_extension = pytest.mark.skipif(
    _C is None, reason=f"{cuda.unavailable()}: pip install -e . --no-build-isolation where there is nvcc"
)
needs_cuda = pytest.mark.skipif(
    cuda.unavailable() is not None,
    reason=f"{cuda.unavailable()}. On a machine with an NVIDIA GPU these tests run on it; on one without, "
    'build with TORCH_CUDA_ARCH_LIST="8.0+PTX" and run '
    "$PTX_ON_CPU/run-extension ghostfused/_C*.so python -m pytest -m cuda tests/kernels",
)


@contextlib.contextmanager
def planned_for(sm_count: int) -> Iterator[None]:
    """Plans launches as for a device of so many SMs: few mean large tiles, many mean many small blocks."""
    _C.pretend_device(sm_count, 101376, 102400)
    try:
        yield
    finally:
        _C.pretend_device()


@contextlib.contextmanager
def general_only(general: bool = True) -> Iterator[None]:
    """Whether the general family of kernels runs all modules."""
    _C.general_only(general)
    try:
        yield
    finally:
        _C.general_only(False)
