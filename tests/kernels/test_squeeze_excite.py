"""The squeeze-and-excite gate on every backend, against the float64 reference. What all ops share is in test_every_op.py."""

import dataclasses

import pytest
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, LAYOUTS

from ghostfused import functional
from ghostfused.testing import SqueezeExciteCase, make


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", strategies.GATES)
def test_every_kernel(backend, gate, dtype, layout):
    common = {"gate": gate, "dtype": dtype, "layout": layout}
    backend.check(SqueezeExciteCase(3, 24, 8, 9, 13, bias=gate == "sigmoid", **common))
    backend.check(SqueezeExciteCase(5, 41, 11, 7, 9, act="silu", bias=False, sliced=True, **common))
    backend.check(SqueezeExciteCase(1, 3, 1, 1, 1, **common))


@pytest.mark.parametrize("act", strategies.GATE_ACTS)
def test_activations(backend, act):
    backend.check(SqueezeExciteCase(height=5, width=6, act=act))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_channels(backend, layout):
    for size in strategies.SIZES:
        backend.check(SqueezeExciteCase(2, 16, 6, *size, layout=layout, dtype=torch.float16))
    for i, channels in enumerate(strategies.CHANNELS):
        backend.check(SqueezeExciteCase(2, channels, max(1, channels // 3), 5, 6, layout=layout, dtype=DTYPES[i % 3]))


def test_matrices_of_any_strides(backend):
    args = make(SqueezeExciteCase(2, 30, 8, 5, 5))
    columns = {name: getattr(args, name).T.contiguous().T for name in ("reduce_weight", "expand_weight")}
    backend.check(args._replace(**columns), name="column-major matrices")


@pytest.mark.parametrize(("channels", "size"), [(72, 28), (120, 28), (480, 14), (672, 7), (960, 7)])
def test_real_layers(backend, channels, size):
    """GhostNet 1.0×'s."""
    case = SqueezeExciteCase(1, channels, channels // 4, size, size)
    with backend.planned_for(132):
        backend.check(case, dataclasses.replace(case, layout="nhwc", dtype=torch.float16))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_images_share_a_program_and_large_maps_have_several(backend, multiprocessors, layout):
    with backend.planned_for(multiprocessors):
        backend.check(SqueezeExciteCase(5, 70, 20, 60, 50, layout=layout))


@given(case=strategies.squeeze_excite(), multiprocessors=st.sampled_from([1, 132]))
def test_any_case(backend, case, multiprocessors):
    with backend.planned_for(multiprocessors):
        backend.check(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduce_weight": torch.randn(2, 5)}, r"reduce_weight: expected shape \(R, C\) = \(2, 4\), got \(2, 5\)"),
        ({"expand_weight": torch.randn(4, 3)}, r"expand_weight: expected shape \(C, R\) = \(4, 2\), got \(4, 3\)"),
        ({"expand_bias": torch.randn(2)}, r"expand_bias: expected shape \(C,\)"),
        ({"gate": "tanh"}, r"gate: expected one of \['sigmoid', 'hardsigmoid', 'relu6'\], got 'tanh'"),
        ({"act": "leaky_relu"}, "act: expected an activation without a slope, got leaky_relu"),
    ],
)
def test_the_function_names_the_bad_argument(change, message):
    good = {"reduce_weight": torch.randn(2, 4), "expand_weight": torch.randn(4, 2)}
    with pytest.raises(ValueError, match=message):
        functional.squeeze_excite(torch.randn(1, 4, 5, 5), **{**good, **change})
