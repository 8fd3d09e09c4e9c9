"""The ops that run several steps in one call, for inference: ``program_<backend>``, whose arguments ``encoding.py`` describes,
and ``replay_<backend>`` of a program that ``keep_program_<backend>`` was given."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..spec import Step
from ..spec.checks import validate
from . import encoding
from .recording import note
from .refusals import below_autograd
from .schemas import define_op, fake_output, forward_op, library

PROGRAM_BACKENDS, REPLAY_BACKENDS = ("cuda", "cpu", "reference"), ("cuda", "cpu")

for _backend in PROGRAM_BACKENDS:
    define_op(
        f"program_{_backend}",
        "(Tensor x, Tensor[] tensors, int[] code, float[] numbers) -> Tensor",
        functools.partial(encoding.run_program, fake_output),
        tags=torch.Tag.pt2_compliant_tag,
    )


class Packs:
    """What kept programs make of weights that never change: in the order in which the kernels read them, when a program first
    reads them so.

    ``module``: the extension's.
    """

    def __init__(self, module: Any):
        self.number, self._module = next(_pack_numbers), module
        self.renew()

    def renew(self, *, bfloat16: bool = False) -> None:
        """The weights have changed. No program that reads them may run meanwhile.

        ``bfloat16``: they are numbers that it holds, or tensors of another type than float32; half the bytes do.
        """
        self._module.renew_packs(self.number, bfloat16)

    def __del__(self) -> None:
        self._module.drop_packs(self.number)


_pack_numbers = itertools.count(1)


class KeptProgram:
    """A program that the extension of ``backend`` keeps, so that a call of it hands over nothing but x:
    ``ghostfused::replay_<backend>(x, number)``. Its tensors live as long as this does.

    ``any_format``: maps between its steps may lie in the memory format that is faster, on a CPU. Sums are then made in
    another order than by the ops one by one, so that results differ from theirs by rounding.

    ``packs``: its tensors change before a ``packs.renew()`` only.
    """

    def __init__(
        self,
        backend: str,
        kept: encoding.Program,
        drop: Callable[[int], None],
        *,
        any_format: bool = False,
        packs: Packs | None = None,
    ):
        self.program, self._drop, self._op, self.packs = kept, drop, forward_op(backend, "replay"), packs
        self.refuse_negative_views()  # of which the dispatcher would hand over copies, that miss what is written later
        keep: Callable[..., Any] = forward_op(backend, "keep_program")
        self.number: int = below_autograd(keep, *kept, any_format, packs.number if packs else 0)
        _kept_programs[backend, self.number] = self

    def __call__(self, x: Tensor) -> Tensor:
        """The program's last result.

        Raises:
            RuntimeError: the kernels refuse x, or one of the tensors as it is by now.
        """
        self.refuse_negative_views()
        return below_autograd(self._op, x, self.number)

    def refuse_negative_views(self) -> None:
        """Raises RuntimeError if one of the tensors is a negative view, as ``.data`` can make of any: the dispatcher, which
        resolves them, sees no tensor but x, and the kernels' ABI doesn't tell."""
        if any(map(Tensor.is_neg, self.program.tensors)):
            i = next(i for i, t in enumerate(self.program.tensors) if t.is_neg())
            raise RuntimeError(f"tensors[{i}]: expected no negative view (torch.resolve_neg makes it a tensor)")

    def __del__(self) -> None:
        if "number" in self.__dict__:
            self._drop(self.number)


_kept_programs: weakref.WeakValueDictionary[tuple[str, int], KeptProgram] = weakref.WeakValueDictionary()


def kept_program(backend: str, number: int) -> encoding.Program:
    """The program that the extension of ``backend`` keeps under ``number``."""
    kept = _kept_programs.get((backend, number))
    if kept is None:
        raise RuntimeError(f"program: there is none of number {number}")
    return kept.program


def _fake_replay(backend: str, x: Tensor, number: int) -> Tensor:
    return encoding.run_program(fake_output, x, *kept_program(backend, number))


for _backend in REPLAY_BACKENDS:
    define_op(
        f"keep_program_{_backend}",
        "(Tensor[] tensors, int[] code, float[] numbers, bool any_format=False, int packs=0) -> int",
        None,
    )
    define_op(
        f"replay_{_backend}",
        "(Tensor x, int number) -> Tensor",
        functools.partial(_fake_replay, _backend),
        tags=torch.Tag.pt2_compliant_tag,
    )


_program_cpu = forward_op("cpu", "program")


def run_step(args: Step) -> Tensor:
    """A step that is no op of its own and takes no weights, by the CPU's kernel, as a program of it alone. It has no derivative.

    Raises:
        RuntimeError: the kernel refuses it.
    """
    program = encoding.encode([(args, torch.empty(0, device=args.x.device))], args.x, ())
    if program is None:
        raise RuntimeError(f"{args.op}: expected a step without weights")
    out = below_autograd(_program_cpu, args.x, *program)
    note("cpu", args, out)
    return out


def _reference_step(args: Step) -> Tensor:
    validate(args)
    return reference.run(args)


for _key in ("CPU", "CUDA"):
    library.impl("program_reference", torch.no_grad()(functools.partial(encoding.run_program, _reference_step)), _key)


_replay_cpu = forward_op("cpu", "replay")


def replay_cpu(x: Tensor, number: int) -> Tensor:
    """The op of that name, for graphs in which nothing is differentiated."""
    return below_autograd(_replay_cpu, x, number)
