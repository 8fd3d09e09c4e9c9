"""Who takes part. A peer is one short class: ``unavailable(setting)`` and ``prepare(module, x)``; engines are in engines.py.

``prepare`` gets a module of its own, already in the setting's dtype, layout and mode, and returns a function of x. Where
a peer computes in another precision than x's, it sets ``computes_in``, is judged by that one, and is shown with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ghostfused.backends import BACKENDS, unavailable_on
from ghostfused.capture import capture
from ghostfused.cli.inputs import BadInput
from ghostfused.fuse import fuse_with_report

from .cases import MODES, Setting

Run = Callable[[Tensor], Tensor]
LEVELS: dict[str, dict] = {"auto": {"level": "auto"}, "module": {"level": "module"}}
"""Levels of fusion, the default first, each with ``ghostfused.fuse``'s arguments for it; a level is one more row."""


def execution(backend: str, level: str) -> str:
    """The name of the fused model on ``backend`` at ``level``."""
    return f"ghostfused_{backend}" + (f"_{level}" if level != next(iter(LEVELS)) else "")


class Peer:
    name: str
    modes: tuple[str, ...] = ("inference",)
    traffic: str | None = None
    """The execution in bench/traffic.py whose bytes this peer moves."""
    computes_in: torch.dtype | None = None
    ours = False
    slow_to_prepare = False
    """It compiles or searches for seconds."""

    def unavailable(self, setting: Setting) -> str | None:
        """Why it can't take part; None if it can."""
        return None if setting.mode in self.modes else f"no {setting.mode}"

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        raise NotImplementedError


class Eager(Peer):
    name = "eager"
    modes = MODES
    traffic = "eager"

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        return module


class BatchNormFolded(Peer):
    """BatchNorm folded into the convolutions by torch.fx, in float32."""

    name = "bn_folded"

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        from torch.fx.experimental.optimization import fuse

        layout = torch.channels_last if not x.is_contiguous() else torch.contiguous_format
        return fuse(module.float(), inplace=True).to(x.dtype).to(memory_format=layout)


class Fused(Peer):
    """Ours: ``ghostfused.fuse`` at one level on one backend."""

    modes = MODES
    ours = True

    def __init__(self, backend: str, level: str = "auto"):
        self.backend, self.level = backend, level
        self.name = execution(backend, level)
        self.traffic = {"cuda": "fused", "triton": "fused", "triton_two_kernel": "two kernels"}.get(backend)
        self.slow_to_prepare = backend.startswith("triton")

    def unavailable(self, setting: Setting) -> str | None:
        return unavailable_on(self.backend, setting.device) or super().unavailable(setting)

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        fused, report = fuse_with_report(module, inplace=True, backend=self.backend, **LEVELS[self.level])
        if not any(swap.fused for swap in report):
            raise RuntimeError(f"found nothing to fuse: {report}")
        return fused


class Captured(Peer):
    """Ours: ``ghostfused.capture``, with what no kernel computes left to PyTorch, one for each shape of an input."""

    ours = True

    def __init__(self, name: str, computes_in: torch.dtype | None = None, **arguments: Any):
        self.name, self.computes_in, self.arguments = name, computes_in, arguments

    def unavailable(self, setting: Setting) -> str | None:
        if setting.device != "cpu":
            return "on a GPU it is ghostfused_*+graph"
        if self.computes_in is not None and setting.dtype != "float32":
            return f"no {setting.dtype}"
        if unknown := self.arguments.keys() - inspect.signature(capture).parameters.keys():
            return f"this ghostfused.capture has no {', '.join(sorted(unknown))}"
        return unavailable_on("cpu", "cpu") or super().unavailable(setting)

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        captured: dict[torch.Size, Run] = {}

        def run(x: Tensor) -> Tensor:
            if x.shape not in captured:
                captured[x.shape] = capture(module, x, partial=True, **self.arguments)
            return captured[x.shape](x)

        return run


class Compiled(Peer):
    """torch.compile of what ``inner`` makes of the module."""

    slow_to_prepare = True

    def __init__(self, name: str, inner: Peer | None = None, modes: tuple[str, ...] = MODES, **arguments):
        self.name, self.inner, self.modes, self.arguments = name, inner or Eager(), modes, arguments
        self.traffic = "compiled" if inner is None else self.inner.traffic
        self.ours = self.inner.ours

    def unavailable(self, setting: Setting) -> str | None:
        return self.inner.unavailable(setting) or super().unavailable(setting)

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        return torch.compile(self.inner.prepare(module, x), dynamic=False, **self.arguments)


class Graphed(Peer):
    """``inner`` captured in a CUDA graph, one for each input, so that no input is copied."""

    def __init__(self, inner: Peer):
        self.inner = inner
        self.name = f"{inner.name}+graph"
        self.traffic, self.ours, self.slow_to_prepare = inner.traffic, inner.ours, inner.slow_to_prepare

    def unavailable(self, setting: Setting) -> str | None:
        no_gpu = None if setting.device == "cuda" else "CUDA graphs need a GPU"
        return no_gpu or self.inner.unavailable(setting) or super().unavailable(setting)

    def prepare(self, module: nn.Module, x: Tensor) -> Run:
        run = self.inner.prepare(module, x)
        graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

        def capture(x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    run(x)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = run(x)
            return graph, out

        def replay(x: Tensor) -> Tensor:
            if x.data_ptr() not in graphs:
                graphs[x.data_ptr()] = capture(x)
            graph, out = graphs[x.data_ptr()]
            graph.replay()
            return out

        return replay


def _max_autotune(inner: Peer | None = None) -> Compiled:
    name = "compile_max_autotune" if inner is None else f"{inner.name}+compile"
    # its own CUDA graphs would copy every input to a fixed place; Graphed does without
    return Compiled(name, inner, mode="max-autotune-no-cudagraphs")


def all_peers() -> dict[str, Peer]:
    """A fresh instance of every peer, by name, the baseline first."""
    from .engines import OnnxRuntime, OpenVino, TorchTensorRT

    ours = [Fused(backend, level) for level in LEVELS for backend in BACKENDS]
    peers: list[Peer] = [
        Eager(),
        BatchNormFolded(),
        Compiled("compile_default"),
        _max_autotune(),
        Compiled("compile_freezing", modes=("inference",), options={"freezing": True}),
        Graphed(Eager()),
        Graphed(Compiled("compile_default")),
        Graphed(_max_autotune()),
        OnnxRuntime("CPU"),
        OnnxRuntime("CUDA"),
        OnnxRuntime("TensorRT"),
        OpenVino("float32"),
        OpenVino("default"),
        TorchTensorRT(),
        *ours,
        Captured("ghostfused_capture"),
        Captured("ghostfused_frozen", freeze=True),
        Captured("ghostfused_frozen_bf16", torch.bfloat16, freeze=True, weights="bfloat16"),
        Captured("ghostfused_bf16", torch.bfloat16, freeze=True, dtype="bfloat16"),
        *(Graphed(p) for p in ours if p.backend in ("cuda", "triton")),
        *(_max_autotune(p) for p in ours if p.backend in ("cuda", "triton", "cpu") and p.level == "auto"),
    ]
    return {p.name: p for p in peers}


def _only_for_networks(peer: Peer) -> bool:
    if isinstance(peer, Fused):
        return peer.level == "module"
    return isinstance(peer, Compiled | Graphed) and (
        _only_for_networks(peer.inner) or (isinstance(peer, Compiled) and isinstance(peer.inner, Fused))
    )


def select(names: str | None, network: bool = False) -> dict[str, Peer]:
    """The peers that a comma-separated list names; all by default. A name that ends with * stands for all it begins.

    By default a single Ghost module's peers leave out fused modules that are then compiled, as there is nothing left to
    compile, and the level of Ghost modules alone, which is the default's.
    """
    peers = all_peers()
    if names is None:
        return {n: p for n, p in peers.items() if network or not _only_for_networks(p)}
    chosen = []
    for pattern in names.split(","):
        found = [n for n in peers if n == pattern or (pattern.endswith("*") and n.startswith(pattern[:-1]))]
        if not found:
            raise BadInput(f"--peers: no peer {pattern!r}; there are {', '.join(peers)}")
        chosen += found
    return {n: peers[n] for n in dict.fromkeys(chosen)}
