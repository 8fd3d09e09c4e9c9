"""The stand-in device in this process: its memory, and the launches of the extension, which go to a function of ours.

A process has it if it was started in ``environment()``; ``enter`` starts it so.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator

from . import build, kernel
from .machine import Launch
from .memory import ProcessMemory

_MARK = "GHOSTFUSED_SASS"
_Triple = ctypes.POINTER(ctypes.c_uint * 3)
_Callback = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, _Triple, _Triple, ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)
)  # fmt: skip
Handler = Callable[[Launch], None]


def environment() -> dict[str, str]:
    """Variables of a process in which PyTorch finds the stand-in device."""
    folder = build.runtime()
    paths = [str(folder), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {
        "LD_PRELOAD": str(folder / "libcudart-sass.so"),
        "LD_LIBRARY_PATH": ":".join(filter(None, paths)),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # so that each tensor has bounds of its own
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        _MARK: "1",
    }


def is_active() -> bool:
    return _MARK in os.environ


def enter(module: str) -> None:
    """Starts this process anew as ``python -m module`` with the same arguments, unless it has the device."""
    if not is_active():
        build.extension()
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], environment())


class Device:
    def __init__(self) -> None:
        if not is_active():
            raise RuntimeError("this process has no stand-in device: start it in device.environment()")
        library = build.extension()
        _use_extension(library)
        self._kernels = kernel.index(build.cubins(library))
        self._runtime = ctypes.CDLL(None)
        self._runtime.sass_arena.restype = ctypes.c_void_p
        size = ctypes.c_size_t()
        base = self._runtime.sass_arena(ctypes.byref(size))
        self.memory = ProcessMemory(base, size.value)
        self._handler: Handler | None = None
        self._failure: BaseException | None = None
        self._callback = _Callback(self._on_launch)
        self._runtime.sass_on_launch(self._callback)

    def fill(self, byte: int) -> None:
        """What fresh memory is full of from now on: 0xFF is NaN in all formats."""
        self._runtime.sass_fill(byte)

    def note_allocations(self) -> None:
        """Makes the tensors that there are now the memory that kernels may touch."""
        count = self._runtime.sass_allocations(ctypes.c_size_t(0), None, None)
        starts, sizes = (ctypes.c_size_t * count)(), (ctypes.c_size_t * count)()
        self._runtime.sass_allocations(ctypes.c_size_t(count), starts, sizes)
        self.memory.set_spans(list(starts), list(sizes))

    def take(self, launch: Launch) -> None:
        """Gives a launch to the handler."""
        if self._handler is None:
            raise RuntimeError(f"a launch of {launch.kernel} that nobody runs")
        self.note_allocations()
        self._handler(launch)

    def _on_launch(self, name: bytes, grid, block, shared: int, arguments) -> None:
        if self._failure is not None:
            return
        try:
            code = kernel.load(self._kernels[name.decode()], name.decode())
            raw = bytearray(max(offset + size for offset, size in code.parameters))
            for (offset, size), pointer in zip(code.parameters, arguments, strict=False):
                raw[offset : offset + size] = ctypes.string_at(pointer, size)
            self.take(Launch(code, tuple(grid[0]), tuple(block[0]), shared, bytes(raw)))
        except BaseException as error:  # it can't pass through the extension
            self._failure = error

    @contextlib.contextmanager
    def launching(self, handler: Handler) -> Iterator[None]:
        """Gives the launches of the body to ``handler``, whose exception it raises at the end."""
        self._handler, self._failure = handler, None
        try:
            yield
        finally:
            self._handler = None
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _use_extension(library) -> None:
    """Makes ``library`` what the package takes as ``ghostfused._C``."""
    import torch  # noqa: F401 (the extension needs its libraries)

    spec = importlib.util.spec_from_file_location("ghostfused._C", library)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"not an extension: {library}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["ghostfused._C"] = module
    spec.loader.exec_module(module)


@functools.cache
def device() -> Device:
    """This process's."""
    return Device()
