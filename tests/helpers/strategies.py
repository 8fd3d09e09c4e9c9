"""What hypothesis draws cases from: every field of a case at once. A test narrows or widens fields by name."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st

from ghostfused.spec import Act, Gate
from ghostfused.spec.takes import COMMON
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("nchw", "nhwc")
ACTS = [act.name.lower() for act in Act]
GATE_ACTS = [act.name.lower() for act in COMMON.gate_acts]
GATES = [gate.name.lower() for gate in Gate]
SIZES = ((1, 1), (1, 9), (13, 1), (2, 2), (5, 2), (7, 7), (7, 9), (14, 14), (3, 33), (33, 7), (16, 16))
CHANNELS = (1, 2, 4, 5, 12, 20, 33, 36, 72, 130)
NORMS = ("bn", "bias", "bn+bias", "bn_no_affine", "none")


def ghost_modules(cut: st.SearchStrategy | None = None, **fields: st.SearchStrategy) -> st.SearchStrategy[Case]:
    """``cut``: how many output channels fewer than both halves make; those of the first half at most remain."""
    defaults = {
        "batch": st.integers(1, 3),
        "in_channels": st.integers(1, 40),
        "height": st.integers(1, 12),
        "width": st.integers(1, 20),
        "out_channels": st.integers(4, 40),
        "ratio": st.integers(2, 4),
        "dw_size": st.sampled_from([1, 3, 3, 5, 7]),
        "act_primary": st.sampled_from(ACTS),
        "act_cheap": st.sampled_from(ACTS),
        "per_channel_slope": st.booleans(),
        "primary_norm": st.sampled_from(NORMS),
        "cheap_norm": st.sampled_from(NORMS),
        "dtype": st.sampled_from(DTYPES),
        "norm_dtype": st.sampled_from([None, torch.float32]),
        "layout": st.sampled_from(LAYOUTS),
        "sliced": st.booleans(),
        "input_gate": st.booleans(),
        "residual": st.booleans(),
        "output_gate": st.booleans(),
        "seed": st.integers(0, 99),
    }
    return st.builds(_cut, st.builds(Case, **{**defaults, **fields}), st.just(0) if cut is None else cut)


def _cut(case: Case, cut: int) -> Case:
    out_channels = max(case.out_channels, case.ratio)
    init = case.init_channels or -(-out_channels // case.ratio)
    return dataclasses.replace(case, out_channels=max(out_channels - cut, init), init_channels=init)


def depthwise(**fields: st.SearchStrategy) -> st.SearchStrategy[DepthwiseCase]:
    defaults = {
        "batch": st.integers(1, 3),
        "channels": st.integers(1, 24),
        "height": st.integers(1, 13),
        "width": st.integers(1, 19),
        "kernel": st.sampled_from(COMMON.depthwise),
        "stride": st.sampled_from([1, 2]),
        "act": st.sampled_from(ACTS),
        "per_channel_slope": st.booleans(),
        "norm": st.sampled_from(NORMS),
        "dtype": st.sampled_from(DTYPES),
        "norm_dtype": st.sampled_from([None, torch.float32]),
        "layout": st.sampled_from(LAYOUTS),
        "sliced": st.booleans(),
        "seed": st.integers(0, 99),
    }
    return st.builds(DepthwiseCase, **{**defaults, **fields})


def squeeze_excite(**fields: st.SearchStrategy) -> st.SearchStrategy[SqueezeExciteCase]:
    defaults = {
        "batch": st.integers(1, 6),
        "channels": st.integers(1, 150),
        "reduced": st.integers(1, 70),
        "height": st.integers(1, 24),
        "width": st.integers(1, 24),
        "act": st.sampled_from(GATE_ACTS),
        "gate": st.sampled_from(GATES),
        "bias": st.booleans(),
        "dtype": st.sampled_from(DTYPES),
        "layout": st.sampled_from(LAYOUTS),
        "sliced": st.booleans(),
        "seed": st.integers(0, 99),
    }
    return st.builds(SqueezeExciteCase, **{**defaults, **fields})
