"""Writes the table of block sizes, ghostfused/backends/triton_configs.json: ``python -m bench.regenerate_configs``.

For each shape class it takes the candidate that is best on one representative shape of the class: on a GPU the fastest,
elsewhere, by compiled evidence for sm_80, the one that issues the fewest instructions per output byte. In both cases it
must spill no register on sm_80 and sm_90 and leave room for ``MIN_WARPS`` warps on a multiprocessor, for channel counts
that divide well and badly.
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
from ghostfused.backends import triton_configs as configs
from ghostfused.spec import GhostArgs

from .static_triton import measure, shape_args

MIN_WARPS = 12
REGISTERS, SHARED = 65536, 99 * 1024
"""Of a multiprocessor: registers, and the shared memory of sm_86 and sm_89, the smallest among our targets."""
CIN = {16: 16, 32: 24, 64: 48, 65: 160}
CP = {8: (8, 7), 16: (12, 16, 13), 32: (20, 32, 29), 33: (60, 64, 61)}
SIDE = {64: 7, 65: 56}
"""Representatives of each shape class. The first Cp is measured; for all of them a kernel must be fit."""
DTYPES = {2: torch.float16, 4: torch.float32}


def primary_candidates(itemsize: int, cin: int, cp: int, pixels: int, timed: bool) -> list[configs.Primary]:
    """Blocks of at least the tensor cores' 16 × 8. Only a clock can tell what a stage of prefetching is worth."""
    block_m = (64,) if pixels == 64 else (64, 128)
    block_n = {8: (8, 16), 16: (16,), 32: (32,), 33: (32, 64)}[cp]
    block_k = (min(cin, 64),) if itemsize == 2 else (16,) if cin == 16 else (16, 32)
    stages = (2, 3, 4) if timed else (3,) if itemsize == 2 else (2,)
    return [configs.Primary(*c) for c in itertools.product(block_m, block_n, block_k, stages)]


def cheap_candidates(itemsize: int, nhwc: bool, dw_size: int, cp: int, pixels: int) -> list[configs.Cheap]:
    """In NHWC a pixel's row of channels should fill a sector of 32 bytes, where there are so many."""
    block_c = [c for c in (4, 8, 16, 32) if c < 2 * cp and (not nhwc or c * itemsize >= min(32, cp * itemsize))]
    block_p = (32, 64) if pixels == 64 else (64, 128)
    hoist = (True,) if dw_size == 1 else (True, False) if dw_size < 7 else (False,)
    return [configs.Cheap(*c) for c in itertools.product(block_p, block_c, hoist)]


def representatives(itemsize: int, nhwc: bool, cin: int, cp: int, pixels: int, dw_size: int = 3) -> list[GhostArgs]:
    side = SIDE[pixels]
    return [shape_args(CIN[cin], 2 * n, side, side, dtype=DTYPES[itemsize], nhwc=nhwc, dw_size=dw_size) for n in CP[cp]]


def overrides(args: GhostArgs, primary: configs.Primary | None, cheap: configs.Cheap | None) -> dict[str, Any]:
    """The launch constants that the candidate of one step stands for."""
    pixels = args.x.shape[2] * args.x.shape[3]
    if primary is not None:
        step, block_n = primary.BLOCK_M, primary.BLOCK_N
        out: dict[str, Any] = primary._asdict() | {"ONE_K": args.x.shape[1] <= primary.BLOCK_K}
    else:
        assert cheap is not None
        step, block_n = cheap.BLOCK_P, cheap.BLOCK_C
        out = cheap._asdict() | {"BLOCK_N": block_n}
    units = args.x.shape[0] * -(-args.init_channels // block_n)
    return out | {"run": configs.run_length(pixels, 0, units, step)}


def evidence(
    args: GhostArgs, primary: configs.Primary | None, cheap: configs.Cheap | None, target: str
) -> dict[str, Any]:
    return measure(args, target, primary is not None, cheap is not None, **overrides(args, primary, cheap))


def fit(row: dict[str, Any]) -> bool:
    """No spill, and room for MIN_WARPS warps (registers come in eights, a block's shared memory with 1 KB more)."""
    by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    blocks = min(by_registers, SHARED // (row["shared"] + 1024))
    return row["spill_bytes"] == 0 and blocks * row["warps"] >= MIN_WARPS


def static_cost(args: GhostArgs, primary: configs.Primary | None, cheap: configs.Cheap | None) -> float:
    """Instructions per output byte."""
    return evidence(args, primary, cheap, "sm_80")["total"]


def timed_cost(args: GhostArgs, primary: configs.Primary | None, cheap: configs.Cheap | None) -> float:
    """Milliseconds on this GPU."""
    from triton.testing import do_bench

    args = args._replace(
        **{k: torch.rand_like(t, device="cuda") for k, t in args._asdict().items() if isinstance(t, torch.Tensor)}
    )
    out = args.new_output()
    return do_bench(
        lambda: backend.launch(
            args, out, out, primary is not None, cheap is not None, **overrides(args, primary, cheap)
        )
    )


def best(job: tuple[str, str, list[GhostArgs], list], timed: bool) -> tuple[str, str, list, float] | None:
    """The cheapest candidate that is fit; None if none is."""
    step, key, shapes, candidates = job
    pairs = [(c, None) if step == "primary" else (None, c) for c in candidates]
    cost = timed_cost if timed else static_cost
    for value, i in sorted((cost(shapes[0], *pair), i) for i, pair in enumerate(pairs)):
        if all(fit(evidence(args, *pairs[i], target)) for target in ("sm_80", "sm_90") for args in shapes):
            return step, key, list(candidates[i]), value
    return None


def jobs(timed: bool) -> list[tuple[str, str, list[GhostArgs], list]]:
    out: list[tuple[str, str, list[GhostArgs], list]] = []
    for itemsize, nhwc, cp, pixels in itertools.product(
        DTYPES, (False, True), configs.CP_CLASSES, configs.PIXEL_CLASSES
    ):
        for cin in configs.CIN_CLASSES:
            shapes = representatives(itemsize, nhwc, cin, cp, pixels)
            key = configs.primary_key(itemsize, nhwc, cin, cp, pixels)
            out.append(("primary", key, shapes, primary_candidates(itemsize, cin, cp, pixels, timed)))
        for dw_size in (1, 3, 5, 7):
            shapes = representatives(itemsize, nhwc, 16, cp, pixels, dw_size)
            key = configs.cheap_key(itemsize, nhwc, dw_size, cp, pixels)
            out.append(("cheap", key, shapes, cheap_candidates(itemsize, nhwc, dw_size, cp, pixels)))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--static", action="store_true", help="by compiled evidence even if there is a GPU")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (default %(default)s)")
    arguments = parser.parse_args()
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
            step, key, choice, cost = found
            print(f"{i}/{len(todo)} {step} {key}: {choice} {cost:.3f}", flush=True)
            tables[step][key] = choice
    lines = [f'{{\n"made": {json.dumps(f"by python -m bench.regenerate_configs {made}")}']
    for step, table in tables.items():
        body = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in table.items())
        lines.append(f'"{step}": {{\n{body}\n}}')
    configs.PATH.write_text(",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
