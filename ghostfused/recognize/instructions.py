"""The instructions of Python code, and a call before each one that runs."""

from __future__ import annotations

import dis
import functools
import itertools
import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

MONITORING: Any = getattr(sys, "monitoring", None)
"""Python 3.12 and later have it. There a trace function may miss the instructions of a frame that it has just met."""


@functools.cache
def instructions_of(code: CodeType) -> tuple[dict[int, int], list[dis.Instruction]]:
    """Those of ``code`` without padding, and where each is by its offset."""
    listed = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL")]
    return {i.offset: n for n, i in enumerate(listed)}, listed


@functools.cache
def catches(code: CodeType) -> bool:
    """Whether it has an ``except``: what a layer raises may be the way to another result."""
    names = [instruction.opname for instruction in instructions_of(code)[1] if instruction.opname != "NOP"]
    bare = any(pair == ("PUSH_EXC_INFO", "POP_TOP") for pair in itertools.pairwise(names))
    return bare or not {"CHECK_EXC_MATCH", "CHECK_EG_MATCH"}.isdisjoint(names)


class Instructions:
    """Calls ``before(frame)`` ahead of each instruction of some code, between ``start`` and ``stop``, where Python monitors.

    No context manager: an interrupt at the end of ``__enter__`` would leave the tool in use.
    """

    def __init__(self, before: Callable[[FrameType], None]):
        self.before = before
        self.codes: set[CodeType] = set()
        self.tool: int | None = None

    def start(self) -> None:
        if MONITORING is None:
            return
        for tool in (3, 4, 5, 2, 1, 0):  # the others have purposes, but may be free
            try:
                self.tool = tool
                MONITORING.use_tool_id(tool, "ghostfused")
            except ValueError:
                self.tool = None
                continue
            MONITORING.register_callback(tool, MONITORING.events.INSTRUCTION, self._event)
            return

    def stop(self) -> None:
        if self.tool is None:
            return
        for code in self.codes:
            MONITORING.set_local_events(self.tool, code, 0)
        MONITORING.register_callback(self.tool, MONITORING.events.INSTRUCTION, None)
        MONITORING.free_tool_id(self.tool)
        self.codes.clear()
        self.tool = None

    def of(self, code: CodeType | None) -> None:
        """From its next call on: Python looks for monitors where a function begins."""
        if self.tool is not None and code is not None and code not in self.codes:
            self.codes.add(code)
            MONITORING.set_local_events(self.tool, code, MONITORING.events.INSTRUCTION)

    def _event(self, code: CodeType, offset: int) -> None:
        self.before(sys._getframe(1))
