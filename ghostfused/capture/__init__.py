"""``capture(model, example)``: a network's inference as next to nothing but kernels.

On a CPU what ``torch.export`` sees of the model becomes a program of our kernels (``lowering``); on a GPU its forward is
recorded as one CUDA graph (``graphs``). Both read the model's parameters and buffers where they lie, unless a program is to be
frozen (``frozen``).
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..fuse import fuse_with_report
from ..ops.transforms import onlooker
from ..spec.checks import ArgumentError
from ..spec.subclasses import takes_operations
from ..spec.words import dtype_of
from . import equivalence
from .frozen import Frozen
from .graphs import RecordedGraph
from .model_tensors import Given
from .variant import Inputs, Key, NotCaptured, Variant, export, key_of, prove, shown

__all__ = ["Captured", "NotCaptured", "capture", "graphed", "load"]


def capture(
    model: nn.Module,
    example: Tensor | Inputs | Sequence[Tensor | Inputs],
    *,
    partial: bool = False,
    dynamic_batch: bool = False,
    copy_output: bool = True,
    freeze: bool = False,
    weights: torch.dtype | str | None = None,
    dtype: torch.dtype | str | None = None,
) -> Captured:
    """``model``'s inference for inputs like ``example``, as one program on a CPU and as one CUDA graph on a GPU.

    What is written into the model's parameters and buffers takes effect (``load_state_dict``, a weight average), unless it is
    frozen; where another is put in the place of one, the next call raises RuntimeError. Modules, attributes and hooks are as they are now, and what the forward does in Python beside computing isn't
    done again. The model itself stays as it is; it need not be fused before.

    Args:
        model: in eval mode, on one device.
        example: an input, or the tuple of a call's inputs; or a list of these, one for each shape that will come. On a CPU
            the model runs a few times on them, and on random numbers of these shapes, to prove that both compute the same.
        partial: on a CPU, leave to PyTorch what no kernel of ours computes, between several programs, rather than raise
            NotCaptured. A CUDA graph holds any op.
        dynamic_batch: on a CPU, take any number of images; all else is as in the example.
        copy_output: on a GPU, return fresh tensors at each call. If false, every call with one shape returns the same
            tensors, which the next call overwrites, and one copy fewer runs.
        freeze: on a CPU, give the programs parameters of their own, as the kernels read them, with norms folded into float32
            weights. What is written into the model's parameters later takes no effect until ``Captured.refresh``.
        weights: of a frozen network of float32, ``torch.bfloat16`` (or ``"bfloat16"``) rounds the weights of 1×1 convolutions
            and fully connected layers to that type: half the bytes to read. Maps and sums stay float32.
        dtype: of a frozen network of float32, ``torch.bfloat16`` or ``torch.float16`` (or their names): the programs compute
            in it, as inference engines choose to on a CPU that multiplies it faster. Inputs are cast as they come in and
            results as they go out, so that callers see float32. Norms and sums stay float32.

    Returns:
        A function of the model's inputs, a ``Captured``, which computes no gradients.

    Raises:
        NotCaptured: the model runs something that no kernel of ours computes, and ``partial`` is false; or it can't be
            exported; or the program computes something else than the model; or the CPU's extension is missing.
        TypeError: ``model`` is no module, or ``example`` is neither tensors nor tuples or lists of them.
        ValueError: ``model`` is in train mode, tensors are on several devices or of a device that is neither a CPU nor a
            GPU, ``dynamic_batch`` or ``freeze`` is asked for on a GPU, or ``weights`` or ``dtype`` of what isn't frozen or
            float32, or of another type.
    """
    examples = _examples(example)
    device = check(model, [x for inputs in examples for x in inputs])
    rounded = _coarser("weights", weights, freeze, torch.bfloat16)
    computes_in = _coarser("dtype", dtype, freeze, torch.bfloat16, torch.float16)
    if device.type == "cuda":
        if dynamic_batch:
            raise ValueError("dynamic_batch: expected False on a GPU, where a CUDA graph is for one shape, got True")
        if freeze:
            raise ValueError(
                "freeze: expected False on a GPU, where a CUDA graph reads the model's parameters where they lie, got True"
            )
        fused = _shared_copy(model)
        graphs = {key_of(inputs): Recorded(fused, inputs, copy_output) for inputs in examples}
        return Captured(graphs, device, partial, False, given=Given(model, "cuda"))
    if device.type != "cpu":
        raise ValueError(f"model: expected it on a CPU or on a GPU, got {device}")
    _needs_kernels()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        fused = _shared_copy(model)
        frozen = Frozen(None if computes_in else rounded, computes_in) if freeze else None
        variants = {}
        for inputs in examples:
            exact = Variant(export(fused, inputs, dynamic_batch), inputs, partial, None if computes_in else frozen)
            prove(exact, model, inputs, dynamic_batch)
            variant = exact
            if computes_in is not None:  # of what is proven
                variant = Variant(exact.exported, inputs, partial, frozen)
                equivalence.in_range(variant, exact, inputs, computes_in)
            variants[key_of(inputs, dynamic_batch)] = variant
        if frozen is not None:
            frozen.round_weights()
    return Captured(variants, device, partial, dynamic_batch, frozen, Given(model, "cpu"))


def _needs_kernels() -> None:
    if reason := cpu.unavailable():
        raise NotCaptured(f"no program runs on this CPU: {reason}")


def _coarser(name: str, given: torch.dtype | str | None, freeze: bool, *known: torch.dtype) -> torch.dtype | None:
    """The type that the argument ``name`` stands for."""
    if given is None:
        return None
    found = dtype_of(given)
    if found not in known:
        raise ValueError(f"{name}: expected {', '.join(map(str, (None, *known[:-1])))} or {known[-1]}, got {given!r}")
    if not freeze:
        raise ValueError(
            f"{name}: expected None where freeze is False: the model's own weights are read, got {given!r}"
        )
    return found


class Captured:
    """What ``capture`` returns: a function of the model's inputs for the shapes that it was made for."""

    _beside_compilers: Callable[..., Any] | None = None
    """``__call__`` for a compiled function, which has one graph before it and one after it."""

    def __init__(
        self,
        variants: dict[Key, Any],
        device: torch.device,
        partial: bool,
        dynamic_batch: bool,
        frozen: Frozen | None = None,
        given: Given | None = None,
    ):
        self._variants, self._device, self._frozen, self._given = variants, device, frozen, given
        self._partial, self._dynamic_batch = partial, dynamic_batch
        if Captured._beside_compilers is None:  # which imports all of Dynamo
            reason = "a captured model is compiled already"
            Captured._beside_compilers = staticmethod(torch.compiler.disable(Captured.__call__, reason=reason))

    def __call__(self, *inputs: Tensor) -> Any:
        """What the model returns for ``inputs``: a tensor, or tuples, lists and dicts of tensors, without gradients.

        Raises:
            ValueError: there is no program for inputs of these shapes, dtypes and devices; or they ask for gradients, or
                are under one of ``torch.func``'s transforms, a tracer or a mode. It is a RuntimeError too, as PyTorch's own
                layers raise.
            TypeError: an input is no tensor.
            RuntimeError: the model has another parameter or buffer in the place of one that is read.
        """
        if torch.compiler.is_compiling():
            return self._beside_compilers(self, *inputs)  # type: ignore[misc]
        if who := onlooker():
            raise ArgumentError(f"inputs: expected no {who}, which a captured model doesn't take")
        for i, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {i}: expected a tensor on {self._device}, got {type(x).__name__}")
            if x.device != self._device or x.layout != torch.strided or x.is_nested:
                what = "a nested one" if x.is_nested else x.layout
                raise ArgumentError(f"input {i}: expected a dense tensor on {self._device}, got {what} on {x.device}")
            if takes_operations(x):
                raise ArgumentError(
                    f"input {i}: expected a plain tensor, as x.as_subclass(torch.Tensor), got a {type(x).__name__}"
                )
            if x.requires_grad and torch.is_grad_enabled():
                raise ArgumentError(f"input {i}: expected one that asks for no gradient, got requires_grad=True")
        variant = self._variants.get(key_of(inputs, self._dynamic_batch))
        if variant is None:
            known = " or ".join(map(self._shown, self._variants))
            raise ArgumentError(f"inputs: expected {known}, got {shown(key_of(inputs))}")
        if self._given is not None and self._frozen is None:
            self._given.check()
        with torch.no_grad():
            if torch.is_autocast_enabled(self._device.type):
                with torch.autocast(self._device.type, enabled=False):
                    return variant(*inputs)
            return variant(*inputs)

    @property
    def frozen(self) -> bool:
        """Whether the programs have parameters of their own: what is written into the model's takes no effect."""
        return self._frozen is not None

    @property
    def weights(self) -> torch.dtype | None:
        """The type to which the weights of a frozen network are rounded, or None."""
        return None if self._frozen is None else self._frozen.dtype or self._frozen.weights

    @property
    def dtype(self) -> torch.dtype | None:
        """The type that a frozen network of float32 computes in, or None if that is the model's own."""
        return None if self._frozen is None else self._frozen.dtype

    def refresh(self) -> None:
        """Takes over the model's parameters and buffers as they are now, in place. No call may run meanwhile.

        Raises:
            ValueError: it isn't frozen, or a weight isn't finite any more with its norm folded.
            RuntimeError: the model has another parameter or buffer in the place of one.
        """
        if self._frozen is None:
            raise ValueError(
                "refresh: expected a frozen network (capture(..., freeze=True)), got one that reads the model's"
            )
        if self._given is not None:
            self._given.check()
        with torch.no_grad():
            self._frozen.refresh()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one file that ``ghostfused.load`` reads in another process, or on another machine: what ``torch.export``
        sees of the fused model for each shape, with its weights, in ``torch.export``'s own format.

        Raises:
            ValueError: the model can't be exported, or it is frozen and the model's parameters are others by now.
            RuntimeError: the model has another parameter or buffer in the place of one.
        """
        from . import saved

        with torch.no_grad():
            if self._given is not None:
                self._given.check()
            if self._frozen is not None and not self._frozen.is_current():
                raise ValueError(
                    "save: the model's parameters were written since they were frozen: call refresh() before"
                )
        exported = [variant.exported for variant in self._variants.values()]
        settings = {
            "partial": self._partial,
            "dynamic_batch": self._dynamic_batch,
            "freeze": self.frozen,
            "weights": _name(self._frozen.weights if self._frozen else None),
            "dtype": _name(self.dtype),
        }
        saved.write(path, exported, settings)

    def __repr__(self) -> str:
        first = f"Captured on {self._device}{', frozen' if self.frozen else ''}"
        if self.weights:
            first += f", in {_name(self.dtype)}" if self.dtype else f", {_name(self.weights)} weights"
        lines = [f"  {self._shown(key)}: {variant}" for key, variant in self._variants.items()]
        return "\n".join([first, *lines])

    def __reduce__(self) -> Any:
        raise TypeError("Captured: it belongs to its process and can't be copied or pickled")

    def _shown(self, key: Key) -> str:
        return shown(key, "batch" if self._dynamic_batch else None)


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _examples(example: Any) -> list[Inputs]:
    """Each call's inputs."""
    examples = example if isinstance(example, list) else [example]
    calls = [(each,) if isinstance(each, Tensor) else each for each in examples]
    wanted = "example: expected a tensor or a tuple of tensors, or a list of these, got"
    for inputs in calls:
        if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
            raise TypeError(f"{wanted} {_kinds(example)}")
    if not calls:
        raise TypeError(f"{wanted} an empty list")
    return calls


def _kinds(example: Any) -> str:
    name = type(example).__name__
    if not isinstance(example, list | tuple):
        return name
    return f"a {name} of {', '.join(type(x).__name__ for x in example) or 'nothing'}"


def check(model: nn.Module, inputs: Sequence[Tensor]) -> torch.device:
    """The one device of ``model``, which must be in eval mode, and ``inputs``."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if training := [name or type(model).__name__ for name, m in model.named_modules() if m.training]:
        raise ValueError(f"model: expected eval mode, since there is no backward; in train mode: {training[0]}")
    devices = {t.device for t in (*inputs, *model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(f"example: expected the inputs and the model on one device, got {sorted(map(str, devices))}")
    return devices.pop()


def _shared_copy(model: nn.Module) -> nn.Module:
    """A fused copy of ``model`` that has its very parameters and buffers."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # without fuse's warning: a network without Ghost modules is captured too
    return fuse_with_report(copy.deepcopy(model, memo), inplace=True)[0]


class Recorded(RecordedGraph):
    """A CUDA graph that can be saved: by exporting its model."""

    @property
    def exported(self) -> torch.export.ExportedProgram:
        with torch.no_grad():
            return export(self.model, self.inputs, False)


def graphed(model: nn.Module, example: Tensor | Inputs, *, copy_output: bool = True) -> Callable[..., Any]:
    """Deprecated: ``capture``, but on a CPU ``model`` itself, with a warning."""
    warnings.warn("graphed is deprecated: use ghostfused.capture", DeprecationWarning, stacklevel=2)
    if not isinstance(example, Tensor | tuple):
        raise TypeError(f"example: expected a tensor or a tuple of tensors, got {_kinds(example)}")
    device = check(model, _examples(example)[0])
    if device.type == "cuda":
        return capture(model, example, copy_output=copy_output)
    warnings.warn(f"graphed: CUDA graphs need a GPU, and the model is on {device}: it stays as it is", stacklevel=2)
    return model


def load(path: str | os.PathLike[str], *, copy_output: bool = True) -> Captured:
    """What ``Captured.save`` wrote, captured again: on a CPU lowered to programs, on a GPU recorded as graphs.

    The file is data: nothing is unpickled, and no code runs but PyTorch's operators and ours.

    Args:
        path: of the file.
        copy_output: as in ``capture``.

    Raises:
        ValueError: the file is none that ``Captured.save`` wrote, or holds more than data.
    """
    from . import saved

    programs, settings = saved.read(path)
    variants: dict[Key, Any] = {}
    device = torch.device("cpu")
    partial, dynamic = bool(settings.get("partial")), bool(settings.get("dynamic_batch"))
    coarser = [_coarser(name, settings.get(name), True, torch.bfloat16, torch.float16) for name in ("weights", "dtype")]
    frozen = Frozen(*coarser) if settings.get("freeze") else None
    for exported in programs:
        inputs = saved.inputs_like(exported)
        device = inputs[0].device
        if device.type == "cpu":
            _needs_kernels()
        with torch.no_grad():
            variants[key_of(inputs, dynamic)] = (
                Recorded(exported.module(check_guards=False), inputs, copy_output)
                if device.type == "cuda"
                else Variant(exported, inputs, partial, frozen)
            )
    if frozen is not None:
        with torch.no_grad():
            frozen.round_weights()
    return Captured(variants, device, partial, dynamic, frozen)
