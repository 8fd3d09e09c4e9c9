"""Which ops a module calls, for tests of the programs that fused modules keep."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ghostfused import backends
from ghostfused.nn import batch_statistics

needs_cpu_kernels = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None,
    reason=f"no CPU kernel: {backends.BACKENDS['cpu'].unavailable()}",
)


class Ops:
    """Names of the ops that are called within, but for those that they call: by the profiler, since a mode that looks on
    sees no op of ours."""

    def __enter__(self):
        self._profiler = torch.autograd.profiler.profile()
        self._profiler.__enter__()
        return self

    def __exit__(self, *error):
        self._profiler.__exit__(*error)
        events = [e for e in self._profiler.function_events if "::" in e.name]
        outer = [e for e in events if e.cpu_parent is None or "::" not in e.cpu_parent.name]  # or an autograd.Function
        self.names = [e.name.replace("::", ".") for e in outer]


def ops_of(run: Callable[..., object], *inputs: torch.Tensor) -> list[str]:
    """The ops that a call runs."""
    with Ops() as called:
        run(*inputs)
    return called.names


ONE_OP = ["ghostfused.replay_cpu"]


def replays(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether a call of ``module`` is one op."""
    with torch.no_grad():
        return ops_of(module, x) == ONE_OP


def train_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the training ops train fused modules, as on a GPU: on a CPU the reference's."""
    monkeypatch.setattr(batch_statistics, "_has_training_kernels", lambda *_: True)
    monkeypatch.setattr(batch_statistics, "is_left_to_torch", lambda *_: False)
