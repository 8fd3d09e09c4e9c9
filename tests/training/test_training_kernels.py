"""A training step of a Ghost module on every backend, against float64 autograd. What only CUDA's and Triton's kernels are asked
is in test_cuda_training.py and test_triton_training.py."""

import dataclasses

import pytest
import strategies
import strides
import torch
import training_runtime
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kernel_backends import on
from strategies import ACTS, DTYPES, LAYOUTS
from training_runtime import ALL_INPUTS, NORMS, check_args, kernels, make, run

from ghostfused import FusedGhostModule, ops
from ghostfused.backends import training_step
from ghostfused.backends.training_step import KERNELS
from ghostfused.numerics import relative_error
from ghostfused.spec import TENSORS, memory_format
from ghostfused.testing import Case, make_args
from ghostfused.testing.judge_training import wanted

SMOOTH = ["none", "silu", "gelu", "gelu_tanh", "mish"]
STEP = Case(2, 20, 9, 11, 39, act_primary="silu", act_cheap="none", **ALL_INPUTS)
with_kernels = on("cuda", "triton")


@pytest.fixture
def check(backend):
    return lambda case, batch_statistics=True: training_runtime.check(backend, case, batch_statistics)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_layouts(check, dtype, layout, batch_statistics):
    check(
        Case(dtype=dtype, layout=layout, height=7, width=9, out_channels=16, act_primary="silu", act_cheap="none"),
        batch_statistics,
    )


@pytest.mark.parametrize("act", ACTS)
def test_activations(backend, check, act):
    acts = {"act_primary": act, "act_cheap": ACTS[ACTS.index(act) - 1]}
    for layout in backend.alternate(LAYOUTS, ACTS.index(act)):
        check(Case(**acts, layout=layout, per_channel_slope=layout == "nchw", height=5, width=6), layout == "nchw")


@pytest.mark.parametrize("primary", [*NORMS, "bias", "none"])
def test_norms(check, primary):
    for cheap in ("bias", "none"):
        check(Case(primary_norm=primary, cheap_norm=cheap, height=5, width=6, layout="nhwc", act_cheap="prelu"), False)
    if primary in NORMS:
        check(Case(primary_norm=primary, cheap_norm=NORMS[NORMS.index(primary) - 1], height=5, width=6))


@pytest.mark.parametrize("dw_size", [1, 3, 5, 7])
def test_dw_sizes(check, dw_size):
    check(
        Case(dw_size=dw_size, batch=1, height=9, width=8, out_channels=8, layout=LAYOUTS[dw_size // 2 % 2]), dw_size > 1
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ratio", "out_channels"), [(2, 15), (3, 13), (5, 8)])
def test_ratio_and_cut_channels(check, ratio, out_channels, layout):
    check(
        Case(ratio=ratio, out_channels=out_channels, layout=layout, height=5, width=7), layout == "nhwc" or ratio == 3
    )


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_all_ghosts_cut_but_one_or_none(check, batch_statistics):
    for out_channels, output_gate in ((9, False), (9, True), (10, False)):
        case = Case(init_channels=9, out_channels=out_channels, height=5, width=7, output_gate=output_gate)
        check(case, batch_statistics)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [*({name: True} for name in ALL_INPUTS), ALL_INPUTS], ids=str)
def test_optional_inputs(check, options, layout):
    for batch_statistics in (False, True) if len(options) == 3 else (layout == "nchw",):
        check(Case(layout=layout, height=7, width=5, out_channels=13, ratio=3, **options), batch_statistics)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 2), (2, 1), (1, 40), (12, 13)], ids=str)
def test_sizes(check, size, layout):
    check(Case(batch=4, height=size[0], width=size[1], layout=layout, out_channels=8, in_channels=5))


@pytest.mark.parametrize("channels", [1, 5, 33, 70])
def test_odd_channels(check, channels):
    smooth = {"act_primary": "silu", "act_cheap": "none"}
    check(Case(in_channels=channels, out_channels=10, height=5, width=4, layout="nhwc", **smooth))
    check(Case(in_channels=9, out_channels=min(channels * 2, 40), height=4, width=5))
    check(Case(in_channels=channels, out_channels=max(channels - 2, 3), height=4, width=5, layout="nhwc"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [2, 3])
def test_one_primary_channel(check, ratio, layout):
    """A map of one channel lies the same in both layouts, and says nothing of the others'."""
    for batch_statistics in (False, True):
        acts = {"act_primary": "silu", "act_cheap": "none"}
        check(Case(out_channels=ratio, ratio=ratio, height=7, width=9, layout=layout, **acts), batch_statistics)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_sliced_input(check, batch_statistics, layout):
    check(Case(sliced=True, layout=layout, height=6, width=7), batch_statistics)


def test_grad_output_of_any_strides(backend):
    a = make_args(Case(height=5, width=6))
    for grad in (torch.ones(()).expand(a.output_shape()), torch.randn(2, 6, 5, 24).permute(0, 3, 2, 1)):
        check_args(backend, a, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("programs", [1, 3, 10**6])
def test_any_number_of_rows(backend, check, programs, layout):
    """One program walks through several images, or each through a part of one; and many rows are combined."""
    with backend.planned_for(programs):
        check(Case(batch=3, height=9, width=15, in_channels=4, out_channels=8, layout=layout))


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_empty_batch(backend, batch_statistics):
    a = make_args(Case(batch=1, out_channels=23, **ALL_INPUTS))
    cut = {name: getattr(a, name)[:0] for name in ("x", "input_gate", "residual", "output_gate")}
    a = a._replace(**cut)
    results = run(backend, a, torch.empty(a.output_shape()), batch_statistics)
    for name in TENSORS:
        if name in results and name not in cut:
            assert torch.equal(results[name], torch.zeros_like(getattr(a, name)))


def test_deterministic(backend):
    a = make_args(Case(height=9, width=8, out_channels=8, dtype=torch.float16, layout="nhwc", **ALL_INPUTS))
    grad = torch.randn(a.output_shape()).half()
    with backend.planned_for(16):
        first, second = (run(backend, a, grad, True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_gradient(backend, layout):
    """A contiguous gradient that starts in the middle of a vector."""
    a, grad = make(Case(1, 8, 4, 8, 16, layout=layout))
    first, second = (run(backend, a, g, True) for g in (grad, strides.shifted(grad)))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_parameters(backend, layout):
    a, grad = make(Case(2, 12, 5, 6, 24, primary_norm="bn+bias", input_gate=True, output_gate=True, layout=layout))
    for batch in (False, True):
        plain, other = (
            run(backend, x, grad, batch) for x in (a, strides.changed(a, strides.with_gaps, "x", "output_gate"))
        )
        for name, result in plain.items():
            torch.testing.assert_close(other[name].view_as(result), result, rtol=1e-5, atol=1e-5)


@on("reference", "cuda")  # in the interpreter it takes minutes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_channels_and_images(backend, layout):
    with backend.planned_for(132):
        training_runtime.check(backend, Case(1, 4, 3, 5, 280, layout=layout))
        training_runtime.check(backend, Case(300, 3, 1, 2, 6, layout=layout))


NEEDED = ["x", "residual", "cheap_beta", "cheap_weight", "primary_weight", "output_gate", "primary_slope x"]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("asked", NEEDED)
def test_only_what_is_asked_for(backend, asked, batch_statistics):
    """The same gradients as when all are asked for, and none besides."""
    a, grad = make(Case(2, 8, 5, 6, 15, act_primary="prelu", per_channel_slope=True, **ALL_INPUTS))

    def gradients(needs: list[bool]) -> dict[str, torch.Tensor]:
        results = training_step.backward(kernels(backend), grad, a, batch_statistics, "", needs)
        return dict(zip([name for name, need in zip(TENSORS, needs, strict=True) if need], results, strict=True))

    every = gradients([t is not None for t in a.tensors])
    results = gradients([name in asked.split() for name in TENSORS])
    assert set(results) == set(asked.split())
    assert all(torch.equal(result, every[name]) for name, result in results.items())


def test_forward_is_three_kernels(backend):
    calls: list[str] = []
    own = kernels(backend)
    steps = [name for name in own._fields if name != "layout"]
    spied = {name: lambda *args, name=name: calls.append(name) or getattr(own, name)(*args) for name in steps}
    training_step.train_forward(own._replace(**spied), make_args(STEP), "")
    assert calls == ["primary_statistics", "cheap_statistics", "normalize"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_statistics", [False, True])
def test_opcheck(backend, batch_statistics, layout):
    if not backend.has_torch:
        pytest.skip("needs PyTorch's own CUDA kernels")
    case = Case(layout=layout, sliced=True, height=5, width=6, out_channels=7, act_cheap="prelu", **ALL_INPUTS)
    a = backend.there(make_args(case))
    if batch_statistics:
        fields = (*(getattr(a, n) for n in ops.TRAIN_FIELDS), "")
        torch.library.opcheck(ops.training_op("train_forward", backend.name), fields)
    needs = [
        n or (name == "residual" and backend.name == "reference") for name, n in zip(TENSORS, wanted(a), strict=True)
    ]
    arguments = torch.randn(a.output_shape(), device=backend.device), *a, batch_statistics, "", needs
    torch.library.opcheck(ops.training_op("backward", backend.name), arguments)


@pytest.mark.parametrize("training_mode", [False, True])
def test_a_module_trains(backend, training_mode):
    if not backend.has_torch:
        pytest.skip("needs PyTorch's own CUDA kernels")
    m = FusedGhostModule(6, 9, backend=backend.name).to(backend.device).train(training_mode)
    x = torch.randn(2, 6, 5, 6, device=backend.device, requires_grad=True)
    m(x).square().sum().backward()
    ours = [p.grad for p in (x, *m.parameters())]
    m.zero_grad(), setattr(x, "grad", None)
    m._run_children(x, None, None, None).square().sum().backward()
    for grad, p in zip(ours, (x, *m.parameters()), strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-4)


@with_kernels
def test_what_the_kernels_refuse_trains_on_the_reference(backend):
    assert training_step.choose(backend.name, backend.there(make_args(Case(kernel_size=3)))) == "reference"
    assert training_step.choose(backend.name, backend.there(make_args(Case()))) == backend.name


@given(
    case=strategies.ghost_modules(
        in_channels=st.integers(1, 20),
        height=st.integers(2, 8),
        width=st.integers(2, 9),
        out_channels=st.integers(4, 20),
        dw_size=st.sampled_from([3, 3, 5]),
        primary_norm=st.sampled_from(NORMS),
        cheap_norm=st.sampled_from(NORMS),
    ),
    batch_statistics=st.booleans(),
)
@settings(max_examples=16, phases=[Phase.generate])  # shrinking takes minutes in the interpreter
def test_any_module(backend, case, batch_statistics):
    if case.dtype.itemsize == 2:  # no kinks: see testing_training
        smooth = {f"act_{half}": SMOOTH[getattr(case, f"act_{half}") != "none"] for half in ("primary", "cheap")}
        case = dataclasses.replace(case, **smooth)
    if not batch_statistics:  # PyTorch's batch_norm wants one dtype for the norm tensors and stored statistics
        case = dataclasses.replace(case, norm_dtype=None)
    training_runtime.check(backend, case, batch_statistics)


STEPS = {
    "mixed": Case(height=7, width=9, out_channels=15, act_primary="prelu", act_cheap="hardswish", **ALL_INPUTS),
    "ratio": Case(height=5, width=8, out_channels=21, ratio=3, dw_size=5, act_primary="relu6", act_cheap="silu"),
    "vectors": Case(1, height=5, width=8, out_channels=16, act_primary="leaky_relu", act_cheap="relu", dw_size=7),
}


@with_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", STEPS.values(), ids=list(STEPS))
def test_every_step(backend, case, layout):
    """Each kernel on the same arguments as the reference's, in float32: they differ by a few roundings only."""
    a, grad = make(dataclasses.replace(case, layout=layout))
    own, ground = kernels(backend), KERNELS["reference"]

    def dense(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous(memory_format=memory_format(a.x))

    out = a.new_output().fill_(float("nan"))
    expected = ground.primary_statistics(a, out)
    assert_close(own.primary_statistics(a, mine := a.new_output()), expected)
    assert_close(mine[:, : a.init_channels], out[:, : a.init_channels])
    y1, grad = dense(out[:, : a.init_channels]), dense(grad)
    mine = out.clone()
    expected = ground.cheap_statistics(a, out)
    assert_close(own.cheap_statistics(a, mine), expected)
    assert_close(mine, out)
    own.normalize(a, mine := out.clone())
    ground.normalize(a, out)
    assert_close(mine, out)
    for batch in (False, True):
        product = None if a.output_gate is None else (torch.empty_like(grad), torch.empty_like(grad))
        results, expected = (
            k.cheap_backward(a, grad, y1, batch, True, product and product[i]) for i, k in enumerate((own, ground))
        )
        assert_close(results, expected)
        if product:
            assert_close(*product)
        dz2, y2, sums = (t if t is None or t.dim() == 2 else dense(t) for t in expected)
        means = sums[:2] / grad[:, 0].numel() if batch else None
        for asked in ((True, True, True), (True, False, False), (False, False, True)):
            results, expected = (k.primary_backward(a, grad, y1, dz2, y2, means, batch, *asked) for k in (own, ground))
            assert_close(results, expected)
        if batch:
            dz1, sums, _ = ground.primary_backward(a, grad, y1, dz2, y2, means, True, True, True, True)
            means = sums[:2] / grad[:, 0].numel()
            own.normalize_backward(a, mine := dense(dz1.clone()), y1, means)
            ground.normalize_backward(a, dz1, y1, means)
            assert_close(mine, dz1)


def assert_close(got, expected) -> None:
    if isinstance(expected, tuple):
        for pair in zip(got, expected, strict=True):
            assert_close(*pair)
    elif expected is None:
        assert got is None
    else:
        assert relative_error(got, expected.double()) < 1e-5


@on("cuda", "triton", "reference")
def test_ops_refuse_what_does_not_fit_by_name(backend):
    """Before a kernel sees it: sizes, of which either of two may be blamed, dtypes, acts, and the gradient."""
    a, grad = make(Case(1, 4, 5, 6, 8, act_primary="prelu", act_cheap="prelu", **ALL_INPUTS))
    needs_grad = [t is not None for t in a.tensors]
    longer = {
        name: torch.ones(*t.shape[:-1], t.shape[-1] + 2) for name in TENSORS if (t := getattr(a, name)) is not None
    }
    wrong = {
        "residual": a.residual.double(), "primary_act": 77, "cheap_act": -1, "cheap_eps": -1e-5, "stride": 0,
        "out_channels": 9, "output_gate": torch.ones(1, 7, 2, 2),  # a gate may be of any height and width
    }  # fmt: skip
    for name, value in (longer | wrong).items():
        there = backend.there(a._replace(**{name: value}))
        with pytest.raises(RuntimeError, match=r"^\w+: expected"):
            ops.training_op("backward", backend.name)(grad.to(backend.device), *there, False, "", needs_grad)
        if name not in ops.STATISTICS:
            fields = [getattr(there, field) for field in ops.TRAIN_FIELDS]
            with pytest.raises(RuntimeError, match=r"^\w+: expected"):
                ops.training_op("train_forward", backend.name)(*fields, "")
    there = backend.there(a)
    for changed, needs, blamed in (
        (grad[:, 1:], needs_grad, "grad_output"), (grad.double(), needs_grad, "grad_output"),
        (grad, needs_grad[1:], "needs_grad"), (grad, [True] * len(needs_grad), "needs_grad"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"^{blamed}: "):
            ops.training_op("backward", backend.name)(changed.to(backend.device), *there, False, "", needs)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")  # by NumPy, which interprets Triton
@pytest.mark.parametrize("half", ["primary", "cheap"])
@pytest.mark.parametrize(("var", "eps"), [(torch.inf, 1e-5), (3.4e38, 1e-5), (0.0, 1e-20), (1.2e-38, 1.2e-38)])
def test_stored_variances_at_the_ends_of_float32(backend, var, eps, half):
    """Of infinity the norm's scale is 0, as PyTorch's, and so are the gradients that go through it."""
    a = make_args(Case(1, 8, 5, 6, 16, act_primary="none", act_cheap="none"))
    own = getattr(a, f"{half}_var").clone()
    own[1:3] = var
    a = a._replace(**{f"{half}_var": own, f"{half}_eps": eps})
    check_args(backend, a, torch.randn(a.output_shape()), batch_statistics=False)
