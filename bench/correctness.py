"""Decides whether a peer's output may be timed: compared with float64, within the package's one table of tolerances."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ghostfused.numerics import TOLERANCES, relative_error
from ghostfused.testing import Verdict

from .cases import Setting

_CHUNK = 16  # samples per float64 forward, to bound memory


def gradients(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients of x and the parameters for a fixed gradient of the output."""
    x = x.detach().requires_grad_()
    out = run(x)
    return list(torch.autograd.grad(out, [x, *module.parameters()], grad_output(out)))


def grad_output(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return torch.empty_like(out).copy_(grad)


class Exact:
    """The results of ``module`` on ``x`` in float64, from weights and inputs as rounded to the setting's dtype."""

    def __init__(self, module: nn.Module, x: Tensor, setting: Setting):
        self.module, self.x, self.setting = module, x, setting
        self._own: dict[torch.dtype, list[float]] = {}
        exact = setting.place(module).double().to(memory_format=torch.contiguous_format)
        if setting.mode == "inference":
            with torch.no_grad():
                self.expected = [torch.cat([exact(chunk.double().contiguous()) for chunk in x.split(_CHUNK)])]
        else:
            self.expected = self.outputs(exact, exact, x.double().contiguous())

    def outputs(self, run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
        """What is compared: the output, or in mode "backward" the gradients of x and of ``module``'s parameters."""
        if self.setting.mode == "backward":
            return gradients(run, module, x)
        with torch.inference_mode(self.setting.mode == "inference"):
            return [run(x)]

    def _errors(self, outputs: list[Tensor]) -> list[float]:
        pairs = zip(outputs, self.expected, strict=True)
        return [relative_error(out, e) if out.shape == e.shape else math.inf for out, e in pairs]

    def own_errors(self, dtype: torch.dtype) -> list[float]:
        """Of PyTorch itself, eager, with everything in ``dtype``."""
        if dtype not in self._own:
            module = self.setting.place(self.module).to(dtype)
            self._own[dtype] = self._errors(self.outputs(module, module, self.x.to(dtype)))
        return self._own[dtype]

    def judge(self, outputs: list[Tensor], computes_in: torch.dtype | None = None) -> Verdict:
        """The verdict on the worst of ``outputs``; ``computes_in`` is the peer's own dtype where it chose another."""
        dtype = computes_in or self.setting.torch_dtype
        tf32 = self.setting.dtype == "tf32" and computes_in is None
        tolerance = TOLERANCES["tf32" if tf32 else dtype]
        # PyTorch's worst gradient: on a single one, of few numbers, it may be exact by luck
        own = max(self.own_errors(dtype))
        return Verdict(max(self._errors(outputs)), own, max(tolerance.factor * own, tolerance.floor))


def snapshot(outputs: list[Tensor]) -> list[Tensor]:
    """Copies, since engines may write their next output to the same memory."""
    return [copy.deepcopy(t.detach()) for t in outputs]
