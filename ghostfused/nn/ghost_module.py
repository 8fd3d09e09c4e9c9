"""FusedGhostModule: a Ghost module as ``nn.Module``, with the seed blog's arguments."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import arguments, ghost_module
from ..ops.recording import note_others
from ..recognize import ghost
from ..recognize.classes import call
from ..recognize.disturbed import named
from ..recognize.equivalence import prove
from ..recognize.swap import make_twin, original
from ..spec import Act
from . import batch_statistics
from .batch_statistics import runs_unfused
from .cache import CachesPrograms, ProgramCache, may_replay
from .children import ConvNormAct, activation, check_backend, check_int
from .layers import Layout
from .output_order import fits, orders, reordered

torch.fx.wrap("ghost_module")  # torch.fx's symbolic tracing records the call and doesn't look inside

KEYS = {
    "seed": ("primary_conv", "cheap_op"),
    "paper": ("primary_conv", "cheap_operation"),
    "ultralytics": ("cv1", "cv2"),
}
"""Names of the two halves in each layout of state_dict keys."""


class FusedGhostModule(CachesPrograms, nn.Module):
    """A Ghost module (Han et al., "GhostNet: More Features from Cheap Operations", CVPR 2020, section 3.1), fused.

    (N, in_channels, H, W) → (N, out_channels, H', W'). ceil(out_channels / s) primary maps are made by
    convolution, BatchNorm and activation, s - 1 ghost maps from each of them by a depthwise convolution, BatchNorm and
    activation; what exceeds ``out_channels`` is dropped.

    Weights, BatchNorms and activations live in ordinary child modules and are read afresh when anything about them has
    changed, so whatever is done to them takes effect. Where a child is one that the fused function can't stand for
    (hooks, parametrizations, other padding, …), or only one BatchNorm uses batch statistics, forward runs the children
    themselves: same result, more kernels.

    Args:
        in_channels, out_channels: of input and output.
        s: primary and ghost maps for each primary map (the paper's ratio), at least 2.
        kernel_size, stride: of the primary conv, which pads by ``dilation * (kernel_size // 2)``.
        use_relu: the blog's choice of the primary conv's activation, ReLU or none; ``act_primary`` overrides it.
        dw_size: kernel size of the cheap operation, odd.
        dilation, groups: of the primary conv.
        act_primary, act_cheap: name or ``Act`` ("none", "relu", "relu6", "silu", "hardswish", "leaky_relu", "prelu",
            "gelu", "gelu_tanh", "mish"), or a module of one of these kinds, such as ``nn.LeakyReLU(0.1)`` or ``nn.PReLU(init_channels)``.
            Defaults are the blog's: by ``use_relu``, and ReLU6.
        keys: names of the children, hence of the state_dict's keys: "seed" (primary_conv.0, cheap_op.0, …), "paper"
            (primary_conv.0, cheap_operation.0, …) or "ultralytics" (cv1.conv, cv1.bn, cv2.conv, …).
        backend: as in ``ghostfused.functional.ghost_module``.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument doesn't fit; the message names it, what was expected and what came.
    """

    takes_gates = True  # subclasses say whether their names mean something else to the original

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        s: int = 2,
        kernel_size: int = 1,
        stride: int = 1,
        use_relu: bool = True,
        *,
        dw_size: int = 3,
        dilation: int = 1,
        groups: int = 1,
        act_primary: str | Act | nn.Module | None = None,
        act_cheap: str | Act | nn.Module | None = None,
        keys: str = "seed",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1), ("out_channels", out_channels, 1), ("kernel_size", kernel_size, 1),
            ("stride", stride, 1), ("dw_size", dw_size, 1), ("dilation", dilation, 1), ("groups", groups, 1),
        ):  # fmt: skip
            check_int(name, value, least)
        check_int("s", s, 2, "; with one map for each there are no ghosts: use nn.Conv2d")
        if dw_size % 2 == 0:
            raise ValueError(f"dw_size: expected an odd number, got {dw_size}")
        init_channels = -(-out_channels // s)
        new_channels = init_channels * (s - 1)
        if in_channels % groups or init_channels % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels = {in_channels} and of init_channels = {init_channels}, "
                f"got {groups}"
            )
        if keys not in KEYS:
            raise ValueError(f"keys: expected one of {sorted(KEYS)}, got {keys!r}")
        check_backend(backend)
        to = {"device": device, "dtype": dtype}

        def half(name: str, conv: nn.Conv2d, act: str | Act | nn.Module) -> nn.Sequential:
            channels = conv.out_channels
            block = ConvNormAct() if keys == "ultralytics" else nn.Sequential()
            names = ("conv", "bn", "act") if keys == "ultralytics" else ("0", "1", "2")
            norm = nn.BatchNorm2d(channels, **to)  # type: ignore[arg-type]
            for key, child in zip(names, (conv, norm, activation(name, act, channels, to)), strict=True):
                block.add_module(key, child)
            return block

        padding = dilation * (kernel_size // 2)
        primary_conv = nn.Conv2d(
            in_channels,
            init_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            **to,  # type: ignore[arg-type]
        )
        cheap_conv = nn.Conv2d(
            init_channels,
            new_channels,
            dw_size,
            padding=dw_size // 2,
            groups=init_channels,
            bias=False,
            **to,  # type: ignore[arg-type]
        )
        if act_primary is None:
            act_primary = Act.RELU if use_relu else Act.NONE
        self._halves: tuple[ghost.Place, ghost.Place] = KEYS[keys]  # type: ignore[assignment]
        self.out_channels = out_channels
        self.backend = backend
        self._cache = ProgramCache()
        self.add_module(self._halves[0], half("act_primary", primary_conv, act_primary))
        self.add_module(self._halves[1], half("act_cheap", cheap_conv, Act.RELU6 if act_cheap is None else act_cheap))

    @classmethod
    def from_module(cls, module: nn.Module, backend: str = "auto") -> FusedGhostModule:
        """The fused twin of somebody's Ghost module: the blog's, the paper's, timm's (v1), ultralytics' GhostConv, ….

        The twin holds the very children of ``module``, so parameters and buffers are shared, and its state_dict keys,
        BatchNorm settings, training flag, hooks and extra attributes are ``module``'s. The module is recognized by its
        structure, and both are run in float64 on a small random input to prove that they compute the same, in eval and
        train mode; neither its tensors nor PyTorch's random state change.

        Raises:
            TypeError: ``module`` is no nn.Module.
            ValueError: it is not a Ghost module, or one that can't be fused; the message says why.
        """
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
        check_backend(backend)
        with named("from_module"):
            recognized = ghost.read(module)
            fused = recognized if isinstance(recognized, str) else cls.from_recognized(module, recognized, backend)
        if isinstance(fused, str):
            raise ValueError(f"module: expected a Ghost module that can be fused, got {type(module).__name__}: {fused}")
        return fused

    @classmethod
    def from_recognized(cls, module: nn.Module, recognized: ghost.Recognized, backend: str) -> FusedGhostModule | str:
        """As ``from_module``, for what ``ghost.read`` has read; returns how the two differ where that raises."""
        kind, halves = cls, (recognized.primary, recognized.cheap)
        attributes = {
            "_halves": halves,
            "backend": "reference",
            "_cache": ProgramCache(),
            "_cut": recognized.cut,
            "_watched": recognized.watched,
            "_layout": Layout.of(module, (), recognized.read_afresh, recognized.watched.looks),
        }
        if "out_channels" not in module.__dict__:  # else it is the module's own, which its forward may read
            attributes["out_channels"] = recognized.out_channels(module)
        if recognized.attention is not None:
            from .attention import FusedAttentionGhostModule  # it derives from this class

            kind = FusedAttentionGhostModule
            attributes |= FusedAttentionGhostModule.attributes(module, recognized.attention, recognized.gate_form)
        from .call_signature import called_as  # so do its classes

        kind, arguments = called_as(module, kind)
        reason: str | None = "no memory format is that of its output"
        for order in orders(module, recognized):
            fused = make_twin(kind, module, **attributes, **arguments, _order=order)
            reason = prove(module, fused, recognized.in_channels)
            if reason is None:
                fused.backend = backend
                return fused
        other_order = "it gives out its maps in an order that no fused module has: " if recognized.shuffled else ""
        return f"{other_order}{reason}"

    def _read(self) -> tuple[ghost.Half, ghost.Half] | str:
        """Both halves as they are now; or why the fused function can't stand for them."""
        if self._is_changed():
            return "what its own forward reads has changed"
        if foreign := next((name for name in self._halves if isinstance(name, str) and self._is_foreign(name)), None):
            return f"{foreign} is no plain sequence of layers"
        primary, cheap = (ghost.read_place(self, place) for place in self._halves)
        if isinstance(primary, str):
            return primary
        if isinstance(cheap, str):
            return cheap
        if self._channels(primary, cheap) < primary.weight.shape[0]:
            return "it gives out fewer channels than its first half"
        if (primary.batch_norm is None) != (cheap.batch_norm is None):
            return "one half's BatchNorm uses batch statistics, the other's doesn't"
        return ghost.mismatch(primary, cheap) or (primary, cheap)

    def _is_changed(self) -> bool:
        """Whether what the forward of the module that this was made from reads, or leaps over, isn't as it was."""
        watched = self.__dict__.get("_watched")
        if watched is None:
            return False
        return watched.changed(self) or not self.__dict__["_layout"].holds(self)

    def _is_foreign(self, name: str) -> bool:
        """Whether the child of that name has a forward that may do anything: it isn't the kind that it was."""
        kind = type(self.__dict__["_modules"].get(name))
        if kind is nn.Sequential or kind is ConvNormAct:
            return False
        layout: Layout | None = self.__dict__.get("_layout")
        return layout is None or layout.kinds[()].get(name) is not kind

    def _channels(self, primary: ghost.Half, cheap: ghost.Half) -> int:
        """How many it gives out, by what its tensors are now."""
        cut, channels = self.__dict__.get("_cut", self.out_channels), primary.weight.shape[0] + cheap.weight.shape[0]
        return channels if cut is None else min(cut, channels)

    def forward(
        self,
        x: Tensor,
        *,
        input_gate: Tensor | None = None,
        residual: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        """The Ghost module of x.

        Args:
            x: (N, in_channels, H, W).
            input_gate: (N, in_channels), multiplies x.
            residual: (N, out_channels, H', W'), added last.
            output_gate: (N, out_channels, Hg, Wg), multiplies the output after nearest upsampling to (H', W').

        Returns:
            (N, out_channels, H', W'), a fresh tensor.
        """
        if self.__dict__.get("_order") is not None:
            return self._run_shuffled(x, input_gate, residual, output_gate)
        if input_gate is None and residual is None and output_gate is None and may_replay(x):
            return self._cache(self, x, self._run)
        return self._run(x, input_gate, residual, output_gate)

    def _run_shuffled(
        self, x: Tensor, input_gate: Tensor | None, residual: Tensor | None, output_gate: Tensor | None
    ) -> Tensor:
        """The kernel's maps, put into their order by PyTorch."""
        note_others()
        order, plain = self.__dict__["_order"], runs_unfused(self, x)
        if plain or isinstance(halves := self._read(), str) or not fits(order, self._channels(*halves)):
            module = cast(nn.Module, original(self))
            out = call(module, x if input_gate is None else _gated(x, input_gate))
        else:
            out = reordered(self._run(x, input_gate), order)
        return out if output_gate is None and residual is None else _finished(out, output_gate, residual)

    def _run(
        self,
        x: Tensor,
        input_gate: Tensor | None = None,
        residual: Tensor | None = None,
        output_gate: Tensor | None = None,
    ) -> Tensor:
        """As ``forward``, read afresh."""
        if runs_unfused(self, x) or isinstance(halves := self._read(), str):
            return self._run_children(x, input_gate, residual, output_gate)
        primary, cheap = halves
        conv = primary.conv
        options: dict[str, Any] = {
            "primary_bias": primary.bias,
            "primary_bn": primary.norm,
            "act_primary": primary.act,
            "primary_slope": primary.slope,
            "cheap_bias": cheap.bias,
            "cheap_bn": cheap.norm,
            "act_cheap": cheap.act,
            "cheap_slope": cheap.slope,
            "out_channels": self._channels(primary, cheap),
            "stride": conv.stride[0],
            "dilation": conv.dilation[0],
            "groups": conv.groups,
        }
        options |= {"input_gate": input_gate, "residual": residual, "output_gate": output_gate}
        if primary.batch_norm is None or cheap.batch_norm is None:
            return ghost_module(x, primary.weight, cheap.weight, backend=self.backend, **options)
        norms = primary.batch_norm, cheap.batch_norm
        groups = [batch_statistics.group_name(norm) for norm in norms]
        if groups[0] != groups[1] or isinstance(x, torch.fx.Proxy):
            return self._run_children(x, input_gate, residual, output_gate)
        args = arguments(x, primary.weight, cheap.weight, **options)
        name = batch_statistics.choose(args, self.backend, groups[0])
        if batch_statistics.is_left_to_torch(name, self.backend, groups[0]):
            return self._run_children(x, input_gate, residual, output_gate)
        update = functools.partial(batch_statistics.update_both, norms)
        return batch_statistics.train(args, name, groups[0], update).out

    def _run_children(
        self, x: Tensor, input_gate: Tensor | None, residual: Tensor | None, output_gate: Tensor | None
    ) -> Tensor:
        """Forward by calling the children, as an unfused Ghost module does; or as the one did that this was made from."""
        note_others()
        if input_gate is not None:
            x = _gated(x, input_gate)
        primary, cheap = self._halves
        named = isinstance(primary, str) and isinstance(cheap, str)
        module = original(self) if runs_unfused(self, x) or not named or self._is_changed() else None
        if module is not None:
            out = call(module, x)
        else:
            x1 = cast(nn.Module, self._modules[cast(str, primary)])(x)
            x2 = cast(nn.Module, self._modules[cast(str, cheap)])(x1)
            if (cut := self.__dict__.get("_cut", self.out_channels)) is not None:
                # cut before the concatenation: the output is no view of a larger tensor
                rest = cut - x1.shape[1]
                x1, x2 = (
                    (x1, x2[:, :rest]) if isinstance(rest, torch.fx.Proxy) or rest >= 0 else (x1[:, :cut], x2[:, :0])
                )
            out = torch.cat([x1, x2], dim=1)
        return out if output_gate is None and residual is None else _finished(out, output_gate, residual)

    def unfused(self) -> nn.Module:
        halves = OrderedDict((name, self._modules[name]) for name in cast(tuple[str, str], self._halves))
        module = _Halves(halves, self.out_channels)  # type: ignore[arg-type]
        module.training = self.training
        return module

    def extra_repr(self) -> str:
        text = f"out_channels={self.out_channels}, backend={self.backend!r}"
        halves = self._read()
        if isinstance(halves, str):
            return f"{text}, runs its layers one by one: {halves}"
        primary, cheap = halves
        ratio = cheap.weight.shape[0] // primary.weight.shape[0] + 1
        return f"{text}, ratio={ratio}, act_primary={primary.act.name.lower()}, act_cheap={cheap.act.name.lower()}"


# torch.fx's symbolic tracing doesn't know which of these are None: the graph asks as it runs
torch.fx.wrap("_gated")
torch.fx.wrap("_finished")


def _gated(x: Tensor, input_gate: Tensor | None) -> Tensor:
    return x if input_gate is None else x * input_gate[:, :, None, None]


def _finished(out: Tensor, output_gate: Tensor | None, residual: Tensor | None) -> Tensor:
    if output_gate is not None:
        out = out * F.interpolate(output_gate, size=out.shape[2:], mode="nearest")
    return out if residual is None else out + residual


class _Halves(nn.Sequential):
    """A Ghost module's halves, for TorchScript."""

    def __init__(self, halves: OrderedDict[str, nn.Module], out_channels: int):
        super().__init__(halves)
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for half in self:
            maps.append(half(maps[-1]))
        return torch.cat(maps[1:], 1)[:, : self.out_channels]
