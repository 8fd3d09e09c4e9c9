"""Block sizes of the Triton kernels: a small table per shape class, and the length of a run.

``python -m tools.triton_configs`` writes the table, ``configs.json``; nothing is tuned at a user's call.
Each step of the kernel has its own table, since the step's cost depends on its own blocks only.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...spec import GhostArgs
from ...spec.takes import has_window
from .launch import align
from .patch_plan import MULTIPROCESSORS, plan_patches

PATH = Path(__file__).with_suffix(".json")
NUM_WARPS = 4
PROGRAMS = 528
"""Programs that a launch should have: four for each of an H100's 132 multiprocessors."""

SECTOR = 32
"""Bytes that memory moves at once."""
SMALL_IMAGE = 64
"""Pixels up to which a block need not be longer than this."""

LONG_SUM = 256
"""Products of float32 from which on one chain of them rounds away more than PyTorch's sums do."""

CIN_CLASSES = (16, 32, 64, 65)
CP_CLASSES = (8, 16, 32, 33)
DW_CLASSES = (3, 5, 7)
"""Upper bounds of the shape classes; the last one for channels is open."""


def _class(size: int, bounds: tuple[int, ...]) -> int:
    return next((bound for bound in bounds if size <= bound), bounds[-1])


class Primary(NamedTuple):
    """Blocks of the 1×1 conv: pixels × init channels, in steps of BLOCK_K input channels."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_stages: int


class Cheap(NamedTuple):
    """Blocks of the depthwise conv: pixels × init channels."""

    BLOCK_P: int
    BLOCK_C: int


def primary_key(itemsize: int, nhwc: bool, cin: int, cp: int) -> str:
    layout = "nhwc" if nhwc else "nchw"
    return f"{layout} bytes={itemsize} cin={_class(cin, CIN_CLASSES)} cp={_class(cp, CP_CLASSES)}"


def cheap_key(itemsize: int, nhwc: bool, dw_size: int, cp: int) -> str:
    layout = "nhwc" if nhwc else "nchw"
    return f"{layout} bytes={itemsize} dw={_class(dw_size, DW_CLASSES)} cp={_class(cp, CP_CLASSES)}"


def precision(args: GhostArgs) -> str:
    """How the primary conv sums: "tf32", "ieee", or "blocks", which is IEEE with a sum of its own for each BLOCK_K channels."""
    if args.allow_tf32:
        return "tf32"
    is_long = args.x.dtype == torch.float32 and args.x.shape[1] * args.kernel_size**2 >= LONG_SUM
    return "blocks" if is_long else "ieee"


@functools.cache
def tables() -> dict[str, dict[str, list]]:
    return json.loads(PATH.read_text())


def cheap_blocks(itemsize: int, nhwc: bool, dw_size: int, channels: int) -> Cheap:
    """The table's blocks of a depthwise conv, made narrower while many of their channels would be idle."""
    c = Cheap(*tables()["cheap"][cheap_key(itemsize, nhwc, dw_size, channels)])
    while c.BLOCK_C * itemsize > SECTOR and 4 * (-(-channels // c.BLOCK_C) * c.BLOCK_C) > 5 * channels:
        c = Cheap(2 * c.BLOCK_P, c.BLOCK_C // 2)  # a tile of the same size
    return c


def run_length(pixels: int, halo: int, units: int, step: int) -> int:
    """Pixels per program, a multiple of ``step``, for ``units`` = images × channel blocks of ``pixels`` pixels.

    As many as give PROGRAMS programs; at least a halo, so that a small batch recomputes at most two pixels for one; at
    most 8 halos, from where longer runs would save less than a quarter.
    """
    wanted = max(-(-pixels * units // PROGRAMS), halo, 1)
    return -(-min(wanted, max(8 * halo, 1024), pixels) // step) * step


@functools.lru_cache(maxsize=4096)
def window_run_length(pixels: int, halo: int, units: int, step: int) -> int:
    """As ``run_length``, where a halo's pixel costs as many products as a window has taps: the length of least work for the
    busiest multiprocessor, which should have two programs."""

    def work(run: int) -> int:
        waves = -(-units * -(-pixels // run) // MULTIPROCESSORS)
        return max(waves, 2) * min(run + 2 * halo, pixels)

    return min((-(-pixels // parts // step) * step for parts in range(1, -(-pixels // step) + 1)), key=work)


def blocks(
    args: GhostArgs, nhwc: bool, primary: bool = True, cheap: bool = True, choice: tuple[Primary, Cheap] | None = None,
    patches: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """The launch constants of both steps in one kernel, or of one step in its own; ``choice`` replaces the table's.

    In channels_last the depthwise conv goes by patches, unless there is a choice or ``patches`` says no.
    """
    cin, (n, _, h, w) = args.x.shape[1], args.output_shape()
    cp, pixels, itemsize = args.init_channels, h * w, args.x.element_size()
    if choice is None:
        p = Primary(*tables()["primary"][primary_key(itemsize, nhwc, cin, cp)])
        c = cheap_blocks(itemsize, nhwc, args.dw_size, cp)
    else:
        p, c = choice
    window = has_window(args)
    if window and itemsize == 4 and not args.allow_tf32:
        p = p._replace(num_stages=1)  # a prefetched tile beside float32's products spills registers
    elif nhwc and precision(args) == "blocks":
        p = p._replace(BLOCK_K=32)  # 16 spill registers
    if pixels <= SMALL_IMAGE:
        p, c = p._replace(BLOCK_M=min(p.BLOCK_M, SMALL_IMAGE)), c._replace(BLOCK_P=min(c.BLOCK_P, SMALL_IMAGE))
    block_n = p.BLOCK_N if primary else c.BLOCK_C
    step = c.BLOCK_P if cheap else p.BLOCK_M
    halo = args.dw_size // 2 * (w + 1) if primary and cheap else 0
    common = dict(p._asdict(), BLOCK_N=block_n, ONE_K=cin <= p.BLOCK_K)
    if nhwc and cheap and choice is None and patches:
        m = plan_patches(
            n, h, w, cin * args.kernel_size**2, cp, align(cp, args.out_channels), itemsize, args.dw_size, (p.BLOCK_M, block_n, p.BLOCK_K), primary
        )  # fmt: skip
        return common | dict(m._asdict(), run=m.rows * w, LANES=32 * m.num_warps, BLOCK_P=None, BLOCK_C=None)
    length = window_run_length if window and halo else run_length
    return common | {
        "WIDTH": block_n, "BLOCK_P": c.BLOCK_P, "BLOCK_C": min(c.BLOCK_C, block_n), "num_warps": NUM_WARPS,
        "run": length(pixels, halo, n * -(-cp // block_n), step),
        "PATCH_H": None, "PATCH_W": None, "VECTOR": None, "LANES": None,
    }  # fmt: skip
