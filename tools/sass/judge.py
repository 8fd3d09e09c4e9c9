"""Runs the launches of our ops as machine code, checks their results against float64, and says what they cost."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostfused import ops
from ghostfused.backends import reference
from ghostfused.spec import Args, GhostArgs
from ghostfused.testing import Case, convert, judge, make_args, to_device

from .costs import DRAM, TIMES, LaunchCost, cost_of
from .device import device
from .latency import microseconds
from .machine import Launch, execute
from .race import check_races
from .triton_launches import intercepted

DTYPES = {
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
}
PER_IMAGE = ("x", "input_gate", "residual", "output_gate")


@dataclasses.dataclass
class Row:
    """One module."""

    module: str
    count: int
    issue_us: float
    issue_mean_us: float
    shared_us: float
    shared_mean_us: float
    hmma_us: float
    dram_us: float
    """The op's tensors, each once; of a training step, what its launches touch."""
    instructions: int
    dram_read_bytes: int
    dram_write_bytes: int
    store_sector_ratio: float
    error: float
    """The largest difference from the float64 reference over the largest value."""
    limit: float
    """What the table of tolerances allows."""
    images_checked: float
    """Numbers that were checked, in images."""
    parts: dict[str, float]
    launches: list[dict[str, Any]]
    latency_us: float | None = None
    """The timing model's, where it was asked for (latency.py)."""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit and self.images_checked > 0


def case_of(config: dict[str, Any], batch: int, dtype: str, layout: str) -> Case:
    """The case of a line of ghost_configs.jsonl."""
    names = ("in_channels", "out_channels", "height", "width", "kernel_size", "stride", "dw_size", "ratio")
    kind, tf32 = DTYPES[dtype]
    return Case(
        batch=batch, dtype=kind, layout=layout, allow_tf32=tf32,
        act_primary=config["act_primary"], act_cheap=config["act_cheap"], **{n: config[n] for n in names},
    )  # fmt: skip


def name_of(config: dict[str, Any]) -> str:
    c = config
    extra = "" if c["dw_size"] == 3 else f" dw{c['dw_size']}"
    extra += "" if c["kernel_size"] == 1 else f" k{c['kernel_size']}"
    extra += "" if c["stride"] == 1 else f" s{c['stride']}"
    return f"{c['in_channels']}->{c['out_channels']} {c['height']}x{c['width']} {c['act_primary']}{extra}"


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def sample(launch: Launch, batch: int) -> range:
    """One image's blocks if they divide among images, else as many."""
    return range(math.ceil(launch.blocks / batch))


def judge_config(config: dict[str, Any], options: argparse.Namespace) -> Row:
    """Judges a line of ghost_configs.jsonl as the command's options say."""
    case = case_of(config, options.batch, options.dtype, options.layout)
    name, count = name_of(config), config.get("count", 1)
    if options.mode == "training":
        from .training import judge_training_step

        return judge_training_step(case, name, count)
    args = make_args(dataclasses.replace(case, batch=min(2, case.batch)))
    if case.layout == "nhwc":  # a model in channels_last has its weights so too
        args = args._replace(primary_weight=args.primary_weight.contiguous(memory_format=torch.channels_last))
    args = repeated(args, case.batch)
    if options.general:
        args = args._replace(primary_weight=displaced(args.primary_weight))
    return judge_args(args, name, count, options.backend, options.latency)


def displaced(t: Tensor) -> Tensor:
    """``t`` an element beyond where vectors begin, which the general kernels alone take."""
    storage = t.new_empty(t.numel() + 1)
    return torch.as_strided(storage, t.shape, t.stride(), 1).copy_(t)


def repeated(args: GhostArgs, batch: int) -> GhostArgs:
    """``args`` for so many images, which are those of ``args`` in turn: random numbers for all take longer than the
    simulation of one."""

    def more(t: Tensor) -> Tensor:
        new = torch.empty((batch, *t.shape[1:]), dtype=t.dtype, memory_format=memory_format(t))
        for n in range(batch):
            new[n] = t[n % t.shape[0]]
        return new

    return args._replace(**{n: more(t) for n in PER_IMAGE if (t := getattr(args, n)) is not None})  # type: ignore[arg-type]


def memory_format(t: Tensor) -> torch.memory_format:
    nhwc = t.dim() == 4 and not t.is_contiguous()
    return torch.channels_last if nhwc else torch.contiguous_format


def judge_args(args: Args, name: str, count: int = 1, backend: str = "cuda", latency: bool = False) -> Row:
    """Judges one call of an op whose kernel fills the output's images each by blocks of its own."""
    dev, batch = device(), args.x.shape[0]
    costs: list[LaunchCost] = []
    times: list[float] = []

    def on_launch(launch: Launch) -> None:
        dev.memory.forget()
        counts = execute(launch, sample(launch, batch), dev.memory)
        costs.append(cost_of(launch, counts, dev.memory))
        if latency:
            times.append(microseconds(launch, dev.memory))

    there = to_device(args, "cuda")
    with dev.launching(on_launch), intercepted(dev) if backend == "triton" else contextlib.nullcontext():
        out = ops.forward_op(backend, args.op)(*there)
    written = dev.memory.written.get(out.data_ptr())
    error, limit, checked = check(args, out, written)
    moved = nbytes(args.tensors) + nbytes([out])
    judged = row(name, count, costs, moved / DRAM * 1e6, error, limit, checked)
    return dataclasses.replace(judged, latency_us=sum(times)) if latency else judged


def line_of(row: Row, config: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """A line of JSON: what was judged, as bench's files of measurements describe it, and the judgement."""
    mode = "inference" if options.mode == "forward" else "training_step"
    setting = {"dtype": options.dtype, "layout": options.layout, "batch": options.batch, "mode": mode}
    values = {name: value for name, value in dataclasses.asdict(row).items() if value is not None}
    return {"kind": "counted", **config, **setting, **values, "ok": row.ok}


def races(config: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """``races_of`` a line of ghost_configs.jsonl."""
    case, name = case_of(config, options.batch, options.dtype, options.layout), name_of(config)
    if options.mode == "forward":
        return races_of(make_args(case), name)
    from .training import checked

    found, on_launch = list[str](), _race_handler()
    error, limit = checked(case, functools.partial(on_launch, found))
    return found + _wrong(name, error, limit)


def races_of(args: Args, name: str) -> list[str]:
    """Runs all blocks of an op's launches, and describes the races in the first, a middle and the last one of each; and a
    wrong result, of which a race may be the reason."""
    found, on_launch = list[str](), _race_handler()
    there = to_device(args, "cuda")
    with device().launching(functools.partial(on_launch, found)):
        out = ops.forward_op("cuda", args.op)(*there)
    verdict = judge(out.cpu(), args)
    return found + _wrong(name, verdict.error, verdict.limit)


def _race_handler() -> Callable[[list[str], Launch], None]:
    memory = device().memory

    def on_launch(found: list[str], launch: Launch) -> None:
        some = sorted({0, launch.blocks // 2, launch.blocks - 1})
        found.extend(check_races(launch, some, memory))
        execute(launch, sorted(set(range(launch.blocks)) - set(some)), memory)

    return on_launch


def _wrong(name: str, error: float, limit: float) -> list[str]:
    return [] if error <= limit else [f"{name}: error {error:.1e}, limit {limit:.1e}"]


def row(
    name: str, count: int, costs: list[LaunchCost], dram_us: float, error: float, limit: float, checked: float
) -> Row:
    parts: dict[str, float] = {}
    for c in costs:
        for part, share in c.parts.items():
            parts[part] = parts.get(part, 0) + share * c.issue_us
    issue = sum(c.issue_us for c in costs)
    return Row(
        module=name,
        count=count,
        issue_us=issue,
        issue_mean_us=sum(c.issue_mean_us for c in costs),
        shared_us=sum(c.shared_us for c in costs),
        shared_mean_us=sum(c.shared_mean_us for c in costs),
        hmma_us=sum(c.hmma_us for c in costs),
        dram_us=dram_us,
        instructions=sum(c.instructions for c in costs),
        dram_read_bytes=sum(c.read_bytes for c in costs),
        dram_write_bytes=sum(c.written_bytes for c in costs),
        store_sector_ratio=sum(c.stored_sectors for c in costs) / max(1, sum(c.ideal_sectors for c in costs)),
        error=error,
        limit=limit,
        images_checked=checked,
        parts={part: round(us / issue, 4) for part, us in sorted(parts.items(), key=lambda item: -item[1])},
        launches=[dataclasses.asdict(c) | {"dram_us": c.dram_us} for c in costs],
    )


def check(args: Args, out: Tensor, written: np.ndarray | None) -> tuple[float, float, float]:
    """Error, limit and how many images' worth of numbers, of what was written of the output."""
    if written is None:
        return math.inf, 0.0, 0.0
    batch = out.shape[0]
    per_element = out.element_size() // 2
    elements = torch.from_numpy(written[::per_element][: out.numel()].copy())
    mask = torch.empty(0, dtype=torch.bool).set_(elements.untyped_storage(), 0, out.shape, out.stride())
    error = limit = 0.0
    for n in torch.nonzero(mask.flatten(1).any(1)).flatten().tolist():
        own = out[n : n + 1].cpu()
        alone = one_image(args, n)
        if not bool(mask[n].all()):
            expected = reference.run(convert(alone, torch.float64)).to(own.dtype)
            own = torch.where(mask[n : n + 1], own, expected)
        verdict = judge(own, alone)
        error, limit = max(error, verdict.error), max(limit, verdict.limit)
    return error, limit, int(mask.sum()) / (out.numel() / batch)


def one_image(args: Args, n: int) -> Args:
    def own(t: Tensor) -> Tensor:
        return t[n : n + 1].clone(memory_format=torch.preserve_format)

    names = [name for name in PER_IMAGE if getattr(args, name, None) is not None]
    return args._replace(**{name: own(getattr(args, name)) for name in names})  # type: ignore[return-value, arg-type]


def totals(rows: list[Row]) -> dict[str, Any]:
    """Sums over the modules, each as often as it occurs."""
    sums: dict[str, Any] = {name: sum(r.count * getattr(r, name) for r in rows) for name in TIMES}
    if all(r.latency_us is not None for r in rows):
        sums["latency_us"] = sum(r.count * (r.latency_us or 0) for r in rows)
    slowest = [max(r.issue_us, r.shared_us, r.dram_us) for r in rows]
    return {
        "modules": sum(r.count for r in rows),
        **sums,
        "slowest_us": sum(r.count * us for r, us in zip(rows, slowest, strict=True)),
        "worst_over_dram": max(us / r.dram_us for r, us in zip(rows, slowest, strict=True)),
        "store_sector_ratio": max(r.store_sector_ratio for r in rows),
        "error_over_limit": max(r.error / r.limit if r.limit else math.inf for r in rows),
        "ok": all(r.ok for r in rows),
    }
