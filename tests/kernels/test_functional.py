"""The function, its op, Function and errors, on the reference and with the plain PyTorch ops under it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ghostfused import Act, BatchNorm, functional, ghost_module
from ghostfused.backends import reference
from ghostfused.numerics import relative_error
from ghostfused.ops.autograd import call
from ghostfused.spec import TENSORS, DepthwiseArgs, Gate, GhostArgs, SqueezeExciteArgs
from ghostfused.testing import Case, convert, judge, make_args

NORMS = ["bn", "bias", "bn+bias", "bn_no_affine", "none"]
ACTS = [act.name.lower() for act in Act]


def by_modules(args: GhostArgs) -> torch.Tensor:
    """The same Ghost module built from torch.nn modules: a second opinion on the reference."""

    def half(prefix: str, **conv_args) -> nn.Sequential:
        get = lambda name: getattr(args, f"{prefix}_{name}")  # noqa: E731
        weight = get("weight")
        conv = nn.Conv2d(
            weight.shape[1] * conv_args["groups"],
            weight.shape[0],
            weight.shape[2],
            bias=get("bias") is not None,
            **conv_args,
        )
        conv.weight.data = weight
        if get("bias") is not None:
            conv.bias.data = get("bias")
        layers: list[nn.Module] = [conv]
        if get("mean") is not None:
            bn = nn.BatchNorm2d(weight.shape[0], eps=get("eps"), affine=get("gamma") is not None)
            bn.running_mean, bn.running_var = get("mean"), get("var")
            if get("gamma") is not None:
                bn.weight.data, bn.bias.data = get("gamma"), get("beta")
            layers.append(bn)
        act = Act(get("act"))
        if act == Act.PRELU:
            layers.append(nn.PReLU(get("slope").numel()))
            layers[-1].weight.data = get("slope")
        else:
            layers.append(
                {
                    Act.NONE: nn.Identity(),
                    Act.RELU: nn.ReLU(),
                    Act.RELU6: nn.ReLU6(),
                    Act.SILU: nn.SiLU(),
                    Act.HARDSWISH: nn.Hardswish(),
                    Act.LEAKY_RELU: nn.LeakyReLU(get("negative_slope")),
                    Act.GELU: nn.GELU(),
                    Act.GELU_TANH: nn.GELU("tanh"),
                    Act.MISH: nn.Mish(),
                }[act]
            )
        return nn.Sequential(*layers).to(args.x.dtype).eval()

    padding = args.dilation * (args.kernel_size - 1) // 2
    primary = half("primary", stride=args.stride, padding=padding, dilation=args.dilation, groups=args.groups)
    cheap = half("cheap", padding=args.dw_size // 2, groups=args.init_channels)
    with torch.no_grad():
        x = args.x if args.input_gate is None else torch.einsum("nchw,nc->nchw", args.x, args.input_gate)
        x1 = primary(x)
        out = torch.cat([x1, cheap(x1)], 1)[:, : args.out_channels]
        if args.output_gate is not None:
            out = out * nn.Upsample(out.shape[2:])(args.output_gate)
        return out if args.residual is None else out + args.residual


@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        in_channels=st.sampled_from([4, 8, 12]),
        height=st.integers(1, 12),
        width=st.integers(1, 12),
        out_channels=st.sampled_from([12, 20, 24]),
        ratio=st.integers(2, 4),
        dw_size=st.sampled_from([1, 3, 5, 7]),
        kernel_size=st.sampled_from([1, 3, 5]),
        stride=st.integers(1, 2),
        dilation=st.integers(1, 2),
        groups=st.sampled_from([1, 1, 1]),
        act_primary=st.sampled_from(ACTS),
        act_cheap=st.sampled_from(ACTS),
        per_channel_slope=st.booleans(),
        primary_norm=st.sampled_from(NORMS),
        cheap_norm=st.sampled_from(NORMS),
        dtype=st.just(torch.float64),
        layout=st.sampled_from(["nchw", "nhwc"]),
        sliced=st.booleans(),
        input_gate=st.booleans(),
        residual=st.booleans(),
        output_gate=st.booleans(),
        seed=st.integers(0, 99),
    )
)
def test_reference_equals_torch_modules(case):
    args = make_args(case)
    out = functional.run(args)
    torch.testing.assert_close(out, by_modules(args), rtol=1e-12, atol=1e-12)
    assert out.shape == args.output_shape()
    assert out.is_contiguous(memory_format=torch.channels_last if case.layout == "nhwc" else torch.contiguous_format)


def test_grouped_primary_conv():
    args = make_args(Case(in_channels=12, out_channels=16, groups=4, dtype=torch.float64))
    torch.testing.assert_close(functional.run(args), by_modules(args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reference_in_low_precision_meets_its_own_limit(dtype):
    args = make_args(Case(dtype=dtype))
    assert judge(reference.ghost_module(args), args).ok


def test_judge_catches_a_wrong_result():
    args = make_args(Case())
    out = reference.ghost_module(args)
    for wrong in (out * (1 + 1e-5), out.roll(1, 2), torch.full_like(out, float("nan"))):
        assert not judge(wrong, args).ok


def grad_args(**settings) -> tuple[GhostArgs, list[torch.Tensor]]:
    """Arguments in float64 with a gradient asked for on every tensor but the statistics; and those tensors."""
    args = make_args(Case(dtype=torch.float64, height=5, width=4, in_channels=3, out_channels=7, ratio=3, **settings))
    leaves = [
        t.requires_grad_()
        for name in TENSORS
        if (t := getattr(args, name)) is not None and not name.endswith(("mean", "var"))
    ]
    return args, leaves


ALL_OPTIONS = {"input_gate": True, "residual": True, "output_gate": True, "primary_norm": "bn+bias"}


@pytest.mark.parametrize(
    "acts", [("silu", "hardswish"), ("prelu", "gelu"), ("leaky_relu", "none"), ("gelu_tanh", "mish")]
)
def test_function_gradcheck(acts):
    args, leaves = grad_args(act_primary=acts[0], act_cheap=acts[1], **ALL_OPTIONS)
    assert torch.autograd.gradcheck(lambda *_: call("reference", args), leaves)


def test_function_gives_the_reference_gradients_and_only_those_asked_for():
    args, leaves = grad_args(**ALL_OPTIONS)
    frozen = leaves.pop(1).requires_grad_(False)
    out = call("reference", args)
    assert type(out.grad_fn).__name__ == "GhostFunctionBackward"
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(reference.ghost_module(args), leaves, grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert frozen.grad is None


def test_no_function_without_gradients():
    args, _ = grad_args()
    with torch.no_grad():
        assert call("reference", args).grad_fn is None
    with torch.inference_mode():
        assert call("reference", args).is_inference()


def test_compile_and_export():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.args = make_args(Case(act_primary="silu"))
            self.weight = nn.Parameter(self.args.primary_weight.clone())

        def forward(self, x, through_op=False):
            args = self.args._replace(x=x, primary_weight=self.weight)
            return call("reference", args) if through_op else functional.run(args)

    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for through_op in (False, True):
        for shape in ((2, 16, 14, 14), (3, 16, 9, 11)):
            x = torch.randn(shape)
            expected = net(x)
            out = compiled(x, through_op)
            assert relative_error(out, expected.double()) < 1e-6
            (grad,) = torch.autograd.grad(out.square().sum(), net.weight)
            (expected_grad,) = torch.autograd.grad(expected.square().sum(), net.weight)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4)
    x = torch.randn(2, 16, 14, 14)
    program = torch.export.export(net, (x, True), strict=False)
    torch.testing.assert_close(program.module()(x, True), net(x))


def test_autocast_matches_eager_autocast():
    args = make_args(Case())
    with torch.autocast("cpu", torch.bfloat16):
        out = ghost_module(
            args.x,
            args.primary_weight,
            args.cheap_weight,
            primary_bn=BatchNorm(args.primary_mean, args.primary_var, args.primary_gamma, args.primary_beta),
        )
    assert out.dtype == torch.bfloat16


def simple(**changes):
    tensors = {
        "x": torch.randn(2, 6, 5, 5),
        "primary_weight": torch.randn(4, 6, 1, 1),
        "cheap_weight": torch.randn(4, 1, 3, 3),
    }
    return ghost_module(**{**tensors, **changes})


def test_empty_batch_nan_and_inference_mode():
    assert simple(x=torch.randn(0, 6, 5, 5)).shape == (0, 8, 5, 5)
    x = torch.randn(2, 6, 5, 5)
    x[1, 0, 2, 2] = float("nan")
    out = simple(x=x, act_primary="none", act_cheap="relu6")
    assert out[0].isfinite().all()
    assert out[1, :4, 2, 2].isnan().all()
    assert out[1, 4:, 1:4, 1:4].isnan().all()
    with torch.inference_mode():
        simple(primary_weight=torch.randn(4, 6, 1, 1, requires_grad=True))


@pytest.mark.parametrize("residual", [False, True])
def test_conv1x1_is_a_ghost_module_without_ghosts(residual):
    conv, bn = nn.Conv2d(6, 10, 1), nn.BatchNorm2d(10)
    bn(torch.randn(4, 10, 5, 5) * 2 + 1)
    bn.eval()
    x, gate = torch.randn(2, 6, 9, 11), torch.rand(2, 6)
    rest = torch.randn(2, 10, 9, 11) if residual else None
    norm = BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    expected = nn.functional.relu(bn(conv(x * gate[:, :, None, None])))
    for backend in ("auto", "reference"):
        out = functional.conv1x1(
            x, conv.weight, bias=conv.bias, bn=norm, act=Act.RELU, input_gate=gate, residual=rest, backend=backend
        )
        torch.testing.assert_close(out, expected if rest is None else expected + rest)


BN4 = BatchNorm(torch.zeros(4), torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.randn(6, 5, 5)}, ValueError, r"x: expected 4 dimensions, got 3"),
        ({"x": torch.randn(2, 5, 5, 5)}, ValueError, r"x: expected 6 channels, for primary_weight \(4, 6, 1, 1\) and groups = 1, got 5 \("),
        ({"x": torch.randn(2, 6, 0, 5)}, ValueError, r"x: expected height and width of at least 1"),
        ({"x": torch.ones(2, 6, 5, 5, dtype=torch.int64)}, TypeError, r"x: expected float32.*got torch.int64"),
        ({"x": torch.randn(2, 6, 5, 5).half()}, TypeError, r"primary_weight: expected x's dtype torch.float16, got torch.float32"),
        ({"x": torch.randn(2, 6, 5, 5, device="meta")}, ValueError, r"primary_weight: expected x's device meta, got cpu"),
        ({"x": [1.0]}, TypeError, r"x: expected a Tensor, got list"),
        ({"primary_weight": torch.randn(4, 6)}, ValueError, r"primary_weight: expected 4 dimensions, got 2"),
        ({"primary_weight": torch.randn(4, 6, 2, 2)}, ValueError, r"primary_weight: expected an odd square kernel, got 2×2"),
        ({"primary_weight": torch.randn(0, 6, 1, 1)}, ValueError, r"at least one channel"),
        ({"cheap_weight": torch.randn(6, 1, 3, 3)}, ValueError, r"cheap_weight: expected .*init_channels = 4"),
        ({"cheap_weight": torch.randn(4, 1, 3, 5)}, ValueError, r"cheap_weight: expected an odd square kernel, got 3×5"),
        ({"primary_bias": torch.randn(3)}, ValueError, r"primary_bias: expected shape .*\(4,\), got \(3,\)"),
        ({"primary_bn": BatchNorm(torch.zeros(4), None)}, ValueError, r"primary_bn: expected both"),
        ({"cheap_bn": BN4._replace(weight=torch.ones(5))}, ValueError, r"cheap_gamma: expected shape"),
        ({"act_primary": "elu"}, ValueError, r"act_primary: expected one of .*'relu6'.*got 'elu'"),
        ({"act_cheap": "prelu"}, TypeError, r"cheap_slope: PReLU expects its weight as a tensor"),
        ({"act_cheap": "prelu", "cheap_slope": torch.ones(3)}, ValueError, r"cheap_slope: expected shape \(1,\) or"),
        ({"act_cheap": "relu", "cheap_slope": 0.1}, TypeError, r"cheap_slope: expected None with relu"),
        ({"out_channels": 9}, ValueError, r"out_channels: expected at most init_channels \* ratio = 8, got 9"),
        ({"out_channels": 0}, ValueError, r"out_channels: expected a positive number, got 0"),
        ({"stride": 0}, ValueError, r"stride: expected a positive number"),
        ({"stride": -1}, ValueError, r"stride: expected a positive number"),
        ({"stride": (1, 1)}, TypeError, r"stride: expected an int, got tuple \(1, 1\)"),
        ({"out_channels": 5.0}, TypeError, r"out_channels: expected an int, got float 5.0"),
        ({"cheap_bn": BN4._replace(eps="1")}, TypeError, r"cheap_eps: expected a number, got str '1'"),
        ({"act_cheap": "leaky_relu", "cheap_slope": "1"}, TypeError, r"cheap_slope: expected a number, got str '1'"),
        ({"primary_bn": (torch.zeros(4), torch.ones(4))}, TypeError, r"primary_bn: expected .*BatchNorm.*, got tuple"),
        ({"cheap_bn": nn.GroupNorm(2, 4)}, TypeError, r"cheap_bn: expected .*nn.BatchNorm2d or None, got GroupNorm"),
        ({"cheap_bn": nn.BatchNorm2d(4, track_running_stats=False)}, ValueError, r"cheap_bn: expected .* stored statistics"),
        ({"groups": 4}, ValueError, r"x: expected 24 channels, for .* and groups = 4, got 6 \("),
        ({"groups": 3, "primary_weight": torch.randn(4, 2, 1, 1)}, ValueError, r"groups: expected a divisor of .* 4 channels, got 3"),
        ({"input_gate": torch.randn(2, 5)}, ValueError, r"input_gate: expected shape .*\(2, 6\), got \(2, 5\)"),
        ({"residual": torch.randn(2, 8, 5, 4)}, ValueError, r"residual: expected shape .*\(2, 8, 5, 5\), got \(2, 8, 5, 4\)"),
        ({"output_gate": torch.randn(2, 4, 2, 2)}, ValueError, r"output_gate: expected"),
        ({"backend": "cudnn"}, ValueError, r"backend: expected 'auto' or one of .*got 'cudnn'"),
        ({"backend": "cuda"}, RuntimeError, r"backend='cuda' can't run this Ghost module: ."),
        ({"backend": "triton"}, RuntimeError, r"backend='triton' can't run this Ghost module: ."),
    ],
)  # fmt: skip
def test_bad_input_is_explained(changes, error, message):
    with pytest.raises(error, match=message):
        simple(**changes)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("settings", [{}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_a_norm_may_be_pytorchs_module(settings, backend):
    """In either mode, by its stored statistics."""
    norm = nn.BatchNorm2d(4, **settings)
    norm(torch.randn(8, 4, 3, 3))
    tensors = BatchNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    x, primary, cheap = torch.randn(2, 6, 5, 5), torch.randn(4, 6, 1, 1), torch.randn(4, 1, 3, 3)
    with torch.no_grad():
        for training in (True, False):
            given, expected = (
                (
                    functional.ghost_module(x, primary, cheap, primary_bn=bn, cheap_bn=bn, backend=backend),
                    functional.conv1x1(x, primary, bn=bn, backend=backend),
                    functional.depthwise(x[:, :4], cheap, bn=bn, backend=backend),
                )
                for bn in (norm.train(training), tensors)
            )
            assert all(map(torch.equal, given, expected))
        with pytest.raises(TypeError, match=r"^bn: expected"):
            functional.conv1x1(x, primary, bn=nn.ReLU())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stride_or_dilation_beyond_the_map_is_that_of_its_size(dtype):
    x, weight = torch.randn(2, 6, 4, 5, dtype=dtype), torch.randn(4, 6, 3, 3, dtype=dtype)
    cheap = torch.randn(4, 1, 3, 3, dtype=dtype)
    tensors = {"x": x, "primary_weight": weight, "cheap_weight": cheap}
    for distance in (4097, 2**40, 2**62, 2**63 - 1):
        for name in ("stride", "dilation"):
            far, near = (simple(**tensors, **{name: d}, backend="reference") for d in (distance, 5))
            assert torch.equal(far, near)
        far, near = (functional.depthwise(x[:, :4], cheap, stride=d, backend="reference") for d in (distance, 5))
        assert torch.equal(far, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_norms_of_mixed_dtypes_are_explained_where_pytorch_refuses_them(dtype):
    short = dtype.itemsize < 4
    dtypes = (dtype, torch.float32 if short or dtype == torch.float64 else torch.float16)
    x, y = (torch.randn(1, 4, 3, 3, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.randn(4, 1, 3, 3, dtype=dtype)
    norm = lambda d: None if d is None else torch.rand(4, dtype=d) + 0.5  # noqa: E731
    for chosen in itertools.product(dtypes, dtypes, (*dtypes, None), (*dtypes, None)):
        mean, var, gamma, beta = map(norm, chosen)
        bn = BatchNorm(mean, var, gamma, beta)
        call = lambda: functional.depthwise(x, weight, bn=bn, backend="reference").sum().backward()  # noqa: B023, E731
        try:
            nn.functional.batch_norm(y, mean, var, gamma, beta).sum().backward()
        except RuntimeError:
            with pytest.raises(
                TypeError, match=r"^(mean|var|gamma|beta): expected (x's dtype|the dtype of (mean|var|gamma))"
            ):
                call()
        else:
            call()


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("name", "value"), [*(("act", v) for v in (1, True, 2.5, None, "elu")), *(("gate", v) for v in (7, 2.5, None, "elu"))]
)  # fmt: skip
def test_compiled_a_bad_word_is_explained_too(name, value, fullgraph):
    matrices = torch.randn(4, 6), torch.randn(6, 4)
    torch._dynamo.reset()
    call = torch.compile(
        lambda x: functional.squeeze_excite(x, *matrices, **{name: value}), fullgraph=fullgraph, backend="eager"
    )
    with pytest.raises(RuntimeError, match=rf"{name}: expected one of \[.*\], got {value!r}"):
        call(torch.randn(2, 6, 3, 3))


def test_convert_keeps_values():
    args = make_args(Case(dtype=torch.float16))
    assert all(a is None or a.dtype == torch.float64 for a in convert(args, torch.float64)[: len(TENSORS)])


def closed_over(make, *arguments):
    """``functional.run`` of what a tuple in a function's cell holds: its integers are symbols where sizes are dynamic."""
    return lambda x: functional.run(make(x, *arguments))


@pytest.mark.parametrize("numbers", range(4))
@pytest.mark.parametrize("kind", [SqueezeExciteArgs, DepthwiseArgs])
def test_compiled_with_symbols_in_place_of_integers(kind, numbers):
    """A symbol equals no ``Gate``, and for a pair of them among five PyTorch thinks for longer than anybody waits."""
    act = [Act.RELU, Act.HARDSWISH, Act.SILU, Act.RELU6][numbers]
    if kind is SqueezeExciteArgs:
        gate = [Gate.SIGMOID, Gate.HARDSIGMOID, Gate.RELU6, Gate.HARDSIGMOID][numbers]
        run = closed_over(kind, torch.randn(4, 6), None, torch.randn(6, 4), None, int(act), int(gate))
    else:
        kh, kw, stride = [(3, 3, 1), (5, 5, 2), (1, 5, 1), (3, 3, 2)][numbers]
        run = closed_over(kind, torch.randn(6, 1, kh, kw), *[None] * 6, 1e-5, int(act), 0.01, stride)
    torch._dynamo.reset()
    compiled = torch.compile(run, dynamic=True, fullgraph=True, backend="aot_eager")
    for size in ((2, 6, 9, 8), (3, 6, 5, 8)):
        x = torch.randn(size)
        torch.testing.assert_close(compiled(x), run(x))
