"""Several ops as one: a list of calls, each by the arguments of its op, as numbers that one op can take and run.

``ghostfused::program_<backend>(x, tensors, code, numbers)`` runs the calls one after the other with no Python and no
dispatcher between them. The code of a call is its op's place in ``STEPS``, then a number for each argument but the floats,
which are in ``numbers``: an int or bool is itself, a tensor -1 for None, else 2 * its place among x, the tensors and the
results so far, + 1 where it is a result that nobody reads later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import STEPS, GhostArgs, Step, tensor_names


class Program(NamedTuple):
    """The op's arguments but x."""

    tensors: list[Tensor]
    code: list[int]
    numbers: list[float]


def encode(calls: Sequence[tuple[Step, Tensor]], x: Tensor, parameters: Collection[int]) -> Program | None:
    """The program of ``calls``, arguments and result of each, in order.

    None if a call takes a tensor that is neither x nor the result of another nor one of ``parameters`` (by id).
    """
    results = [id(result) for _, result in calls]
    made = set(results)
    if not calls or len(made) < len(results):
        return None
    tensors: dict[int, Tensor] = {}
    for args, _ in calls:
        for name, t in zip(tensor_names(type(args)), args.tensors, strict=True):
            if t is None or t is x or id(t) in made:
                continue
            if t.is_neg():  # the op that keeps the program would keep a copy, and miss what is written later
                return None
            # conv1x1's cheap weight is made for the call: only its shape counts
            unread = isinstance(args, GhostArgs) and name == "cheap_weight" and args.out_channels == args.init_channels
            if id(t) not in parameters and not unread:
                return None
            tensors[id(t)] = t
    if not tensors:  # by one the dispatcher knows who keeps the program
        none = torch.empty(0, dtype=x.dtype, device=x.device)
        tensors[id(none)] = none
    places = {key: 2 * place for place, key in enumerate([id(x), *tensors, *results])}
    last_read: dict[int, int] = {}
    code: list[int] = []
    numbers: list[float] = []
    for args, _ in calls:
        code.append(list(STEPS).index(args.op))
        for value in args:
            if isinstance(value, Tensor):
                last_read[id(value)] = len(code)
                code.append(places[id(value)])
            elif isinstance(value, float):
                numbers.append(value)
            else:
                code.append(-1 if value is None else int(value))
    for result in results[:-1]:
        if result in last_read:
            code[last_read[result]] += 1
    return Program(list(tensors.values()), code, numbers)


def run_program(
    step: Callable[[Step], Tensor], x: Tensor, tensors: Sequence[Tensor], code: Sequence[int], numbers: Sequence[float]
) -> Tensor:
    """The last call's result, each made by ``step``."""
    if not code:
        raise RuntimeError("code: expected at least one call")
    values = [x, *tensors]
    codes, floats, kinds = iter(code), iter(numbers), list(STEPS.values())
    for op in codes:
        where = f"step {len(values) - len(tensors) - 1}"
        if not 0 <= op < len(kinds):
            raise RuntimeError(f"code: {where}: there is no op {op}")
        kind = kinds[op]
        arguments: list[Any] = []
        for name, type_ in kind.__annotations__.items():
            number = next(floats if type_ is float else codes, None)
            if number is None:
                raise RuntimeError(
                    f"code: {where} ({list(STEPS)[op]}): {name}: expected a longer code and more numbers"
                )
            if type_ in (float, int, bool):
                arguments.append(type_(number))
                continue
            place = int(number) >> 1
            if place >= len(values) or (place < 0 and type_ is Tensor):
                raise RuntimeError(
                    f"code: {where} ({list(STEPS)[op]}): {name}: expected a place below {len(values)}, got {place}"
                )
            arguments.append(None if place < 0 else values[place])
        values.append(step(kind(*arguments)))
    if next(floats, None) is not None:
        raise RuntimeError(f"numbers: expected one for each float of a step, got {len(numbers)}")
    return values[-1]
