"""Backends: each answers whether it works on this machine, whether it can run a call, and runs it.

A backend is a module with three functions:

``unavailable() -> str | None``
    Why this backend can't run anything here (no compiler, no GPU, …); None if it can.
``supports(args) -> str | None``
    Why it can't run this call; None if it can. Used to choose and to explain a refusal.
``forward(args) -> Tensor``
    Runs it. ``ops`` registers it.

``declines(args) -> str | None``, where a backend has it
    Why ``"auto"`` leaves a call that it can run to the next; None if it doesn't.

and ``DEVICES``, the types of the devices whose tensors it takes, or None if it takes all.

Training takes six more, which ``training_step.TrainingKernels`` lists; the backends that have them register them there.
"""

from __future__ import annotations

from ..spec import Args
from . import cpu, cuda, cuda_training, reference, reference_training, triton
from .triton import training as triton_training
from .triton import two_kernel as triton_two_kernel

BACKENDS = {"cuda": cuda, "cpu": cpu, "triton": triton, "triton_two_kernel": triton_two_kernel, "reference": reference}
_ = cuda_training, reference_training, triton_training  # imported to be registered
AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
"""The kernels that ``backend="auto"`` tries in this order before the reference, by the type of x's device. A GPU's by what their
launches count (docs/counts.md), not by timings, of which there are none."""

_CALLS = {"forward": "Ghost module", "depthwise": "depthwise convolution", "squeeze_excite": "squeeze-and-excite"}


def unavailable_on(backend: str, device: str) -> str | None:
    """Why ``backend`` can run nothing on tensors of the device type ``device`` here; None if it can."""
    module = BACKENDS[backend]
    if module.DEVICES is not None and device not in module.DEVICES:
        return f"it takes tensors on {' or '.join(module.DEVICES)}, not on {device}"
    return module.unavailable()


def declines(name: str, args: Args) -> str | None:
    """Why ``backend="auto"`` doesn't take the backend ``name`` for a call that it can run; None if it does."""
    reason = getattr(BACKENDS[name], "declines", None)
    return reason(args) if reason is not None else None


def choose(args: Args, backend: str = "auto") -> str:
    """The name of the backend that will run ``args``.

    Raises:
        ValueError: ``backend`` is no backend's name.
        RuntimeError: ``backend`` was asked for by name and can't run this call; the message says why.
    """
    if backend == "auto":
        for name in AUTO.get(args.x.device.type, ()):
            if BACKENDS[name].supports(args) is None and declines(name, args) is None:
                return name
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    reason = BACKENDS[backend].supports(args)
    if reason is not None:
        raise RuntimeError(f"backend={backend!r} can't run this {_CALLS[args.op]}: {reason}")
    return backend
