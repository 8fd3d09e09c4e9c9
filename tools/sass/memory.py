"""Global memory as kernels see it: addresses of the process or of an arena of its own, with checked bounds."""

from __future__ import annotations

import ctypes

import numpy as np

Array = np.ndarray


class Fault(RuntimeError):
    """An access that a GPU would refuse or that has no defined result."""


class Memory:
    """``size`` bytes from ``base`` on, of which kernels may touch ``spans`` only; remembers which bytes they did."""

    def __init__(self, u8: Array, base: int) -> None:
        self.base = base
        self.u8 = u8
        self.u16, self.u32 = u8.view(np.uint16), u8.view(np.uint32)
        self.starts, self.ends = np.empty(0, np.int64), np.empty(0, np.int64)
        self.read: dict[int, Array] = {}
        self.written: dict[int, Array] = {}
        """By an allocation's start, for each pair of its bytes, whether a kernel has touched it."""
        self._span: int = 0

    def set_spans(self, starts: list[int], sizes: list[int]) -> None:
        order = np.argsort(np.array(starts, np.int64))
        self.starts = np.array(starts, np.int64)[order]
        self.ends = self.starts + np.array(sizes, np.int64)[order]
        self._span = 0

    def forget(self) -> None:
        """Which bytes were touched."""
        self.read.clear()
        self.written.clear()

    def check(self, at: Array, size: int | Array, what: str) -> Array:
        """Offsets of addresses ``at``; a Fault if an access of ``size`` bytes leaves the spans."""
        if len(at) and self._span < len(self.starts):  # most instructions stay in one tensor
            start, end = self.starts[self._span], self.ends[self._span]
            if at.min() >= start and (at + size).max() <= end:
                return at - self.base
        found = np.searchsorted(self.starts, at, "right") - 1
        bad = (found < 0) | (at + size > self.ends[found])
        if bad.any():
            raise Fault(f"global {what} out of bounds at {int(at[bad][0]):#x}")
        self._span = int(found[0]) if len(found) else self._span
        return at - self.base

    def touch(self, at: Array, size: int, seen: dict[int, Array]) -> None:
        """Notes ``size`` bytes at each of the checked addresses ``at``."""
        spans = np.unique(np.searchsorted(self.starts, (at.min(), at.max()), "right") - 1)
        for span in range(spans[0], spans[-1] + 1):
            start = int(self.starts[span])
            inside = at if len(spans) == 1 else at[(at >= start) & (at < self.ends[span])]
            if start not in seen:
                seen[start] = np.zeros((int(self.ends[span]) - start + 1) // 2, bool)
            pairs = (inside - start) // 2
            for k in range(max(1, size // 2)):
                seen[start][pairs + k] = True


class Arena(Memory):
    """Memory of its own, for a kernel without PyTorch. What is not put there is NaN."""

    def __init__(self, size: int = 1 << 24) -> None:
        super().__init__(np.full(size, 0xFF, np.uint8), 0x7F0000000000)
        self._top = 0
        self._sizes: dict[int, int] = {}

    def put(self, array: Array) -> int:
        """The address of a copy of ``array``."""
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        at = (self._top + 511) // 256 * 256
        self._top = at + raw.size
        if self._top > self.u8.size:
            raise MemoryError(f"the arena has {self.u8.size} bytes")
        self.u8[at : self._top] = raw
        self._sizes[self.base + at] = raw.size
        self.set_spans(list(self._sizes), list(self._sizes.values()))
        return self.base + at

    def get(self, address: int, dtype: np.typing.DTypeLike, shape: tuple[int, ...]) -> Array:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at = address - self.base
        return self.u8[at : at + size].view(dtype).reshape(shape).copy()


class ProcessMemory(Memory):
    """``size`` bytes of this process at address ``base``."""

    def __init__(self, base: int, size: int) -> None:
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base)), base)
