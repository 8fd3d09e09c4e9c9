"""Runs of layers (conv → norm → activation) and squeeze-and-excite blocks inside a fused module: found by their paths
and read afresh at every call, as the halves of a Ghost module are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import conv1x1, depthwise, squeeze_excite
from ..ops.recording import note_others
from ..recognize import ghost
from ..recognize.equivalence import substituted
from ..recognize.reads import reads
from ..spec import Act, Gate
from ..spec.activations import BY_MODULE
from ..spec.kernels import KERNEL_GATE_ACTS, depthwise_form_refusal

for _name in ("conv1x1", "depthwise", "squeeze_excite"):
    torch.fx.wrap(_name)  # torch.fx's symbolic tracing records the call and doesn't look inside

Path = tuple[str, ...]


def get(root: nn.Module, path: Path) -> nn.Module:
    """The descendant of ``root`` at ``path``; Identity if it has been removed, as a norm is when it is folded."""
    for name in path:
        # not root._modules, where torch.export has put a stand-in for root that hands out stand-ins
        root = root.__dict__["_modules"].get(name) or _IDENTITY
    return root


_IDENTITY = nn.Identity()


class Run(NamedTuple):
    """conv → norm → activation, of which the last two may be missing; or a single layer of any other kind."""

    paths: tuple[Path, ...]

    def __call__(
        self, root: nn.Module, x: Tensor, backend: str, gate: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """This of x * gate, plus residual: in one kernel where there is one, else layer by layer."""
        layers = [get(root, path) for path in self.paths]
        half = ghost.read_layers(layers)
        if isinstance(half, str) or half.batch_statistics or (kind := _kind(half)) is None:
            note_others()
            out = x if gate is None else x * gate[:, :, None, None]
            for layer in layers:
                out = layer(out)
            return out if residual is None else out + residual
        conv = half.weight
        settings = {"bias": half.bias, "bn": half.norm, "act": half.act, "slope": half.slope, "backend": backend}
        if kind == "conv1x1":
            return conv1x1(x, conv, **settings, input_gate=gate, residual=residual)  # type: ignore[arg-type]
        if gate is not None:
            x = x * gate[:, :, None, None]
        out = depthwise(x, conv, **settings, stride=half.conv.stride[0])  # type: ignore[arg-type]
        return out if residual is None else out + residual

    def kind(self, root: nn.Module) -> str | None:
        """Which function computes this in a kernel, whatever the norm's mode: "conv1x1", "depthwise" or none."""
        half = ghost.read_layers([get(root, path) for path in self.paths])
        return None if isinstance(half, str) else _kind(half)


def _kind(half: ghost.Half) -> str | None:
    """Which function computes ``half`` in a kernel: "conv1x1", "depthwise" or none."""
    conv = half.conv
    channels, per_group, kh, kw = half.weight.shape
    padding = (kh // 2, kw // 2)
    if conv.padding_mode != "zeros" or kh % 2 == 0 or kw % 2 == 0 or conv.stride[0] != conv.stride[1]:
        return None
    if conv.padding != padding and not (conv.padding == "same" and conv.stride[0] == 1):
        return None
    if kh == kw == 1 and conv.groups == 1 and conv.stride[0] == 1:
        return None if half.act == Act.GELU else "conv1x1"
    if conv.groups != channels or channels != conv.in_channels or per_group != 1 or conv.dilation != (1, 1):
        return None
    return None if depthwise_form_refusal((kh, kw), conv.stride[0], half.act) else "depthwise"


def split(layers: Sequence[tuple[Path, nn.Module]]) -> list[Run]:
    """Groups layers that follow each other into runs; a layer that begins no conv and continues none stands alone."""
    runs: list[list[tuple[Path, nn.Module]]] = []
    for path, layer in layers:
        if isinstance(layer, nn.Identity) or (isinstance(layer, nn.Sequential) and not layer._modules):
            continue
        if runs and not isinstance(ghost.read_layers(m for _, m in (*runs[-1], (path, layer))), str):
            runs[-1].append((path, layer))
        else:
            runs.append([(path, layer)])
    return [Run(tuple(path for path, _ in run)) for run in runs]


class SqueezeExcite(NamedTuple):
    """A squeeze-and-excite block: where its two 1×1 convolutions or Linear layers are, and what it does besides."""

    reduce: Path
    expand: Path
    act: Act
    gate: Gate

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.reduce, self.expand

    def __call__(self, root: nn.Module, x: Tensor, backend: str) -> Tensor:
        """The gate, (N, C)."""
        reduce, expand = (get(root, path)._parameters for path in (self.reduce, self.expand))
        return squeeze_excite(
            x,
            reduce["weight"],  # type: ignore[arg-type]
            expand["weight"],  # type: ignore[arg-type]
            reduce_bias=reduce["bias"],
            expand_bias=expand["bias"],
            act=self.act,
            gate=self.gate,
            backend=backend,
        )


def _matrices(block: nn.Module) -> list[tuple[Path, nn.Module]]:
    """The descendants of ``block`` that have tensors: two of them, each a Linear or a 1×1 conv; else nothing."""
    found = [
        (tuple(name.split(".")), m)
        for name, m in block.named_modules()
        if m is not block and (m._parameters or m._buffers)
    ]
    for _, m in found:
        if type(m) is not nn.Linear and not (
            type(m) is nn.Conv2d
            and m.kernel_size == (1, 1)
            and m.groups == 1
            and m.stride == (1, 1)
            and m.padding == (0, 0)
        ):
            return []
    sizes = [tuple(m._parameters["weight"].shape[:2]) for _, m in found]  # type: ignore[union-attr]
    return found if len(found) == 2 and sizes[0] == sizes[1][::-1] and not (block._parameters or block._buffers) else []


def read_squeeze_excite(block: nn.Module, path: Path) -> SqueezeExcite | None:
    """``block`` as a squeeze-and-excite block, if it computes x times such a gate: tried on a random input."""
    matrices = _matrices(block)
    if not matrices or ghost.unusual(block) or any(ghost.has_hooks(m) for m in block.modules()):
        return None
    if isinstance(reads(block), str):
        return None
    (reduce, first), (expand, _) = matrices
    channels = first._parameters["weight"].shape[1]  # type: ignore[union-attr]
    acts = {BY_MODULE[type(m)] for m in block.modules() if type(m) in BY_MODULE} or {Act.RELU}
    try:
        with substituted(block, channels, training=False) as x:
            expected = block.forward(x)
            for act, gate in itertools.product(acts.intersection(KERNEL_GATE_ACTS), Gate):
                found = SqueezeExcite(reduce, expand, act, gate)
                out = x * found(block, x, "reference")[:, :, None, None]
                if out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-10, atol=1e-12):
                    return found._replace(reduce=path + reduce, expand=path + expand)
    except Exception:  # whatever it does, it isn't this
        return None
    return None
