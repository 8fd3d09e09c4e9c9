"""What is asked of every op: tensors of any strides, NaN and infinities, errors, and what PyTorch makes of the op."""

import dataclasses

import pytest
import strategies
import strides
import torch
from kernel_backends import Backend, needs_cpu, on
from strategies import LAYOUTS

from ghostfused import backends, functional, ops
from ghostfused.backends import reference
from ghostfused.ops.autograd import FusedFunction
from ghostfused.spec import Act, tensor_names
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, convert, make

EVERYTHING = {  # tensors that there can be
    "forward": Case(
        2, 6, 5, 7, 7, primary_norm="bn+bias", cheap_norm="bn+bias", act_primary="prelu", act_cheap="prelu",
        per_channel_slope=True, input_gate=True, residual=True, output_gate=True,
    ),
    "depthwise": DepthwiseCase(2, 6, 5, 7, norm="bn+bias", act="prelu", per_channel_slope=True),
    "squeeze_excite": SqueezeExciteCase(2, 6, 3, 5, 7),
}  # fmt: skip
PLAIN = {"forward": Case(), "depthwise": DepthwiseCase(), "squeeze_excite": SqueezeExciteCase()}
each_op = pytest.mark.parametrize("op", PLAIN)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)
everywhere = on("reference", "cpu", "cuda", "triton")


# ---- memory


@everywhere
@each_layout
@pytest.mark.parametrize("name", strides.VIEWS)
def test_views(backend, name, layout):
    x = strides.view(name, layout)
    n, c, h, w = x.shape
    for case in (
        Case(n, c, h, w), DepthwiseCase(n, c, h, w, stride=1 + c % 2), SqueezeExciteCase(n, c, 6, h, w),
    ):  # fmt: skip
        backend.check(make(case)._replace(x=x), name=case)


@everywhere
@each_op
def test_strided_parameters(backend, op):
    args = make(EVERYTHING[op])
    backend.check(strides.changed(args, strides.with_gaps, "x"), name="gaps")
    backend.check(strides.changed(args, strides.transposed, "x"), name="transposed")


@everywhere
@each_layout
@each_op
def test_addresses_aligned_to_one_element(backend, op, layout):
    sizes = {"height": 8, "width": 8, "layout": layout, "dtype": torch.float16}
    channels = {"in_channels": 16, "out_channels": 32} if op == "forward" else {"channels": 16}
    for case in (PLAIN[op], EVERYTHING[op]):
        args = make(dataclasses.replace(case, **sizes, **channels))
        backend.check(args._replace(x=strides.shifted(args.x)), strides.changed(args, strides.shifted), name=case)


@everywhere
@each_op
def test_empty_batch(backend, op):
    args = make(PLAIN[op])
    assert backend.run(args._replace(x=args.x[:0])).shape[0] == 0


@everywhere
@each_op
def test_output_is_fresh_and_writable(backend, op):
    args = make(EVERYTHING[op])
    out = backend.run(args)
    assert out.untyped_storage().nbytes() == out.numel() * 4
    assert out.untyped_storage().data_ptr() not in [
        t.untyped_storage().data_ptr() for t in args.tensors if t is not None
    ]
    out += 1


# ---- numbers


@on("cpu", "cuda", "triton", "triton_two_kernel")
@each_op
def test_nan_and_infinity(backend, op):
    """They reach the same outputs as in PyTorch in float64, and no others, of their image alone: in float32 its GELU makes NaN
    of infinity if it is oneDNN's."""
    names = {"forward": ("act_primary", "act_cheap"), "depthwise": ("act",), "squeeze_excite": ("gate",)}[op]
    case = {"forward": Case(4, 8, 7, 8, 16), "depthwise": DepthwiseCase(4, 8, 7, 8, stride=1)}.get(
        op, SqueezeExciteCase(4, 24, 8, 7, 8)
    )
    for setting in strategies.GATES if op == "squeeze_excite" else strategies.ACTS:
        for layout in LAYOUTS:
            args = make(dataclasses.replace(case, layout=layout, **dict.fromkeys(names, setting)))
            args.x[:3, 3, 2, 5] = torch.tensor([float("nan"), float("inf"), -float("inf")])
            out, expected = backend.run(args), reference.run(convert(args, torch.float64)).float()
            assert torch.equal(out.isnan(), expected.isnan())
            assert torch.equal(out.isinf(), expected.isinf())
            finite = expected.isfinite()
            assert finite[3].all()
            torch.testing.assert_close(out[finite], expected[finite], rtol=1e-4, atol=1e-5)


@each_op
def test_deterministic(backend, op):
    larger = {
        "forward": Case(2, 40, 14, 14, 80, dtype=torch.float16, layout="nhwc"),
        "depthwise": DepthwiseCase(dtype=torch.float16, layout="nhwc"),
        "squeeze_excite": SqueezeExciteCase(5, 130, 30, 40, 30),
    }
    args = make(larger[op])
    assert torch.equal(backend.run(args), backend.run(args))


# ---- refusals


def bad_arguments(op: str, backend: Backend) -> list[tuple[str, object]]:
    """Names and values that don't fit what ``EVERYTHING`` makes."""
    elsewhere = "cpu" if backend.device == "cuda" else "meta"
    common = [("x", torch.ones(2, 6, 5)), ("act", 77)]
    if op == "squeeze_excite":
        return [
            *common, ("reduce_weight", torch.ones(3, 5)), ("reduce_bias", torch.ones(2)), ("expand_weight", torch.ones(3, 6)),
            ("expand_weight", torch.ones(6, 4)), ("expand_bias", torch.ones(3)), ("expand_bias", torch.ones(6, device=elsewhere)),
            ("act", int(Act.LEAKY_RELU)), ("act", int(Act.PRELU)), ("gate", 3),
        ]  # fmt: skip
    if op == "depthwise":
        return [
            *common, ("weight", torch.ones(5, 1, 3, 3)), ("weight", torch.ones(6, 1, 2, 3)), ("bias", torch.ones(3)),
            ("mean", torch.ones(5)), ("mean", torch.ones(6, device=elsewhere)), ("var", None),
            ("gamma", torch.ones(6).double()), ("slope", torch.ones(3)), ("stride", 3), ("stride", 0),
        ]  # fmt: skip
    return [
        common[0], ("primary_weight", torch.ones(4, 5, 1, 1)), ("primary_weight", torch.ones(4, 6, 2, 2)),
        ("primary_weight", torch.ones(4, 6, 3, 1)), ("cheap_weight", torch.ones(6, 1, 3, 3)), ("primary_bias", torch.ones(3)),
        ("primary_mean", torch.ones(5)), ("primary_mean", torch.ones(4, device=elsewhere)), ("cheap_var", None),
        ("cheap_gamma", torch.ones(4).double()), ("primary_slope", torch.ones(3)), ("input_gate", torch.ones(2, 7)),
        ("residual", torch.ones(2, 7, 5, 4)), ("output_gate", torch.ones(2, 6, 2, 2)), ("out_channels", 9), ("stride", 0),
        ("dilation", 0), ("groups", 2), ("primary_act", -1), ("cheap_act", 77),
    ]  # fmt: skip


@on("cpu", "cuda")
@each_op
def test_a_binding_names_the_argument(backend, op):
    good = backend.there(make(EVERYTHING[op]))
    for name, value in bad_arguments(op, backend):
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim():
            moved = not (
                backend.device == "cuda" and value.shape == getattr(good, name).shape and value.dtype == good.x.dtype
            )
            value = value.to(backend.device) if moved else value
        with pytest.raises(RuntimeError, match=name):
            ops.forward_op(backend.name, op)(*good._replace(**{name: value}))


@each_op
def test_a_backend_is_the_default_and_explains_refusals(backend, op):
    supports = backends.BACKENDS[backend.name].supports
    plain = make(PLAIN[op])
    args = backend.there(plain)
    assert supports(args) is None
    assert backends.choose(args, backend.name) == backend.name
    if backend.name == backends.AUTO.get(backend.device, [None])[0]:
        assert backends.choose(args) == backend.name
    doubles = backend.there(convert(plain, torch.float64))
    refused = {
        "forward": {"groups 2": {"groups": 2}, "2×2": {"primary_weight": torch.ones(12, 16, 2, 2)}},
        "depthwise": {"3×5": {"weight": torch.ones(12, 1, 3, 5)}, "stride 3": {"stride": 3}},
        "squeeze_excite": {"LEAKY_RELU": {"act": int(Act.LEAKY_RELU)}},
    }[op]
    for message, change in refused.items():
        assert message in supports(args._replace(**change))
    with pytest.raises(RuntimeError, match=rf"backend='{backend.name}' can't run this \w.*float64"):
        functional.run(doubles, backend.name)


@on("cpu", "cuda")
def test_a_compiled_backend_refuses_another_device(backend):
    args = make(PLAIN["forward"])
    elsewhere = args if backend.device == "cuda" else args._replace(x=args.x.to("meta"))
    assert elsewhere.x.device.type in backends.BACKENDS[backend.name].supports(elsewhere)


# ---- what PyTorch makes of it

CASES = {
    "forward": [Case(2, 6, 5, 7, 8, layout="nhwc", sliced=True, input_gate=True, residual=True, output_gate=True, act_cheap="prelu"),
                Case(2, 6, 5, 7, 8, act_primary="silu")],
    "depthwise": [DepthwiseCase(2, 5, 6, 5, act="leaky_relu", layout="nhwc"),
                  DepthwiseCase(2, 5, 7, 5, (1, 5), 1, norm="bias", act="prelu")],
    "squeeze_excite": [SqueezeExciteCase(2, 7, 3, 5, 4), SqueezeExciteCase(2, 7, 3, 5, 4, gate="relu6", bias=False, act="silu")],
}  # fmt: skip


def with_torch(backend: Backend) -> None:
    if not backend.has_torch:
        pytest.skip("needs PyTorch's own CUDA kernels")


def needs_grad(args) -> list[bool]:
    """Of every tensor but the statistics, which have no gradient in PyTorch."""
    names = tensor_names(type(args))
    return [t is not None and not name.endswith(("mean", "var")) for name, t in zip(names, args.tensors, strict=True)]


@everywhere
@each_op
def test_opcheck(backend, op):
    with_torch(backend)
    for case in CASES[op]:
        args = backend.there(make(case))
        torch.library.opcheck(ops.forward_op(backend.name, op), tuple(args))
        if op != "forward" and backend.name == "reference":  # one backward serves all backends
            grad = torch.randn(args.output_shape())
            torch.library.opcheck(ops.backward_op(op), (grad, *args, needs_grad(args)))


@everywhere
@each_op
def test_gradients(backend, op):
    with_torch(backend)
    for case in CASES[op]:
        args = backend.there(make(case))
        leaves = [t.requires_grad_() for t, need in zip(args.tensors, needs_grad(args), strict=True) if need]
        out, expected = functional.run(args, backend.name), reference.run(args)
        grad = torch.randn_like(out)
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, grad) for y in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", ["depthwise", "squeeze_excite"])
def test_gradcheck(op):
    for case in CASES[op]:
        args = convert(make(case), torch.float64)
        tensors = [t.requires_grad_() if need else t for t, need in zip(args.tensors, needs_grad(args), strict=True)]
        rest = args[len(tensors) :]
        assert torch.autograd.gradcheck(lambda *t: FusedFunction.apply(op, "reference", *t, *rest), tensors)  # noqa: B023


@everywhere
@each_op
def test_compiled_without_a_graph_break(backend, op):
    args = make(CASES[op][1])
    on_device = backend.there(args)
    run = lambda x: functional.run(on_device._replace(x=x), backend.name)  # noqa: E731
    torch._dynamo.reset()  # or it takes the numbers in args for symbols, since those of the last test were others
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if backend.name == "cpu" else "aot_eager")
    with torch.no_grad():
        for x in (args.x, args.x[:, :, 1:, :4]):
            expected, there = reference.run(args._replace(x=x)), backend.there(args._replace(x=x)).x
            for function in (run, compiled):
                torch.testing.assert_close(function(there).cpu(), expected, rtol=1e-5, atol=1e-5)


@needs_cpu
def test_the_default_is_compiled_with_the_kernel():
    args = make(CASES["squeeze_excite"][0])
    compiled = torch.compile(lambda x: functional.run(args._replace(x=x)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(args.x), functional.run(args, "cpu"))
