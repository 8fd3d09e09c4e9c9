"""Norms whose variance or eps lies at the ends of float32, or beyond, on every backend: what the float64 reference makes of them."""

import itertools
import math

import pytest
import torch
from kernel_backends import on
from strategies import LAYOUTS

from ghostfused import functional
from ghostfused.backends import BACKENDS
from ghostfused.spec import Act, Args, GhostArgs
from ghostfused.testing import Case, DepthwiseCase, judge, make

FLOAT32 = torch.finfo(torch.float32)
EXTREMES = [  # variance and eps
    (math.inf, 1e-5), (FLOAT32.max, 1e-5), (FLOAT32.max, FLOAT32.max), (1.0, 1e300), (1.0, FLOAT32.max), (1.0, 0.0),
    (0.0, FLOAT32.tiny), (FLOAT32.tiny, FLOAT32.tiny), (FLOAT32.tiny, 0.0), (1e-41, FLOAT32.tiny), (1e-41, 0.0), (0.0, 1e-41),
]  # fmt: skip
PATHS = {"float32": {}, "float16": {"dtype": torch.float16, "norm_dtype": torch.float32}}
ALL = on(*BACKENDS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered"
)  # by NumPy, which interprets Triton


def with_norm(args: Args, half: str, var: float, eps: float) -> Args:
    """``args`` with this variance in two of the channels of a norm, and this eps in all."""
    own = getattr(args, f"{half}var").clone()
    own[1:3] = var
    return args._replace(**{f"{half}var": own, f"{half}eps": eps})


def check(backend, args: Args) -> None:
    """By the kernels, or where they refuse it by what the functions take in their place."""
    if BACKENDS[backend.name].supports(backend.there(args)):
        assert "triton" in backend.name
        verdict = judge(functional.run(args, "reference"), args)
    else:
        verdict = judge(backend.run(args), args)
    assert verdict.ok, verdict


@ALL
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("var", "eps"), EXTREMES)
def test_ghost_module(backend, var, eps, path):
    for layout, half in itertools.product(LAYOUTS, ("primary_", "cheap_")):
        check(backend, with_norm(make(Case(1, 8, 5, 6, 16, layout=layout, **PATHS[path])), half, var, eps))


@ALL
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("var", "eps"), EXTREMES)
def test_depthwise(backend, var, eps, path):
    for layout in LAYOUTS:
        check(backend, with_norm(make(DepthwiseCase(1, 8, 6, 6, layout=layout, **PATHS[path])), "", var, eps))


@on("triton", "triton_two_kernel")
def test_triton_refuses_an_eps_out_of_its_range_and_nothing_else(backend):
    """Its reciprocal square root takes a denormal for 0; a variance of infinity, which only the device knows, is right."""
    for args in (make(Case()), make(DepthwiseCase())):
        half = "primary_" if isinstance(args, GhostArgs) else ""
        for eps in (0.0, 1e-41, 1e300):
            reason = BACKENDS[backend.name].supports(backend.there(args._replace(**{f"{half}eps": eps})))
            assert reason.startswith(f"{half}eps {eps} "), reason
        for eps in (FLOAT32.tiny, 1e-5, FLOAT32.max):
            there = backend.there(
                args._replace(**{f"{half}eps": eps, f"{half}var": getattr(args, f"{half}var") * math.inf})
            )
            assert BACKENDS[backend.name].supports(there) is None


@on("cpu", "triton", "triton_two_kernel")  # PyTorch's own norms, and CUDA's kernels, make infinity of the sum
@pytest.mark.parametrize(("var", "eps"), [(3e38, 3e38), (1.0, FLOAT32.max), (FLOAT32.max, 1e38)])
def test_a_variance_and_an_eps_whose_sum_is_beyond_float32(backend, var, eps):
    """Of maps that are as large, which come out as numbers near 1."""
    for make_case in (Case(1, 8, 5, 6, 16, act_primary="none"), DepthwiseCase(1, 8, 6, 6)):
        args = make(make_case)
        halves = ("primary_", "cheap_") if isinstance(args, GhostArgs) else ("",)
        for half in halves:
            args = with_norm(args, half, var, eps)
        args.x.mul_(1e19)
        assert judge(backend.run(args), args).error < 1e-6


@ALL
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("slope", [FLOAT32.max, 1e300, -1e300, math.inf, 1e-320])
def test_slope_of_leaky_relu(backend, slope, path):
    """Rounded to float32, beyond which it is infinite."""
    in_float32 = float(torch.tensor(slope, dtype=torch.float64).float())
    for make_case in (
        Case(1, 8, 5, 6, 16, act_primary="none", **PATHS[path]),
        DepthwiseCase(1, 8, 6, 6, **PATHS[path]),
    ):
        args = make(make_case)
        half = "cheap_" if isinstance(args, GhostArgs) else ""
        given, expected = (
            {f"{half}act": Act.LEAKY_RELU, f"{half}negative_slope": each} for each in (slope, in_float32)
        )
        verdict = judge(backend.run(args._replace(**given)), args._replace(**expected))
        assert verdict.ok, verdict
