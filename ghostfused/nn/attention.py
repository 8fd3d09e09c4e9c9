"""A Ghost module with DFC attention (Tang et al., "GhostNetV2: Enhance Cheap Operation with Long-Range Attention",
NeurIPS 2022, section 3): its gate is made at half the size and goes into the fused kernel's epilogue."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..backends import cpu
from ..ops import run_step
from ..ops.recording import note_others
from ..ops.transforms import undisturbed
from ..recognize.watch import forward_replaced, has_hooks
from ..spec import AvgPoolArgs, Gate, GateArgs
from ..spec.takes import COMMON
from . import layers
from .batch_statistics import runs_unfused
from .cache import may_replay
from .ghost_module import FusedGhostModule, _finished, _gated

fx.wrap("_gated")


class FusedAttentionGhostModule(FusedGhostModule):
    """``ghost(x) * upsample(sigmoid(short_conv(avg_pool2d(x, 2))))``, (N, Cin, H, W) → (N, out_channels, H, W).

    Made by ``FusedGhostModule.from_module`` of the V2 modules of the official repository and of timm.
    ``short_conv`` is their name for a 1×1 conv, a 1×5 and a 5×1 depthwise conv, each with BatchNorm. Others pool what
    these give, or have a module that makes the whole gate.

    On a CPU pooling and sigmoid are steps of the program that it keeps. With gradients, and on a GPU, PyTorch runs them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError(f"{type(self).__name__} is made by ghostfused.fuse of somebody's module, not by its class")

    _attention: str
    _gate_form: str
    _runs: tuple[layers.Run, ...]
    _gate_names: tuple[str, ...]

    def runs_our_ops(self) -> bool:
        """On a CPU, where pooling and sigmoid are steps of programs; of a gate whose layers all have kernels."""
        weight = next(self.parameters(), None)
        if weight is None or not weight.is_cpu or self._gate_form == "whole" or not self._runs:
            return False
        return all(run.kind(self) is not None for run in self._runs)

    @staticmethod
    def attributes(module: nn.Module, attention: str, gate_form: str) -> dict:
        """What this has beyond a FusedGhostModule, for ``module``, whose child ``attention`` makes the gate."""
        block = module._modules[attention]
        children = block.named_children()  # type: ignore[union-attr]
        leaves: list[tuple[layers.ChildPath, nn.Module]] = [((attention, name), m) for name, m in children]
        sequential = type(block) is nn.Sequential
        runs = tuple(layers.split(leaves)) if sequential else ()
        return {"_attention": attention, "_gate_form": gate_form, "_runs": runs, "_gate_names": tuple(block._modules)}  # type: ignore[union-attr]

    def _is_changed_inside(self, block: nn.Module) -> bool:
        """Whether it isn't the Sequential of children of these names any more, or somebody looks on."""
        if type(block) is not nn.Sequential or tuple(block._modules) != self._gate_names:
            return True
        return None in block._modules.values() or has_hooks(block) or forward_replaced(block)

    def forward(
        self,
        x: Tensor,
        *,
        input_gate: Tensor | None = None,
        residual: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        """As ``FusedGhostModule.forward``; the module makes its output gate itself.

        Raises:
            ValueError: an ``output_gate`` is given.
        """
        if output_gate is not None and not isinstance(output_gate, fx.Proxy):  # torch.fx can't say that it is None
            raise ValueError("output_gate: expected None, since this module makes its own, got a tensor")
        if input_gate is None and residual is None and may_replay(x) and x.is_cpu:
            return self._cache(self, x, self._run)
        return self._run(x, input_gate, residual)

    def _run(
        self,
        x: Tensor,
        input_gate: Tensor | None = None,
        residual: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, read afresh; ``output_gate`` doesn't count."""
        # its own forward makes the gate as well
        if runs_unfused(self, x) or self._is_changed():
            return self._run_children(x, input_gate, residual, None)
        if input_gate is not None:
            x = _gated(x, input_gate)
        gate = _pooled(x, self.backend) if self._gate_form == "pooled first" else x
        block = self._modules[self._attention]
        if not self._runs or self._is_changed_inside(block):  # type: ignore[arg-type]
            note_others()
            gate = block(gate)  # type: ignore[misc]
        else:
            for run in self._runs:
                gate = run(self, gate, self.backend)
        if self._gate_form == "pooled last":
            gate = _pooled(gate, self.backend)
        if self._gate_form != "whole":
            gate = _sigmoid(gate, self.backend)
        if not isinstance(gate, fx.Proxy) and gate.shape[1] == 1:
            note_others()  # one for all channels, since its last layer was replaced
            return _finished(super()._run(x), gate, residual)
        return super()._run(x, residual=residual, output_gate=gate)


def _pooled(x: Tensor, backend: str) -> Tensor:
    out = _by_kernel(AvgPoolArgs(x, 2), backend)
    return F.avg_pool2d(x, 2) if out is None else out


def _sigmoid(x: Tensor, backend: str) -> Tensor:
    out = _by_kernel(GateArgs(x, _SIGMOID), backend)
    return x.sigmoid() if out is None else out


_SIGMOID = int(Gate.SIGMOID)


def _by_kernel(args: AvgPoolArgs | GateArgs, backend: str) -> Tensor | None:
    """What the CPU's kernel makes of ``args``, as a step of a recorded program does; None where PyTorch is to run."""
    if not torch.compiler.is_compiling() and _may_run_kernel(args.x, backend):
        try:
            return run_step(args)
        except RuntimeError:  # PyTorch can run it, or says what is wrong
            pass
    note_others()
    return None


def _may_run_kernel(x: Tensor, backend: str) -> bool:
    """Whether x is a tensor for the CPU's kernels, nothing is differentiated, and nobody looks on."""
    return (
        backend in ("auto", "cpu")
        and type(x) is Tensor
        and x.is_cpu
        and x.dtype in COMMON.dtypes
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and cpu.unavailable() is None
        and undisturbed()
    )
