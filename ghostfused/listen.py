"""Hears what a forward runs, as steps of a program: our own ops, and those of PyTorch's functions that are the same as one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .backends.common import MAX_PATCH_CHANNELS, depthwise_form_refusal
from .spec import Act, DepthwiseArgs, GhostArgs, GlobalPoolArgs, LinearArgs, Step

_QUESTIONS = ("__get__", "dim", "is_contiguous", "numel", "size", "stride")
"""Functions that read what a tensor is, but none of its numbers."""

_COPIES = (Tensor.contiguous, Tensor.to)
"""Functions that return their first argument itself if it is as they are to make it."""


class Listener(TorchFunctionMode):
    """While it is on, ``calls`` grows by each of our ops that runs (``note`` tells); with ``translate`` also by PyTorch's
    functions, as steps of the CPU's programs.

    A function that is none of these makes a tensor that no step has made: a program can't be made of what uses it. But
    one that may change a tensor in place, or reads its numbers, can't be left out, and then ``lost`` is true.
    """

    def __init__(self, translate: bool):
        super().__init__()
        self.translate = translate
        self.calls: list[tuple[str, Step, Tensor]] = []
        """Backend, arguments, result."""
        self.lost = False
        self._same: dict[int, tuple[Tensor, Tensor]] = {}
        """By a tensor's id: it, and the step's result that it is another view of."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.lost:
            self._hear(func, args, kwargs, out)
        return out

    def note(self, backend: str, args: Step, out: Tensor) -> None:
        """``backend`` has made ``out`` of ``args``."""
        self.calls.append((backend, args, out))

    def result(self, out: object) -> bool:
        """Whether ``out`` is what the last call made."""
        return not self.lost and bool(self.calls) and out is self.calls[-1][2] and self._has_its_shape()

    def _has_its_shape(self) -> bool:
        _, args, out = self.calls[-1]
        return tuple(args.output_shape()) == tuple(out.shape)

    def _hear(self, func: Callable, args: tuple, kwargs: dict[str, Any], out: object) -> None:
        if getattr(func, "namespace", None) == "ghostfused" or (func in _COPIES and out is args[0]):
            return
        if self.translate and func in _TRANSLATIONS:
            translation = _TRANSLATIONS[func]
            try:
                bound = inspect.signature(translation).bind(self, out, *args, **kwargs)
            except TypeError:  # arguments that no translation knows
                pass
            else:
                if translation(*bound.args, **bound.kwargs):
                    return
        outs = out if isinstance(out, tuple | list) else (out,)
        if all(isinstance(t, Tensor) for t in outs):
            self.lost = any(t is given for t in outs for given in (*args, *kwargs.values()))
        else:
            self.lost = getattr(func, "__name__", None) not in _QUESTIONS

    def _source(self, t: Tensor) -> Tensor:
        return self._same.get(id(t), (t, t))[1]

    def _last(self, x: Tensor) -> tuple[str, Any] | None:
        """The call that made x, if nothing has come after it."""
        if self.calls and self.calls[-1][2] is x:
            return self.calls[-1][:2]
        return None

    # ---- PyTorch's functions: what each made, then its own parameters. They return whether they are a step.

    def conv2d(self, out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> bool:
        """A convolution padded by half its kernel: of all channels, or depthwise."""
        (sh, sw), (dh, dw) = _pair(stride), _pair(dilation)
        if input.dim() != 4:
            return False
        channels, per_group, kh, kw = weight.shape
        half = dh * (kh // 2), dw * (kw // 2)
        if padding == "same" and (sh, sw) == (1, 1):
            padding = half
        if sh != sw or dh != dw or kh % 2 == 0 or kw % 2 == 0 or isinstance(padding, str) or _pair(padding) != half:
            return False
        if groups == 1 and kh == kw and (kh == 1 or per_group <= MAX_PATCH_CHANNELS):
            unread = weight[:, :1, :1, :1]
            settings = 0.0, int(Act.NONE), 0.0, 0.0, int(Act.NONE), 0.0, channels, sh, dh, groups, False
            args = GhostArgs(input, weight, bias, *[None] * 5, unread, *[None] * 9, *settings)  # type: ignore[arg-type,call-arg]
            self.note("cpu", args, out)
            return True
        depthwise = groups == channels == input.shape[1] and per_group == dh == 1
        if not depthwise or depthwise_form_refusal((kh, kw), sh, Act.NONE):
            return False
        rest = 0.0, int(Act.NONE), 0.0, sh
        self.note("cpu", DepthwiseArgs(input, weight, bias, *[None] * 5, *rest), out)  # type: ignore[arg-type,call-arg]
        return True

    def batch_norm(
        self, out, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ) -> bool:
        """That of the convolution that has just run, with stored statistics."""
        last = self._last(input)
        if training or running_mean is None or last is None:
            return False
        backend, args = last
        norm = {"mean": running_mean, "var": running_var, "gamma": weight, "beta": bias, "eps": eps}
        if isinstance(args, DepthwiseArgs) and args.mean is None and args.act == Act.NONE:
            args = args._replace(**norm)
        elif _is_conv(args) and args.primary_mean is None and args.primary_act == Act.NONE:
            args = args._replace(**{f"primary_{name}": value for name, value in norm.items()})
        else:
            return False
        self.calls[-1] = backend, args, out
        return True

    def activate(self, out: Tensor, input: Tensor, act: Act, negative_slope: float = 0.0) -> bool:
        """That of the convolution that has just run."""
        last = self._last(input)
        if last is None:
            return False
        backend, args = last
        if isinstance(args, DepthwiseArgs) and args.act == Act.NONE:
            args = args._replace(act=int(act), negative_slope=negative_slope)
        elif _is_conv(args) and args.primary_act == Act.NONE:
            args = args._replace(primary_act=int(act), primary_negative_slope=negative_slope)
        else:
            return False
        self.calls[-1] = backend, args, out
        return True

    def leaky_relu(self, out, input, negative_slope=0.01, inplace=False) -> bool:
        return self.activate(out, input, Act.LEAKY_RELU, negative_slope)

    def hardtanh(self, out, input, min_val=-1.0, max_val=1.0, inplace=False) -> bool:
        return (min_val, max_val) == (0, 6) and self.activate(out, input, Act.RELU6)

    def adaptive_avg_pool2d(self, out, input, output_size) -> bool:
        if _pair(output_size) != (1, 1) or input.dim() != 4:
            return False
        self.note("cpu", GlobalPoolArgs(input), out)
        return True

    def mean(self, out, input, dim=None, keepdim=False) -> bool:
        """Over height and width."""
        if input.dim() != 4 or not isinstance(dim, tuple | list) or not all(isinstance(d, int) for d in dim):
            return False
        if sorted(d % 4 for d in dim) != [2, 3]:
            return False
        self.note("cpu", GlobalPoolArgs(input), out)
        return True

    def reshaped(self, out, input, *shape, **named) -> bool:
        """A map of one pixel as a matrix."""
        if out is not input:
            if input.dim() != 4 or out.shape != input.shape[:2] or input.shape[2:] != (1, 1):
                return False
            self._same[id(out)] = out, self._source(input)
        return True

    def dropout(self, out, input, p=0.5, training=True, inplace=False) -> bool:
        """In eval mode."""
        if training:
            return False
        if out is not input:
            self._same[id(out)] = out, self._source(input)
        return True

    def linear(self, out, input, weight, bias=None) -> bool:
        if input.dim() != 2:
            return False
        self.note("cpu", LinearArgs(self._source(input), weight, bias), out)
        return True


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values  # type: ignore[return-value]


def _is_conv(args: Step) -> bool:
    """Whether ``args`` are a convolution and what may follow it, but no ghosts, gate or residual after these."""
    if not isinstance(args, GhostArgs):
        return False
    return args.out_channels == args.init_channels and args.residual is None and args.output_gate is None


def _activation(act: Act) -> Callable[..., bool]:
    return lambda listener, out, input, inplace=False: listener.activate(out, input, act)


_TRANSLATIONS: dict[Callable, Callable[..., bool]] = {
    torch.conv2d: Listener.conv2d,
    F.batch_norm: Listener.batch_norm,
    F.leaky_relu: Listener.leaky_relu,
    F.hardtanh: Listener.hardtanh,
    F.adaptive_avg_pool2d: Listener.adaptive_avg_pool2d,
    F.dropout: Listener.dropout,
    F.linear: Listener.linear,
}
for _act, _functions in {
    Act.RELU: (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
    Act.RELU6: (F.relu6,),
    Act.SILU: (F.silu,),
    Act.HARDSWISH: (F.hardswish,),
}.items():
    _TRANSLATIONS |= dict.fromkeys(_functions, _activation(_act))
_TRANSLATIONS |= dict.fromkeys((torch.mean, Tensor.mean), Listener.mean)
_TRANSLATIONS |= dict.fromkeys(
    (torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.squeeze, Tensor.squeeze), Listener.reshaped
)
