"""Op schemas and fakes: the only file that talks to torch.library.

Per op and kernel backend one forward, ``ghostfused::<op>_<backend>``; the schema is that of the op's tuple of
arguments. Those of "cuda" and "cpu" are registered by the extensions when they load. One backward per op serves
all backends; but for Ghost modules each backend that can train has its own, ``backward_<backend>``, and
``train_forward_<backend>``, with BatchNorm by the batch's statistics. ``program_<backend>`` runs several forwards, for
inference, and so does ``replay_<backend>`` of a program that ``keep_program_<backend>`` was given.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from . import program, reference
from .spec import OPS, TENSORS, Args, GhostArgs, Step, tensor_names
from .validate import check_memory, dimensions

_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "int", bool: "bool"}

BACKENDS = ("cuda", "cpu", "triton", "triton_two_kernel", "reference")

_library = torch.library.Library("ghostfused", "DEF")


def schema(args: type[Args]) -> str:
    """``Tensor x, Tensor primary_weight, Tensor? primary_bias, …``."""
    return ", ".join(f"{_TYPES[kind]} {name}" for name, kind in args.__annotations__.items())


def implement(op: str, backend: str, kernel: Callable[[Args], Tensor], *dispatch_keys: str) -> None:
    """Registers ``kernel`` as ``ghostfused::<op>_<backend>`` under each of ``dispatch_keys``."""
    kind = OPS[op]

    def run(*args) -> Tensor:
        checked = kind(*args)
        check_memory(tensor_names(kind), args)
        return kernel(checked)

    for key in dispatch_keys:
        _library.impl(f"{op}_{backend}", run, key)


def _fake(args: Step) -> Tensor:
    """The output of a step that isn't run. One tensor on the meta device is enough to get here."""
    dimensions(args)
    for name, t in zip(tensor_names(type(args)), args.tensors, strict=True):
        if t is not None and t.device != args.x.device:
            raise RuntimeError(f"{name}: expected a tensor on x's device {args.x.device}, got {t.device}")
    return args.new_output()


_OTHER_KEYS = (
    *(f"{kind}{device}" for kind in ("Sparse", "SparseCsr") for device in ("CPU", "CUDA", "Meta")),
    *("QuantizedCPU", "QuantizedCUDA", "MkldnnCPU"),
)
"""Dispatch keys of tensors that have no strides, or no numbers, to read."""


def _define_op(name: str, signature: str, fake: Callable | None, **options: Any) -> None:
    """Defines ``ghostfused::<name>``; tensors that have no strides to read are refused by name."""
    _library.define(f"{name}{signature}", **options)
    if fake is not None:
        torch.library.register_fake(f"ghostfused::{name}", fake, lib=_library)

    def refuse(*args):
        for argument, value in zip(getattr(torch.ops.ghostfused, name).default._schema.arguments, args, strict=False):
            for t in value if isinstance(value, list | tuple) else [value]:
                if isinstance(t, Tensor) and (t.layout != torch.strided or t.is_quantized):
                    raise RuntimeError(f"{argument.name}: expected a dense tensor, got layout {t.layout}, {t.dtype}")
        raise RuntimeError(f"ghostfused::{name}: expected dense tensors")

    for key in _OTHER_KEYS:
        _library.impl(name, refuse, key)


def forward_op(backend: str, op: str = "forward") -> Callable[..., Tensor]:
    """The op ``ghostfused::<op>_<backend>``; call it with ``*args``."""
    return getattr(torch.ops.ghostfused, f"{op}_{backend}").default


def backward_op(op: str) -> Callable[..., list[Tensor]]:
    """The op that gives the gradients of ``op``'s tensors; call it with the output's gradient, ``*args``, needs_grad."""
    return getattr(torch.ops.ghostfused, f"{op}_backward").default


def _backward(kind: type[Args], grad_output: Tensor, *args) -> list[Tensor]:
    """Gradients of the tensor arguments for which ``needs_grad`` holds, by recomputing through the reference."""
    *fields, needs_grad = args
    count = len(tensor_names(kind))
    if len(needs_grad) != count:
        raise RuntimeError(f"needs_grad: expected {count} bools, one for each tensor, got {len(needs_grad)}")
    check_memory(["grad_output", *tensor_names(kind)], [grad_output, *fields[:count]])
    # under a TorchDispatchMode an op's kernel runs with autograd keys excluded: take them back in
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        tensors = [
            t.detach().requires_grad_(need) if t is not None else None
            for t, need in zip(fields[:count], needs_grad, strict=True)
        ]
        out = reference.run(kind(*tensors, *fields[count:]))  # type: ignore[arg-type]
        wanted = [t for t, need in zip(tensors, needs_grad, strict=True) if need and t is not None]
        grads = torch.autograd.grad(out, wanted, grad_output, allow_unused=True, materialize_grads=True)
    return [_owned(grad, like, grad_output) for grad, like in zip(grads, wanted, strict=True)]


def _owned(grad: Tensor, like: Tensor, grad_output: Tensor) -> Tensor:
    """``grad`` with the strides that the fake promises, and no alias of ``grad_output`` (the residual's is itself)."""
    promised = torch.empty_like(like)
    if grad.stride() == promised.stride() and grad.data_ptr() != grad_output.data_ptr():
        return grad
    return promised.copy_(grad)


def _fake_backward(grad_output: Tensor, *args) -> list[Tensor]:
    needs_grad = args[-1]
    return [torch.empty_like(t) for t, need in zip(args[: len(needs_grad)], needs_grad, strict=True) if need]


def _define(op: str, kind: type[Args]) -> None:
    for backend in BACKENDS:
        fake = lambda *args: _fake(kind(*args))  # noqa: E731
        _define_op(f"{op}_{backend}", f"({schema(kind)}) -> Tensor", fake, tags=torch.Tag.pt2_compliant_tag)
    implement(op, "reference", reference.run, "CPU", "CUDA")

    if op == "forward":  # has backwards of its own, below
        return
    name = f"{op}_backward"
    signature = f"(Tensor grad_output, {schema(kind)}, bool[] needs_grad) -> Tensor[]"
    _define_op(name, signature, _fake_backward, tags=torch.Tag.pt2_compliant_tag)
    for key in ("CPU", "CUDA"):
        _library.impl(name, lambda *args: _backward(kind, *args), key)


for _op, _kind in OPS.items():
    _define(_op, _kind)


def _define_program(backend: str) -> None:
    signature = "(Tensor x, Tensor[] tensors, int[] code, float[] numbers) -> Tensor"
    fake = functools.partial(program.run, _fake)
    _define_op(f"program_{backend}", signature, fake, tags=torch.Tag.pt2_compliant_tag)


for _backend in ("cuda", "cpu", "reference"):
    _define_program(_backend)


class KeptProgram:
    """A program that the extension of ``backend`` keeps, so that a call of it hands over nothing but x:
    ``ghostfused::replay_<backend>(x, number)``. Its tensors live as long as this does."""

    def __init__(self, backend: str, kept: program.Program, drop: Callable[[int], None]):
        for i, t in enumerate(kept.tensors):
            if t.is_neg():  # the dispatcher would hand over a copy, which misses what is written into t
                raise RuntimeError(f"tensors[{i}]: expected no negative view (torch.resolve_neg makes it a tensor)")
        self.program, self._drop, self._op = kept, drop, forward_op(backend, "replay")
        keep: Callable[..., Any] = forward_op(backend, "keep_program")
        self.number: int = keep(*kept)
        _kept_programs[backend, self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """The program's last result."""
        return self._op(x, self.number)

    def __del__(self) -> None:
        if "number" in self.__dict__:
            self._drop(self.number)


_kept_programs: weakref.WeakValueDictionary[tuple[str, int], KeptProgram] = weakref.WeakValueDictionary()


def _fake_replay(backend: str, x: Tensor, number: int) -> Tensor:
    kept = _kept_programs.get((backend, number))
    if kept is None:
        raise RuntimeError(f"program: there is none of number {number}")
    return program.run(_fake, x, *kept.program)


for _backend in ("cuda", "cpu"):
    _define_op(f"keep_program_{_backend}", "(Tensor[] tensors, int[] code, float[] numbers) -> int", None)
    _define_op(
        f"replay_{_backend}",
        "(Tensor x, int number) -> Tensor",
        functools.partial(_fake_replay, _backend),
        tags=torch.Tag.pt2_compliant_tag,
    )


def _reference_step(args: Step) -> Tensor:
    check_memory(tensor_names(type(args)), args.tensors)
    return reference.run(args)


for _key in ("CPU", "CUDA"):
    _library.impl("program_reference", torch.no_grad()(functools.partial(program.run, _reference_step)), _key)


STATISTICS = ("primary_mean", "primary_var", "cheap_mean", "cheap_var")
TRAIN_FIELDS = [name for name in GhostArgs.__annotations__ if name not in STATISTICS]
"""GhostArgs' fields but for the statistics, which the training forward computes."""
TRAINING_OPS = ("cuda", "triton", "reference")
"""The backends with training kernels: ``train_forward_<backend>`` and ``backward_<backend>``."""

_TRAIN_SCHEMA = ", ".join(f"{_TYPES[GhostArgs.__annotations__[name]]} {name}" for name in TRAIN_FIELDS)


def _fake_train_forward(*args) -> tuple[Tensor, ...]:
    *fields, group_name = args
    a = train_args(fields)
    dtype = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    sizes = [a.init_channels] * 2 + [a.cheap_weight.shape[0]] * 2 + [1 if group_name else 0]
    return _fake(a), *(torch.empty(size, dtype=dtype, device=a.x.device) for size in sizes)


for _backend in TRAINING_OPS:
    _define_op(
        f"train_forward_{_backend}",
        f"({_TRAIN_SCHEMA}, str group_name) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _fake_train_forward,
        tags=torch.Tag.pt2_compliant_tag,
    )
    _define_op(
        f"backward_{_backend}",
        f"(Tensor grad_output, {schema(GhostArgs)}, bool batch_statistics, str group_name, bool[] needs_grad) -> Tensor[]",
        _fake_backward,
        tags=torch.Tag.pt2_compliant_tag,
    )


TRAINING_KERNELS = {
    "primary_statistics": "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var",
    "cheap_statistics": "Tensor(a!) out, Tensor(b!) mean, Tensor(c!) var",
    "normalize": "Tensor(a!) out",
    "cheap_backward": "Tensor grad, Tensor y1, Tensor(a!) dz2, Tensor(b!)? y2, Tensor(c!)? product, Tensor(d!)? sums",
    "primary_backward": "Tensor grad, Tensor y1, Tensor? dz2, Tensor? y2, Tensor? means2, bool batch_statistics, "
    "Tensor(a!)? dz1, Tensor(b!)? sums, Tensor(c!)? weight",
    "normalize_backward": "Tensor(a!) dz1, Tensor y1, Tensor means1",
}
"""The single kernels of ``backends.training.Kernels`` that an extension registers as ``<kernel>_cuda``, and what each takes
after GhostArgs: memory to read and to fill. Only the two training ops call them, so they need no fakes."""

for _kernel, _memory in TRAINING_KERNELS.items():
    _define_op(f"{_kernel}_cuda", f"({schema(GhostArgs)}, {_memory}) -> ()", None)


def training_kernel(name: str, backend: str) -> Callable[..., None]:
    """The op ``ghostfused::<name>_<backend>``, one of ``TRAINING_KERNELS``."""
    return getattr(torch.ops.ghostfused, f"{name}_{backend}").default


def train_args(fields: Iterable) -> GhostArgs:
    """The GhostArgs of a training forward's arguments (``TRAIN_FIELDS``), with no statistics."""
    values: dict[str, Any] = dict(zip(TRAIN_FIELDS, fields, strict=True))
    return GhostArgs(**values, **dict.fromkeys(STATISTICS))  # type: ignore[arg-type]


def implement_training(
    backend: str, forward: Callable[[GhostArgs, str], tuple[Tensor, ...]], backward: Callable, *dispatch_keys: str
) -> None:
    """Registers both training ops of ``backend`` under each of ``dispatch_keys``.

    ``forward(args, group_name)`` and ``backward(grad_output, args, batch_statistics, group_name, needs_grad)`` are
    ``backends.training.train_forward`` and ``backward`` with the backend's kernels.
    """

    def run_forward(*args) -> tuple[Tensor, ...]:
        fields = train_args(args[:-1])
        check_memory(TENSORS, fields.tensors)
        return forward(fields, args[-1])

    def run_backward(grad_output: Tensor, *args) -> list[Tensor]:
        fields = GhostArgs(*args[:-3])
        check_memory(["grad_output", *TENSORS], [grad_output, *fields.tensors])
        return backward(grad_output, fields, *args[-3:])

    for key in dispatch_keys:
        _library.impl(f"train_forward_{backend}", run_forward, key)
        _library.impl(f"backward_{backend}", run_backward, key)


def training_op(kind: str, backend: str) -> Callable[..., Any]:
    """The op ``ghostfused::<kind>_<backend>``, ``kind`` being "train_forward" or "backward"."""
    return getattr(torch.ops.ghostfused, f"{kind}_{backend}").default
