"""``capture`` on a CPU: what becomes a program, what is left to PyTorch, what takes effect later, and the errors."""

import copy
import itertools
import pickle
import random

import networks
import pytest
import torch
import torch.nn.functional as F
from capture_network import made
from spies import ONE_OP, needs_cpu_kernels, ops_of
from torch import nn

import ghostfused
from ghostfused import NotCaptured, capture, fuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper, seed
from ghostfused.numerics import TOLERANCES, relative_error

pytestmark = needs_cpu_kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


ACTS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.mark.parametrize(
    ("dtype", "layout", "act"),
    [(dtype, LAYOUTS[(i + j) % 2], act) for i, dtype in enumerate(DTYPES) for j, act in enumerate(ACTS)],
    ids=str,
)
def test_one_op(dtype, layout, act):
    model, x = made(act=act)
    model, x = model.to(dtype, memory_format=layout), x.to(dtype, memory_format=layout)
    captured = capture(model, torch.ones_like(x))
    out = captured(x)
    assert ops_of(captured, x) == ONE_OP
    assert not out.requires_grad
    networks.assert_same(out, model, x)
    assert torch.equal(captured(x), out)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_stems_and_shapes(kernel):
    model, _ = made(kernel=kernel)
    examples = [torch.randn(shape) for shape in ((1, 3, 21, 18), (9, 3, 8, 8), (2, 3, 1, 1), (2, 3, 40, 3))]
    captured = capture(model, examples)
    for x in examples:
        networks.assert_same(captured(x), model, x)
        networks.assert_same(captured(torch.cat([x, x])[::2]), model, torch.cat([x, x])[::2])
        turned = torch.randn_like(x).to(memory_format=torch.channels_last)
        networks.assert_same(captured(turned), model, turned)
    shapes = (
        r"\(1, 3, 21, 18\) torch.float32 or .* or \(2, 3, 40, 3\) torch.float32, got \(2, 3, 21, 18\) torch.float32"
    )
    with pytest.raises(ValueError, match=shapes):
        captured(torch.randn(2, 3, 21, 18))


def test_any_batch():
    model, x = made()
    captured = capture(model, x[:1], dynamic_batch=True)
    for x in (torch.randn(batch, 3, 21, 18) for batch in (1, 2, 3, 16)):
        networks.assert_same(captured(x), model, x)
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 21, 18\) torch.float32, got \(2, 3, 21, 19\)"):
        captured(torch.randn(2, 3, 21, 19))
    with pytest.raises(ValueError, match=r"expected .*float32, got .*torch.float64"):
        captured(x.double())
    fixed, x = made(lambda self, x: x if x.shape[0] > 2 else F.relu6(-x), act=nn.Identity)
    with pytest.raises(NotCaptured):
        capture(fixed, x, dynamic_batch=True)
    networks.assert_same(capture(fixed, x)(x), fixed, x)
    two, x = made(lambda self, x: x.topk(2, 0)[0], act=nn.Identity)
    with pytest.raises(
        NotCaptured, match=r"itself doesn't run on \(1, 3, 21, 18\) torch.float32: RuntimeError: selected"
    ):
        capture(two, x, partial=True, dynamic_batch=True)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("ghostnet_050", True),
        ("paper", False),
        ("seed", True),
        *itertools.product(("ghostnet", "small", "ghostnetv2"), (False, True)),
        ("ghostnetv3", True),
    ],
)
def test_whole_networks(name, fused):
    size = 224 if name == "seed" else 64
    x = torch.randn(2, 3, size, size)
    if name in ("paper", "seed"):
        made = paper.GhostNet(num_classes=7, width=0.5) if name == "paper" else seed.GhostNet(num_classes=7)
        model = calibrate(made, torch.randn_like(x))
    else:
        model = networks.network(name)
    captured = capture(fuse(model) if fused else model, torch.zeros_like(x))
    assert ops_of(captured, x) == ONE_OP
    networks.assert_same(captured(x), model, x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_a_network_in_parts():
    model, x = fuse(networks.network("yolov8n-ghost")), torch.randn(2, 3, 64, 64)
    with pytest.raises(NotCaptured, match=r"no kernel computes aten\..* in .* \(\w+\).*partial=True"):
        capture(model, x)
    captured = capture(model, x, partial=True)
    x = torch.randn(2, 3, 64, 64)
    names = ops_of(captured, x)
    networks.assert_same(networks.first(captured(x)), model, x)
    assert names.count("ghostfused.replay_cpu") >= 8


LEFT_OUT = {
    "aten.sort": lambda self, x: x.sort(dim=1).values,
    "aten.elu": lambda self, x: F.elu(x, inplace=True),
    "aten.mean": lambda self, x: x.mean(1, keepdim=True) + x.mean((0, 2, 3), keepdim=True) + x,
    "aten.conv2d": lambda self, x: F.conv2d(x, self.stem.weight[:, :1].repeat(1, 9, 1, 1), padding=2),
    "aten.mul": lambda self, x: F.conv2d(x, self.mix.weight[:9] * 2, padding=2, groups=9),
    "aten.relu": lambda self, x: F.relu(x) + x,
    "aten.add": lambda self, x: (x.clone(), x.relu_())[0] + x[:, :1],
    "aten.max_pool2d": lambda self, x: F.max_pool2d(x, 3, 1, 1, 1, True),
    "aten.softplus": lambda self, x: F.softplus(x),
    "aten.prelu": lambda self, x: F.prelu(x, self.norm.weight),
    "aten.neg": lambda self, x: x[:, :2].neg_() is x or x,
    "aten.hardtanh": lambda self, x: F.hardtanh(x, -1, 6),
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_no_kernel_computes(what):
    model, x = made(LEFT_OUT[what], act=nn.Identity)
    with pytest.raises(NotCaptured, match=r"no kernel computes aten\.\w+\.\w+ in the model \(Net\)"):
        capture(model, x)
    captured = capture(model, x, partial=True, dynamic_batch=True)
    for batch in (1, 3):
        x = torch.randn(batch, 3, 21, 18)
        with torch.no_grad():
            torch.testing.assert_close(captured(x), model(x), rtol=1e-3, atol=1e-4)
    assert "ghostfused.replay_cpu" in ops_of(captured, x)


def test_the_module_is_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Softsign())).eval()
    with pytest.raises(NotCaptured, match=r"no kernel computes aten\..* in 1\.1 \(Softsign\)"):
        capture(model, torch.randn(1, 3, 4, 4))


class Drawn(nn.Module):
    """A network drawn at random: each layer takes any of the maps made so far; several are results."""

    def __init__(self, draw: random.Random):
        super().__init__()
        self.layers, self.sources = nn.ModuleList(), []
        for i in range(draw.randint(4, 14)):
            kind = draw.choice(["ghost", "conv", "depthwise", "bare", "elu", "relu", "add", "pool", "slice"])
            self.sources.append((kind, draw.randint(0, i), draw.randint(0, i)))
            self.layers.append(
                {
                    "ghost": lambda: ghostfused.FusedGhostModule(6, 6),
                    "conv": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
                    "depthwise": lambda: nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)),
                    "bare": lambda: nn.Conv2d(6, 6, 3, padding=1),
                    "elu": nn.ELU,
                    "relu": lambda: nn.ReLU(inplace=draw.random() < 0.3),
                }.get(kind, nn.Identity)()
            )
        self.results = [draw.randint(0, len(self.layers)) for _ in range(draw.randint(1, 3))] + [len(self.layers)]

    def forward(self, x):
        maps = [x.clone()]
        for (kind, a, b), layer in zip(self.sources, self.layers, strict=True):
            out = layer(maps[a])
            if kind == "add":
                out = out + maps[b]
            elif kind == "pool":
                out = out * F.adaptive_avg_pool2d(maps[b], 1)
            elif kind == "slice":
                out = torch.cat([out[:, 3:], maps[b][:, :3]], 1)
            elif kind == "ghost" and a != b:
                out = layer(maps[a], residual=maps[b])
            maps.append(out)
        return {"all": [maps[i].clone() for i in self.results], "last": maps[-1]}


@pytest.mark.parametrize("number", range(24))
def test_networks_drawn_at_random(number):
    model = Drawn(random.Random(number)).eval()
    x = torch.randn(2, 6, 5, 7)
    captured = capture(model, x, partial=True, dynamic_batch=bool(number % 2))
    for _ in range(2):
        x = torch.randn(2, 6, 5, 7)
        with torch.no_grad():
            torch.testing.assert_close(captured(x), model(x.clone()), rtol=1e-4, atol=1e-4)


# ---- what takes effect and what doesn't


def test_values_written_take_effect():
    model, x = made()
    model.register_buffer("kept", torch.ones(()), persistent=False)
    model.between = lambda self, x: x * self.kept
    captured = capture(model, x, partial=True)
    whole, _ = made()
    one_op = capture(whole, x)
    for m, c in ((model, captured), (whole, one_op)):
        before = c(x)
        with torch.no_grad():
            m.stem.weight.mul_(2)
            m.norm.running_var.mul_(3)
            networks.assert_same(c(x), m, x)
            m.load_state_dict({k: v * 0.5 if v.is_floating_point() else v for k, v in m.state_dict().items()})
            networks.assert_same(c(x), m, x)
            m.blocks[0].ghost1.primary_conv[0].weight.data = m.blocks[0].ghost1.primary_conv[0].weight.data * -1
            networks.assert_same(c(x), m, x)
        assert not torch.allclose(c(x), before, rtol=1e-2)
    before = captured(x)
    model.kept.mul_(3)
    assert not torch.allclose(captured(x), before, rtol=1e-2)
    networks.assert_same(captured(x), model, x)


def test_a_kernel_of_another_size_is_refused():
    model, x = made()
    captured, conv = capture(model, x), model.blocks[0].ghost1.cheap_operation[0]
    kernel = conv.weight.data
    conv.weight.data = torch.randn(*kernel.shape[:2], 5, 5)
    with pytest.raises(
        RuntimeError, match=rf"tensors\[\d+\]: expected {kernel.numel()} elements .* got {conv.weight.numel()}"
    ):
        captured(x)
    conv.weight.data = kernel
    networks.assert_same(captured(x), model, x)


def test_what_is_replaced_does_not():
    model, x = made(lambda self, x: x * self.options["scale"])
    captured = capture(model, x, partial=True)
    before = captured(x)
    model.options["scale"] = 3.0
    model.classifier = nn.Linear(33, 4)
    model.mix.register_forward_hook(lambda mod, args, out: out + 1)
    assert torch.equal(captured(x), before)


def test_the_model_stays_as_it_is():
    model, x = made()
    kinds, state = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    capture(model, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_several_inputs_and_results():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = paper.GhostModule(3, 8), paper.GhostModule(5, 8)

        def forward(self, x, y):
            return {"sum": self.a(x) + self.b(y), "both": (self.a(x), y), "none": None, "number": 3}

    model = Two().eval()
    x, y = torch.randn(2, 3, 5, 5), torch.randn(2, 5, 5, 5)
    captured = capture(model, (x, y), partial=True)
    x, y = torch.randn(2, 3, 5, 5), torch.randn(2, 5, 5, 5)
    torch.testing.assert_close(captured(x, y), model(x, y), rtol=1e-4, atol=1e-5, check_stride=False)
    with pytest.raises(
        ValueError, match=r"expected \(2, 3, 5, 5\) .* and \(2, 5, 5, 5\) .*, got \(2, 3, 5, 5\) torch.float32$"
    ):
        captured(x)


def test_autocast_and_gradients():
    model, x = made()
    captured = capture(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(captured(x), captured(x.clone()))
        assert captured(x).dtype == torch.float32
        assert torch.equal(capture(model, x)(x), captured(x))
    with pytest.raises(ValueError, match="input 0: expected one that asks for no gradient, got requires_grad=True"):
        captured(x.requires_grad_())
    with torch.no_grad():
        networks.assert_same(captured(x), model, x)


# ---- errors


def test_it_names_what_is_wrong():
    model, x = made()
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got function"):
        capture(lambda x: x, x)
    for example in ([x, 1], (), [], (x, 1), None, [[x]]):
        with pytest.raises(
            TypeError, match="example: expected a tensor or a tuple of tensors, or a list of these, got"
        ):
            capture(model, example)
    with pytest.raises(ValueError, match=r"expected the inputs and the model on one device, got \['cpu', 'meta'\]"):
        capture(model, x.to("meta"))
    with pytest.raises(ValueError, match="model: expected it on a CPU or on a GPU, got meta"):
        capture(copy.deepcopy(model).to("meta"), x.to("meta"))
    captured = capture(model, x)
    with pytest.raises(TypeError, match="input 0: expected a tensor on cpu, got list"):
        captured([x])
    with pytest.raises(ValueError, match=r"input 0: expected a dense tensor on cpu, got torch\.strided on meta"):
        captured(x.to("meta"))
    for do in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            do(captured)
    model.blocks[0].ghost1.primary_conv[1].train()
    with pytest.raises(ValueError, match=r"expected eval mode.*in train mode: blocks\.0\.ghost1\.primary_conv\.1"):
        capture(model, x)
    assert str(captured) == "Captured on cpu\n  (3, 3, 21, 18) torch.float32: 1 program"


def writes(self, x):
    self.norm.num_batches_tracked.add_(1)
    return x


NEVER = {
    "the forward writes into norm.num_batches_tracked": writes,
    "can't trace Net": lambda self, x: x * 0.5 if x.mean().item() > 0 else x,
    "computes something else than Net": lambda self, x: x * random.random(),
    "computes something else": lambda self, x: F.dropout(x, 0.5, training=True),
}


@pytest.mark.parametrize("message", NEVER)
def test_what_can_not_be_captured_at_all(message):
    model, x = made(NEVER[message])
    with pytest.raises(NotCaptured, match=message):
        capture(model, x, partial=True)


def test_a_program_that_computes_something_else_is_refused(monkeypatch):
    model, x = made()
    run = ghostfused.ops.encoding.encode

    def wrong(calls, *rest):
        (first, result), *others = calls
        return run([(first._replace(primary_act=0), result), *others], *rest)

    monkeypatch.setattr(ghostfused.ops.encoding, "encode", wrong)
    with pytest.raises(NotCaptured, match=r"computes something else than Net for \(3, 3, 21, 18\)"):
        capture(model, x)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_an_example_that_tells_nothing(value):
    model, x = made()
    captured = capture(model, torch.full_like(x, value))
    networks.assert_same(captured(x), model, x)
    assert captured(x * float("nan")).isnan().all()
    assert TOLERANCES[torch.float32].floor < 1e-6 < relative_error(captured(x), x.new_zeros(3, 7) + 1)


def test_programs_go_with_what_holds_them():
    from ghostfused.backends import cpu

    model, x = made()
    captured = capture(model, x)
    (variant,) = captured._variants.values()
    (kept,) = variant.lowered.programs
    number = kept.number
    del captured, variant, kept
    with pytest.raises(RuntimeError, match="there is none of number"):
        ghostfused.ops.forward_op("cpu", "replay")(x, number)
    assert cpu.extension.module is not None


def test_a_network_that_enlarges_rounding_is_captured():
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 1), torch.nn.BatchNorm2d(16), torch.nn.ReLU()).eval()
    x = 1 + 1e-6 * torch.randn(2, 8, 6, 7)
    with torch.no_grad():
        model[1].running_mean.copy_(model[0](torch.ones(1, 8, 1, 1)).flatten())
    exact = copy.deepcopy(model).double()(x.double())
    assert relative_error(model(x), exact) > 1e-2
    captured = capture(model, x)
    assert relative_error(captured(x), exact) < 4 * relative_error(model(x), exact)
