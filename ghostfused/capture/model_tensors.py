"""The model's own tensors, which a captured network reads where they lie: whether they still are the model's."""

from __future__ import annotations

from torch import Tensor, nn

from ..backends import BACKENDS


class _Root:
    """The guard's, which has no attributes."""


class Given:
    """The parameters and buffers of ``model``. ``.half()``, ``.to(…)`` and ``load_state_dict(assign=True)`` put others in the
    place of some: a captured network would go on with those that nobody writes into any more."""

    def __init__(self, model: nn.Module, device: str):
        self._places = [
            (f"{path}." if path else "", kind, tensors)
            for path, module in model.named_modules()
            for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers))
            if tensors
        ]
        self._dicts: list[dict] = [tensors for _, _, tensors in self._places]  # type: ignore[misc]
        self._then = [dict(tensors) for tensors in self._dicts]
        extension = BACKENDS[device].extension.module
        self._guard = extension and extension.Guard(_Root(), self._dicts, [], [], None)
        # a CUDA graph knows no tensor, only addresses, which a new ``.data`` leaves
        self._read = [t for then in self._then for t in then.values() if t is not None] if device == "cuda" else []
        self._addresses = [*map(Tensor.data_ptr, self._read)]

    def check(self) -> None:
        """Raises RuntimeError for the first tensor that isn't the model's any more."""
        if self._guard is None or not self._guard.dicts_hold():
            for (prefix, kind, now), then in zip(self._places, self._then, strict=True):
                for name, tensor in then.items():
                    if now.get(name) is not tensor:
                        raise self._refusal(kind, prefix + name)
        if self._addresses != [*map(Tensor.data_ptr, self._read)]:
            moved = {id(t) for t, then in zip(self._read, self._addresses, strict=True) if t.data_ptr() != then}
            for prefix, kind, now in self._places:
                for name, tensor in now.items():
                    if id(tensor) in moved:
                        raise self._refusal(kind, prefix + name)

    @staticmethod
    def _refusal(kind: str, name: str) -> RuntimeError:
        return RuntimeError(
            f"{name}: expected the {kind} that was captured, got another in its place, as .half(), .to() or "
            "load_state_dict(assign=True) makes: capture the model anew"
        )
