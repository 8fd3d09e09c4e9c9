"""A whole network replayed as one op on the CPU: what it hears of PyTorch's own layers, and what it must not leave out."""

import copy
import pickle

import networks
import pytest
import torch
import torch.nn.functional as F
from test_replay import Ops, pytestmark  # noqa: F401
from torch import nn

from ghostfused import FusedGhostBottleneck, fuse, ops, program, reference, unfuse
from ghostfused.models import paper
from ghostfused.network import FusedNetwork
from ghostfused.spec import GlobalPoolArgs, LinearArgs
from ghostfused.testing import TOLERANCES, relative_error
from ghostfused.verify import calibrate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Net(nn.Module):
    """A stem, bottlenecks, a head and a classifier, with what a forward may do between them."""

    def __init__(self, between=lambda self, x: x, act=nn.ReLU, kernel=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 9, kernel, 2, kernel // 2, bias=False)
        self.norm, self.act = nn.BatchNorm2d(9), act()
        self.blocks = nn.Sequential(paper.GhostBottleneck(9, 20, 12, stride=2, se_ratio=0.25))
        self.mix = nn.Conv2d(12, 12, 5, padding=2, groups=12)
        self.pool, self.head, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 33, 1), nn.Flatten()
        self.dropout, self.classifier = nn.Dropout(), nn.Linear(33, 7)
        self.between, self.calls = between, 0

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.between(self, x)
        x = F.hardswish(self.mix(self.blocks(x)))
        x = F.relu6(self.head(self.pool(x)), inplace=True)
        return self.classifier(self.dropout(self.flatten(x)))


def made(*args, **kwargs) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A network, its fused copy, and an input."""
    model = calibrate(Net(*args, **kwargs), torch.randn(4, 3, 21, 18))
    return model, fuse(model), torch.randn(3, 3, 21, 18)


def replays(module: nn.Module, x: torch.Tensor) -> bool:
    with torch.no_grad(), Ops() as called:
        module(x)
    return called.names == ["ghostfused.replay_cpu"]


def check(model, fused, x) -> None:
    """The first call, which is recorded, and those after it."""
    with torch.no_grad():
        first = fused(x)
        assert torch.equal(fused(x), first)
    assert replays(fused, x)
    networks.assert_same(first, model, x)


@pytest.mark.parametrize("act", [nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_op(dtype, layout, act):
    model, fused, x = made(act=act)
    model, fused = (m.to(dtype, memory_format=layout) for m in (model, fused))
    check(model, fused, x.to(dtype, memory_format=layout))


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_stems_and_shapes(kernel):
    model, fused, _ = made(kernel=kernel)
    for shape in ((1, 3, 21, 18), (3, 3, 21, 18), (9, 3, 8, 8), (2, 3, 1, 1), (2, 3, 40, 3)):
        check(model, fused, torch.randn(shape))
        check(model, fused, torch.randn(2 * shape[0], *shape[1:])[::2])
    assert 5 <= len(fused._replay._state.programs) <= 6


@pytest.mark.parametrize("name", ["ghostnet_050", "ghostnetv3_050", "mobilenetv3_small_050"])
def test_real_networks(name):
    model = networks.network(name)
    fused, x = fuse(model), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        networks.assert_same(fused(x), model, x)
        networks.assert_same(fused(x), model, x)
    if name == "ghostnet_050":
        assert replays(fused, x)
    assert isinstance(fused, FusedNetwork) == name.startswith("ghostnet")


def in_place(self, x):
    x[:, 0] = 1
    return x


def reads(self, x):
    return x * 0.5 if x.mean().item() > 0 else x


def counts(self, x):
    self.calls += 1
    return x


LEFT_OUT = {
    "unknown function": lambda self, x: x.sort(dim=1).values,
    "in place": in_place,
    "in place through a view": lambda self, x: x[:, :2].neg_() is x or x,
    "reads numbers": reads,
    "random": lambda self, x: F.dropout(x, 0.5, training=True),
    "settings of one number": lambda self, x: F.conv2d(x, self.mix.weight[:9], None, (1,), (2,), (1,), 9),
    "a mean by one dimension": lambda self, x: x.mean(1, keepdim=True) + x.mean((0, 2, 3), keepdim=True) + x,
    "another padding": lambda self, x: F.conv2d(x, self.stem.weight[:, :1].repeat(1, 9, 1, 1), padding=2),
    "a weight made at every call": lambda self, x: F.conv2d(x, self.mix.weight[:9] * 2, padding=2, groups=9),
    "used twice": lambda self, x: F.relu(x) + x,
    "read before it changes": lambda self, x: (x.clone(), x.relu_())[0],
    "data": lambda self, x: setattr(x, "data", -x) or x,
}


@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_no_step_stands_for_still_runs(what):
    model, fused, x = made(LEFT_OUT[what], act=nn.Identity)
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(3, 3, 21, 18) + seed - 1
            torch.manual_seed(seed)
            expected = model(x)
            torch.manual_seed(seed)
            torch.testing.assert_close(fused(x), expected, rtol=1e-3, atol=1e-4)
    assert not replays(fused, x)


class Between(nn.Module):
    """A bottleneck with an activation in place that no op takes in."""

    def __init__(self):
        super().__init__()
        self.ghost1, self.act = paper.GhostModule(6, 14, relu=False), nn.ELU(inplace=True)
        self.ghost2 = paper.GhostModule(14, 6, relu=False)

    def forward(self, x):
        return self.ghost2(self.act(self.ghost1(x))) + x


def test_an_activation_in_place_inside_a_bottleneck():
    model = nn.Sequential(calibrate(Between(), torch.randn(4, 6, 9, 8)))
    fused, x = fuse(model), torch.randn(2, 6, 9, 8)
    assert isinstance(fused[0], FusedGhostBottleneck)
    for module in (fused, fused[0]):
        with torch.no_grad():
            for _ in range(3):
                networks.assert_same(module(x), model, x)
        assert not replays(module, x)


def test_a_forward_may_look_at_the_shape():
    model, fused, _ = made(lambda self, x: x if x.shape[-1] > 8 else F.relu6(-x), act=nn.Identity)
    for width in (18, 12, 18, 12):
        x = torch.randn(2, 3, 21, width)
        with torch.no_grad():
            networks.assert_same(fused(x), model, x)


def test_a_module_that_changes_with_every_call_is_left_alone():
    model, fused, x = made(counts)
    before = fused.calls
    with torch.no_grad():
        for _ in range(70):
            fused(x)
    networks.assert_same(fused(x), model, x)
    assert fused._replay._misses == 64
    assert fused.calls == before + 71


CHANGES = {
    "weight": lambda m: m.stem.weight.data.mul_(2),
    "eps": lambda m: setattr(m.norm, "eps", 1.0),
    "classifier": lambda m: setattr(m, "classifier", nn.Linear(33, 4)),
    "stride": lambda m: setattr(m.stem, "stride", (1, 1)),
    "hook": lambda m: m.norm.register_forward_hook(lambda mod, args, out: out + 1),
    "forward": lambda m: setattr(m.act, "forward", torch.neg),
    "between": lambda m: setattr(m, "between", lambda self, x: x * 2),
    "loaded": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
    "train": lambda m: m.norm.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change):
    model, fused, x = made()
    with torch.no_grad():
        before = fused(x)
        assert torch.equal(fused(x), before)
        torch.manual_seed(1)
        CHANGES[change](fused)
        torch.manual_seed(1)
        CHANGES[change](model)
        for _ in range(3):
            out = fused(x)
            torch.testing.assert_close(out, model(x), rtol=1e-3, atol=1e-4)
    assert out.shape != before.shape or not torch.allclose(out, before, rtol=1e-2)


def test_hooks_on_all_modules_see_every_call():
    model, fused, x = made()
    with torch.no_grad():
        before = fused(x)
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
        try:
            for _ in range(2):
                torch.testing.assert_close(fused(x), before, rtol=1e-4, atol=1e-5)
        finally:
            handle.remove()
    assert seen.count(fused.stem) == seen.count(fused.classifier) == 2
    check(model, fused, x)


def test_an_input_of_nan_decides_nothing():
    model, fused, x = made()
    with torch.no_grad():
        assert fused(x * float("nan")).isnan().all()
    check(model, fused, x)
    assert fused(x * float("nan")).isnan().all()


@pytest.mark.parametrize("change", [{"stride": 1}, {"groups": 2}])
def test_a_program_that_computes_something_else_or_nothing_is_not_kept(change, monkeypatch):
    model, fused, x = made()
    run = program.encode

    def wrong(calls, *rest):
        (first, result), *others = calls
        if first.x is x:  # the stem, not the bottlenecks that are replayed in the network's place
            first = first._replace(**change)
        return run([(first, result), *others], *rest)

    monkeypatch.setattr(program, "encode", wrong)
    with torch.no_grad():
        for _ in range(2):
            networks.assert_same(fused(x), model, x)
    assert not replays(fused, x)


def test_swapped_tensors():
    model, fused, x = made()
    with torch.no_grad():
        fused(x)
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            fused.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
            model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()})
            check(model, fused, x)
            fused.to(torch.bfloat16)
            check(model.to(torch.bfloat16), fused, x.to(torch.bfloat16))
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)


def test_the_model_stays_what_it_is():
    model, fused, x = made()
    model.between = fused.between = torch.nn.Module.__call__  # something that can be pickled, and isn't called
    model.between = fused.between = _same
    assert isinstance(fused, Net)
    assert repr(fused).startswith("Net(")
    assert fused._get_name() == "Net"
    assert fuse(fused, inplace=True) is fused
    assert type(fuse(fused)) is type(fused)
    check(model, fused, x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused)
        check(model, other, x)
    plain = copy.deepcopy(model)
    assert fuse(plain, inplace=True) is plain
    check(model, plain, x)
    assert unfuse(plain, inplace=True) is plain
    assert type(plain) is Net
    assert "_replay" not in vars(plain)
    assert plain.state_dict().keys() == fused.state_dict().keys() == model.state_dict().keys()
    nested = fuse(nn.Sequential(fused, nn.ReLU()))
    assert type(unfuse(nested)[0]) is Net
    for off in ({"level": "module"}, {"level": "bottleneck"}, {"filter_fn": lambda fqn, m: bool(fqn)}):
        assert type(fuse(model, **off)) is Net


def _same(self, x):
    return x


# ---- the steps that are no ops of their own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_and_linear_steps(dtype):
    for n, c, h, w, m in ((1, 3, 7, 7, 5), (2, 40, 1, 1, 70), (5, 33, 6, 11, 1), (7, 130, 3, 2, 20)):
        for layout in (torch.contiguous_format, torch.channels_last):
            buffer = torch.randn(n, c, h + 1, w + 2).to(dtype, memory_format=layout)
            x, weight, bias = buffer[:, :, 1:, 1:-1], torch.randn(m, c).to(dtype), torch.randn(m).to(dtype)
            for b, matrix in ((bias, weight), (None, weight.T.contiguous().T), (bias[:1].expand(m), weight)):
                y = torch.empty(0)
                calls = [(GlobalPoolArgs(x), pooled := torch.empty(n, c, 1, 1)), (LinearArgs(pooled, matrix, b), y)]
                known = {id(matrix), id(b)}
                out = ops.forward_op("cpu", "program")(x, *program.encode(calls, x, known))
                exact = F.linear(x.double().mean((2, 3)), matrix.double(), None if b is None else b.double())
                own = F.linear(x.mean((2, 3)), matrix, b)
                tolerance = TOLERANCES[dtype]
                assert relative_error(out, exact) <= tolerance.factor * relative_error(own, exact) + tolerance.floor
                pool = program.encode(calls[:1], x, known)
                out = ops.forward_op("cpu", "program")(x, *pool)
                assert out.shape == (n, c, 1, 1)
                exact = reference.run(GlobalPoolArgs(x.double()))
                assert (
                    relative_error(out, exact)
                    <= tolerance.factor * relative_error(reference.run(GlobalPoolArgs(x)), exact) + tolerance.floor
                )


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (LinearArgs(torch.randn(2, 5), torch.randn(3, 4), None), "x: expected shape"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4), torch.randn(2)), "bias: expected shape"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4).double(), None), "weight: expected x's dtype"),
        (LinearArgs(torch.randn(2, 4), torch.randn(3, 4, 1), None), "weight: expected 2 dimensions"),
        (GlobalPoolArgs(torch.randn(2, 4)), "x: expected 4 dimensions"),
    ],
)
def test_steps_name_what_does_not_fit(step, message):
    known = {id(t) for t in step.tensors}
    with pytest.raises(RuntimeError, match=message):
        ops.forward_op("cpu", "program")(step.x, *program.encode([(step, torch.empty(0))], step.x, known))


def test_replay_is_an_op_with_a_fake():
    _, fused, x = made()
    with torch.no_grad():
        fused(x)
        (kept,) = fused._replay._state.programs.values()
        torch.library.opcheck(ops.forward_op("cpu", "replay"), (x, kept.number))
        number = kept.number
        del kept
        fused._replay.forget()
        with pytest.raises(RuntimeError, match=f"program: there is none of number {number}"):
            ops.forward_op("cpu", "replay")(x, number)
