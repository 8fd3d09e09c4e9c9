"""Parameters that a frozen program has to itself: folded once, so that what is written into the model's takes no effect."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import cpu
from ..spec import DepthwiseArgs, GhostArgs, LinearArgs, SqueezeExciteArgs

ACTIVE = ("x", "input_gate", "residual", "output_gate", "second", "third", "fourth")
"""Arguments of a step that the network computes; all others are the model's own tensors."""
_LARGE: dict[type, tuple[str, ...]] = {
    GhostArgs: ("primary_weight",),
    SqueezeExciteArgs: ("reduce_weight", "expand_weight"),
    LinearArgs: ("weight",),
}
"""The weights that a network reads many of; those of its depthwise convolutions are few."""
_NORM = ("mean", "var", "gamma", "beta")


class Frozen:
    """Copies of the model's tensors, as a program's steps read them; programs of several shapes share them."""

    def __init__(self, weights: torch.dtype | None = None, dtype: torch.dtype | None = None) -> None:
        self.weights, self.dtype = weights, dtype
        self.packs = ops.Packs(cpu.extension.module)
        self._rounded = False
        self._steps: dict[Any, tuple[Any, Any]] = {}
        """By what a step is made of: the step as the model has it, and with tensors of our own."""
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, args: Any) -> Any:
        """The step ``args`` with parameters of ours; what the network computes stays as it is."""
        active = [name for name in ACTIVE if hasattr(args, name)]
        alone = args._replace(**dict.fromkeys(active))
        # with no ghosts, of the cheap weight only the shape counts, and it is made for the step
        unread = isinstance(args, GhostArgs) and args.out_channels == args.init_channels
        made_of = alone._replace(cheap_weight=None) if unread else alone
        key = type(args), *(id(value) if isinstance(value, Tensor) else value for value in made_of)
        if key not in self._steps:
            folded = [half for half in _halves(alone) if self.dtype is None and _may_fold(alone, half)]
            self._steps[key] = alone, _own(alone, folded, self.dtype)
        own = self._steps[key][1]
        return own._replace(**{name: getattr(args, name) for name in active})

    def tensor(self, t: Tensor) -> Tensor:
        """A copy of ``t``, which PyTorch reads."""
        return self._tensors.setdefault(id(t), (t, t.clone()))[1]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of ours and what it would be by now."""
        pairs = [(own, given) for given, own in self._tensors.values()]
        for given, own in self._steps.values():
            folded = [half for half in _halves(given) if half not in _halves(own)]
            large = _LARGE.get(type(own), ()) if self._rounded else ()
            for name, value in _own(given, folded, self.dtype)._asdict().items():
                if isinstance(value, Tensor):
                    rounded = name in large and value.dtype == torch.float32
                    pairs.append((getattr(own, name), value.to(self.weights).float() if rounded else value))
        return pairs

    def refresh(self) -> None:
        """Takes over the model's parameters as they are now."""
        for own, now in self._pairs():
            own.copy_(now)
        self.packs.renew(bfloat16=self._rounded)

    def round_weights(self) -> None:
        """From now on, rounds to the type ``weights`` what the kernels read in it, which stay float32 tensors.

        Raises:
            ValueError: no weight is float32 or of that type.
        """
        if self.weights is None:
            return
        weights = [getattr(own, name) for _, own in self._steps.values() for name in _LARGE.get(type(own), ())]
        if not any(weight.dtype in (torch.float32, self.weights) for weight in weights):
            raise ValueError(f"weights: expected a network of float32 or {self.weights}, got one of another type")
        self._rounded = True
        self.refresh()

    def is_current(self) -> bool:
        """Whether the model's parameters are still those of the last refresh."""
        return all(torch.equal(own.nan_to_num(), now.nan_to_num()) for own, now in self._pairs())


def _halves(args: Any) -> list[str]:
    """The prefixes of a step's convolutions that have a norm."""
    halves: dict[type, list[str]] = {GhostArgs: ["primary_", "cheap_"], DepthwiseArgs: [""]}
    prefixes = halves.get(type(args), [])
    return [prefix for prefix in prefixes if getattr(args, prefix + "mean") is not None]


def _may_fold(args: Any, prefix: str) -> bool:
    """In float32: a half-precision weight would be rounded once more. And where the products are numbers."""
    return getattr(args, prefix + "weight").dtype == torch.float32 and _folded(args, prefix) is not None


def _folded(args: Any, prefix: str) -> dict[str, Tensor | None] | None:
    """The weight and bias that make up a convolution with its norm, as fields; None where they are no finite numbers."""
    parts = (getattr(args, prefix + name) for name in ("weight", "bias", *_NORM))
    doubles: list[Any] = [None if t is None else t.double() for t in parts]
    weight, bias, mean, var, gamma, beta = doubles
    scale = (var + getattr(args, prefix + "eps")).rsqrt()
    scale = scale if gamma is None else scale * gamma
    shift = -mean if bias is None else bias - mean
    shift = shift * scale if beta is None else shift * scale + beta
    weight, shift = (weight * scale.view(-1, 1, 1, 1)).float(), shift.float()
    if not (weight.isfinite().all() and shift.isfinite().all()):
        return None
    return {prefix + "weight": weight, prefix + "bias": shift} | {prefix + name: None for name in _NORM}


def _own(args: Any, folded: list[str], dtype: torch.dtype | None) -> Any:
    """``args`` with copies of the parameters, all but the norms' as ``dtype``, and without the norms of the halves in
    ``folded``."""
    fields: dict[str, Any] = {}
    for name, value in args._asdict().items():
        if isinstance(value, Tensor):
            own = value.contiguous() if name.endswith("weight") else value
            fields[name] = own.to(None if name.endswith(_NORM) else dtype, copy=True)
    for prefix in folded:
        fold = _folded(args, prefix)
        if fold is None:
            raise ValueError(f"refresh: {prefix}weight: expected finite numbers with its norm folded, got others")
        fields |= fold
    return args._replace(**fields)
