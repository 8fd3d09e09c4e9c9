"""What the tests of compiled Triton kernels share: what spills, and a launch of the compiled PTX on the CPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ghostfused.backends import triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if triton.INTERPRETED:
    pytest.skip("compiles, so TRITON_INTERPRET must not be set", allow_module_level=True)

from ghostfused.backends.triton.compile import describe
from tools.sass.build import nvidia_tool

SHARED_LIMIT = 99 * 1024  # of sm_86 and sm_89
ORDERS = ("asc", "desc", "rand:7")
"""Of blocks and threads, as ptx-on-cpu's SHIM_ORDER."""


def spilled(cubin: bytes, tmp_path: Path) -> int:
    """Bytes of local memory that a thread uses."""
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    usage = subprocess.run(
        [nvidia_tool("cuobjdump"), "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    stack, local = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)


def in_short_runs(plan: dict[str, Any]) -> dict[str, Any]:
    """``plan`` with runs of at most 64 pixels, or one row, so that each program has neighbours whose halos overlap its run."""
    pixels, patch_h = plan["H"] * plan["W"], plan["PATCH_H"]
    if patch_h is None:
        return plan | {"run": 64 if pixels > 128 else 32}
    rows = max(1, min(64 // plan["W"], plan["H"] - 1))
    return plan | {"run": rows * plan["W"], "PATCH_H": min(patch_h, rows)}


def launch_on_cpu(compiled_on_cpu: Callable, kernel: Any, programs: int, kwargs: dict[str, Any]) -> None:
    """Runs ``kernel[programs,](**kwargs)``, compiled, on CPU tensors: with blocks and threads in three orders, which must
    leave the same bits in every tensor.

    The tool reads its order once per process, so each order runs in a fork, on copies of the tensors in shared memory.
    """
    signature, constexprs, attributes, options = describe(kwargs, kernel)
    compiled = compiled_on_cpu(kernel, signature, constexprs, attrs=attributes, **options)
    names = [name for name, kind in signature.items() if kind != "constexpr"]
    tensors = {name: kwargs[name] for name in names if isinstance(kwargs[name], Tensor)}
    results = {}
    for order in ORDERS:
        storages: dict[int, torch.UntypedStorage] = {}  # by address: two names of one buffer are one buffer there too
        results[order] = {name: _shared(t, storages) for name, t in tensors.items()}
        values = [results[order].get(name, kwargs[name]) for name in names]
        process = multiprocessing.get_context("fork").Process(target=_launch, args=(order, compiled, programs, values))
        process.start()
        process.join()
        assert process.exitcode == 0, f"{kernel.__name__} with SHIM_ORDER={order}"
    for name, t in tensors.items():
        first, *others = (results[order][name] for order in ORDERS)
        for order, other in zip(ORDERS[1:], others, strict=True):
            same = torch.equal(_bits(first), _bits(other))
            assert same, f"{kernel.__name__} leaves other bits in {name} with SHIM_ORDER={order}"
        t.copy_(first)


def _shared(t: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy of t's whole storage in shared memory, viewed as t is."""
    storage = t.untyped_storage()
    copy = storages.setdefault(storage.data_ptr(), storage.clone().share_memory_())
    return torch.empty(0, dtype=t.dtype).set_(copy, t.storage_offset(), t.shape, t.stride())


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _launch(order: str, compiled: Any, programs: int, values: list) -> None:
    os.environ["SHIM_ORDER"] = order
    compiled((programs,), *values)


@pytest.fixture(scope="session")
def compiled_on_cpu(tmp_path_factory) -> Iterator[Callable]:
    """ptx-on-cpu's class that compiles a kernel for the CPU."""
    folder = os.environ.get("PTX_ON_CPU")
    if not folder:
        pytest.skip("set PTX_ON_CPU to a ptx-on-cpu folder to run the compiled PTX on the CPU")
    with pytest.MonkeyPatch.context() as patch:
        kept, helpers = tmp_path_factory.mktemp("kept"), Path(__file__).parent
        patch.setenv("FLAGS", f"-include {_headers(Path(folder), kept)} -include {helpers / 'ptx_kernels.h'}")
        patch.setenv("KEPT_RUNTIME", str(kept / "runtime.o"))
        patch.setenv("PATH", f"{helpers / 'compiler'}{os.pathsep}{os.environ['PATH']}")
        patch.syspath_prepend(folder)
        from triton_ptx import CompiledOnCPU

        yield CompiledOnCPU


def _headers(tool: Path, folder: Path) -> Path:
    """What each kernel's C++ includes first, precompiled with the tool's own flags: most of the time of a build goes there."""
    header = folder / "headers.h"
    header.write_text('#include "ptx_rt.h"\n#include <cuda_runtime_api.h>\n')
    flags = "-std=c++17 -fPIC -ffp-contract=off -frounding-math -fno-strict-aliasing -w"
    folders = [f"-I{tool.resolve()}", "-isystem", f"{os.environ.get('CUDA', '/usr/local/cuda')}/include"]
    command = ["g++", *flags.split(), os.environ.get("OPT", "-O1"), *folders, "-x", "c++-header", header]
    subprocess.run([*command, "-o", header.with_suffix(".h.gch")], check=True)
    return header
