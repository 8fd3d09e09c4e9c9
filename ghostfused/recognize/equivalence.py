"""Runs somebody's module beside its fused twin, on random numbers, before the twin takes its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..numerics import relative_error
from .swap import is_ours

SAME = 1e-10
"""Two modules whose float64 outputs differ by less, relative to the largest value, compute the same."""


def prove(module: nn.Module, fused: nn.Module, in_channels: int) -> str | None:
    """Runs both in eval and in train mode; says how they differ, None if they don't.

    ``fused`` must hold the very children of ``module``. Both run in float64 on the CPU, on one small input, with random
    weights and statistics in place of their own, so that weights of zero hide nothing; hooks of ``module`` don't fire.
    Don't call it while another thread runs ``module``.
    """
    for training in (False, True):
        mode = "train" if training else "eval"
        outputs = []
        for each in (module, fused):
            try:
                with substituted(module, in_channels, training) as x:
                    outputs.append(each.forward(x))
            except Exception as error:
                return f"it doesn't run in {mode} mode: {type(error).__name__}: {error}"
        expected, out = outputs
        if out.shape != expected.shape:
            return (
                f"in {mode} mode its output has the shape {tuple(expected.shape)}, that of the fused one "
                f"{tuple(out.shape)}"
            )
        difference = relative_error(out, expected)
        if difference >= SAME:
            return f"in {mode} mode its output differs from the fused one's by {difference:.1e} of the largest value"
    return None


@contextlib.contextmanager
def substituted(module: nn.Module, in_channels: int, training: bool) -> Iterator[Tensor]:
    """Puts random float64 CPU tensors in place of ``module``'s and sets its mode; yields an input to run it on.

    Fused modules in it run on the reference meanwhile, since no kernel takes float64.

    Nothing is written to the module's own tensors; they and all training flags are back afterwards. The random numbers
    are the same every time, and PyTorch's random state is left as it was.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    substitutes: dict[int, Tensor] = {}  # by the original's id, so that tied tensors stay tied

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def substitute(name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
        random = randn(*t.shape)
        return random.abs() + 0.5 if name == "running_var" else random

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the work is tiny, and on a busy machine threads would wait for each other
    modules = list(module.modules())
    saved = [(m, dict(m._parameters), dict(m._buffers), m.training) for m in modules]
    fused = [(m, m.__dict__["backend"]) for m in modules if _is_fused(m)]
    try:
        for m, _ in fused:
            m.__dict__["backend"] = "reference"
        for m in modules:
            for tensors in (m._parameters, m._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        new = substitutes.setdefault(id(t), substitute(name, t))
                        is_parameter = isinstance(t, nn.Parameter)
                        tensors[name] = nn.Parameter(new) if is_parameter else new  # type: ignore[assignment]
            m.training = training
        # one sample around 1, one where clamps (ReLU6, hardswish) act, one between
        x = torch.cat([randn(1, in_channels, 7, 9) * scale for scale in (0.3, 2.0, 15.0)]) / in_channels**0.5
        random_state = torch.get_rng_state()
        torch.default_generator.manual_seed(0)  # torch.manual_seed would seed the GPUs too
        try:
            with torch.no_grad():
                yield x
        finally:
            torch.set_rng_state(random_state)
    finally:
        torch.set_num_threads(threads)
        for m, backend in fused:
            m.__dict__["backend"] = backend
        for m, parameters, buffers, mode in saved:
            m._parameters.update(parameters)
            m._buffers.update(buffers)
            m.training = mode


def _is_fused(module: nn.Module) -> bool:
    return is_ours(module) and "backend" in module.__dict__
