"""Which ops a module calls, for tests of the programs that fused modules keep."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostfused import backends

needs_cpu_kernels = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None,
    reason=f"no CPU kernel: {backends.BACKENDS['cpu'].unavailable()}",
)


class Ops(TorchDispatchMode):
    """Names of the ops that are called within."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def replays(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call of ``module`` is one op."""
    with torch.no_grad(), Ops() as called:
        module(x)
    return called.names == ["ghostfused.replay_cpu"]
