"""FusedGhostModule as a module: constructor, keys, equality with unfused layers, and what users do to modules."""

import copy
import functools

import pytest
import torch
from modules import FLOAT64, example, randomize, runs_fused, unfused
from torch import nn
from torch._subclasses import FakeTensorMode

from ghostfused import Act, FusedGhostModule, capture, fuse
from ghostfused.models import paper, seed

# ---- construction


def test_positional_arguments_are_the_blogs():
    theirs = randomize(seed.GhostModule(6, 12, 3, 3, 2, False)).eval()
    ours = FusedGhostModule(6, 12, 3, 3, 2, False).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 6, 9, 8)
    torch.testing.assert_close(ours(x), theirs(x))


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize(
    ("keys", "halves", "conv", "bn"),
    [
        ("seed", ("primary_conv", "cheap_op"), "0", "1"),
        ("paper", ("primary_conv", "cheap_operation"), "0", "1"),
        ("ultralytics", ("cv1", "cv2"), "conv", "bn"),
    ],
)
def test_state_dict_keys(keys, halves, conv, bn):
    expected = [k for h in halves for k in (f"{h}.{conv}.weight", *(f"{h}.{bn}.{n}" for n in BN))]
    assert list(FusedGhostModule(4, 8, keys=keys).state_dict()) == expected
    with_prelu = [*expected, f"{halves[1]}.{'act' if conv == 'conv' else '2'}.weight"]
    assert list(FusedGhostModule(4, 8, keys=keys, act_cheap="prelu").state_dict()) == with_prelu


def test_paper_keys_load_into_the_papers_module():
    m = FusedGhostModule(4, 7, act_cheap="none", use_relu=False, keys="paper")
    paper.GhostModule(4, 7, relu=False).load_state_dict(m.state_dict(), strict=True)


@pytest.mark.parametrize("act", [act.name.lower() for act in Act])
def test_activations_by_name_and_by_act(act):
    for given in (act, Act[act.upper()]):
        m, x = example(act_primary=given, act_cheap=given, use_relu=False)
        assert runs_fused(m)
        assert f"act_primary={act}, act_cheap={act}" in repr(m)
        torch.testing.assert_close(m(x), unfused(m, x), **FLOAT64)


@pytest.mark.parametrize(
    "acts",
    [
        (nn.LeakyReLU(0.3), nn.LeakyReLU(0.1)),
        (nn.PReLU(6), nn.PReLU(1)),
        (nn.PReLU(1), nn.PReLU(6)),
        (nn.Identity(), nn.SiLU()),
        (nn.GELU("tanh"), nn.ReLU()),
    ],
    ids=["leaky", "prelu_per_channel", "prelu_scalar", "identity", "gelu_tanh"],
)
def test_activations_by_module(acts):
    for a in acts:
        if isinstance(a, nn.PReLU):
            nn.init.uniform_(a.weight, -0.5, 0.5)
    m, x = example(act_primary=acts[0], act_cheap=acts[1])
    assert m.primary_conv[2] is acts[0]
    assert m.cheap_op[2] is acts[1]
    assert runs_fused(m)
    torch.testing.assert_close(m(x), unfused(m, x), **FLOAT64)


def test_default_activations_are_the_blogs():
    assert [type(m.primary_conv[2]) for m in (FusedGhostModule(2, 4), FusedGhostModule(2, 4, use_relu=False))] == [
        nn.ReLU,
        nn.Sequential,
    ]
    assert type(FusedGhostModule(2, 4, use_relu=False).cheap_op[2]) is nn.ReLU6


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"in_channels": 0}, ValueError, "in_channels: expected at least 1, got 0"),
        ({"out_channels": -3}, ValueError, "out_channels: expected at least 1, got -3"),
        ({"out_channels": 8.0}, TypeError, "out_channels: expected an int, got float"),
        ({"s": 1}, ValueError, r"s: expected at least 2, got 1; .*nn\.Conv2d"),
        ({"s": True}, TypeError, "s: expected an int, got bool"),
        ({"kernel_size": 0}, ValueError, "kernel_size: expected at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"dw_size": 4}, ValueError, "dw_size: expected an odd number, got 4"),
        ({"dilation": 0}, ValueError, "dilation: expected at least 1, got 0"),
        ({"groups": 3}, ValueError, "groups: expected a divisor of in_channels = 4 and of init_channels = 4, got 3"),
        ({"act_primary": "tanh"}, ValueError, "act_primary: expected one of .*'relu6'.* got 'tanh'"),
        ({"act_cheap": 99}, ValueError, "act_cheap: expected one of .* got 99"),
        ({"act_cheap": nn.Tanh()}, ValueError, "act_cheap: expected a module among .*'ReLU6'.* got Tanh"),
        ({"act_cheap": nn.PReLU(3)}, ValueError, "act_cheap: expected a PReLU of 1 or 4 parameters, got 3"),
        ({"keys": "timm"}, ValueError, "keys: expected one of .*'paper'.* got 'timm'"),
        ({"backend": "cudnn"}, ValueError, "backend: expected 'auto' or one of .*'triton'.* got 'cudnn'"),
    ],
)
def test_bad_constructor_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        FusedGhostModule(**{"in_channels": 4, "out_channels": 8, **kwargs})


def test_device_and_dtype():
    m = FusedGhostModule(4, 8, act_cheap="prelu", device="meta", dtype=torch.bfloat16)
    floats = [t for t in m.state_dict().values() if t.is_floating_point()]
    assert {(t.device.type, t.dtype) for t in floats} == {("meta", torch.bfloat16)}


# ---- forward

SHAPES = [
    {},
    {"s": 3},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2},
    {"kernel_size": 3, "dilation": 2},
    {"groups": 2},
    {"dw_size": 5, "s": 4},
    {"dw_size": 1},
]


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize("kwargs", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_is_that_of_the_children(kwargs, backend):
    m, x = example(backend=backend, **kwargs)
    assert runs_fused(m) == (kwargs.get("kernel_size") != 2)
    torch.testing.assert_close(m(x), unfused(m, x), **FLOAT64)
    twin = copy.deepcopy(m)
    m.train()
    torch.testing.assert_close(m(x), unfused(twin.train(), x), **FLOAT64)
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, **FLOAT64)


def test_gates_and_residual(training):
    m, x = example()
    m.train(training)
    gates = {
        "input_gate": torch.rand(2, 6, dtype=torch.float64),
        "residual": torch.randn(2, 11, 7, 5, dtype=torch.float64),
        "output_gate": torch.rand(2, 11, 3, 2, dtype=torch.float64),
    }
    for names in (["input_gate"], ["residual"], ["output_gate"], list(gates)):
        some = {name: gates[name] for name in names}
        torch.testing.assert_close(m(x, **some), unfused(m, x, **some), **FLOAT64)


def test_output_is_fresh_and_writable(training):
    m, x = example()
    m.train(training)
    before = x.clone()
    with torch.no_grad():
        out = m(x)
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
        out += 1
    assert torch.equal(x, before)


def test_gradients_are_the_unfused_ones(training):
    m, x = example(act_primary="prelu", act_cheap="silu")
    twin = copy.deepcopy(m)
    grads = []
    for module, forward in ((m, m), (twin, lambda x: unfused(twin, x))):
        module.train(training)
        leaf = x.clone().requires_grad_()
        forward(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("trained_by_kernels")
@pytest.mark.parametrize(
    "norm",
    [
        {"momentum": None},
        {"momentum": 0.3, "eps": 0.1},
        {"track_running_stats": False},
        {"affine": False},
    ],
    ids=str,
)
def test_batchnorm_settings(norm):
    m, x = example()
    m.primary_conv[1], m.cheap_op[1] = nn.BatchNorm2d(6, **norm), nn.BatchNorm2d(6, **norm)
    randomize(m).double()
    twin = copy.deepcopy(m)
    for training in (True, True, False):
        out, expected = m.train(training)(x), unfused(twin.train(training), x)
        torch.testing.assert_close(out, expected, **FLOAT64)
        for a, b in zip(m.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, **FLOAT64)
    assert runs_fused(m)


def test_halves_can_be_in_different_modes():
    m, x = example()
    m.cheap_op.train()  # the primary conv's BatchNorm is frozen
    twin = copy.deepcopy(m)
    assert torch.equal(m(x), unfused(twin, x))
    for a, b in zip(m.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_no_grad_for_frozen_parameters():
    m, x = example()
    m.requires_grad_(False)
    assert not m(x).requires_grad
    m.cheap_op[0].weight.requires_grad_(True)
    m(x).sum().backward()
    assert m.cheap_op[0].weight.grad is not None
    assert m.primary_conv[0].weight.grad is None


# ---- compilers


def test_compile_in_one_graph_with_dynamic_shapes(training):
    torch._dynamo.reset()
    m, _ = example(torch.float32)
    m.train(training)
    compiled = torch.compile(m, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, h, w in ((2, 7, 5), (3, 8, 9)):
        x = torch.randn(n, 6, h, w)
        twin = copy.deepcopy(m)
        torch.testing.assert_close(compiled(x), unfused(twin, x))
        for a, b in zip(m.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        m.primary_conv[0].weight.mul_(2)
    twin = copy.deepcopy(m)
    torch.testing.assert_close(compiled(x), unfused(twin, x))


def test_compile_with_inductor():
    torch._dynamo.reset()
    m, x = example(torch.float32)
    torch.testing.assert_close(torch.compile(m, fullgraph=True)(x), unfused(m, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    m, x = example(torch.float32)
    n, h, w = (torch.export.Dim(name) for name in "nhw")
    program = torch.export.export(m, (x,), dynamic_shapes={"x": {0: n, 2: h, 3: w}}, strict=strict)
    assert set(program.state_dict) == set(m.state_dict())
    x = torch.randn(5, 6, 4, 9)
    torch.testing.assert_close(program.module()(x), unfused(m, x))


def test_fx_tracing_of_a_model(training):
    m, x = example()
    model = nn.Sequential(nn.Conv2d(6, 6, 1).double(), m).train(training)
    traced = torch.fx.symbolic_trace(model)
    if not training:
        assert "ghost_module" in {getattr(n.target, "__name__", "") for n in traced.graph.nodes}
    torch.testing.assert_close(traced(x), copy.deepcopy(model)(x), **FLOAT64)


CHANNELS, SIZE = 6, (2, 6, 7, 7)
BAD_INPUTS = {
    "channels": torch.ones(2, 5, 7, 7),
    "more dimensions": torch.ones(1, *SIZE),
    "empty maps": torch.ones(2, CHANNELS, 0, 7),
    "no channels": torch.ones(2, 0, 7, 7),
    "float64": torch.ones(SIZE, dtype=torch.float64),
    "float16": torch.ones(SIZE, dtype=torch.float16),
    "int64": torch.ones(SIZE, dtype=torch.int64),
    "complex": torch.ones(SIZE, dtype=torch.complex64),
    "bool": torch.ones(SIZE, dtype=torch.bool),
    "meta": torch.ones(SIZE, device="meta"),
    "sparse": torch.ones(SIZE).to_sparse(),
    "none": None,
    "list": [1.0],
    "array": torch.ones(SIZE).numpy(),
}


@functools.cache
def made(kind: str):
    """A model, the same fused, which replays by now, and the same captured."""
    ghost = paper.GhostModule(CHANNELS, 8)
    plain = nn.Sequential(ghost if kind == "module" else paper.GhostBottleneck(CHANNELS, 12, CHANNELS, se_ratio=0.25))
    fused = fuse(plain.eval())
    with torch.no_grad():
        fused(torch.ones(SIZE))
    return plain, fused, capture(plain, torch.ones(SIZE))


@pytest.mark.parametrize("name", BAD_INPUTS)
@pytest.mark.parametrize("kind", ["module", "bottleneck"])
def test_who_catches_the_unfused_error_catches_ours(kind, name):
    """PyTorch's own layers raise RuntimeError or TypeError of a bad input, and ValueError of some."""
    plain, fused, captured = made(kind)
    x = BAD_INPUTS[name]
    for training, grad in ((False, False), (False, True), (True, True)):
        with torch.set_grad_enabled(grad):
            plain.train(training), fused.train(training)
            with pytest.raises((RuntimeError, TypeError, ValueError)) as unfused:
                plain(x)
            expected = next(kind for kind in (RuntimeError, TypeError, ValueError) if isinstance(unfused.value, kind))
            # in training the layers themselves say what is wrong
            with pytest.raises(expected, match=None if training else "x|primary_weight"):
                fused(x)
            if not training:
                with pytest.raises(expected, match="input"):
                    captured(x)


@pytest.mark.parametrize("name", ["channels", "more dimensions", "empty maps", "float64", "int64"])
def test_fake_tensors_of_a_bad_input_raise_too(name):
    plain = nn.Sequential(paper.GhostModule(CHANNELS, 8)).eval()
    fused = fuse(plain)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        with pytest.raises(RuntimeError):  # PyTorch's own layers don't look at the dtype there
            fused(mode.from_tensor(BAD_INPUTS[name]))
        assert fused(mode.from_tensor(torch.ones(SIZE))).shape == (2, 8, 7, 7)
    for model in (plain, fused):
        for fullgraph in (True, False):
            torch._dynamo.reset()
            with pytest.raises(RuntimeError):
                torch.compile(model, backend="eager", fullgraph=fullgraph)(BAD_INPUTS[name])


@pytest.mark.parametrize(
    ("field", "value"), [("eps", float("nan")), ("eps", float("inf")), ("eps", -1e-6), ("momentum", float("nan"))]
)
def test_odd_settings_of_a_norm_give_what_they_give_unfused(field, value, training):
    model = torch.nn.Sequential(paper.GhostModule(6, 12)).eval()
    x, results = torch.randn(3, 6, 5, 7), []
    for each in (model, fuse(model)):
        for m in each.train(training).modules():
            if isinstance(m, torch.nn.BatchNorm2d):
                setattr(m, field, value)
        try:
            out = copy.deepcopy(each)(x)
        except Exception as error:
            out = type(error) if not isinstance(error, ValueError) else ValueError
        results.append(out)
    theirs, ours = results
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        assert ours is theirs
