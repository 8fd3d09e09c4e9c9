"""The CPU kernels on aarch64, cross-compiled and run by an emulator: no Python and no Torch is there.

``Driver.run`` hands one call of an op to tests/helpers/cpu_ops_driver.cpp, and takes its result, as that file describes.
"""

from __future__ import annotations

import fcntl
import platform
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from ghostfused.spec import STEPS, Step

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
DRIVER = ROOT / "tests" / "helpers" / "cpu_ops_driver.cpp"
SOURCES = [*sorted((CPU / "isa").glob("*.cpp")), DRIVER, CPU / "dispatch.cpp", CPU / "pool.cpp"]  # the longest first
FLAGS = ["-std=c++20", "-Og", "-fno-math-errno", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}"]
FLAGS += ["-DGHOSTFUSED_SVE512", f"-I{ROOT / 'tests' / 'helpers' / 'without_torch'}"]
OWN_FLAGS = {"sve512.cpp": ["-march=armv8.2-a+sve", "-msve-vector-bits=512"]}
"""As setup.py has them."""
NATIVE = platform.machine() == "aarch64"
DTYPES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def compiler() -> str | None:
    return shutil.which("g++" if NATIVE else "aarch64-linux-gnu-g++")


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def missing() -> str | None:
    """What it would take to run here; None if all of it is there."""
    if compiler() is None:
        return "no g++ for aarch64 (Debian's package g++-aarch64-linux-gnu)"
    if emulator() is None:
        return "no emulator of aarch64 (Debian's package qemu-user)"
    return None


def build(folder: Path) -> Path:
    """The driver, compiled once even if several processes ask for it."""
    binary = folder / "cpu_ops_driver_aarch64"
    with (folder / "aarch64.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not binary.exists():
            _build(folder, binary)
    return binary


def _build(folder: Path, binary: Path) -> None:
    def run(*command: object) -> None:
        done = subprocess.run([str(compiler()), *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]

    objects = [folder / f"{source.stem}.aarch64.o" for source in SOURCES]
    with ThreadPoolExecutor(2) as pool:
        flags = [[*FLAGS, *OWN_FLAGS.get(source.name, ())] for source in SOURCES]
        list(pool.map(lambda f, source, to: run(*f, "-c", source, "-o", to), flags, SOURCES, objects))
    unfinished = binary.with_suffix(".part")
    run("-static", *objects, "-o", unfinished)
    unfinished.rename(binary)


class Driver:
    """The kernels at one instruction set, on one CPU of the emulator's.

    Attributes:
        isa: the chosen instruction set.
        supported: those that the CPU has.

    Raises:
        RuntimeError: there is none for ``isa``; the message is the kernels' own.
    """

    def __init__(self, binary: Path, cpu: str, isa: str = "", threads: int = 1):
        command = [str(emulator()), "-cpu", cpu, "-E", f"GHOSTFUSED_CPU_ISA={isa}", str(binary), str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        line = self._process.stderr.readline().decode().strip()
        if " of " not in line:
            self.close()
            raise RuntimeError(line)
        self.isa, supported = line.split(" of ")
        self.supported = supported.split()

    def close(self) -> None:
        self._process.communicate()

    def run(self, args: Step) -> Tensor:
        """The op's result.

        Raises:
            RuntimeError: the op's own error, or the driver's end.
        """
        to, answers = self._process.stdin, self._process.stdout
        assert to is not None
        assert answers is not None

        def read(count: int) -> bytes:
            got = answers.read(count)
            if len(got) < count:
                raise RuntimeError(f"the driver ended with {self._process.wait()} on {args}")
            return got

        def words(count: int) -> list[int]:
            return list(struct.unpack(f"<{count}q", read(8 * count)))

        try:
            to.write(struct.pack("<q", list(STEPS).index(args.op)) + b"".join(map(encoded, args)))
            to.flush()
        except BrokenPipeError:
            raise RuntimeError(f"the driver has ended, with {self._process.wait()}") from None
        (failed,) = words(1)
        if failed:
            raise RuntimeError(read(failed + (-failed & 7))[:failed].decode())
        _, dtype, dims = words(3)
        sizes, strides, (offset, size) = words(dims), words(dims), words(2)
        storage = bytearray(read(size + (-size & 7))[:size])
        kind = {number: dtype for dtype, number in DTYPES.items()}[dtype]
        return torch.frombuffer(storage, dtype=kind).as_strided(sizes, strides, offset)


def encoded(value: Tensor | float | int | None) -> bytes:
    """An argument as the driver reads it; a tensor with its whole storage, where it lies in it."""
    if value is None:
        return struct.pack("<q", 0)
    if isinstance(value, float):
        return struct.pack("<d", value)
    if not isinstance(value, Tensor):
        return struct.pack("<q", value)
    data = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy().tobytes()
    header = [1, DTYPES[value.dtype], value.dim(), *value.shape, *value.stride(), value.storage_offset(), len(data)]
    return struct.pack(f"<{len(header)}q", *header) + data + bytes(-len(data) & 7)
