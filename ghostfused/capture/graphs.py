"""A network's forward recorded as one CUDA graph: what ``capture`` makes on a GPU, for small batches, where the GPU would
wait for the host between two kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

WARMUP = 3
"""Forwards before the recording, in which libraries choose algorithms and Triton compiles."""


class RecordedGraph:
    """The graph of ``model`` on ``inputs``, with the places that it reads and writes; autocast and the settings are as now."""

    def __init__(self, model: nn.Module, inputs: tuple[Tensor, ...], copy_output: bool):
        self.copy_output = copy_output
        self.inputs = tuple(x.detach().clone(memory_format=torch.preserve_format) for x in inputs)
        self.model = model
        self.read = (*model.parameters(), *model.buffers())  # kept alive: the graph knows their addresses only
        self.graph = torch.cuda.CUDAGraph()
        device = inputs[0].device
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
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.output) if self.copy_output else self.output

    def __repr__(self) -> str:
        return "one CUDA graph"
