"""Training on any backend: the order of a backend's six kernels, and what is Torch's: matrix products, sums, processes.

docs/training.md has the formulas and says what each kernel reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec import TENSORS, GhostArgs, memory_format
from .reference import within

UPSTREAM = ("x", "input_gate", *(n for n in TENSORS if n.startswith("primary_")))
"""What gets its gradient by way of the primary conv's output."""
_CHEAP = tuple(n for n in TENSORS if n.startswith("cheap_"))


class TrainingKernels(NamedTuple):
    """The six steps. "Dense" is: of the strides that ``GhostArgs.new_output`` would give. All norm tensors are float32
    (float64 if x is), and the means include the conv's bias. In the output's channels, the first Cp are the primary
    half, the others the cheap half.
    """

    supports: Callable[[GhostArgs], str | None]
    """Why the kernels can't train ``args``; None if they can."""
    primary_statistics: Callable[[GhostArgs, Tensor], tuple[Tensor, Tensor]]
    """(args, out) → (mean, biased variance) of y1 = conv(x * input_gate), bias left out; writes y1 to out."""
    cheap_statistics: Callable[[GhostArgs, Tensor], tuple[Tensor, Tensor]]
    """(args, out) → those of y2 = depthwise(act(norm(y1))), of cut channels too; reads y1 from out and writes y2 to it."""
    normalize: Callable[[GhostArgs, Tensor], None]
    """(args, out): y1 and y2 in out become the module's output, in place."""
    cheap_backward: Callable[[GhostArgs, Tensor, Tensor, bool, bool, Tensor | None], tuple]
    """(args, grad, y1, batch_statistics, sums, product) → (dz2, y2, (3, new) sums).

    Without batch statistics dz2 is dy2 = dz2 * scale2 already, and y2 None. The sums, None unless asked for, are those
    of dz2, of dz2 * x̂2 and of the gradient after the activation times min(z2, 0); the last for PReLU, and else that or
    zero. ``product``, where given, becomes grad * (the output before output_gate), for both halves.
    """
    primary_backward: Callable[
        [GhostArgs, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, bool, bool, bool, bool], tuple
    ]
    """(args, grad, y1, dz2, y2, means2, batch_statistics, primary, sums, weight) → (dz1, (3, Cp) sums, cheap_weight's).

    dz2 is None where every cheap channel is cut: nothing reaches y1 that way, and ``weight`` isn't asked for.
    With batch statistics dy2 = scale2 * (dz2 - means2[0] - x̂2 * means2[1]). dz1 and its sums are as in cheap_backward,
    and None unless ``primary`` (and ``sums``) ask for them; ``weight`` asks for cheap_weight's gradient.
    """
    normalize_backward: Callable[[GhostArgs, Tensor, Tensor, Tensor], None]
    """(args, dz1, y1, means1): dz1 becomes dy1 = scale1 * (dz1 - means1[0] - x̂1 * means1[1]), in place."""
    layout: Callable[[GhostArgs], torch.memory_format] = lambda a: memory_format(a.x)
    """args → the memory format in which the steps cost least, copies to it and back included."""
    copy: Callable[[Tensor, Tensor], object] = lambda x, out: out.copy_(x)
    """(x, out): x, whose rows follow each other in one of the two layouts, to a dense map of the other."""


KERNELS: dict[str, TrainingKernels] = {}
"""By the backend's name; a backend that isn't here, or refuses, trains with the reference's."""


def choose(backend: str, args: GhostArgs) -> str:
    """The name of the backend whose kernels train ``args`` when ``backend`` runs its forward."""
    kernels = KERNELS.get(backend)
    return backend if kernels is not None and kernels.supports(args) is None else "reference"


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def with_norms_in_one_dtype(a: GhostArgs) -> GhostArgs:
    """``a`` with its norms' tensors in the dtype of statistics."""
    dtype = _statistics_dtype(a.x)
    names = [f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta")]
    changed = {n: t.to(dtype) for n in names if (t := getattr(a, n)) is not None and t.dtype != dtype}
    return a._replace(**changed) if changed else a


# ---- processes


def _group(name: str):
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def _joint_statistics(mean: Tensor, var: Tensor, count: int, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, var, (1,) count) of all processes' samples from those of each."""
    group = _group(group_name)
    own = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, own, group)
    table = torch.stack(parts)
    means, variances, counts = table.split([len(mean), len(var), 1], dim=1)
    total = counts.sum()
    joint = (means * counts).sum(0) / total
    spread = ((variances + (means - joint).square()) * counts).sum(0) / total
    return joint.to(mean.dtype), spread.to(var.dtype), total.to(mean.dtype).reshape(1)


def _means(sums: Tensor, count: int, group_name: str) -> Tensor:
    """The first two sums over the count; both of all processes."""
    if not group_name:
        return sums[:2] / count
    joint = torch.cat([sums[:2].flatten(), sums.new_full((1,), count)])
    torch.distributed.all_reduce(joint, group=_group(group_name))
    return (joint[:-1] / joint[-1]).view(2, -1)


# ---- the primary conv, by Torch


def _is_matrix_product(a: GhostArgs) -> bool:
    return a.kernel_size == 1 and a.stride == 1 and a.groups == 1


def _matrices(t: Tensor) -> Tensor:
    """t as (N, H W, C): a view if it is contiguous or channels_last."""
    return t.flatten(2).transpose(1, 2)


def _maps(matrices: Tensor, like: tuple[int, ...]) -> Tensor:
    """(N, H W, C) as (N, C, H, W) with H and W of the shape ``like``: a view if it comes from ``_matrices``."""
    return matrices.transpose(1, 2).unflatten(2, like[2:])


def _product(left: Tensor, right: Tensor, channels_last: bool) -> Tensor:
    """left (N, P, K) @ right (K, M) or (N, K, M), laid out as the maps are."""
    if right.dim() == 2 and channels_last:
        return left @ right
    right = right.expand(left.shape[0], -1, -1)
    if channels_last:
        return torch.bmm(left, right)
    return torch.bmm(right.transpose(1, 2), left.transpose(1, 2)).transpose(1, 2)


def _dense(t: Tensor, like: Tensor) -> Tensor:
    """t in the memory format that the output for the input ``like`` has."""
    return t.contiguous(memory_format=memory_format(like))


def _primary_weight(a: GhostArgs) -> Tensor:
    """(Cp, Cin) of a 1×1 conv, or one for each image with the input gate in it: (N, Cp, Cin)."""
    weight = a.primary_weight.flatten(1)
    return weight if a.input_gate is None else weight * a.input_gate[:, None, :]


def _conv_arguments(a: GhostArgs) -> tuple[list[int], list[int], list[int]]:
    stride, dilation = within(a.stride, a.x), within(a.dilation, a.x)
    padding = dilation * (a.kernel_size - 1) // 2
    return [stride] * 2, [padding] * 2, [dilation] * 2


def primary_conv(a: GhostArgs) -> Tensor:
    """y1 = conv(x * input_gate) without bias, dense (N, Cp, H', W')."""
    if not _is_matrix_product(a):
        x = a.x if a.input_gate is None else a.x * a.input_gate[:, :, None, None]
        y1 = torch.conv2d(x, a.primary_weight, None, *_conv_arguments(a), a.groups)
        return _dense(y1, a.x)
    channels_last = memory_format(a.x) == torch.channels_last
    weight = _primary_weight(a).transpose(-1, -2)
    y1 = _product(_matrices(_dense(a.x, a.x)), weight, channels_last)
    return _dense(_maps(y1, a.output_shape()), a.x)


def _primary_conv_backward(a: GhostArgs, dy1: Tensor, need: dict[str, bool]) -> dict[str, Tensor]:
    """Gradients of x, primary_weight and input_gate from that of y1."""
    needs_weight, needs_gate = need["primary_weight"], need["input_gate"]
    if not _is_matrix_product(a):
        gate = None if a.input_gate is None else a.input_gate[:, :, None, None]
        gated = a.x if gate is None else a.x * gate
        mask = [need["x"] or needs_gate, needs_weight, False]
        dx, dw, _ = torch.ops.aten.convolution_backward(
            dy1, gated, a.primary_weight, None, *_conv_arguments(a), False, [0, 0], a.groups, mask
        )
        grads = {"primary_weight": dw}
        if needs_gate:
            grads["input_gate"] = (dx * a.x).sum((2, 3))
        if need["x"]:
            grads["x"] = dx if gate is None else dx * gate
        return grads
    channels_last = memory_format(a.x) == torch.channels_last
    d = _matrices(dy1)
    grads = {}
    if need["x"]:
        dx = _product(d, _primary_weight(a), channels_last)
        grads["x"] = _maps(dx, a.x.shape)
    if needs_weight or needs_gate:
        x = _matrices(_dense(a.x, a.x))
        n, pixels, cp = d.shape
        cin = x.shape[2]
        # one product over all pixels of the batch, unless a sum over images comes cheaper than transposing the maps; on a CPU
        # that sum is more accurate too: of few channels, MKL adds up all pixels one by one
        as_they_lie = channels_last and a.x.is_cuda
        if a.input_gate is None and (as_they_lie or cp * cin > pixels * (cp + cin)):
            dw = d.reshape(n * pixels, cp).T @ x.reshape(n * pixels, cin)
        else:
            per_image = torch.bmm(d.transpose(1, 2), x)
            if needs_gate:  # the sum over pixels of dx * x, for dx = weight.T @ dy1
                grads["input_gate"] = (per_image * a.primary_weight.flatten(1)).sum(1)
            dw = (per_image if a.input_gate is None else per_image * a.input_gate[:, None, :]).sum(0)
        grads["primary_weight"] = dw.view_as(a.primary_weight)
    return grads


# ---- the two ops


def _copy(kernels: TrainingKernels, t: Tensor, out: Tensor) -> Tensor:
    """``out``, after t has been copied to it."""
    if t.dim() != 4 or memory_format(t) == memory_format(out):
        return out.copy_(t)
    rows_follow = t.stride(2) == t.shape[3] * t.stride(3)
    kernels.copy(t if rows_follow and 1 in (t.stride(1), t.stride(3)) else _dense(t, t), out)
    return out


def _copied(kernels: TrainingKernels, t: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of ``t`` in the layout."""
    return _copy(kernels, t, torch.empty_like(t, memory_format=layout))


def _in_best_layout(kernels: TrainingKernels, a: GhostArgs) -> GhostArgs:
    """``a`` with its maps as the kernels are fastest: itself, or copies. All that is made from them follows x."""
    layout = kernels.layout(a)
    if layout == memory_format(a.x):
        return a
    residual = None if a.residual is None else _copied(kernels, a.residual, layout)
    return a._replace(x=_copied(kernels, a.x, layout), residual=residual)


def train_forward(kernels: TrainingKernels, a: GhostArgs, group_name: str) -> tuple[Tensor, ...]:
    """(out, primary_mean, primary_var, cheap_mean, cheap_var, count) with statistics of the batch.

    ``count`` has the samples of all processes in ``group_name``, shape (1,); with no group it is empty, and the samples
    are the output's pixels.
    """
    given, a = a.x, _in_best_layout(kernels, a)
    out = a.new_output()
    a, dtype = with_norms_in_one_dtype(a), _statistics_dtype(a.x)
    samples = out.shape[0] * out.shape[2] * out.shape[3]
    count = torch.empty(0, dtype=dtype, device=out.device)

    def complete(mean: Tensor, var: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        nonlocal count
        if group_name:
            mean, var, count = _joint_statistics(mean, var, samples, group_name)
        return mean if bias is None else mean + bias, var

    with torch.autocast(out.device.type, enabled=False):
        mean, var = complete(*kernels.primary_statistics(a, out), a.primary_bias)
        a = a._replace(primary_mean=mean, primary_var=var)
        mean, var = complete(*kernels.cheap_statistics(a, out), a.cheap_bias)
        a = a._replace(cheap_mean=mean, cheap_var=var)
        kernels.normalize(a, out)
        if a.x is not given:
            out = _copied(kernels, out, memory_format(given))
    return out, a.primary_mean, a.primary_var, a.cheap_mean, a.cheap_var, count  # type: ignore[return-value]


def backward(
    kernels: TrainingKernels,
    grad_output: Tensor,
    args: GhostArgs,
    batch_statistics: bool,
    group_name: str,
    needs: list[bool],
) -> list[Tensor]:
    """Gradients of the tensor arguments for which ``needs`` holds.

    autograd.py doesn't ask for the residual's, which is grad_output: an op may not return its argument, only a copy.
    """
    need = dict(zip(TENSORS, needs, strict=True))
    a = _in_best_layout(kernels, with_norms_in_one_dtype(args)._replace(residual=None))
    with torch.autocast(a.x.device.type, enabled=False):
        grad = _dense(grad_output, args.x)
        if a.x is not args.x:
            grad = _copied(kernels, grad, memory_format(a.x))
        grads = _gradients(kernels, grad, a, batch_statistics, group_name, need)
    if need["residual"]:
        grads["residual"] = grad_output.clone()
    return [_promised(kernels, grads[name], getattr(args, name)) for name in TENSORS if need[name]]


def _promised(kernels: TrainingKernels, grad: Tensor, like: Tensor) -> Tensor:
    """``grad`` with the dtype and the strides that the op's fake promises, and in a storage of its own."""
    promised = torch.empty_like(like)
    owned = grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
    if owned and grad.dtype == like.dtype and grad.stride() == promised.stride():
        return grad
    return promised.copy_(grad) if grad.dtype != like.dtype else _copy(kernels, grad, promised)


def _gradients(
    kernels: TrainingKernels, grad: Tensor, a: GhostArgs, batch: bool, group_name: str, need: dict[str, bool]
) -> dict[str, Tensor]:
    grads: dict[str, Tensor] = {}
    samples = grad.shape[0] * grad.shape[2] * grad.shape[3]
    y1 = primary_conv(a)
    product = torch.empty_like(grad) if need["output_gate"] else None
    if grad.shape[1] > a.init_channels or product is not None:
        dz2, y2, sums2 = kernels.cheap_backward(a, grad, y1, batch, batch or _needs_sums("cheap", need), product)
    else:  # all cheap channels are cut, as functional.conv1x1 does
        dz2 = y2 = sums2 = None
        grads |= {name: torch.zeros_like(t) for name in _CHEAP if (t := getattr(a, name)) is not None}
    if product is not None:
        assert a.output_gate is not None
        gate_shape = list(a.output_gate.shape)
        grads["output_gate"] = torch.ops.aten.upsample_nearest2d_backward(product, grad.shape[2:], gate_shape)
        del product
    if sums2 is not None:
        grads |= _norm_gradients("cheap", a, sums2, batch)
    upstream, weight = any(need[name] for name in UPSTREAM), need["cheap_weight"]
    if not (upstream or weight):
        return grads
    means2 = _means(sums2, samples, group_name) if batch and sums2 is not None else None
    weight = weight and dz2 is not None
    sums = upstream and (batch or _needs_sums("primary", need))
    dz1, sums1, dw2 = kernels.primary_backward(a, grad, y1, dz2, y2, means2, batch, upstream, sums, weight)
    del dz2, y2
    if weight:
        grads["cheap_weight"] = dw2
    if sums1 is not None:
        grads |= _norm_gradients("primary", a, sums1, batch)
    if need["x"] or need["primary_weight"] or need["input_gate"]:
        if batch:
            kernels.normalize_backward(a, dz1, y1, _means(sums1, samples, group_name))
        del y1
        grads |= _primary_conv_backward(a, dz1, need)
    return grads


def _needs_sums(half: str, need: dict[str, bool]) -> bool:
    return any(need[f"{half}_{name}"] for name in ("bias", "mean", "var", "gamma", "beta", "slope"))


def _norm_gradients(half: str, a: GhostArgs, sums: Tensor, batch: bool) -> dict[str, Tensor]:
    """Gradients of one half's parameters of one number per channel, asked for or not: they cost next to nothing."""
    mean, var, gamma, slope = (getattr(a, f"{half}_{name}") for name in ("mean", "var", "gamma", "slope"))
    dz, dz_xhat, negative = sums
    grads = {"gamma": dz_xhat, "beta": dz, "bias": dz}
    if mean is not None:
        rstd = (var + getattr(a, f"{half}_eps")).rsqrt()
        dy = dz * rstd if gamma is None else dz * rstd * gamma
        # the batch's mean takes the bias out again
        grads["bias"] = torch.zeros_like(dz) if batch else dy
        grads["mean"] = -dy
        grads["var"] = -0.5 * rstd.square() * (dz_xhat if gamma is None else dz_xhat * gamma)
    if slope is not None:
        grads["slope"] = negative if slope.numel() > 1 or len(negative) == 1 else negative.sum().reshape(1)
    return {f"{half}_{name}": grad for name, grad in grads.items()}
