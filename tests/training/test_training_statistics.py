"""The batch statistics that every backend's training kernels make, where sums in float32 would lose digits, or make a number of none."""

import dataclasses

import pytest
import torch
from kernel_backends import Backend
from strategies import LAYOUTS
from training_runtime import kernels, run

from ghostfused import ops
from ghostfused.backends import reference
from ghostfused.numerics import relative_error
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, convert, make_args


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("programs", [1, 4, 132])
def test_statistics_do_not_cancel(backend, programs, layout):
    """Where the mean is a thousand standard deviations, E[y²] - E[y]² in float32 would leave no digit."""
    with backend.planned_for(programs):
        case = Case(batch=3, in_channels=8, out_channels=12, height=17, width=13, act_primary="none", act_cheap="none")
        a = make_args(dataclasses.replace(case, layout=layout))
        a = a._replace(x=a.x / 1000 + 1, primary_weight=a.primary_weight.abs() + 0.1)
        mean, var = primary_statistics(backend, a)
        y1 = torch.nn.functional.conv2d(a.x.double(), a.primary_weight.double())
        exact_var, exact_mean = torch.var_mean(y1, (0, 2, 3), correction=0)
        assert (exact_mean.abs() / exact_var.sqrt()).min() > 300
        assert relative_error(mean, exact_mean) < 1e-6
        # y1 itself, rounded to float32, has a variance that differs by about 2⁻²⁴ · mean/std
        assert relative_error(var, exact_var) < 1e-4
        out = run(backend, a, torch.ones(a.output_shape()), True)["out"]
        exact = reference.ghost_module(convert(a, torch.float64), True)
        assert relative_error(out, exact) <= 2 * relative_error(reference.ghost_module(a, True), exact)


def primary_statistics(backend: Backend, a: GhostArgs) -> tuple[torch.Tensor, torch.Tensor]:
    a = a._replace(**dict.fromkeys(ops.STATISTICS))
    return kernels(backend).primary_statistics(a, a.new_output())


def same_maps(dtype: torch.dtype, layout: str) -> GhostArgs:
    """A step whose maps y1 and y2 are x itself."""
    case = Case(1, 8, 20, 8, 16, dw_size=1, act_primary="none", primary_norm="bn_no_affine", dtype=dtype, layout=layout)
    a = make_args(case)._replace(primary_mean=torch.zeros(8), primary_var=torch.ones(8), primary_eps=0.0)
    return a._replace(
        primary_weight=torch.eye(8, dtype=dtype).view(8, 8, 1, 1), cheap_weight=torch.ones(8, 1, 1, 1, dtype=dtype)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("programs", [1, 132])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_statistics_beside_a_corner_that_lies_far_off(backend, dtype, programs, layout):
    """As in a padded map of one color: squares about the first pixels' mean would leave two digits less."""
    a, own = same_maps(dtype, layout), kernels(backend)
    a.x[:, :, 0, :4] = 100
    out = a.new_output()
    with backend.planned_for(programs):
        for name in ("primary", "cheap"):
            mean, var = getattr(own, f"{name}_statistics")(a, out)
            exact_var, exact_mean = torch.var_mean(a.x.double(), (0, 2, 3), correction=0)
            assert ((mean - exact_mean).abs() / exact_var.sqrt()).max() < 5e-7, name
            assert relative_error(var, exact_var) < 1.5e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_of_what_is_not_finite(backend, value, layout):
    """The variance is NaN, as PyTorch's is, and no other channel's."""
    a, own = same_maps(torch.float32, layout), kernels(backend)
    out = a.new_output()
    own.primary_statistics(a, out)
    out[0, 3, 2, 2] = value
    mean, var = own.cheap_statistics(a, out)
    assert [t.isfinite().nonzero().flatten().tolist() for t in (mean, var)] == [[0, 1, 2, 4, 5, 6, 7]] * 2
    assert var[3].isnan()


def test_statistics_of_a_constant_are_exact(backend):
    a = make_args(Case(height=8, width=9))
    a = a._replace(x=torch.full_like(a.x, 3.0), primary_weight=torch.full_like(a.primary_weight, 7.0))
    mean, var = primary_statistics(backend, a)
    assert torch.equal(mean, torch.full((12,), 16 * 21.0))
    assert torch.equal(var, torch.zeros(12))
