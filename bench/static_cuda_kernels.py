"""The compiled CUDA kernels of csrc/cuda/instances: resources and instruction counts, with no GPU.

Every kernel is listed by itself; for its name, shared memory and occupancy it needs a line in ``KERNELS``.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ghostfused.spec.kernels import COMMON

from .sass import tool
from .sass_flow import Instruction, parse, static_counts
from .static_triton import modules

CSRC = Path(__file__).parents[1] / "csrc"
_COUNTED = ("nhwc_", "nchw_", "training_nhwc_")
SOURCES = sorted(p.stem for p in (CSRC / "cuda" / "instances").glob("*.cu") if not p.stem.startswith(_COUNTED))
"""But for the kernels of one layout, which have no model here: ``tools.sass`` counts those."""
PATHS = ("float16", "bfloat16", "tf32", "float32")
LAYOUTS = ("nchw", "nhwc")
BATCHES = (1, 64, 256)
DEVICES = {"sm_80": (108, 166912, 167936), "sm_90": (132, 232448, 233472)}  # A100, H100: SMs, shared memory (block, SM)


def extension() -> Any:
    return importlib.import_module("ghostfused._C")


def plan(m: dict[str, Any], batch: int, nhwc: bool, path: str = "float16", arch: str = "sm_90", dw: int = 0) -> dict:
    """The launch plan of one of ``modules()``; ``dw`` replaces its depthwise kernel."""
    sms, block, sm = DEVICES[arch]
    p = extension().plan(
        batch=batch, in_channels=m["in_channels"], height=m["height"], width=m["width"],
        init_channels=math.ceil(m["out_channels"] / m["ratio"]), out_channels=m["out_channels"], ratio=m["ratio"],
        dw_size=dw or m["dw_size"], path=path, channels_last=nhwc, sm_count=sms, smem_per_block=block, smem_per_sm=sm,
        family="general",
    )  # fmt: skip
    del p["family"]
    return p


def _ghost_plans(path: str, arch: str, dw: int, nhwc: int) -> list[dict]:
    return [plan(m, batch, bool(nhwc), path, arch, dw or 7) for m in modules() for batch in BATCHES]


def _depthwise_plans(path: str, arch: str, w: int, stride: int, nhwc: int) -> list[dict]:
    """As the depthwise conv of a bottleneck, after the first of the Ghost modules in it."""
    return [
        extension().plan_depthwise(
            batch=batch, channels=m["out_channels"], height=m["height"], width=m["width"], kernel_h=h, kernel_w=w,
            stride=stride, path=path, channels_last=bool(nhwc), sm_count=DEVICES[arch][0],
        )
        for m in modules() for batch in BATCHES for h, kernel_w in COMMON.depthwise if kernel_w == w
    ]  # fmt: skip


_NO_DYNAMIC = [{"smem_bytes": 0, "threads": 256}]


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: Callable[..., str]
    """Of its template arguments but the path: what comes after the path in kernel_attributes()."""
    plans: Callable[..., list[dict]]
    """Of (path, architecture, the other template arguments): plans with dynamic shared memory and threads of a block."""


KERNELS = {
    "ghost_forward": Kernel(lambda dw, nhwc: f"{f'dw{dw}' if dw else 'any'}_{LAYOUTS[nhwc]}", _ghost_plans),
    "depthwise_conv": Kernel(lambda w, stride, nhwc: f"depthwise_w{w}_s{stride}_{LAYOUTS[nhwc]}", _depthwise_plans),
    "squeeze": Kernel(lambda nhwc: f"squeeze_{LAYOUTS[nhwc]}", lambda *_: _NO_DYNAMIC),
    "excite": Kernel(lambda: "excite", lambda *_: _NO_DYNAMIC),
}
"""By the __global__ function's name. One that isn't here is listed by its name and template arguments, without a plan."""


def nvcc_path() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or next((p for p in (f"{home}/bin/nvcc",) if os.path.exists(p)), None)


def nvcc_version() -> str:
    text = subprocess.run([str(nvcc_path()), "--version"], capture_output=True, text=True, check=False).stdout
    return text.strip().splitlines()[-1]


def compile_sass(arch: str, source: str) -> tuple[str, str]:
    """SASS and resource usage of the kernels in csrc/cuda/instances/``source``.cu.

    Raises:
        RuntimeError: no nvcc or no cuobjdump, or the compiler failed.
    """
    nvcc = nvcc_path()
    if nvcc is None or not os.path.exists(tool("cuobjdump")):
        raise RuntimeError("bench.static_cuda needs nvcc and the cuobjdump of Triton's package")
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{source}.cubin"
        command = [
            nvcc,
            "-std=c++20",
            "-O3",
            "-cubin",
            f"-arch={arch}",
            "-o",
            cubin,
            f"-I{CSRC}",
            str(CSRC / "cuda" / "instances" / f"{source}.cu"),
        ]
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
        done = run(command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        return run([tool("cuobjdump"), "-sass", cubin]).stdout, run([tool("cuobjdump"), "-res-usage", cubin]).stdout


def identify(mangled: str) -> tuple[str, str, tuple[int, ...]] | None:
    """(function, path, its other template arguments) of a kernel template's symbol; None of any other symbol."""
    m = re.match(r"_ZN10ghostfused(\d+)", mangled)
    if m is None:
        return None
    end = m.end() + int(m[1])
    arguments = re.match(r"ILNS_4PathE(\d)E((?:L[ib]\d+E)*)E", mangled[end:])
    if arguments is None:
        return None
    return mangled[m.end() : end], PATHS[int(arguments[1])], tuple(map(int, re.findall(r"\d+", arguments[2])))


def kernel_name(mangled: str) -> str:
    """As kernel_attributes() calls it."""
    found = identify(mangled)
    if found is None:
        return mangled
    function, path, others = found
    if function in KERNELS:
        return f"{path}_{KERNELS[function].name(*others)}"
    return "_".join((path, function, *map(str, others)))


def occupancy(registers: int, shared: int, threads: int, arch: str) -> int:
    """Blocks per SM: registers are given to warps in units of 256, 1 KB of each block's shared memory is the system's."""
    warps = threads // 32
    by_registers = 65536 // (math.ceil(registers * 32 / 256) * 256 * warps)
    return min(by_registers, DEVICES[arch][2] // (shared + 1024), 2048 // threads, 32)


def resources(usage: str, name: str, arch: str) -> dict[str, int]:
    """Of the line that -res-usage prints for a kernel; from sm_90 on it counts the system's 1 KB of shared memory."""
    m = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if m is None:
        raise ValueError(f"no resource usage of {name}: {usage!r}")
    shared = int(m[3]) - (1024 if int(arch.removeprefix("sm_")) >= 90 else 0)
    return {"registers": int(m[1]), "spill_bytes": int(m[2]) + int(m[4]), "static_smem": shared}


def kernel_row(mangled: str, arch: str, code: Iterable[Instruction], usage: str) -> dict[str, Any]:
    """One compiled kernel. ``usage``: the line that -res-usage prints for it."""
    name, found, counts = kernel_name(mangled), identify(mangled), static_counts(code)
    row: dict[str, Any] = {"kernel": name, "arch": arch, **resources(usage, name, arch)}
    row["local"] = sum(n for kind, n in counts.items() if kind.startswith(("LDL", "STL")))
    row |= {"smem": row["static_smem"], "threads": "-", "blocks_per_sm": "-", "warps_per_sm": "-"}
    if found is not None and found[0] in KERNELS:
        function, path, others = found
        plans = KERNELS[function].plans(path, arch, *others)
        blocks = [occupancy(row["registers"], row["static_smem"] + p["smem_bytes"], p["threads"], arch) for p in plans]
        at_most, most = max(enumerate(plans), key=lambda each: each[1]["smem_bytes"])
        row |= {
            "smem": row["static_smem"] + most["smem_bytes"], "threads": most["threads"],
            "blocks_per_sm": blocks[at_most], "warps_per_sm": blocks[at_most] * most["threads"] // 32,
            "blocks_per_sm_all_plans": [min(blocks), max(blocks)],
        }  # fmt: skip
    row |= {kind: counts.get(kind, 0) for kind in ("HMMA", "LDSM", "LDGSTS.128", "LDG.128", "STG.128", "FFMA")}
    return row | {"instructions": sum(counts.values()), "counts": dict(sorted(counts.items()))}


def kernel_rows(sass: dict[tuple[str, str], tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Every kernel; ``sass``: what compile_sass gave, by its arguments."""
    for (arch, _), (text, usage) in sass.items():
        usages = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
        for mangled, code in parse(text).items():
            yield kernel_row(mangled, arch, code, usages.get(mangled, ""))
