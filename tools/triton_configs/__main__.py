"""Writes the table of block sizes, ghostfused/backends/triton/configs.json: ``python -m tools.triton_configs``.

For each shape class it takes the candidate that is best on one representative shape of the class: on a GPU the fastest,
elsewhere, by compiled evidence for sm_80, the one that issues the fewest instructions per output byte. In both cases it
must spill no register on sm_80 and sm_90, for sizes that divide well and badly, and leave room for ``MIN_WARPS`` warps
on a multiprocessor.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import json
import multiprocessing
import sys
from typing import Any

import torch

from ghostfused.backends import triton as backend
from ghostfused.backends.triton import configs
from ghostfused.cli.inputs import positive
from ghostfused.spec import TENSORS, GhostArgs

from .evidence import measure, shape_args

MIN_WARPS = 12
REGISTERS, SHARED = 65536, 99 * 1024
"""Of a multiprocessor: registers, and the shared memory of sm_86 and sm_89, the smallest among our targets."""
CIN = {16: (16, 15), 32: (24, 31), 64: (48, 61), 65: (160, 161)}
CP = {8: (8, 7), 16: (12, 13), 32: (20, 29), 33: (60, 61)}
CP_ALIGNED = {8: 8, 16: 16, 32: 32, 33: 64}
SIDE = (56, 27)
"""Representatives of each shape class: the first ones are measured. With the second ones nothing is aligned."""
DTYPES = {2: torch.float16, 4: torch.float32}


def primary_candidates(itemsize: int, cin: int, cp: int, timed: bool) -> list[configs.Primary]:
    """Blocks of at least the tensor cores' 16 × 8. Only a clock can tell what a stage of prefetching is worth."""
    block_n = {8: (8, 16), 16: (16,), 32: (32,), 33: (32, 64)}[cp]
    block_k = (16,) if cin == 16 else (32,) if cin == 32 and itemsize == 2 else (32, 64) if itemsize == 2 else (16, 32)
    stages = (2, 3, 4) if timed else (3,) if itemsize == 2 else (2,)
    return [configs.Primary(*c) for c in itertools.product((64, 128), block_n, block_k, stages)]


def cheap_candidates(itemsize: int, nhwc: bool, dw_size: int, cp: int) -> list[configs.Cheap]:
    """A thread keeps dw_size² weights of each of its channels in registers, so it can't own many elements of a tile.

    What a warp loads fills sectors of 32 bytes: 64 pixels in NCHW; in NHWC, channels, where there are so many.
    """
    threads = 32 * configs.NUM_WARPS
    per_thread = {3: (4, 8, 16), 5: (2, 4), 7: (1, 2)}[dw_size]
    channels = [c for c in (2, 4, 8, 16, 32) if c < 2 * cp and (not nhwc or c * itemsize >= min(32, cp * itemsize))]
    tiles = [configs.Cheap(threads * n // c, c) for n, c in itertools.product(per_thread, channels)]
    return [tile for tile in tiles if (8 if nhwc else 64) <= tile.BLOCK_P <= 256]


def representatives(itemsize: int, nhwc: bool, cin: int, cp: int, dw_size: int = 3) -> list[GhostArgs]:
    """What is measured, and the same with channels that divide well, with channels and with sizes that don't."""
    shapes = [
        (CIN[cin][0], CP[cp][0], SIDE[0]),
        (CIN[cin][0], CP_ALIGNED[cp], SIDE[0]),
        (CIN[cin][1], CP[cp][1], SIDE[0]),
        (CIN[cin][1], CP[cp][1], SIDE[1]),
    ]
    return [
        shape_args(k, 2 * n, side, side, dtype=DTYPES[itemsize], nhwc=nhwc, dw_size=dw_size) for k, n, side in shapes
    ]


def evidence(args: GhostArgs, step: str, choice: backend.Choice, target: str) -> dict[str, Any]:
    return measure(args, target, step == "primary", step == "cheap", choice)


def roomy(row: dict[str, Any]) -> bool:
    """Room for MIN_WARPS warps (registers come in eights, a block's shared memory with 1 KB more)."""
    by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    return min(by_registers, SHARED // (row["shared"] + 1024)) * row["warps"] >= MIN_WARPS


def fit(shapes: list[GhostArgs], step: str, choice: backend.Choice) -> bool:
    """Room for MIN_WARPS warps at the measured shape, and no spill at any."""
    for target in ("sm_80", "sm_90"):
        rows = [evidence(shape, step, choice, target) for shape in shapes]
        if not roomy(rows[0]) or any(row["spill_bytes"] for row in rows):
            return False
    return True


def static_cost(args: GhostArgs, step: str, choice: backend.Choice) -> float:
    """Instructions per output byte."""
    return evidence(args, step, choice, "sm_80")["total"]


def timed_cost(args: GhostArgs, step: str, choice: backend.Choice) -> float:
    """Milliseconds on this GPU."""
    from triton.testing import do_bench

    data: dict[str, Any] = {
        name: torch.rand_like(t, device="cuda") for name in TENSORS if (t := getattr(args, name)) is not None
    }
    args = args._replace(**data)
    out = args.new_output()
    return do_bench(lambda: backend.launch(args, out, out, step == "primary", step == "cheap", choice))


def best(job: tuple[str, str, list[GhostArgs], list], timed: bool) -> tuple[list, float] | None:
    """The cheapest candidate that is fit, and its cost; None if none is fit."""
    step, _, shapes, candidates = job
    other = {"primary": configs.Cheap(64, 8), "cheap": configs.Primary(64, 16, 16, 2)}[step]  # not compiled
    choices: list[Any] = [(c, other) if step == "primary" else (other, c) for c in candidates]
    cost = timed_cost if timed else static_cost
    for value, i in sorted((cost(shapes[0], step, choice), i) for i, choice in enumerate(choices)):
        if fit(shapes, step, choices[i]):
            return list(candidates[i]), value
    return None


def jobs(timed: bool) -> list[tuple[str, str, list[GhostArgs], list]]:
    out: list[tuple[str, str, list[GhostArgs], list]] = []
    for itemsize, nhwc, cp in itertools.product(DTYPES, (False, True), configs.CP_CLASSES):
        for cin in configs.CIN_CLASSES:
            shapes = representatives(itemsize, nhwc, cin, cp)
            key = configs.primary_key(itemsize, nhwc, cin, cp)
            out.append(("primary", key, shapes, primary_candidates(itemsize, cin, cp, timed)))
        for dw_size in configs.DW_CLASSES:
            shapes = representatives(itemsize, nhwc, 16, cp, dw_size)
            key = configs.cheap_key(itemsize, nhwc, dw_size, cp)
            out.append(("cheap", key, shapes, cheap_candidates(itemsize, nhwc, dw_size, cp)))
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.triton_configs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--static", action="store_true", help="by compiled evidence even if there is a GPU")
    parser.add_argument("--jobs", type=positive, default=2, help="processes that compile (default %(default)s)")
    arguments = parser.parse_args(argv)
    timed = torch.cuda.is_available() and not arguments.static
    todo = jobs(timed)
    tables: dict[str, dict[str, list]] = {"primary": {}, "cheap": {}}
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1 if timed else arguments.jobs, mp_context=spawn) as pool:
        for i, (found, job) in enumerate(
            zip(pool.map(functools.partial(best, timed=timed), todo), todo, strict=True), 1
        ):
            if found is None:
                sys.exit(f"{job[0]} {job[1]}: no candidate is fit")
            (step, key, *_), (choice, cost) = job, found
            print(f"{i}/{len(todo)} {step} {key}: {choice} {cost:.3f}", flush=True)
            tables[step][key] = choice
    made = f"on {torch.cuda.get_device_name()}" if timed else "from compiled evidence, with no GPU"
    lines = [f'{{\n"made": {json.dumps(f"by python -m tools.triton_configs {made}")}']
    for step, table in tables.items():
        body = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
        lines.append(f'"{step}": {{\n{body}\n}}')
    configs.PATH.write_text(",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
