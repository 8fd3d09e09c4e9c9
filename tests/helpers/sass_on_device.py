"""The machine code of each family of kernels on the simulator's device, small: the results are right and no accesses to
shared memory race. test_sass.py runs this file in a process that has the device."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, make
from tools.sass import device, judge

pytestmark = pytest.mark.skipif(
    not device.is_active(), reason="needs the stand-in device: test_sass.py runs this file on it"
)

FORWARD = {"in_channels": 16, "out_channels": 24, "height": 7, "width": 10, "dw_size": 3, "ratio": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "3x3": {},
    "5x5, odd sizes, silu": {"in_channels": 12, "out_channels": 23, "dw_size": 5, "width": 9, "act_primary": "silu"},
    "ratio 3": {"ratio": 3, "width": 7},
}


def config(changes: dict[str, Any]) -> dict[str, Any]:
    rest = {"kernel_size": 1, "stride": 1, "act_primary": "relu", "act_cheap": "none", "count": 1}
    return FORWARD | rest | changes


def options(**given: Any) -> argparse.Namespace:
    rest = {"mode": "forward", "backend": "cuda", "latency": False, "general": False}
    return argparse.Namespace(**{"batch": 1, "dtype": "float16", "layout": "nhwc"} | rest | given)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "tf32"])  # bfloat16's differ by an instruction of conversion
def test_forward_has_no_races(dtype, layout):
    """And the results are right: ``races`` lists what isn't."""
    for changes in FAMILIES.values() if dtype in ("float16", "float32") else [FAMILIES["5x5, odd sizes, silu"]]:
        assert judge.races(config(changes), options(dtype=dtype, layout=layout)) == []


ALL_INPUTS = {"input_gate": True, "residual": True, "output_gate": True}
OPS = {
    "optional inputs": Case(1, 16, 9, 14, 24, dtype=torch.float16, layout="nhwc", **ALL_INPUTS),
    "1x1 conv": Case(1, 16, 9, 14, 24, init_channels=24, dtype=torch.float16),
    "1x1 conv of whole vectors": Case(
        2, 40, 9, 14, 24, init_channels=24, dtype=torch.float16, layout="nhwc", residual=True, input_gate=True
    ),
    **{
        f"3x3 in NCHW, {width} columns, {'tf32' if tf32 else 'fp32'}": Case(
            1, cin, height, width, 24, act_primary="none", allow_tf32=tf32
        )
        for cin, height, width in ((24, 9, 24), (48, 14, 14), (64, 7, 7))
        for tf32 in (True, False)
    },
    "3x3 primary conv": Case(1, 6, 16, 24, 24, kernel_size=3, stride=2, dtype=torch.float16),
    "3x3 primary conv, weights by parts": Case(1, 300, 6, 16, 24, kernel_size=3, stride=2, dtype=torch.float16),
    "depthwise": DepthwiseCase(1, kernel=(5, 5), dtype=torch.float16, layout="nhwc"),
    "depthwise of stride 1": DepthwiseCase(1, stride=1),
    "squeeze-excite": SqueezeExciteCase(2, dtype=torch.float16, layout="nhwc"),
    "squeeze-excite of images together": SqueezeExciteCase(3, 136, 40, 5, 7, dtype=torch.float16, layout="nhwc"),
    "squeeze-excite of planes": SqueezeExciteCase(2),
}


@pytest.mark.parametrize("name", OPS)
def test_other_ops_have_no_races(name):
    args = make(OPS[name])
    assert judge.races_of(args, name) == []


@pytest.mark.parametrize(("dtype", "layout"), [("float16", "nhwc"), ("float32", "nchw")])
def test_training_has_no_races(dtype, layout):
    small = config({"height": 5, "width": 7, "in_channels": 16, "out_channels": 24})
    assert judge.races(small, options(dtype=dtype, layout=layout, mode="training")) == []


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_costs(mode):
    """A batch of which the blocks of one image run."""
    row = judge.judge_config(config({"height": 14, "width": 14}), options(batch=4, mode=mode))
    assert row.ok
    assert row.images_checked == 1
    assert 0 < row.issue_mean_us <= row.issue_us
    assert len(row.launches) == (1 if mode == "forward" else 6)


def test_latency():
    """Of the kernel of the layout and, by its weights' address, of the general one; without the option there is none."""
    own, general = (judge.judge_config(config({}), options(latency=True, general=general)) for general in (False, True))
    assert own.ok
    assert general.ok
    assert own.launches[0]["kernel"].startswith("nhwc_forward")
    assert general.launches[0]["kernel"].startswith("ghost_forward")
    assert 0 < own.issue_us < own.latency_us < general.latency_us
    assert judge.totals([own])["latency_us"] == own.latency_us
    assert judge.judge_config(config({}), options()).latency_us is None


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_triton(layout):
    """What Triton compiles for sm_90, whose products are wgmma's."""
    row = judge.judge_config(
        config({"in_channels": 32, "height": 14}), options(batch=2, backend="triton", layout=layout)
    )
    assert row.ok
    assert row.images_checked == 1
