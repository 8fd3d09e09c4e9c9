"""A Ghost module with BatchNorm by the batch's statistics, and the running statistics that BatchNorm keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import backends
from ..backends import training_step
from ..functional import arguments
from ..ops.autograd import call_with_batch_statistics
from ..ops.transforms import refuse_transforms, runs_plain
from ..spec import GhostArgs
from ..spec.checks import validate_training
from ..spec.takes import COMMON, constant_to_dynamo


class TrainingResult(NamedTuple):
    """What ``ghost_module_training`` returns. The statistics are float32, or float64 if x is."""

    out: Tensor  # (N, out_channels, H', W')
    primary_mean: Tensor  # (Cp,)
    primary_var: Tensor  # (Cp,)  biased
    cheap_mean: Tensor  # (Cp * (ratio - 1),)
    cheap_var: Tensor  # (Cp * (ratio - 1),)  biased
    samples: int | Tensor
    """Samples per channel; of all processes, as a tensor of shape (1,), if there is a process group."""


def trains_by_torch(module: nn.Module, x: Tensor, backend: str) -> bool:
    """Whether PyTorch's operations run a call of ``module`` and its backward, as they do unfused: it is in training mode,
    gradients are on, and no backend that may run the call has kernels for training. They need no second forward in backward.

    In eval mode a call is taken for inference, for which many forget ``torch.no_grad``.
    """
    return (
        module.training
        and torch.is_grad_enabled()
        and isinstance(x, Tensor)
        and not _has_training_kernels(backend, x.device.type)
        and not any(map(group_name, module.modules() if _has_processes() else ()))  # PyTorch has none on a CPU
    )


def runs_unfused(module: nn.Module, x: Tensor) -> bool:
    """Whether PyTorch's operations run a call of the fused ``module``: for training, since somebody looks at each, or since
    ``backend="auto"`` has no kernel for such an x, and the reference takes longer than the layers."""
    backend: str = module.backend  # type: ignore[assignment]
    if trains_by_torch(module, x, backend) or runs_plain(backend, x):
        return True
    if backend != "auto" or not isinstance(x, Tensor) or not x.is_floating_point():
        return False
    if x.dtype in COMMON.dtypes:
        return not _has_kernels(x.device.type)
    return all(p.dtype == x.dtype for p in module.parameters())  # else the reference names what doesn't fit


def is_left_to_torch(kernels: str, backend: str, group_name: str) -> bool:
    """Whether PyTorch takes a batch's statistics where ``backend`` may, for which ``choose`` has found the ``kernels``."""
    return kernels == "reference" != backend and not group_name


@constant_to_dynamo
def _has_kernels(device: str) -> bool:
    return any(backends.unavailable_on(name, device) is None for name in backends.AUTO.get(device, ()))


@constant_to_dynamo
def _has_training_kernels(backend: str, device: str) -> bool:
    names = backends.AUTO.get(device, ()) if backend == "auto" else (backend,)
    return any(name in training_step.KERNELS and backends.unavailable_on(name, device) is None for name in names)


def ghost_module_training(
    x: Tensor,
    primary_weight: Tensor,
    cheap_weight: Tensor,
    *,
    group_name: str = "",
    backend: str = "auto",
    then: Callable[[TrainingResult], None] | None = None,
    **options: Any,
) -> TrainingResult:
    """``ghost_module`` with both norms by the batch's statistics, in three kernels where there are any; differentiable.

    Args:
        x, primary_weight, cheap_weight, backend, options: as for ``ghost_module``, but that primary_bn and cheap_bn,
            both required, have None for mean and var. A backend that has no training kernels trains with the reference's.
        group_name: of the process group over which to take the statistics, as SyncBatchNorm does; empty for none.
        then: called with the result when it is there, also by a checkpoint that ends a repeated forward early.

    Raises:
        ValueError, TypeError: an argument doesn't fit; the message names it, what was expected and what came.
        RuntimeError: the backend asked for can't run this call; the message says why.
    """
    args = arguments(x, primary_weight, cheap_weight, **options)
    return train(args, choose(args, backend, group_name), group_name, then)


def choose(args: GhostArgs, backend: str, group_name: str) -> str:
    """The name of the backend whose kernels train ``args``, once they are checked; raises as ``ghost_module_training``."""
    validate_training(args)
    if _samples(args) == 1 and not group_name:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got input size {tuple(args.x.shape)}"
        )
    refuse_transforms(backend)
    return training_step.choose(backends.choose(args, backend), args)


def train(
    args: GhostArgs, backend: str, group_name: str, then: Callable[[TrainingResult], None] | None = None
) -> TrainingResult:
    """``ghost_module_training`` of what ``choose`` has checked, on the backend that it chose."""

    def result(made: tuple[Tensor, ...]) -> TrainingResult:
        return TrainingResult(*made[:-1], made[-1] if group_name else _samples(args))  # type: ignore[call-arg]

    last = None if then is None else lambda made: then(result(made))
    return result(call_with_batch_statistics(backend, args, group_name, last))


def _samples(args: GhostArgs) -> int:
    n, _, height, width = args.output_shape()
    return n * height * width


@torch.no_grad()
def update_running_statistics(norm: nn.Module, mean: Tensor, var: Tensor, samples: int | Tensor) -> None:
    """What ``norm`` (BatchNorm2d, SyncBatchNorm) does to its buffers in forward, given the batch's biased variance."""
    running_mean, running_var, batches = (
        norm._buffers.get(name) for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    if not (norm.training and norm.track_running_stats):
        return
    weight: Any = norm.momentum
    if batches is not None:
        batches.add_(1)
    if isinstance(samples, int) and samples == 0:  # which have no statistics
        return
    if weight is None:  # the mean of all batches
        weight = 0.0 if batches is None else 1 / batches.to(mean.dtype)
    unbiased = var * (samples / (samples - 1))
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            new = new.to(running.dtype)
            if isinstance(samples, Tensor):  # all processes' batches may be empty
                new = torch.where(samples > 0, new, running)
            running.lerp_(new, weight.to(new.dtype) if isinstance(weight, Tensor) else weight)


def update_both(norms: tuple[nn.Module, nn.Module], result: TrainingResult) -> None:
    """Those of a Ghost module's two norms."""
    update_running_statistics(norms[0], result.primary_mean, result.primary_var, result.samples)
    update_running_statistics(norms[1], result.cheap_mean, result.cheap_var, result.samples)


def group_name(norm: nn.Module) -> str:
    """The name of the process group over which ``norm`` would take its statistics; empty for none."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and _has_processes()):
        return ""
    group: Any = norm.process_group or torch.distributed.group.WORLD
    return group.group_name if group.size() > 1 else ""


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
