"""The ops between a bottleneck's Ghost modules, in plain PyTorch: schemas, fakes, gradients, compile, errors."""

import pytest
import torch
from torch import nn

from ghostfused import functional, ops
from ghostfused.spec import Act, BatchNorm, tensor_names
from ghostfused.testing import DepthwiseCase, SqueezeExciteCase, convert, make_depthwise, make_squeeze_excite

CASES = [
    make_depthwise(DepthwiseCase(act="leaky_relu", layout="nhwc")),
    make_depthwise(DepthwiseCase(kernel=(1, 5), stride=1, norm="bias", act="prelu", height=7, width=5)),
    make_squeeze_excite(SqueezeExciteCase()),
    make_squeeze_excite(SqueezeExciteCase(gate="relu6", bias=False, act="silu")),
]

STATISTICS = ("mean", "var")  # without a gradient, as in PyTorch


def named(args):
    return zip(tensor_names(type(args)), args.tensors, strict=True)


@pytest.mark.parametrize("args", CASES, ids=lambda args: args.op)
def test_op_and_its_backward_pass_opcheck(args):
    torch.library.opcheck(ops.forward_op("reference", args.op), tuple(args))
    needs_grad = [t is not None and name not in STATISTICS for name, t in named(args)]
    grad = torch.randn(args.output_shape())
    torch.library.opcheck(ops.backward_op(args.op), (grad, *args, needs_grad))


@pytest.mark.parametrize("args", CASES, ids=lambda args: args.op)
def test_gradients_of_the_function(args):
    from ghostfused.ops.autograd import FusedFunction

    args = convert(args, torch.float64)
    tensors = [t if t is None or name in STATISTICS else t.requires_grad_() for name, t in named(args)]

    def fused(*tensors):
        return FusedFunction.apply(args.op, "reference", *tensors, *args[len(tensors) :])

    assert torch.autograd.gradcheck(fused, tensors)


def test_depthwise_is_the_layers_it_stands_for():
    conv = nn.Conv2d(6, 6, 5, 2, 2, groups=6)
    bn = nn.BatchNorm2d(6)
    bn(torch.randn(4, 6, 5, 5) * 2 + 1)
    bn.eval()
    x = torch.randn(2, 6, 9, 11)
    norm = BatchNorm(bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.eps)
    out = functional.depthwise(x, conv.weight, bias=conv.bias, bn=norm, act="silu", stride=2, backend="reference")
    torch.testing.assert_close(out, nn.functional.silu(bn(conv(x))))


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


def test_compiled_without_a_graph_break():
    dw, se = CASES[0], CASES[2]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x, y):
        return functional.run(dw._replace(x=x), "auto"), functional.run(se._replace(x=y), "auto")

    for out, expected in zip(both(dw.x, se.x), (functional.run(dw), functional.run(se)), strict=True):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(5, 1, 3, 3)}, r"weight: expected shape \(C, 1, kh, kw\) with C = 4"),
        ({"weight": torch.randn(4, 1, 2, 3)}, "odd kernel"),
        ({"stride": 0}, "stride: expected a positive number, got 0"),
        ({"bias": torch.randn(3)}, r"bias: expected shape \(C,\) = \(4,\), got \(3,\)"),
        ({"act": "tanh"}, "act: expected one of"),
        ({"backend": "cpu_"}, "backend: expected 'auto' or one of"),
    ],
)
def test_depthwise_names_the_bad_argument(change, message):
    with pytest.raises(ValueError, match=message):
        functional.depthwise(torch.randn(1, 4, 5, 5), **{"weight": torch.randn(4, 1, 3, 3), **change})


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
def test_squeeze_excite_names_the_bad_argument(change, message):
    good = {"reduce_weight": torch.randn(2, 4), "expand_weight": torch.randn(4, 2)}
    with pytest.raises(ValueError, match=message):
        functional.squeeze_excite(torch.randn(1, 4, 5, 5), **{**good, **change})
