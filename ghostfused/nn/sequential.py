"""FusedSequential: fused modules that run one after the other, as one op."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ..recognize.swap import make_twin
from .cache import CachesPrograms, ProgramCache, is_recordable, may_replay


class FusedSequential(CachesPrograms, nn.Sequential):
    """An ``nn.Sequential`` of fused modules, for which inference needs one call of one op (``replay``). Made by ``fuse``."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._cache = ProgramCache()

    @classmethod
    def of(cls, sequential: nn.Sequential) -> FusedSequential:
        """The twin of ``sequential``, with its very children."""
        return make_twin(cls, sequential, _cache=ProgramCache())

    def forward(self, input: Tensor) -> Tensor:
        """The modules of the input, one after the other."""
        return self._cache(self, input, super().forward) if may_replay(input) else super().forward(input)

    def __getitem__(self, index: Any) -> Any:
        """A member, or those of a slice in a plain ``nn.Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(OrderedDict(list(self._modules.items())[index]))  # type: ignore[arg-type]
        return super().__getitem__(index)

    def unfused(self) -> nn.Module:
        return self[:]

    def runs_our_ops(self) -> bool:
        return all(map(is_recordable, self))
