"""Static evidence on every launch of a whole fused network, with no GPU: registers, spills, shared memory and bytes.

The ops are those of one forward of GhostNet 1.0×, recorded on PyTorch's "meta" device. What an op launches comes from the
CUDA planner, by a function in ``CUDA``, or from running the Triton backend with its launches recorded instead of made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ghostfused.backends import BACKENDS
from ghostfused.backends.triton import has_ghosts
from ghostfused.fuse import fuse_with_report
from ghostfused.ops import OPS
from ghostfused.spec import Args, DepthwiseArgs, GhostArgs, SqueezeExciteArgs

from . import cases, launches
from .sass import disassemble
from .static_cuda_kernels import DEVICES, KERNELS, extension

HEADER = """\
Each op of GhostNet 1.0× fused whole, its launches joined by +. Registers and bytes spilled: of the compiled code. Shared
memory: static and dynamic bytes. Floor: the activations that the op takes, read once, and its output, written once. MB:
that and the parameters by the plan, with any buffer of the op's own (Triton's x1 where the output doesn't hold it,
the parts of squeeze-and-excite's hidden layer) written and read, as if no cache held it. Rows that neighbouring blocks
both read are taken to come from L2 the second time, which the CUDA planner checks for Ghost modules. Nothing was timed."""
ACTIVATIONS = ("x", "input_gate", "residual", "output_gate")


@dataclasses.dataclass
class Launch:
    kernel: str
    blocks: int
    threads: int
    shared: int
    """Dynamic bytes for CUDA, all bytes for Triton."""
    registers: int = 0
    spill_bytes: int = 0


EACH = tuple(field.name for field in dataclasses.fields(Launch))


@dataclasses.dataclass
class Plan:
    launches: list[Launch]
    scratch: int = 0
    """Bytes that one launch hands to the next."""
    extra: int = 0
    """Bytes that the plan moves beyond each argument and the output once."""


def nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def path_of(args: Args) -> str:
    dtype = str(args.x.dtype).removeprefix("torch.")
    return "tf32" if dtype == "float32" and getattr(args, "allow_tf32", False) else dtype


def is_nhwc(args: GhostArgs | DepthwiseArgs) -> bool:
    return not args.new_output().is_contiguous() or args.x.shape[2:].numel() == 1


def _cuda_ghost(args: GhostArgs, arch: str) -> Plan:
    (sms, block, sm), (n, cin, h, w), init = DEVICES[arch], args.x.shape, args.init_channels
    nhwc, path = is_nhwc(args), path_of(args)
    p = extension().plan(
        batch=n, in_channels=cin, height=h, width=w, init_channels=init, out_channels=args.out_channels, ratio=args.ratio,
        dw_size=args.dw_size, path=path, channels_last=nhwc, input_gate=args.input_gate is not None, sm_count=sms,
        smem_per_block=block, smem_per_sm=sm,
    )  # fmt: skip
    unrolled = has_ghosts(args) and args.ratio == 2 and args.dw_size in (3, 5)
    taps = (args.ratio - 1) * args.dw_size**2 if has_ghosts(args) else 1
    once = nbytes(args.x) + init * (cin + taps) * args.x.element_size()
    kernel = f"{path}_{KERNELS['ghost_forward'].name(unrolled * args.dw_size, nhwc)}"
    return Plan([Launch(kernel, p["grid"], p["threads"], p["smem_bytes"])], extra=p["dram_read"] - once)


def _cuda_depthwise(args: DepthwiseArgs, arch: str) -> Plan:
    (n, c, h, w), (kh, kw), nhwc, path = args.x.shape, args.weight.shape[2:], is_nhwc(args), path_of(args)
    p = extension().plan_depthwise(
        batch=n, channels=c, height=h, width=w, kernel_h=kh, kernel_w=kw, stride=args.stride, path=path,
        channels_last=nhwc, sm_count=DEVICES[arch][0],
    )  # fmt: skip
    kernel = f"{path}_{KERNELS['depthwise_conv'].name(kw, args.stride, nhwc)}"
    return Plan([Launch(kernel, p["grid"], p["threads"], p["smem_bytes"])])


def _cuda_squeeze_excite(args: SqueezeExciteArgs, arch: str) -> Plan:
    (n, c, h, w), path, reduced = args.x.shape, path_of(args), len(args.reduce_weight)
    p = extension().plan_squeeze_excite(
        batch=n, channels=c, height=h, width=w, reduced=reduced, path=path,
        channels_last=not args.x.is_contiguous(), sm_count=DEVICES[arch][0],
    )  # fmt: skip
    squeeze, excite = KERNELS["squeeze"].name(p["channels_adjacent"]), KERNELS["excite"].name()
    both = (squeeze, p["squeeze_grid"]), (excite, p["excite_grid"])
    return Plan(
        [Launch(f"{path}_{k}", grid, p["threads"], 0) for k, grid in both], scratch=n * p["parts"] * reduced * 4
    )


CUDA: dict[type[Args], Callable[[Any, str], Plan]] = {
    GhostArgs: _cuda_ghost, DepthwiseArgs: _cuda_depthwise, SqueezeExciteArgs: _cuda_squeeze_excite,
}  # fmt: skip
"""From an op's arguments and the architecture to its plan."""


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[int, ...], dict[str, Any]]]]:
    """Within, Triton's launches are put on a list as (kernel, grid, arguments) and not made."""
    from triton.runtime.jit import JITFunction

    made: list[tuple[Any, tuple[int, ...], dict[str, Any]]] = []

    def run(self, *args, grid, warmup, **kwargs):
        made.append((self, grid, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield made


_COMPILED: dict[str, tuple[int, int, int]] = {}
"""Registers, bytes spilled and shared memory of what Triton compiled, by target, kernel and arguments."""


def _triton_plan(args: Args, target: str, backend: str) -> Plan:
    """The plan of a Triton backend, with the registers and spills of what it launches."""
    from ghostfused.backends.triton.compile import compile_launch, describe

    with recorded() as made:
        out = BACKENDS[backend].forward(args)
    plan, known, scratch = Plan([]), {id(t) for t in (*args.tensors, out)}, dict[int, int]()
    for kernel, grid, kwargs in made:
        name = kernel.fn.__name__
        key = f"{target} {name} {describe(kwargs, kernel)}"
        if key not in _COMPILED:
            code = compile_launch(kwargs, target, kernel)
            sass = disassemble(code.asm["cubin"])
            _COMPILED[key] = sass.registers, sass.spill_bytes, code.metadata.shared
        registers, spill_bytes, shared = _COMPILED[key]
        plan.launches.append(Launch(name, math.prod(grid), kwargs["num_warps"] * 32, shared, registers, spill_bytes))
        tensors = (t for t in kwargs.values() if isinstance(t, torch.Tensor) and id(t) not in known)
        scratch |= {id(t): nbytes(t) for t in tensors}
    plan.scratch = sum(scratch.values())
    return plan


def plan_of(args: Args, backend: str, target: str, compiled: dict[str, dict[str, Any]] | None = None) -> Plan:
    """What ``args`` launches. ``compiled``, for CUDA: rows of static_cuda_kernels for ``target``, by kernel."""
    if backend != "cuda":
        return _triton_plan(args, target, backend)
    plan = CUDA[type(args)](args, target)
    if compiled is not None:
        for launch in plan.launches:
            kernel = compiled[launch.kernel]
            launch.registers, launch.spill_bytes = kernel["registers"], kernel["spill_bytes"]
            launch.shared += kernel["static_smem"]
    return plan


class _Layout(TorchDispatchMode):
    """Keeps what PyTorch's own layers make in one memory format, which on the meta device they forget."""

    def __init__(self, memory_format: torch.memory_format) -> None:
        super().__init__()
        self.memory_format = memory_format

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.conv2d, torch.ops.aten.batch_norm):
            return out.contiguous(memory_format=self.memory_format)
        return out


@functools.cache
def ops(backend: str, batch: int, dtype: str, layout: str, network: str = "paper", size: int = 224) -> list[Args]:
    """The arguments of our ops in one forward of ``network``, fused whole on ``backend``, in order."""
    model = fuse_with_report(cases.network(network), backend=backend)[0]
    setting = cases.Setting("meta", batch, dtype, layout)
    x = torch.empty(batch, 3, size, size, dtype=setting.torch_dtype, device="meta")
    x = x.contiguous(memory_format=cases.LAYOUTS[layout])
    with launches.as_if_available(backend), _Layout(cases.LAYOUTS[layout]):
        calls = launches.calls_of(setting.place(model), x)
    return [OPS[found[0]](*args) for name, args in calls if (found := launches.fused_op(name))]


def title(args: Args) -> str:
    _, c, h, w = args.x.shape
    if isinstance(args, DepthwiseArgs):
        kh, kw = args.weight.shape[2:]
        return f"depthwise {kh}x{kw}/{args.stride} {c} {h}x{w}"
    if isinstance(args, SqueezeExciteArgs):
        return f"squeeze-excite {c} ({len(args.reduce_weight)}) {h}x{w}"
    parts = [name for name in ("input_gate", "residual", "output_gate") if getattr(args, name) is not None]
    kind = "ghost" if has_ghosts(args) else "conv1x1"
    act = "" if args.primary_act == 0 else " act"
    return f"{kind} {c}->{args.out_channels} {h}x{w}{act}" + "".join(f" +{name}" for name in parts)


def traffic(args: Args, plan: Plan) -> dict[str, int]:
    """Bytes that any kernel has to move, and those that this plan moves."""
    out = nbytes(args.new_output())
    tensors = {n: t for n, t in zip(args._fields, args.tensors, strict=False) if t is not None}
    if isinstance(args, GhostArgs) and not has_ghosts(args):
        tensors = {n: t for n, t in tensors.items() if not n.startswith("cheap_")}
    once = sum(map(nbytes, tensors.values())) + out
    floor = sum(nbytes(tensors[name]) for name in ACTIVATIONS if name in tensors) + out
    moved = once + 2 * plan.scratch + plan.extra
    return {"floor_bytes": floor, "plan_bytes": moved, "scratch_bytes": plan.scratch}


def rows(
    backend: str,
    target: str,
    dtype: str,
    layout: str,
    batch: int = 64,
    compiled: dict[str, dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row per distinct op, in order of first appearance; ``compiled`` as in plan_of."""
    groups: dict[str, list[Args]] = {}
    for args in ops(backend, batch, dtype, layout):
        groups.setdefault(title(args), []).append(args)
    for name, (args, *others) in groups.items():
        plan = plan_of(args, backend, target, compiled)
        yield {
            "backend": backend, "target": target, "dtype": dtype, "layout": layout, "batch": batch, "op": name,
            "count": 1 + len(others), "launches": len(plan.launches),
            **{field: [getattr(launch, field) for launch in plan.launches] for field in EACH}, **traffic(args, plan),
        }  # fmt: skip


def cells(row: dict[str, Any]) -> dict[str, str]:
    """``row`` as it is printed."""
    joined = {f: " + ".join(map(str, row[f])) for f in EACH}
    bytes_ = {"MB": f"{row['plan_bytes'] / 1e6:.1f}", "bytes/floor": f"{row['plan_bytes'] / row['floor_bytes']:.3f}"}
    joined["kernel"] = joined["kernel"].replace(f"{row['dtype']}_", "")
    return {"op": row["op"], "count": str(row["count"]), "launches": str(row["launches"]), **joined, **bytes_}


def total(rows: list[dict[str, Any]]) -> str:
    """One line on a whole forward."""
    count, launched = sum(r["count"] for r in rows), sum(r["count"] * r["launches"] for r in rows)
    moved, floor = (sum(r["count"] * r[f"{what}_bytes"] for r in rows) for what in ("plan", "floor"))
    spilling = sum(any(r["spill_bytes"]) for r in rows)
    return (
        f"{count} ops, {launched} launches, {moved / 1e6:.0f} MB, {moved / floor:.3f} of the floor; "
        f"{spilling} of {len(rows)} distinct ops spill"
    )
