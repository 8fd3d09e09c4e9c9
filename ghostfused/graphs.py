"""``graphed(model, example)``: a network's forward recorded as one CUDA graph, for small batches, where the GPU would
wait for the host between two kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARMUP = 3
"""Forwards before the recording, in which libraries choose algorithms and Triton compiles."""


def graphed(model: nn.Module, example: Tensor | tuple[Tensor, ...], *, copy_output: bool = True) -> Callable[..., Any]:
    """``model`` as a function that replays one CUDA graph; on a CPU ``model`` itself, with a warning.

    The graph reads the parameters and buffers where they lie: what is written into them (``load_state_dict``, a weight
    average) takes effect, but replacing them or their modules doesn't. It holds for inputs like ``example`` only, records
    autocast and the settings as they are now, and computes no gradients.

    Args:
        model: in eval mode, on one GPU.
        example: an input, or the tuple of inputs; values don't matter.
        copy_output: return a fresh output at each call. If false, every call returns the same tensors, which the next call
            overwrites, and one copy fewer runs.

    Returns:
        A function of ``model``'s inputs. It returns what ``model`` returns: a tensor, or tuples, lists and dicts of
        tensors. It raises ValueError for inputs of another number, shape, dtype or device than the example's.

    Raises:
        TypeError: ``model`` is no module, or ``example`` no tensor and no tuple of tensors.
        ValueError: ``model`` is in train mode, or ``model`` and ``example`` are not all on one device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    inputs = (example,) if isinstance(example, Tensor) else example
    if not isinstance(inputs, tuple) or not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"example: expected a tensor or a tuple of tensors, got {type(example).__name__}")
    if training := [name or type(model).__name__ for name, m in model.named_modules() if m.training]:
        raise ValueError(f"model: expected eval mode, since the graph has no backward; in train mode: {training[0]}")
    devices = {t.device for t in (*inputs, *model.parameters(), *model.buffers())}
    if len(devices) != 1:
        raise ValueError(f"example: expected the inputs and the model on one device, got {sorted(map(str, devices))}")
    (device,) = devices
    if device.type != "cuda":
        warnings.warn(f"graphed: CUDA graphs need a GPU, and the model is on {device}: it stays as it is", stacklevel=2)
        return model
    return _Graphed(model, inputs, device, copy_output)


class _Graphed:
    """The graph, with the places that it reads and writes."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device, copy_output: bool):
        self.copy_output = copy_output
        self.inputs = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
        self.read = (model, *model.parameters(), *model.buffers())  # kept alive: the graph knows their addresses only
        self.graph = torch.cuda.CUDAGraph()
        # autocast would keep casts of the weights from before the recording, and free them afterwards
        autocast = torch.autocast(
            "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
        )
        with torch.cuda.device(device), torch.no_grad(), autocast:
            # on another stream than the default one, so that what the warm-up leaves behind is ordered before the recording
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    model(*self.inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(self.graph, stream=stream):
                self.output = model(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self.inputs):
            raise ValueError(f"expected {len(self.inputs)} inputs, got {len(inputs)}")
        for i, (place, x) in enumerate(zip(self.inputs, inputs, strict=True)):
            if (x.shape, x.dtype, x.device) != (place.shape, place.dtype, place.device):
                raise ValueError(
                    f"input {i}: expected {tuple(place.shape)} {place.dtype} on {place.device}, as in the example, "
                    f"got {tuple(x.shape)} {x.dtype} on {x.device}"
                )
        with torch.no_grad():
            for place, x in zip(self.inputs, inputs, strict=True):
                place.copy_(x)
            self.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, self.output) if self.copy_output else self.output
