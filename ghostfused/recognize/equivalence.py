"""Runs somebody's module beside its fused twin, on random numbers, before the twin takes its place."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import relative_error
from .disturbed import undisturbed
from .random_numbers import OwnNumbers
from .trace import is_fused, shadow

SAME = 1e-10
"""Two modules whose float64 outputs differ by less, relative to the largest value, compute the same."""
_SAME_GRADIENTS = 1e-6
"""PyTorch's derivative of hardsigmoid has a constant of float32 in it."""
_SIZES = ((3, 7, 9), (1, 8, 6), (2, 10, 13))
"""Batch, height and width of the inputs: odd and even, small and larger. Gradients are compared on the first that runs."""


@functools.cache
def _set_threads() -> Callable[[int], Any] | None:
    """What sets the number of threads of the calling thread's own work, of the OpenMP that PyTorch uses; None where there is
    none to be found. ``torch.set_num_threads`` would be seen by each thread that begins meanwhile."""
    places: list[str | None] = [None, *map(str, (Path(torch.__file__).parent / "lib").glob("*omp*.so*"))]
    for place in places:
        try:
            openmp = ctypes.CDLL(place, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            threads = torch.get_num_threads()
            openmp.omp_set_num_threads(threads + 1)
            works = torch.get_num_threads() == threads + 1
            openmp.omp_set_num_threads(threads)
        except (OSError, AttributeError):
            continue
        if works:
            return openmp.omp_set_num_threads
    return None


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The work is tiny, and on a busy machine threads would wait for each other."""
    threads, set_threads = torch.get_num_threads(), _set_threads() or (lambda threads: None)
    try:
        set_threads(1)
        yield
    finally:
        set_threads(threads)


def prove(module: nn.Module, fused: nn.Module, in_channels: int, untraced: bool = False) -> str | None:
    """Runs both in eval and in train mode; says how they differ, None if they don't.

    Outputs, gradients and running statistics are compared, in float64 on the CPU, on small inputs of several sizes, with
    random weights and statistics, so that weights of zero hide nothing. What runs are shadows: neither module changes.
    ``untraced``: whether something runs inside that nobody has traced, and that may draw random numbers.
    """
    draws = untraced or any(isinstance(m, _DRAWING) or _has_gate_of_its_own(m) for m in fused.modules())
    numbers: dict[int, Tensor] = {}
    for training in (False, True):
        mode = "train" if training else "eval"
        errors: list[str] = []
        for size in _SIZES:
            if training and _SIZES.index(size) > len(errors):  # the graph is that of eval mode: one that runs is enough
                break
            results: list[list[tuple[str, Tensor | None]] | Exception] = []
            for each in (module, fused):
                try:
                    first = len(errors) == _SIZES.index(size)
                    results.append(_run(each, in_channels, size, training, first, numbers, draws))
                except Exception as error:
                    results.append(error)
            expected, ours = results
            if isinstance(expected, Exception) and isinstance(ours, Exception):
                errors.append(f"it doesn't run in {mode} mode: {type(expected).__name__}: {expected}")
                continue
            for one, result in (("it", expected), ("the fused one", ours)):
                if isinstance(result, Exception):
                    shape = (size[0], in_channels, *size[1:])
                    return f"{one} doesn't run in {mode} mode on {shape}: {type(result).__name__}: {result}"
            if reason := _difference(expected, ours):  # type: ignore[arg-type]
                return f"in {mode} mode {reason}"
        if len(errors) == len(_SIZES):
            return errors[0]
    return None


@undisturbed
def output_format(module: nn.Module, in_channels: int) -> torch.memory_format | None:
    """The memory format of what ``module`` returns: ``preserve_format`` if it is its input's, None if it is of no such kind."""
    found = []
    for given in (torch.contiguous_format, torch.channels_last):
        with substituted(module, in_channels, training=False, draws=False) as (twin, x):
            out = twin.float().forward(
                x.float().contiguous(memory_format=given)
            )  # on a CPU not all layers keep float64's
        formats = (f for f in (torch.contiguous_format, torch.channels_last) if out.is_contiguous(memory_format=f))
        found.append(next(formats, None))
    if found == [torch.contiguous_format, torch.channels_last]:
        return torch.preserve_format
    return found[0] if found[0] is found[1] else None


_DRAWING = (nn.modules.dropout._DropoutNd, nn.RReLU, nn.FractionalMaxPool2d)
"""Layers that draw random numbers."""


def _has_gate_of_its_own(module: nn.Module) -> bool:
    """Whether it is a fused module with GhostNetV2's gate by a child's forward, which nobody has traced."""
    state = module.__dict__
    return state.get("_attention") is not None and not state["_runs"]


@undisturbed
def _run(
    module: nn.Module,
    in_channels: int,
    size: Sequence[int],
    training: bool,
    gradients: bool,
    numbers: dict[int, Tensor],
    draws: bool,
) -> list[tuple[str, Tensor | None]]:
    """Output, and gradients if asked for, and statistics afterwards, each with its name."""
    shadowed = substituted(module, in_channels, training, size, numbers, draws)
    with shadowed as (twin, x), torch.set_grad_enabled(gradients):
        x.requires_grad_(gradients)
        given = x.clone()  # no leaf, so that a forward may write into it
        out = twin.forward(given)
        results: list[tuple[str, Tensor | None]] = [("output", out), ("input afterwards", given)]
        if gradients and isinstance(out, Tensor):
            named = {"gradient of its input": x, **{f"gradient of {n}": p for n, p in twin.named_parameters()}}
            weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
            found: Sequence[Tensor | None] = [None] * len(named)
            if out.requires_grad:
                found = torch.autograd.grad((out * weights).sum(), list(named.values()), allow_unused=True)
            results += zip(named, found, strict=True)
        return results + [(f"buffer {n}", b) for n, b in twin.named_buffers()]


def _difference(expected: list[tuple[str, Tensor | None]], ours: list[tuple[str, Tensor | None]]) -> str | None:
    gradients = [t for name, t in expected if name.startswith("gradient") and isinstance(t, Tensor) and t.numel()]
    rounding = SAME * max([1.0, *(float(t.abs().max()) for t in gradients)])
    for (name, a), (_, b) in zip(expected, ours, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if (a is None) != (b is None) or not isinstance(a, Tensor | None):
                return f"its {name} is {_kind(a)}, the fused one's {_kind(b)}"
            continue
        if a.shape != b.shape:
            return f"its {name} has the shape {tuple(a.shape)}, the fused one's {tuple(b.shape)}"
        difference, limit = relative_error(b, a), _SAME_GRADIENTS if name.startswith("gradient") else SAME
        # before a norm in train mode the gradient of a bias is zero, but for the rounding of what cancels out
        if not torch.equal(a, b) and not difference < limit and not (limit > SAME and (b - a).abs().max() < rounding):
            return f"its {name} differs from the fused one's by {difference:.1e} of the largest value"
    return None


def _kind(value: object) -> str:
    return "none" if value is None else f"a {type(value).__name__}"


@contextlib.contextmanager
def substituted(
    module: nn.Module,
    in_channels: int,
    training: bool,
    size: Sequence[int] = _SIZES[0],
    numbers: dict[int, Tensor] | None = None,
    draws: bool = True,
) -> Iterator[tuple[nn.Module, Tensor]]:
    """A shadow of ``module`` in the mode asked for, with random float64 CPU tensors in place of its own, and an input for it.

    Fused modules in it run on the reference, since no kernel takes float64. The random numbers are the same every time, and
    none are PyTorch's, whose state all threads share. ``numbers`` keeps the tensors for further shadows of the same module, by
    the ids of those that they stand for, so that tied tensors stay tied. ``draws``: whether what runs may draw random numbers.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = {} if numbers is None else numbers
    buffers: dict[int, Tensor] = {}

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def substitute(name: str, t: Tensor) -> Tensor:
        if id(t) not in numbers:
            new = randn(*t.shape) if t.is_floating_point() else torch.zeros(t.shape, dtype=t.dtype, device="cpu")
            new = new.abs() + 0.5 if name == "running_var" else new
            trained = isinstance(t, nn.Parameter) and t.is_floating_point()
            numbers[id(t)] = nn.Parameter(new) if trained else new
        if isinstance(numbers[id(t)], nn.Parameter):
            return numbers[id(t)]
        return buffers.setdefault(id(t), numbers[id(t)].clone())  # train mode writes to them

    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        twin = shadow(module, substitute)
        for m in twin.modules():
            m.training = training
            if is_fused(m):
                m.__dict__["backend"] = "reference"
        # one sample around 1, one where clamps (ReLU6, hardswish) act, one between
        scales = torch.tensor([2.0, 15.0, 0.3], dtype=torch.float64, device="cpu")[: size[0], None, None, None]
        generator.manual_seed(1)  # the same input whether the tensors are new or not
        x = randn(size[0], in_channels, *size[1:]) * scales / in_channels**0.5
        with _one_thread(), OwnNumbers() if draws else contextlib.nullcontext():
            yield twin, x
