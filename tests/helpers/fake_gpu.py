"""A GPU to rehearse on: what ``python tests/helpers/fake_gpu.py -m bench …`` runs takes itself to be on a CUDA device.

Under ptx-on-cpu, tensors on "cuda" lie in the host's memory, and our kernels run on the CPU, as do streams and all that
allocates. PyTorch's own kernels don't: here each of its CUDA operations gets a body, which runs the CPU's operation in the
same memory. Stood in for as well:

- CUDA graphs, by the operations that were called during the capture. As on a GPU, the results of a capture are no values
  until a replay, which computes in the same memory; a capture needs a stream of its own, and what waits for the device
  fails in it. Unlike there, what a capture writes in place is written.
- CUDA events, by the host's clock: all work is done when the call returns. Times are real and say nothing about a GPU.
- ``torch.cuda._sleep``, by sleeping as long as a clock of ``CLOCK`` takes.

Triton counts as not installed, as nothing here runs its kernels. The benchmarks' two roofs, a copy and a matrix product made
to fill a GPU, are 1.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CLOCK = 1e9
installed = False
"""Whether ``install`` has made this process one with a GPU."""
_NATIVE = {"_local_scalar_dense", "empty", "empty_strided", "is_set_to", "record_stream", "resize_", "set_"}
"""These need no kernel, but for the first, which has its own body below."""
_COMPOSITE = {"aten::_convolution", "aten::convolution", "aten::convolution_backward", "aten::copy_"}
"""These have no CUDA kernel of their own, and choose among those of libraries."""


def on_cpu(t: Tensor) -> Tensor:
    """A CPU tensor in the memory of ``t``."""
    storage = t.untyped_storage()
    if storage.nbytes() == 0 or t.numel() == 0:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    data = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    with torch.no_grad():
        return torch.empty(0, dtype=t.dtype).set_(data, t.storage_offset(), t.shape, t.stride())


def _body(op: Callable) -> Callable:
    """``op`` for CUDA tensors: the CPU's, on the same memory; what it allocates is copied to new CUDA tensors."""

    def run(*args, **kwargs):
        twins: dict[int, tuple[Tensor, Tensor]] = {}

        def to_cpu(v: Any) -> Any:
            if isinstance(v, Tensor) and v.is_cuda:
                return twins.setdefault(id(v), (v, on_cpu(v)))[1]
            return torch.device("cpu") if isinstance(v, torch.device) and v.type == "cuda" else v

        cpu_args, cpu_kwargs = tree_map(to_cpu, (args, kwargs))
        if cpu_kwargs.get("pin_memory"):
            cpu_kwargs["pin_memory"] = False
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)):
            out = op(*cpu_args, **cpu_kwargs)
        for own, twin in twins.values():
            if twin.shape != own.shape or (twin.numel() and twin.data_ptr() != own.data_ptr()):  # a resized out=
                own.resize_(twin.shape)
                on_cpu(own).copy_(twin)
        owners = {id(twin): own for own, twin in twins.values()}

        def to_cuda(v: Any) -> Any:
            if not isinstance(v, Tensor) or v.is_cuda:
                return v
            if id(v) in owners:
                return owners[id(v)]
            new = torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda")
            on_cpu(new).copy_(v)
            return new

        return tree_map(to_cuda, out)

    return run


def _overload(name: str) -> Callable | None:
    """The operation that PyTorch calls ``name``, if it computes: what returns a view needs no kernel."""
    base, _, overload = name.removeprefix("aten::").partition(".")
    if base in _NATIVE or "cudnn" in base or "miopen" in base:
        return None
    if name not in _COMPOSITE and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
        return None
    op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    views = op is None or any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    return None if views else op


class Event:
    """A moment of the host's clock."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        self.timed, self.moment = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.moment = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        if not (self.timed and end.timed):
            raise ValueError("both events must be created with enable_timing=True")
        if self.moment is None or end.moment is None:
            raise ValueError("both events must be recorded before their elapsed time is asked for")
        return (end.moment - self.moment) * 1e3

    def synchronize(self) -> None:
        _no_wait("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class Graph(TorchDispatchMode):
    """The operations of a capture, with what they returned."""

    capturing: Graph | None = None

    def __init__(self, keep_graph: bool = False):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, Any]] | None = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        """A capture is no mode, and what runs takes no notice of it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [v for v in tree_leaves((args, kwargs)) if _memory(v)]
        out = func(*args, **kwargs)
        if read and any(not (isinstance(v, Tensor) and v.is_cuda) for v in tree_leaves(out)):
            _no_wait(str(func))  # the host gets a value of the device's
        self.given |= {_address(v) for v in read} - self.made.keys()
        self.made |= {_address(v): v for v in tree_leaves(out) if _memory(v) and _address(v) not in self.given}
        self.calls.append((func, args, kwargs, out))
        return out

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        if torch.cuda.current_stream() == torch.cuda.default_stream():
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self.calls, self.given, self.made = (
            [],
            set(),
            {},
        )  # the latter by address: what was there before, and what is new
        Graph.capturing = self
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)
        Graph.capturing = None
        for address, v in self.made.items():
            ctypes.memset(address, 0xFF, v.untyped_storage().nbytes())

    def replay(self) -> None:
        if self.calls is None:
            raise RuntimeError("CUDAGraph.replay: nothing was captured")
        for func, args, kwargs, captured in self.calls:
            out = func(*args, **kwargs)
            for place, new in zip(tree_leaves(captured), tree_leaves(out), strict=True):
                if _memory(new) and new.data_ptr() != place.data_ptr():
                    on_cpu(place).copy_(on_cpu(new))

    def reset(self) -> None:
        self.calls = None

    def pool(self) -> tuple[int, int]:
        return 0, id(self)


def _memory(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_cuda and v.numel() > 0


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _no_wait(what: str) -> None:
    if Graph.capturing is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")


def install() -> torch.library.Library:
    """Makes this process one with a GPU, for as long as the library that it returns lives."""
    global installed
    if "libcudart-cpu" not in os.environ.get("LD_PRELOAD", ""):
        raise SystemExit("start it with $PTX_ON_CPU/run-extension ghostfused/_C*.so")
    installed = True
    os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING", None)  # which run-extension sets: PyTorch would count no memory
    sys.modules["triton"] = None  # type: ignore[assignment]
    torch.backends.cudnn.enabled = False
    library = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are kernels already
        for name in torch._C._dispatch_get_all_op_names():
            if name.startswith("aten::") and (op := _overload(name)) is not None:
                with contextlib.suppress(
                    RuntimeError
                ):  # what PyTorch puts together from other operations on all devices
                    library.impl(name.removeprefix("aten::"), _body(op), allow_override=True)
        library.impl("_local_scalar_dense", lambda t: on_cpu(t).item(), allow_override=True)
    synchronize = torch.cuda.synchronize

    def waiting(device: Any = None) -> None:
        _no_wait("torch.cuda.synchronize")
        synchronize(device)

    torch.cuda.synchronize = waiting
    torch.cuda.Event, torch.cuda.CUDAGraph = Event, Graph  # type: ignore[assignment,misc]
    torch.cuda.is_current_stream_capturing = lambda: Graph.capturing is not None
    torch.cuda._sleep = lambda cycles: time.sleep(cycles / CLOCK)
    torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
    return library


def _without_roofs() -> None:
    from bench import timing

    for name in ("copy_bandwidth", "matmul_gflops"):
        assert callable(getattr(timing, name))
        setattr(timing, name, lambda *_: 1.0)


def main() -> None:
    """``-m MODULE``, ``-c PROGRAM`` or a file, with its arguments, as Python takes them."""
    library = install()  # noqa: F841  lives as long as what runs
    kind, *rest = sys.argv[1:]
    sys.path[0] = os.getcwd()
    if kind == "-m":
        sys.argv = rest
        if rest[0] == "bench":
            _without_roofs()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    main()
