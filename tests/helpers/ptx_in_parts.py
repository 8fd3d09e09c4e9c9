#!/usr/bin/env python3
"""A cuobjdump for ptx-on-cpu, which finds it by CUOBJDUMP: writes the PTX of each source in files of a few kernels.

The translator takes time by the square of a file's length: of the whole extension minutes, and of its parts a quarter of them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

WHOLE = "WHOLE_CUOBJDUMP"
"""Names the real one."""
LIMIT = 250_000
"""Characters of kernels in a file: to compile one takes a second at least."""
KERNEL, BRACE = re.compile(r"^(?:\.visible )?\.entry ", re.MULTILINE), re.compile(r"[{}]")


def variables() -> dict[str, str]:
    """The environment in which ptx-on-cpu takes this; empty where there is no cuobjdump."""
    from tools.sass.build import nvidia_tool  # which the tool itself, started in another folder, doesn't need

    whole = os.environ.get("CUOBJDUMP") or nvidia_tool("cuobjdump")
    return {WHOLE: str(whole), "CUOBJDUMP": str(Path(__file__).resolve())} if whole and WHOLE not in os.environ else {}


def cut(ptx: str) -> tuple[list[str], str]:
    """The kernels, and all the rest: functions, and declarations of shared memory."""
    kernels, rest, done = [], [], 0
    for start in (m.start() for m in KERNEL.finditer(ptx)):
        depth, end = 0, len(ptx)
        for brace in BRACE.finditer(ptx, start):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                end = brace.end()
                break
        kernels.append(ptx[start:end])
        rest.append(ptx[done:start])
        done = end
    return kernels, "".join([*rest, ptx[done:]])


def parts(ptx: str) -> list[str]:
    """Each with some kernels and all the rest."""
    kernels, rest = cut(ptx)
    found: list[list[str]] = []
    size = LIMIT
    for kernel in kernels:
        if size + len(kernel) > LIMIT:
            found.append([rest])
            size = 0
        found[-1].append(kernel)
        size += len(kernel)
    return ["\n".join(part) for part in found]


def main() -> int:
    returncode = subprocess.run([os.environ[WHOLE], *sys.argv[1:]], check=False).returncode
    for path in Path().glob("*.ptx"):
        for number, part in enumerate(parts(path.read_text())):
            path.with_suffix(f".{number}.ptx").write_text(part)
        path.unlink()
    return returncode


if __name__ == "__main__":
    sys.exit(main())
