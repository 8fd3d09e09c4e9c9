"""The launch planner: a pure function, so it is tested over every real module and batch, with no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cuda_runtime import _C, needs_extension

pytestmark = needs_extension

DEVICES = {  # SMs, shared memory of a block and of an SM
    "A100": (108, 166912, 167936),
    "RTX 3090": (82, 101376, 102400),
    "H100": (132, 232448, 233472),
}
CONFIGS = [
    json.loads(line) for line in (Path(__file__).parents[1] / "data" / "ghost_configs.jsonl").read_text().splitlines()
]
SHAPES = sorted(
    {
        (r["in_channels"], r["out_channels"], r["height"], r["width"], r["dw_size"], r["ratio"])
        for r in CONFIGS
        if r["kernel_size"] == 1 and r["stride"] == 1
    }
)
ELEMENT = {"float16": 2, "bfloat16": 2, "tf32": 4, "float32": 4}


def plan(shape, batch, device="H100", path="float16", channels_last=True, family="general") -> dict:
    cin, cout, height, width, dw_size, ratio = shape
    sm_count, smem_per_block, smem_per_sm = DEVICES[device]
    return _C.plan(
        batch=batch, in_channels=cin, height=height, width=width, init_channels=-(-cout // ratio), out_channels=cout,
        ratio=ratio, dw_size=dw_size, path=path, channels_last=channels_last, family=family,
        sm_count=sm_count, smem_per_block=smem_per_block, smem_per_sm=smem_per_sm,
    )  # fmt: skip


def check_plan(p: dict, shape, batch: int, device: str, path: str) -> None:
    cin, cout, height, width, _, ratio = shape
    init, element = -(-cout // ratio), ELEMENT[path]
    assert p, "nothing fits"
    assert 0 < p["smem_bytes"] <= DEVICES[device][1]
    assert p["threads"] in (128, 256)
    assert 0 < p["grid"] < 2**31
    # tiles cover rows, columns and channels, each once, and none is empty
    for size, tile, tiles in (
        (height, p["tile_h"], p["tiles_h"]),
        (width, p["tile_w"], p["tiles_w"]),
        (init, p["block_c"], p["channel_blocks"]),
    ):
        assert (tiles - 1) * tile < size <= tiles * tile
    assert p["grid"] == batch * p["tiles_h"] * p["tiles_w"] * p["channel_blocks"]
    assert p["block_c"] % 8 == 0
    assert p["block_c"] <= 32 * p["warps_n"]
    assert p["block_k"] * element % 32 == 0
    assert p["k_chunks"] * p["block_k"] >= cin
    assert 2 <= p["stages"] <= 4
    assert 1 <= p["strip_h"] <= p["tile_h"]
    image = height * width
    assert p["recompute"] >= 1
    assert p["dram_write"] == batch * cout * image * element
    assert p["dram_read"] >= batch * cin * image * element
    assert p["l2_read"] >= batch * cin * image * element


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("path", ["float16", "float32"])
def test_every_module_and_batch(device, channels_last, path):
    for shape in SHAPES:
        for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            check_plan(plan(shape, batch, device, path, channels_last), shape, batch, device, path)


@pytest.mark.parametrize("device", DEVICES)
def test_extremes(device):
    for shape in [
        (4, 8, 1, 1, 3, 2),
        (2048, 4096, 1, 1, 3, 2),
        (2048, 4096, 7, 7, 7, 2),
        (2048, 8, 512, 512, 7, 2),
        (4, 4096, 3, 10_000, 5, 2),
        (5, 33, 4096, 1, 3, 3),
        (64, 256, 1024, 1024, 3, 4),
    ]:
        for batch in (1, 70_000):
            for path in ELEMENT:
                for channels_last in (True, False):
                    p = plan(shape, batch, device, path, channels_last)
                    if p or batch == 1:  # 2^31 blocks are refused, not truncated
                        check_plan(p, shape, batch, device, path)


def test_ghostnet_at_batch_64_meets_the_traffic_goal():
    """fp16 channels_last on an H100: x once and the output once, within a tenth, and all SMs at work."""
    modules = [
        (r["in_channels"], r["out_channels"], r["height"], r["width"], 3, 2)
        for r in CONFIGS
        if r["source"] == "timm/ghostnet_100@224"
    ]
    assert len(modules) > 20
    for shape in modules:
        p = plan(shape, 64)
        floor = 64 * (shape[0] + shape[1]) * shape[2] * shape[3] * 2
        assert (p["dram_read"] + p["dram_write"]) <= 1.10 * floor, shape
        assert p["grid"] >= 0.9 * 132, shape
        assert p["x_vector_bytes"] == 16, shape


def tiles(size: int, tile: int, pad: int, align: int) -> list[set[int]]:
    """The rows (or columns) of the image that each tile computes x1 for, one by one."""
    out = []
    for start in range(0, size, tile):
        needed = {i for i in range(start - pad, min(start + tile, size) + pad) if 0 <= i < size}
        vectors = {i // align for i in needed}
        out.append({i for v in vectors for i in range(v * align, (v + 1) * align) if i < size})
    return out


def traffic(shape, p: dict, batch: int) -> dict:
    """Bytes from the tiles' sets of pixels: everything that the blocks load, and what of it leaves DRAM."""
    cin, cout, h, w, dw_size, ratio = shape
    init = -(-cout // ratio)
    rows, cols = tiles(h, p["tile_h"], dw_size // 2, 1), tiles(w, p["tile_w"], dw_size // 2, p["col_align"])
    pixels = [len(r) * len(c) for r in rows for c in cols]
    blocks_c = -(-init // p["block_c"])
    grid = batch * len(pixels) * blocks_c
    block_m = p["threads"] // 32 // p["warps_n"] * 32
    passes = 1 if p["weights_resident"] else -(-max(pixels) // block_m)
    x, x_loads, out = batch * cin * h * w * 2, batch * sum(pixels) * blocks_c * cin * 2, batch * cout * h * w * 2
    near = blocks_c * len(cols) + p["blocks_per_sm"] * 132  # blocks between two that share pixels, and those at work
    kept = near >= grid or (x + out) // grid * near <= 20 * 2**20
    return {
        "dram_read": (x if kept else x_loads) + 2 * init * (cin + (ratio - 1) * dw_size**2),
        "dram_write": out,
        "l2_read": x_loads + grid * passes * p["block_c"] * cin * 2,
        "grid": grid,
        "recompute": pytest.approx(sum(pixels) / (h * w)),
    }


@pytest.mark.parametrize("channels_last", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("batch", [1, 64, 256])
def test_bytes_of_a_plan_are_those_of_its_tiles(batch, channels_last):
    for shape in SHAPES:
        p = plan(shape, batch, channels_last=channels_last)
        expected = traffic(shape, p, batch)
        assert {name: p[name] for name in expected} == expected, shape


def test_no_ghosts_plan():
    """No halo, no depthwise weights, and in channels_last nothing staged: an ordinary 1×1 conv."""
    shape = {"batch": 64, "in_channels": 40, "height": 28, "width": 28, "init_channels": 40}
    for channels_last in (True, False):
        common = {**shape, "channels_last": channels_last, "family": "general"}
        conv = _C.plan(**common, out_channels=40, dw_size=5)
        module = _C.plan(**common, out_channels=80, dw_size=5)
        assert conv == _C.plan(**common, out_channels=40, dw_size=1, ratio=4)
        assert conv["recompute"] == 1 < module["recompute"] or module["tiles_h"] == module["tiles_w"] == 1
        assert conv["dram_write"] * 2 == module["dram_write"]
        assert conv["dram_read"] == (64 * 40 * 28 * 28 + 40 * 40) * 2
        assert conv["smem_bytes"] < module["smem_bytes"]


@pytest.mark.parametrize("device", DEVICES)
def test_no_ghosts_in_channels_last(device):
    """No x1 in shared memory; whole maps or rows, each channel and pixel in a block."""
    sm_count, smem_per_block, smem_per_sm = DEVICES[device]
    for cin, cout, height, width in (
        (16, 24, 56, 56),
        (112, 160, 7, 7),
        (1280, 1000, 8, 8),
        (8, 4, 16, 2),
        (64, 64, 1, 32),
    ):
        for batch in (1, 7, 64):
            p = _C.plan(
                batch=batch, in_channels=cin, height=height, width=width, init_channels=cout, out_channels=cout,
                sm_count=sm_count, smem_per_block=smem_per_block, smem_per_sm=smem_per_sm,
            )  # fmt: skip
            assert p["family"] == "nhwc"
            assert p["grid"] == -(-batch // p["images"]) * p["tiles_h"] * p["channel_blocks"]
            for size, piece, count in ((height, p["tile_h"], p["tiles_h"]), (cout, p["block_c"], p["channel_blocks"])):
                assert (count - 1) * piece < size <= count * piece
            assert p["images"] == 1 or p["tile_h"] == height
            assert p["recompute"] == pytest.approx(p["tiles_h"] * p["tile_h"] / height)  # no halo
            assert p["dram_read"] == (batch * cin * height * width + cin * cout) * 2
            channels = p["warps_n"] * 32
            assert p["smem_bytes"] == channels * (p["k_blocks"] * 64 + 12)


def test_vectors():
    """The widest that alignment allows."""
    assert plan((20, 40, 28, 28, 3, 2), 1)["x_vector_bytes"] == 8
    assert plan((5, 10, 28, 28, 3, 2), 1)["x_vector_bytes"] == 2
    assert plan((16, 24, 56, 56, 3, 2), 64)["out_vector_bytes"] == 16  # whole rows, though x2 starts at 24 bytes
    assert plan((16, 32, 7, 7, 3, 2), 64, channels_last=False)["x_vector_bytes"] == 2
    assert plan((16, 32, 28, 28, 3, 2), 64, channels_last=False)["x_vector_bytes"] in (8, 16)


def test_bad_queries():
    with pytest.raises(ValueError, match="path"):
        plan((16, 32, 7, 7, 3, 2), 1, path="float8")
    with pytest.raises(ValueError, match="positive"):
        plan((16, 32, 0, 7, 3, 2), 1)


def check_channels_last(p: dict, shape, batch: int, device: str) -> None:
    """Of the channels_last kernel's plan."""
    cin, cout, height, width, dw_size, _ = shape
    init, pad = -(-cout // 2), dw_size // 2
    assert 0 < p["smem_bytes"] <= DEVICES[device][1]
    assert 0 < p["grid"] < 2**31
    assert p["threads"] in (64, 128, 256)
    assert p["threads"] <= (128 if p["warp_tiles"] == 3 else 256)
    assert p["threads"] // 32 % p["warps_n"] == 0
    assert p["k_blocks"] * 32 >= cin > (p["k_blocks"] - 1) * 32
    # the last of each may overlap the one before, but none lies wholly in another
    for size, piece, count in (
        (height, p["tile_h"], p["tiles_h"]),
        (init, p["block_c"], p["channel_blocks"]),
        (p["tile_h"], p["strip_h"], p["strips"]),
        (width, 4, p["column_groups"]),
    ):
        assert piece <= size
        assert (count - 1) * piece < size <= count * piece
    assert p["images"] <= batch
    assert p["images"] == 1 or p["tile_h"] == height
    assert p["grid"] == -(-batch // p["images"]) * p["tiles_h"] * p["channel_blocks"]
    assert p["images"] * p["tile_h"] * width >= 32
    assert p["block_c"] % 4 == 0
    assert (p["warps_n"] - 1) * p["warp_tiles"] * 16 < p["block_c"] <= p["warps_n"] * p["warp_tiles"] * 16
    assert p["pitch"] % 16 == 8
    assert p["pitch"] >= 2 * p["block_c"]
    rows = pad + p["images"] * (p["tile_h"] + pad)
    assert p["smem_bytes"] >= rows * (width + 2 * pad) * p["pitch"]
    assert p["recompute"] >= 1


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last_kernel(device):
    """Every real module that it is made for, and odd sizes."""
    taken = 0
    odd = [(8, 8, 8, 4, 3, 2), (2048, 4096, 7, 7, 5, 2), (24, 120, 1000, 5, 3, 2), (16, 16, 9, 1500, 3, 2)]
    for shape in [*SHAPES, *odd]:
        cin, cout, height, width, dw_size, ratio = shape
        made_for = ratio == 2 and dw_size in (3, 5) and cin % 8 == cout % 8 == 0 and width >= 4 and height * width >= 32
        for batch in (1, 7, 64, 1000):
            p = plan(shape, batch, device, family="nhwc")
            if p:
                check_channels_last(p, shape, batch, device)
            assert made_for or not p
            assert p or not made_for or width > 512 or height < 8, shape
        taken += bool(p)
    assert taken > 60


def test_ghostnet_has_a_kernel_for_each_layout():
    for row in CONFIGS:
        if row["source"] == "timm/ghostnet_100@224" and row["kernel_size"] == 1 and row["stride"] == 1:
            shape = tuple(row[k] for k in ("in_channels", "out_channels", "height", "width", "dw_size", "ratio"))
            for path in ("float16", "bfloat16", "tf32", "float32"):
                for channels_last in (True, False):
                    own = "nhwc" if channels_last else "nchw"
                    chosen = plan(shape, 64, path=path, channels_last=channels_last, family="")["family"]
                    assert chosen == own, (shape, path, channels_last)
            assert plan(shape, 64, family="")["grid"] >= 0.9 * 132
