"""The table of instructions: what an opcode does, as a function that makes an Action for one of its uses."""

from __future__ import annotations

from collections.abc import Callable

from .kernel import Instruction
from .machine import Action, Gang
from .memory import Array

Maker = Callable[[Instruction], Action]
MAKERS: dict[str, Maker] = {}


def opcode(*names: str) -> Callable[[Maker], Maker]:
    """Registers a maker for these names."""

    def register(maker: Maker) -> Maker:
        for name in names:
            MAKERS[name] = maker
        return maker

    return register


def unknown(i: Instruction) -> NotImplementedError:
    return NotImplementedError(f"{i.pc:#x}: {i.text}: not simulated")


def action_of(i: Instruction) -> Action:
    """What ``i`` does. An instruction or a variant that isn't known raises when it is executed."""
    from . import control, floating, integer, spills, tensor, transfer  # noqa: F401 (they fill MAKERS)

    try:
        maker = MAKERS.get(i.name)
        if maker is None:
            raise unknown(i)
        return maker(i)
    except (NotImplementedError, ValueError, KeyError, IndexError) as error:
        reason = str(error) if isinstance(error, NotImplementedError) else f"{i.pc:#x}: {i.text}: {error!r}"

        def fail(g: Gang, m: Array) -> None:
            raise NotImplementedError(reason)

        return fail
