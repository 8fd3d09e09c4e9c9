"""How the Triton kernel cuts a channels_last module into programs and lanes: see ``patches.py`` for what a patch is.

The plan is the one that costs least by the counts below, which are of instructions that a warp issues. Nothing is tuned at
a user's call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

MULTIPROCESSORS = 132
"""An H100's."""
WARPS = 8
"""Warps that a multiprocessor needs to hide the latency of instructions and memory."""
REGISTERS = 110
"""Floats that a lane may keep of a window of x1 and of weights, so that no register spills."""
TAPS = 450
"""Most products of a patch and channel: the code is unrolled."""


class Patches(NamedTuple):
    """A program takes ``rows`` × WIDTH channels of an image, a lane PATCH_H × PATCH_W pixels × VECTOR channels at a time."""

    rows: int
    WIDTH: int
    PATCH_H: int
    PATCH_W: int
    VECTOR: int
    num_warps: int


def patch_shapes(h: int, w: int, dw_size: int, itemsize: int, channels_align: int) -> Iterator[tuple[int, int, int]]:
    """Those (PATCH_H, PATCH_W, VECTOR) that fit the map and the registers."""
    for vector in (1, 2, 4):
        if (
            channels_align % vector
            or vector * itemsize > 16
            or (vector * itemsize < 4 and channels_align % 2 == 0 and dw_size < 7)
        ):
            continue
        for patch_w in range(1, min(w, 8) + 1):
            if vector * (dw_size * dw_size + dw_size * (patch_w + dw_size - 1)) > REGISTERS:
                continue
            for patch_h in range(1, min(h, 14) + 1):
                if patch_h * patch_w * dw_size * dw_size <= TAPS:
                    yield patch_h, patch_w, vector


def cheap_cost(rows: int, w: int, width: int, lanes: int, dw_size: int, patch: tuple[int, int, int]) -> float:
    """Instructions of a warp for x2 of a program."""
    patch_h, patch_w, vector = patch
    per_step = lanes // -(-width // vector)
    if not per_step:
        return float("inf")
    steps = -(-(-(-rows // patch_h) * -(-w // patch_w)) // per_step)
    loads = (patch_h + dw_size - 1) * (patch_w + dw_size - 1)
    return 100 + 3 * vector * dw_size**2 + steps * (
        80 + loads * (1.4 + vector) + patch_h * patch_w * (vector * (dw_size**2 + 2) + 1.2)
    )  # fmt: skip


def primary_cost(pixels: int, cin: int, blocks: tuple[int, int, int], lanes: int, itemsize: int) -> float:
    """Instructions of a warp for x1 of a program."""
    block_m, block_n, block_k = blocks
    steps = -(-cin // block_k)
    vectors = (block_m + block_n) * block_k * itemsize / 16 / lanes
    return -(-pixels // block_m) * (50 + steps * (25 + 6 * vectors) + 6 * block_m * block_n / lanes)


@functools.lru_cache(maxsize=4096)
def plan_patches(
    images: int, h: int, w: int, cin: int, cp: int, align: int, itemsize: int, dw_size: int, blocks: tuple[int, int, int],
    primary: bool,
) -> Patches:  # fmt: skip
    """The cheapest plan for a module, of which ``primary`` says whether the 1×1 conv runs in the same program.

    Args:
        align: divides x1's and the output's channels.
        blocks: BLOCK_M, BLOCK_N and BLOCK_K.
    """
    shapes = list(patch_shapes(h, w, dw_size, itemsize, align))
    channel_blocks = -(-cp // blocks[1])
    width = min(-(-cp // channel_blocks // 8) * 8, cp)
    halo = 2 * (dw_size // 2)
    best, found = float("inf"), None
    for parts in dict.fromkeys(-(-h // rows) for rows in range(1, h + 1)):
        rows = -(-h // parts)
        programs = images * channel_blocks * parts
        waves = -(-programs // MULTIPROCESSORS)
        for warps in (4, 8):
            occupied = max(waves * warps, WARPS)
            first = primary_cost(min(rows + halo, h) * w, cin, blocks, 32 * warps, itemsize) if primary else 0
            for patch in shapes:
                if patch[0] > rows:
                    continue
                cost = occupied * (first + cheap_cost(rows, w, width, 32 * warps, dw_size, patch))
                if cost < best:
                    best, found = cost, Patches(rows, width, *patch, warps)
    if found is None:
        raise AssertionError("a patch of one pixel fits every map")
    return found
