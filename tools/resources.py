"""Registers, local memory and static shared memory of every compiled CUDA kernel. Exit code 1 if a kernel spills registers.

    python -m tools.resources                        the built extension
    python -m tools.resources --arch sm_87 sm_121    the kernels' sources, compiled for these

No GPU is needed. A kernel that spills has local memory, which lies in DRAM.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ghostfused.cli.inputs import BadInput, in_one_line, positive

from .sass import build

SOURCES = build.ROOT / "csrc" / "cuda" / "instances"
_USAGE = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_SYSTEM_SHARED = 1024
"""From sm_90 on, cuobjdump counts the shared memory that the system takes of each block."""


@dataclasses.dataclass(frozen=True)
class Resources:
    kernel: str
    arch: str
    registers: int
    local_bytes: int
    shared_bytes: int
    """Without the dynamic shared memory, which the launch plans choose."""


def resources(binary: Path, arch: str | None = None) -> Iterator[Resources]:
    """Of each kernel in an extension, for each architecture that it has machine code for, or in a cubin, which is for ``arch``."""
    tool = str(build.nvidia_tool("cuobjdump"))
    text = subprocess.run([tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
    # an extension's parts are named, a cubin is one
    parts = [arch, text] if arch else re.split(r"^arch = (sm_\w+)$", text, flags=re.MULTILINE)[1:]
    if not _USAGE.search(text):
        raise ValueError(f"{binary}: cuobjdump found no machine code in it")
    for name_of_arch, part in zip(parts[::2], parts[1::2], strict=True):
        system = _SYSTEM_SHARED if int(name_of_arch.removeprefix("sm_").rstrip("af")) >= 90 else 0
        found = _USAGE.findall(part)
        for name, (_, registers, stack, shared, local) in zip(demangled([f[0] for f in found]), found, strict=True):
            yield Resources(name, name_of_arch, int(registers), int(stack) + int(local), max(0, int(shared) - system))


def demangled(symbols: list[str]) -> list[str]:
    """Without namespace, parameters and the types of template arguments: ``ghost_forward<0, 3, true>``."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    names = (re.sub(r"^void |ghostfused::|\(\w+(::\w+)*\)(?=[\w-])", "", line) for line in text.splitlines())
    return [re.sub(r"\(.*$", "", name) for name in names]


def compiled(source: Path, arch: str, folder: Path) -> Path:
    """A cubin of one source, by the flags of the build.

    Raises:
        RuntimeError: the compiler failed; the message is its output.
    """
    setup, cubin = build.setup_functions(), folder / f"{source.stem}.{arch}.cubin"
    flags = setup["cuda_extension"]().extra_compile_args["nvcc"]
    command = [
        str(setup["find_cuda_home"]() / "bin/nvcc"),
        *flags,
        f"-I{SOURCES.parents[1]}",
        "-cubin",
        f"-arch={arch}",
    ]
    command += ["-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return cubin


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.resources", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--arch", nargs="+", help="compile for these, as in sm_87; by default the built extension is read"
    )
    parser.add_argument("--only", default="", help="only sources whose name contains this, as in training")
    parser.add_argument("--jobs", type=positive, default=2, help="compilers at a time (default %(default)s)")
    options = parser.parse_args(argv)
    return in_one_line("python -m tools.resources", functools.partial(report, options))


def architectures() -> list[str]:
    """Those that nvcc compiles for, as in sm_90."""
    nvcc = build.setup_functions()["find_cuda_home"]() / "bin/nvcc"
    return subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()


def report(options: argparse.Namespace) -> int:
    """Prints the table."""
    if reason := build.missing():
        raise BadInput(reason)
    known = [base + suffix for base in architectures() for suffix in ("", "a", "f")]
    if unknown := [arch for arch in options.arch or () if arch not in known]:
        raise BadInput(f"--arch: expected some of {', '.join(architectures())}, got {', '.join(unknown)}")
    binaries: list[tuple[Path, str | None]]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        if options.arch:
            work = [(s, a, Path(folder)) for a in options.arch for s in sorted(SOURCES.glob(f"*{options.only}*.cu"))]
            binaries = [
                (made, each[1]) for made, each in zip(pool.map(lambda each: compiled(*each), work), work, strict=True)
            ]
        else:
            binaries = [(path, None) for path in sorted((build.ROOT / "ghostfused").glob("_C*.so"))]
        rows = [row for binary, arch in binaries for row in resources(binary, arch)]
    if not rows:
        raise BadInput(
            "nothing is compiled: build the extension, or name --arch, and with --only a part of a source's name"
        )
    width = max(len(row.kernel) for row in rows)
    print(f"{'kernel':{width}s}  arch    registers  local  shared")
    for row in rows:
        print(f"{row.kernel:{width}s}  {row.arch:7s} {row.registers:9d} {row.local_bytes:6d} {row.shared_bytes:7d}")
    spills = sum(row.local_bytes > 0 for row in rows)
    print(f"{len(rows)} kernels; {spills} of them spill registers")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
