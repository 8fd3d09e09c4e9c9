"""Reads Ghost modules, other people's too, by structure and by what they compute; never by class name.

``read_half`` says what one half (conv → norm → activation) holds at this moment, or why it can't be read; the
forward of FusedGhostModule asks it at every call, so nothing goes stale. ``read`` finds the two halves of
somebody's module, and ``prove`` runs that module beside its fused twin.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .spec import Act, BatchNorm

ACTIVATIONS: dict[type[nn.Module], Act] = {
    nn.ReLU: Act.RELU,
    nn.ReLU6: Act.RELU6,
    nn.SiLU: Act.SILU,
    nn.Hardswish: Act.HARDSWISH,
    nn.LeakyReLU: Act.LEAKY_RELU,
    nn.PReLU: Act.PRELU,
    nn.GELU: Act.GELU,
}
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Half(NamedTuple):
    """What one half of a Ghost module holds: the modules' own tensors, not copies."""

    conv: nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    norm: BatchNorm | None
    act: Act
    slope: float | Tensor | None
    """LeakyReLU's slope or PReLU's weight."""
    batch_norm: nn.Module | None
    """The norm, if it would use the batch's statistics, not stored ones."""


class Adopted(NamedTuple):
    """Where a Ghost module keeps its halves."""

    primary: str
    """Name of the child that is conv → norm → activation."""
    cheap: str
    """Name of the child that is depthwise conv → norm → activation."""
    out_channels: int
    """Of its output: at most those of both halves together."""


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _forward_replaced(block: nn.Module) -> bool:
    """Whether the instance has a forward that is no method of its class, as offloading tools install.

    Switching to another method of the class (ultralytics' ``forward_fuse``) is the class's own business.
    """
    forward = block.__dict__["forward"]
    return not (isinstance(forward, MethodType) and getattr(type(block), forward.__name__, None) is forward.__func__)


def read_half(block: nn.Module) -> Half | str:
    """The tensors and settings of ``block``'s convolution, norm and activation; or why it can't be taken apart.

    The children count in the order of registration: one Conv2d, at most one BatchNorm, at most one activation.
    Every call of FusedGhostModule comes through here: this reads instance dictionaries, since ``nn.Module.__getattr__``
    costs more than all the rest.
    """
    if _has_hooks(block) or ("forward" in block.__dict__ and _forward_replaced(block)):
        return f"{type(block).__name__} has hooks or another forward"
    conv: nn.Conv2d | None = None
    norm: BatchNorm | None = None
    act: Act | None = None
    slope: float | Tensor | None = None
    batch_norm: nn.Module | None = None
    normed = False
    for child in block._modules.values():
        if child is None:
            continue
        kind = type(child)
        if _has_hooks(child) or "forward" in child.__dict__:
            return f"{kind.__name__} has hooks or another forward"
        if kind is nn.Conv2d and conv is None:
            conv = child  # type: ignore[assignment]
        elif kind in _NORMS and conv is not None and act is None and not normed:
            normed = True
            affine, buffers = child._parameters, child._buffers
            if "weight" not in affine or "bias" not in affine:
                return f"{kind.__name__}, whose weight or bias is no parameter of it"
            mean, var = buffers["running_mean"], buffers["running_var"]
            if child.training or mean is None or var is None:
                batch_norm, mean, var = child, None, None
            norm = BatchNorm(mean, var, affine["weight"], affine["bias"], child.eps)  # type: ignore[arg-type]
        elif kind in ACTIVATIONS and conv is not None and act is None:
            act = ACTIVATIONS[kind]
            if kind is nn.LeakyReLU:
                slope = child.negative_slope  # type: ignore[assignment]
            elif kind is nn.PReLU:
                slope = child._parameters["weight"]
            elif kind is nn.GELU and child.approximate != "none":
                return f"GELU with approximate={child.approximate!r}"
        elif kind is not nn.Identity and (kind is not nn.Sequential or child._modules):
            return f"{kind.__name__} at a place where it is not understood"
    if conv is None:
        return "no Conv2d"
    parameters = conv._parameters
    if "weight" not in parameters or "bias" not in parameters:  # torch.nn.utils.weight_norm, DataParallel's replicas
        return "Conv2d, whose weight or bias is no parameter of it"
    weight: Tensor = parameters["weight"]  # type: ignore[assignment]
    return Half(conv, weight, parameters["bias"], norm, Act.NONE if act is None else act, slope, batch_norm)


def mismatch(primary: Half, cheap: Half) -> str | None:
    """Why ``functional.ghost_module`` can't do what these two convolutions do one after the other; None if it can.

    It takes odd square kernels, zero padding that keeps the size, equal strides and dilations in both directions,
    and a cheap operation that is depthwise, at stride and dilation 1.
    """
    conv = primary.conv
    channels, _, k, k2 = primary.weight.shape
    stride, dilation, padding = conv.stride, conv.dilation, conv.padding
    if k != k2 or k % 2 == 0 or stride[0] != stride[1] or dilation[0] != dilation[1]:
        return "the primary conv's kernel is even, or its kernel, stride or dilation is not square"
    same = dilation[0] * (k // 2)
    if (padding != (same, same) and padding != "same") or conv.padding_mode != "zeros":
        return f"the primary conv's padding is {padding} ({conv.padding_mode}), not {same} zeros"
    conv = cheap.conv
    new_channels, per_group, d, d2 = cheap.weight.shape
    if conv.groups != channels or per_group != 1 or new_channels % channels:
        return f"the second conv is not depthwise over the {channels} maps of the first"
    if d != d2 or d % 2 == 0 or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return "the cheap operation's kernel is not odd and square, or its stride or dilation is not 1"
    padding = conv.padding
    if (padding != (d // 2, d // 2) and padding != "same") or conv.padding_mode != "zeros":
        return f"the cheap operation's padding is {padding} ({conv.padding_mode}), not {d // 2} zeros"
    return None


# Overriding these changes no behaviour that a fused module has to keep, or is what ``prove`` is for.
_MAY_OVERRIDE = {"__init__", "__repr__", "__dir__", "extra_repr", "forward"}
_METHODS = {name for name, value in vars(nn.Module).items() if inspect.isfunction(value)} - _MAY_OVERRIDE


def read(module: nn.Module) -> Adopted | str:
    """Where ``module``'s halves are and how many channels it gives out; or why it is no Ghost module that can be fused.

    Runs ``module.forward`` once, on a small random input with random weights in place of its own (``_substituted``).
    """
    kind = type(module)
    overridden = sorted(name for name in _METHODS if getattr(kind, name) is not getattr(nn.Module, name))
    if overridden:
        return f"{kind.__name__} overrides {', '.join(overridden)} of nn.Module"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    halves: dict[str, Half] = {}
    refusals = []
    for name, child in module._modules.items():
        if child is None:
            continue
        half = read_half(child)
        if not isinstance(half, str):
            halves[name] = half
        elif child._modules or child._parameters:
            refusals.append(f"{name}: {half}")
    pairs = [(p, c) for p in halves for c in halves if p != c and mismatch(halves[p], halves[c]) is None]
    if not pairs:
        if len(halves) >= 2:
            first, second, *_ = halves
            refusals.append(f"{first}, {second}: {mismatch(halves[first], halves[second])}")
        found = f"{len(halves)} children of the form conv, BatchNorm, activation; a Ghost module has 2"
        return "; ".join(refusals) or found
    primary, cheap = pairs[0]  # where both orders fit, the order of registration: ``prove`` tells if that is wrong

    blocks = nn.ModuleList([module._modules[primary], module._modules[cheap]])  # type: ignore[list-item]
    known = {id(t) for t in (*blocks.parameters(), *blocks.buffers())}
    further = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if id(t) not in known]
    if further:
        return f"it has tensors beside {primary} and {cheap}: {', '.join(further[:3])}"
    inner = [name for name, child in module.named_modules() if child is not module and _has_hooks(child)]
    if inner:
        return f"hooks on {', '.join(inner)}"

    try:
        with _substituted(module, halves[primary].conv, training=False) as x:
            out = module.forward(x)
    except Exception as error:
        return f"it doesn't run on a float64 tensor on the CPU: {type(error).__name__}: {error}"
    if not isinstance(out, Tensor) or out.dim() != 4:
        return "it doesn't return one 4-dimensional tensor"
    init_channels = halves[primary].weight.shape[0]
    channels = init_channels + halves[cheap].weight.shape[0]
    if not init_channels <= out.shape[1] <= channels:
        return f"it returns {out.shape[1]} channels, no concatenation of {init_channels} and {channels - init_channels}"
    return Adopted(primary, cheap, out.shape[1])


def prove(module: nn.Module, fused: nn.Module, adopted: Adopted) -> str | None:
    """Runs both in eval and in train mode; says how they differ, None if they don't.

    ``fused`` must hold the very children of ``module``. Both run in float64 on the CPU, on one small input, with random
    weights and statistics in place of their own, so that weights of zero hide nothing; hooks of ``module`` don't fire.
    Don't call it while another thread runs ``module``.
    """
    half = read_half(module._modules[adopted.primary])  # type: ignore[arg-type]
    assert isinstance(half, Half)
    for training in (False, True):
        mode = "train" if training else "eval"
        outputs = []
        for each in (module, fused):
            try:
                with _substituted(module, half.conv, training) as x:
                    outputs.append(each.forward(x))
            except Exception as error:
                return f"it doesn't run in {mode} mode: {type(error).__name__}: {error}"
        expected, out = outputs
        if out.shape != expected.shape:
            return (
                f"in {mode} mode its output has the shape {tuple(expected.shape)}, a Ghost module's {tuple(out.shape)}"
            )
        difference = float((out - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
        if not difference < 1e-10:
            return f"in {mode} mode its output differs from a Ghost module's by {difference:.1e} of the largest value"
    return None


@contextlib.contextmanager
def _substituted(module: nn.Module, primary_conv: nn.Conv2d, training: bool) -> Iterator[Tensor]:
    """Puts random float64 CPU tensors in place of ``module``'s and sets its mode; yields an input to run it on.

    Nothing is written to the module's own tensors; they and all training flags are back afterwards. The random numbers
    are the same every time, and PyTorch's random state is left as it was.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    substitutes: dict[int, Tensor] = {}  # by the original's id, so that tied tensors stay tied

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def substitute(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
        random = randn(*t.shape)
        return random.abs() + 0.5 if name == "running_var" else random

    modules = list(module.modules())
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in modules]
    try:
        for m in modules:
            for tensors in (m._parameters, m._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        new = substitutes.setdefault(id(t), substitute(name, t))
                        is_parameter = isinstance(t, nn.Parameter)
                        tensors[name] = nn.Parameter(new) if is_parameter else new  # type: ignore[assignment]
            m.training = training
        channels = primary_conv.in_channels
        # one sample around 1, one where clamps (ReLU6, hardswish) act, one between
        x = torch.cat([randn(1, channels, 7, 9) * scale for scale in (0.3, 2.0, 15.0)]) / channels**0.5
        random_state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs too
        try:
            with torch.no_grad():
                yield x
        finally:
            torch.set_rng_state(random_state)
    finally:
        for m, parameters, buffers, mode in saved:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            m.training = mode
