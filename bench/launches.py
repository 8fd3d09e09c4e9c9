"""Operations per forward, each at least one kernel on a GPU: counted at the dispatcher; and device kernels where there is a GPU.

The count needs no GPU and computes nothing: tensors are on PyTorch's "meta" device, where a fused op, as any, has a
shape and no data. For it each backend is taken to be available, so that the count is the one of a machine that has it;
what the kernels refuse on all machines still goes to the reference.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ghostfused.backends import BACKENDS, unavailable_on
from ghostfused.backends.training_step import KERNELS
from ghostfused.backends.triton import has_ghosts
from ghostfused.cli.inputs import positive
from ghostfused.fuse import fuse_with_report
from ghostfused.ops import OPS
from ghostfused.ops.schemas import TRAINING_OPS
from ghostfused.spec import GhostArgs
from ghostfused.spec.takes import kernel_refusal

from . import cases, measure
from .console import table
from .peers import LEVELS, execution
from .results import Writer

KERNEL_BACKENDS = [name for name in BACKENDS if name != "reference"]
_NO_KERNEL = {"aten.detach", "aten.alias", "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.lift_fresh"}
_GPU_BACKENDS = ("cuda", "triton", "triton_two_kernel")


def fused_op(name: str) -> tuple[str, str] | None:
    """(op, backend) of an op of ours that computes a forward; None of any other."""
    for op in OPS:
        backend = name.removeprefix(f"ghostfused.{op}_")
        if backend in BACKENDS:
            return op, backend
    return None


def kernels(name: str, args: tuple) -> int:
    """How many kernels an op is known to launch for ``args``; 1, the least, where that isn't known."""
    op, backend = fused_op(name) or (None, None)
    if op == "squeeze_excite" and backend in _GPU_BACKENDS:
        return 2
    if op == "forward" and backend == "triton_two_kernel":
        return 1 + has_ghosts(GhostArgs(*args))
    return 1


class _Record(TorchDispatchMode):
    """Records the ops that compute something: no views, no allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if not func.is_view and name not in _NO_KERNEL:
            self.calls.append((name, args))
        return func(*args, **(kwargs or {}))


def calls_of(model: nn.Module, x: Tensor) -> list[tuple[str, tuple]]:
    """(name, arguments) of the ops of one forward, in order."""
    with torch.inference_mode(), _Record() as record:
        model(x)
    return record.calls


def count_ops(calls: list[tuple[str, tuple]]) -> Counter[str]:
    """The kernels that ``calls`` are known to launch, by op."""
    ops: Counter[str] = Counter()
    for name, args in calls:
        ops[name] += kernels(name, args)
    return ops


@contextlib.contextmanager
def as_if_available(backend: str | None) -> Iterator[None]:
    """Within, ``backend`` refuses only what its kernels refuse on every machine."""
    if backend is None:
        yield
        return
    module = BACKENDS[backend]
    # whose kernels for training need not be built: on the meta device none is run
    trains = {backend: KERNELS["reference"]} if backend in TRAINING_OPS else {}
    with (
        mock.patch.object(module, "DEVICES", None),
        mock.patch.object(module, "unavailable", return_value=None),
        mock.patch.object(module, "supports", lambda args: kernel_refusal(args, backend)),
        mock.patch.dict(KERNELS, trains),
    ):
        yield


def executions(model: nn.Module) -> dict[str, tuple[nn.Module, str | None]]:
    """``model`` unfused, and fused at each level on each kernel backend, whose name comes second."""
    variants: dict[str, tuple[nn.Module, str | None]] = {"eager": (model, None)}
    for level, arguments in LEVELS.items():
        for backend in KERNEL_BACKENDS:
            variants[execution(backend, level)] = fuse_with_report(model, backend=backend, **arguments)[0], backend
    return variants


def count_kernels(model: nn.Module, x: Tensor) -> int:
    """Kernels that one forward launches on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            model(x)
            torch.cuda.synchronize()
    kinds = torch.autograd.DeviceType.CUDA
    events = [e for e in profiled.events() if e.device_type == kinds and not e.name.startswith(("Memcpy", "Memset"))]
    return len(events)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", default="paper", help="as in `network`; several with commas")
    parser.add_argument("--size", type=positive, default=224)
    measure.add_device_arguments(parser)


def main(options: argparse.Namespace) -> int:
    """count operations and kernels per forward, unfused and fused"""
    device = measure.set_device(options)
    networks = cases.networks(options.network, options.size)
    shown = []
    with Writer(options.output, device) as writer:
        for name, network in networks.items():
            for variant, (each, backend) in executions(network).items():
                with as_if_available(backend):
                    meta = cases.Setting("meta").place(each)
                    calls = calls_of(meta, torch.empty(1, 3, options.size, options.size, device="meta"))
                by_op = count_ops(calls)
                row: dict = {"kind": "launches", "name": name, "execution": variant, "ops": sum(by_op.values())}
                row |= {"fused_ops": sum(fused_op(op) is not None for op, _ in calls)}
                row |= {"by_op": dict(by_op.most_common()), "kernels": None}
                if device.type == "cuda" and (backend is None or unavailable_on(backend, "cuda") is None):
                    on_gpu = cases.Setting("cuda").place(each)
                    row["kernels"] = count_kernels(on_gpu, torch.zeros(1, 3, options.size, options.size, device=device))
                writer.write(row)
                shown.append(row)
    table(
        "Operations per forward (counted; no GPU needed) and kernels per forward (profiled on a GPU)",
        ["network", "execution", "operations", "ours", "kernels", "most frequent"],
        [
            [r["name"], r["execution"], str(r["ops"]), str(r["fused_ops"]), str(r["kernels"] or "-"),
             ", ".join(f"{n} {op.removeprefix('aten.')}" for op, n in list(r["by_op"].items())[:4])]
            for r in shown
        ],
    )  # fmt: skip
    return 0
