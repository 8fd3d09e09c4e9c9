"""What the warps of one block issue: rounds of each loop of csrc/ × the machine code of one round.

For the fp16 kernels with an unrolled 3×3 depthwise conv, which are those of GhostNet. See the header of static_cuda.py for
what is exact and what is not. The functions follow csrc/cuda/ghost: load.cuh, primary.cuh, cheap.cuh, store.cuh.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable
from typing import Any

from .sass_flow import Flow, Instruction, Loop

Cost = Any  # a Counter of floats: see Instruction.costs


def times(cost: Cost, n: float) -> Cost:
    return collections.Counter({kind: value * n for kind, value in cost.items()})


class Pieces:
    """One fp16 3×3 kernel's machine code, cut where the source has its loops.

    Raises:
        ValueError: the code doesn't have the loops of the source (the compiler unrolled or split one).
    """

    def __init__(self, code: list[Instruction], nhwc: bool, x_bytes: int, w_bytes: int, out_bytes: int) -> None:

        def cold(block: list[Instruction]) -> bool:  # Hardswish's 1/6, SiLU, the input gate
            return any("0.1666" in i.operands or i.opcode == "MUFU.EX2" or i.name == "HMUL2" for i in block)

        flow = self.flow = Flow(code, cold)
        loops = flow.loops
        inner = [loop for loop in loops if not any(other.inside(loop) for other in loops)]

        def one(what: str, found: Iterable[Loop], n: int = 1) -> list[Loop]:
            found = list(found)
            if len(found) != n:
                raise ValueError(f"{what}: {len(found)} loops, expected {n}")
            return found

        (self.k,) = one("1×1 conv", (p for p in inner if p.has("HMMA")))
        (pipe,) = one("pipeline", (p for p in loops if self.k.inside(p)))
        if self.k.counts["HMMA"] != 16 // 2 or self.k.counts["LDSM"] != 4:
            raise ValueError("1×1 conv: expected 8 HMMA and 4 LDSM a step")
        in_pipe = [p for p in inner if p.inside(pipe) and p != self.k]
        affines = one("parameters", (p for p in in_pipe if p.has("MUFU")), 2)
        wide = one("cp.async", (p for p in in_pipe if p.has("LDGSTS.128")), 2)
        narrow = one("2-byte copies", (p for p in in_pipe if p.counts["STS.16"] == 4), 2)
        self.load_x = narrow[0] if x_bytes == 2 else wide[0]
        self.load_w = narrow[1] if w_bytes == 2 else wide[1]
        (self.rows,) = one("depthwise", (p for p in inner if p.counts["FFMA"] == 9 * 4 and p not in affines))
        (strips,) = one("strips", sorted((p for p in loops if self.rows.inside(p)), key=lambda p: p.latch)[:1])
        kind = {2: "STG.16", 4: "STG.32", 8: "STG.64", 16: "STG.128"}[out_bytes]
        (self.store,) = one("store", (p for p in inner if p.has(kind)))
        self.transpose = None
        if not nhwc:
            after = [p for p in inner if p.counts["STS.16"] == 4 and not p.inside(pipe) and p.counts["FFMA"] == 0]
            (self.transpose,) = one("transpose", after)

        self.affine = [flow.body(p) for p in affines]
        self.k_step = flow.body(self.k)
        copies = flow.with_any("LDGSTS")
        self.x_vector, self.w_vector = (
            times(flow.body(p), 1 / 4) if p in narrow else flow.body(p, copies - flow.with_any(f"LDGSTS.{8 * width}"))
            for p, width in ((self.load_x, x_bytes), (self.load_w, w_bytes))
        )
        self.store_vector = flow.body(self.store, flow.with_any("LDG"))  # no residual, no gate
        self.row = flow.short_body(self.rows)
        self.emit = flow.body(self.rows) - self.row
        self.strip = flow.between(strips.head, self.rows.head) + flow.cost(flow.block_of(strips.head))
        bar = next(i.address for i in code if i.name == "BAR" and pipe.head <= i.address <= pipe.latch)
        fill = flow.between(bar, self.load_x.head) + flow.cost(flow.block_of(bar))
        to_w = flow.between(self.load_x.latch, self.load_w.head)
        to_k = flow.between(self.load_w.latch, self.k.head)
        chunk_end = flow.between(self.k.latch, pipe.latch) + flow.cost(flow.block_of(pipe.latch))
        self.epilogue = flow.longest(self.k.latch, pipe.latch) - flow.cost(flow.block_of(self.k.latch)) - chunk_end
        way = [affines[0].head] + ([] if self.transpose is None else [self.transpose.head])
        entry = flow.between(code[0].address, way[0]) + flow.cost(code[0].address)
        entry += flow.between(affines[0].latch, affines[1].head) + flow.between(affines[1].latch, bar)
        end = next(i.address for i in code if i.name == "EXIT" and i.address > self.store.latch)
        if self.transpose is None:
            entry += flow.between(pipe.latch, strips.head)
        else:
            entry += flow.between(pipe.latch, self.transpose.head) + flow.between(self.transpose.latch, self.store.head)
            entry += flow.between(self.store.latch, strips.head)
            self.transposed = flow.body(self.transpose)
        self.chunk = fill + to_w + to_k + chunk_end
        self.once = entry + flow.between(strips.latch, self.store.head) + flow.between(self.store.latch, end)


def conflicts(lane_addresses: Iterable[int], width: int) -> float:
    """Clocks per access over those without bank conflicts; ``lane_addresses`` in bytes, of up to 32 lanes."""
    addresses, lanes = list(lane_addresses), 128 // max(width, 4)
    clocks = 0
    for first in range(0, len(addresses), lanes):
        banks: dict[int, set[int]] = collections.defaultdict(set)
        for a in addresses[first : first + lanes]:
            for word in range(a // 4, (a + max(width, 4)) // 4):
                banks[word % 32].add(word)
        clocks += max(map(len, banks.values()))
    return clocks / math.ceil(len(addresses) / lanes)


def spans(size: int, tile: int, pad: int, align: int) -> collections.Counter[tuple[int, int]]:
    """(output, with halo) lengths of the tiles along one dimension, and how many tiles have them."""
    found: collections.Counter[tuple[int, int]] = collections.Counter()
    for start in range(0, size, tile):
        end = min(start + tile, size)
        first = max(start - pad, 0) // align * align
        found[end - start, min(math.ceil((end + pad) / align) * align, size) - first] += 1
    return found


def odd_pitch(size: int) -> int:
    return (math.ceil(size / 16) | 1) * 16


def shares(threads: int, vectors: int, positions: int, nhwc: bool) -> list[list[list[int]]]:
    """ThreadShare of cheap.cuh, by warp and lane: the positions that each thread visits."""
    step, out = threads // vectors, []
    for thread in range(threads):
        v, first = (thread % vectors, thread // vectors) if nhwc else (thread // step, thread % step)
        out.append(list(range(first, positions, step)) if v < vectors and first < step else [])
    return [out[w : w + 32] for w in range(0, threads, 32)]


def block_cost(pieces: Pieces, m: dict[str, Any], p: dict[str, Any], nhwc: bool, tile: tuple, channels: int) -> Cost:
    """What the warps of one fp16 block issue. ``tile``: (rows, halo rows), (columns, halo columns)."""
    (rows, halo_rows), (cols, halo_cols) = tile
    threads, block_c, pixels, pad = p["threads"], p["block_c"], halo_rows * halo_cols, m["dw_size"] // 2
    warps, element = threads // 32, 2
    x_count, w_count = p["x_vector_bytes"] // element, p["weight_vector_bytes"] // element
    block_m = warps // p["warps_n"] * 32
    starts = range(0, pixels, block_m)
    cost: Cost = collections.Counter()

    def add(stage: str, piece: Cost, n: float) -> None:
        cost.update(times(piece, n))
        cost.update({f"issue {stage}": piece["issue"] * n})

    add("straight", pieces.once, warps)
    add("parameters", pieces.affine[0], math.ceil(block_c / 32))
    add("parameters", pieces.affine[1], math.ceil(block_c * 9 / 32))

    x_rounds = w_rounds = 0
    for m0 in starts:
        here = min(block_m, pixels - m0)
        vectors = here * p["block_k"] // x_count if nhwc else p["block_k"] * math.ceil(here / x_count)
        x_rounds += p["k_chunks"] * math.ceil(vectors / 32)
        if not (p["weights_resident"] and m0):
            w_rounds += p["k_chunks"] * math.ceil(block_c * p["block_k"] / w_count / 32)
    add("load x", pieces.x_vector, x_rounds)
    add("load weights", pieces.w_vector, w_rounds)
    add("straight", pieces.chunk, warps * len(starts) * p["k_chunks"])

    groups = block_c // 8
    per_warp = math.ceil(groups / p["warps_n"])
    steps = p["k_chunks"] * p["block_k"] * element // 32
    for warp_n in range(p["warps_n"]):
        n = max(0, min(per_warp, groups - warp_n * per_warp))
        busy = sum(math.ceil(min(block_m, pixels - m0) / 32) for m0 in starts) if n else 0
        unused = collections.Counter(issue=8 - 2 * n, tensor=8 - 2 * n, shared=4 * (2 - math.ceil(n / 2)))
        add("multiply", pieces.k_step - unused, busy * steps)
        add("epilogue", pieces.epilogue, busy * n / 4)

    vectors, strips = math.ceil(channels / 4), math.ceil(rows / p["strip_h"])
    pitch = odd_pitch(block_c * element)
    for w, warp in enumerate(shares(threads, vectors, strips * cols, nhwc)):
        for i in range(max(map(len, warp))):
            at = [(32 * w + lane, s[i]) for lane, s in enumerate(warp) if i < len(s)]
            height = max(min(p["strip_h"], rows - pos // cols * p["strip_h"]) for _, pos in at)
            add("depthwise", pieces.strip, 1)
            add("depthwise", pieces.row, height + 2 * pad)
            add("depthwise", pieces.emit, height)
            read = [
                (pos // cols * p["strip_h"] * halo_cols + pos % cols) * pitch
                + (thread % vectors if nhwc else thread // (threads // vectors)) * 4 * element
                for thread, pos in at
            ]
            cost.update(shared=(conflicts(read, 8) - 1) * 2 * 3 * (height + 2 * pad))
    if not nhwc:
        for warp in shares(threads, vectors, rows * cols, False):
            rounds = max(map(len, warp))
            add("store", pieces.transposed, rounds)
            if rounds:
                read = [(s[0] // cols * halo_cols + s[0] % cols) * pitch for s in warp if s]
                cost.update(shared=(conflicts(read, 8) - 1) * 2 * rounds)
    add("store", pieces.store_vector, math.ceil(2 * channels * rows * cols * element / p["out_vector_bytes"] / 32))
    return cost
