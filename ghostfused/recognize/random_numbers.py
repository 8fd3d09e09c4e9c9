"""Random numbers for a proof, of its own: PyTorch's generator belongs to all threads, which would see that it has gone on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _like(fill: str) -> Callable[..., Tensor]:
    def draw(generator: torch.Generator, t: Tensor, *bounds: int, **options: Any) -> Tensor:
        return getattr(torch.empty_like(t, **options), fill)(*bounds, generator=generator)

    return draw


def _dropout(generator: torch.Generator, t: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train:
        return t.clone(), torch.ones_like(t, dtype=torch.bool)
    kept = torch.empty_like(t).bernoulli_(1 - p, generator=generator)
    return t * kept / (1 - p), kept.bool()


_WITHOUT_GENERATOR: dict[Any, Callable] = {
    aten.rand_like: _like("uniform_"), aten.randn_like: _like("normal_"), aten.randint_like: _like("random_"),
    aten.native_dropout: _dropout,
}  # fmt: skip
"""Operations that take no generator, by their like that do."""


class OwnNumbers(TorchDispatchMode):
    """What draws from PyTorch's generator draws from another, which begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _WITHOUT_GENERATOR:
            return _WITHOUT_GENERATOR[packet](self.generator, *args, **kwargs)
        given = {argument.name for argument in func._schema.arguments}
        if "generator" in given:
            names = [argument.name for argument in func._schema.arguments]
            if "generator" in names[: len(args)]:
                args = tuple(self.generator if name == "generator" else v for name, v in zip(names, args, strict=False))
                return func(*args, **kwargs)
            return func(*args, **kwargs | {"generator": self.generator})
        overloads = (getattr(packet, name) for name in packet.overloads())
        wanted = [argument.name for argument in func._schema.arguments] + ["generator"]
        for other in overloads:
            if sorted(argument.name for argument in other._schema.arguments) == sorted(wanted):
                return other(*args, **kwargs, generator=self.generator)
        raise RuntimeError(f"{func} draws random numbers, and takes no generator to draw them from")
