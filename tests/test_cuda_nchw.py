"""The NCHW kernel: every form of it against the float64 reference, and what it leaves to the general kernel."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_runtime import _C, check, needs_cuda, needs_extension

from ghostfused.testing import Case

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
each_path = pytest.mark.parametrize("path", HALVES)

# (Cin, H, W, Cp): each map, few and many channels of a warp, a half k16 step, rows and channels that are cut off
MAPS = {
    "wide8": [(16, 16, 112, 8), (24, 15, 56, 20), (8, 3, 16, 3), (40, 9, 24, 36)],
    "wide4": [(72, 17, 28, 20), (16, 9, 20, 60), (8, 1, 12, 5), (24, 8, 8, 33)],
    "fourteen": [(48, 14, 14, 20), (24, 14, 14, 46), (8, 14, 14, 2), (112, 14, 14, 56)],
    "seven": [(16, 7, 7, 8), (160, 7, 7, 40), (96, 7, 7, 120), (320, 7, 7, 80)],
}


def case(sizes: tuple[int, int, int, int], batch: int = 1, cut: int = 0, **more) -> Case:
    cin, height, width, init = sizes
    return Case(batch, cin, height, width, 2 * init - cut, init_channels=init, **more)


def plan(sizes: tuple[int, int, int, int], cut: int = 0, **more) -> dict:
    cin, height, width, init = sizes
    return _C.plan(batch=1, in_channels=cin, height=height, width=width, init_channels=init,
                   out_channels=2 * init - cut, channels_last=False, **more)  # fmt: skip


@needs_extension
def test_which_modules_it_takes():
    for name, sizes in MAPS.items():
        for one, path, dw_size in itertools.product(sizes, HALVES, (3, 5)):
            found = plan(one, path=path, dw_size=dw_size)
            assert (found["family"], found["map"]) == ("nchw", name), one
    # a width without vectors, channels that aren't whole vectors, fp32, another size or ratio, small shared memory
    for one in [(16, 9, 15, 8), (16, 10, 10, 8), (12, 8, 16, 8), (8, 7, 7, 8), (16, 7, 7, 4), (16, 14, 14, 5)]:
        assert plan(one)["family"] == "general", one
    whole = (16, 16, 16, 16)
    for more in [{"path": "float32"}, {"dw_size": 7}, {"ratio": 3}]:
        assert plan(whole, **more)["family"] == "general", more
    assert plan((960, 7, 7, 80), smem_per_block=65536)["family"] == "general"  # x alone takes more


@needs_extension
@pytest.mark.parametrize("smem", [101376, 166912, 232448])
def test_plans_fit_the_device(smem):
    for one, input_gate in itertools.product(itertools.chain(*MAPS.values()), (False, True)):
        found = plan(one, smem_per_block=smem, smem_per_sm=smem + 1024, input_gate=input_gate)
        assert found["family"] == "nchw"
        assert found["smem_bytes"] <= smem
        assert found["block_c"] * found["channel_blocks"] >= one[3]
        assert found["tile_h"] * found["tiles_h"] >= one[1]


@pytest.mark.cuda
@needs_cuda
@each_path
@pytest.mark.parametrize("name", MAPS)
def test_maps(name, path):
    for one in MAPS[name]:
        check(case(one, dtype=HALVES[path]))
    check(case(MAPS[name][1], batch=2, cut=8 if name == "seven" else 2, act_cheap="none", dtype=HALVES[path]))
