"""What a fused module ran is replayed as one op: the same bits, and only while nothing about the module has changed."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import networks
import pytest
import torch
import torch.nn.utils.parametrizations
from spies import Ops, needs_cpu_kernels, replays
from torch import nn

from ghostfused import FusedGhostBottleneck, FusedGhostModule, fuse, ops, unfuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.nn.bottleneck import FusedConvNormAct
from ghostfused.nn.sequential import FusedSequential
from ghostfused.ops import encoding
from ghostfused.spec import Act

pytestmark = needs_cpu_kernels


def bottlenecks() -> nn.Module:
    """Two bottlenecks, with all that one may have, and a 1×1 conv between them, in a Sequential inside a model."""
    model = nn.Sequential(
        nn.Sequential(
            paper.GhostBottleneck(6, 13, 9, stride=2, se_ratio=0.25),
            nn.Sequential(paper.ConvBnAct(9, 9)),
            nn.Sequential(paper.GhostBottleneck(9, 15, 9)),
        )
    )
    return fuse(calibrate(model, torch.randn(4, 6, 9, 8)))


@pytest.mark.parametrize("path", ["0", "0.0", "0.1.0", "0.2.0", "0.0.ghost1"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits(path, channels_last):
    module = bottlenecks().get_submodule(path)
    channels = next(module.parameters()).shape[1]
    for n, h, w in ((2, 7, 5), (1, 9, 8), (3, 1, 1)):  # one program serves all sizes
        x = torch.randn(n, channels, h, w)
        if channels_last:
            x = x.to(memory_format=torch.channels_last)
        expected = module(x).detach()  # with gradients: read afresh
        with torch.no_grad():
            first, second = module(x), module(x)
        assert replays(module, x)
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)
        assert second.stride() == expected.stride()
        with torch.inference_mode():
            assert torch.equal(module(x), expected)


def rewrite(module, name, change):
    """Puts ``change`` of a parameter or buffer in its place."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    t = getattr(owner, leaf)
    new = change(t.detach().clone())
    setattr(owner, leaf, nn.Parameter(new) if isinstance(t, nn.Parameter) else new)


def in_place(module):
    with torch.no_grad():
        module.ghost1.primary_conv[0].weight.mul_(2)


def squeezed(module):
    """Another tensor under the same parameter, as ``Module.to`` does it."""
    module.se.conv_expand.bias.data = module.se.conv_expand.bias.data - 5
    module.se.conv_reduce.weight.data = -module.se.conv_reduce.weight.data


def another_forward(module):
    relu = module.ghost1.primary_conv[2]
    relu.forward = torch.neg


def without_norm(module):
    module.ghost1.cheap_operation[1] = nn.Identity()


def parametrized(module):
    conv = torch.nn.utils.parametrizations.weight_norm(module.ghost1.primary_conv[0])
    with torch.no_grad():
        conv.parametrizations.weight.original0.mul_(3)


CHANGES = {
    "in_place": in_place,
    "other_storage": squeezed,
    "parameter": lambda m: rewrite(m, "ghost2.cheap_operation.0.weight", torch.neg),
    "buffer": lambda m: rewrite(m, "ghost1.primary_conv.1.running_mean", lambda t: t + 1),
    "eps": lambda m: setattr(m.ghost1.primary_conv[1], "eps", 1.0),
    "train": lambda m: m.train(),
    "train_one": lambda m: m.ghost1.primary_conv[1].train(),
    "hook": lambda m: m.ghost1.primary_conv[1].register_forward_hook(lambda mod, args, out: out + 1),
    "pre_hook": lambda m: m.ghost2.register_forward_pre_hook(lambda mod, args: args[0] + 1),
    "forward": another_forward,
    "activation": lambda m: m.ghost1.primary_conv.__setitem__(2, nn.SiLU()),
    "class": lambda m: setattr(m.ghost1.primary_conv[2], "__class__", nn.Hardswish),
    "no_norm": without_norm,
    "parametrized": parametrized,
    "no_statistics": lambda m: vars(m.ghost1.primary_conv[1])["_buffers"].update(running_mean=None, running_var=None),
    "assigned": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}, assign=True),
    "backend": lambda m: setattr(m.ghost1, "backend", "reference"),
    "folded": lambda m: setattr(m.ghost2, "out_channels", 8),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole", [False, True])
def test_a_change_takes_effect(change, whole):
    model = bottlenecks()
    inner = model[0][0]
    module = model if whole else inner
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        before = module(x)
        assert torch.equal(module(x), before)
        CHANGES[change](inner)
        if change == "folded":  # an output that no longer fits the shortcut's
            with pytest.raises((ValueError, RuntimeError)):
                module(x)
            return
        expected = copy.deepcopy(module)(x)  # a copy remembers nothing
        outputs = [module(x) for _ in range(3)]
    if change == "train_one":  # its running statistics move with every call, not the output
        expected = outputs[0]
    for out in outputs:
        assert torch.equal(out, expected)
    if change != "backend":
        assert not torch.allclose(expected, before, rtol=1e-3)


def test_changed_back_is_replayed_again():
    module, x = bottlenecks()[0], torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        before = module(x)
        handle = module[0].ghost1.register_forward_hook(lambda mod, args, out: out * 2)
        assert not torch.equal(module(x), before)
        handle.remove()
        module.train()
        module(x)
        module.eval()
        calibrated = module(x)
    assert replays(module, x)
    with torch.no_grad():
        assert torch.equal(module(x), calibrated)


def test_another_kernel_size_is_recorded_anew():
    module, x = bottlenecks()[0][0], torch.randn(2, 6, 9, 8)
    conv = module.ghost1.cheap_operation[0]
    with torch.no_grad():
        module(x)
        conv.weight.data, conv.padding = torch.randn(*conv.weight.shape[:2], 5, 5), (2, 2)
        first = module(x)
        # the padding is another one: the program must not run
        conv.weight.data = conv.weight.data[..., 1:4, 1:4].contiguous()
        with pytest.raises((ValueError, RuntimeError)):
            module(x)
        conv.padding = (1, 1)
        assert not torch.allclose(module(x), first, rtol=1e-3)
        expected = copy.deepcopy(module)(x)
        assert torch.equal(module(x), expected)
    assert replays(module, x)


def test_hooks_inside_see_every_call():
    module, x, seen = bottlenecks()[0], torch.randn(1, 6, 5, 5), []
    with torch.no_grad():
        module(x)
        module[2][0].ghost1.register_forward_hook(lambda mod, args, out: seen.append(tuple(out.shape)))
        for _ in range(3):
            module(x)
    assert seen == [(1, 15, 3, 3)] * 3


def test_read_afresh_where_a_program_would_be_wrong():
    model, x = bottlenecks(), torch.randn(2, 6, 9, 8)
    module = model[0]
    with torch.no_grad():
        expected = module(x)
    assert replays(module, x)
    with Ops() as called:
        assert module(x).requires_grad
    assert "ghostfused.replay_cpu" not in called.names
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert module.double()(x.double()).dtype == torch.float64
        back = module.float()(x)
        torch.testing.assert_close(back, expected)
        other = {name: t * 0.5 for name, t in module.state_dict().items() if t.is_floating_point()}
        swapped = torch.func.functional_call(module, other, (x,))
        assert not torch.allclose(swapped, expected, rtol=1e-3)
        assert torch.equal(module(x), back)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), back)
    traced = torch.fx.symbolic_trace(module)
    with torch.no_grad():
        assert torch.equal(traced(x), back)


def test_a_wrong_input_is_named():
    module, x = bottlenecks()[0], torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        module(x)
        with pytest.raises(
            ValueError, match=r"x: expected 6 channels, for primary_weight .*, got 5 \(shape \(2, 5, 9, 8\)\)"
        ):
            module(x[:, :5])
        with pytest.raises(ValueError, match="x: expected 4 dimensions"):
            module(x[0])
    assert replays(module, x)


def test_copies_and_pickles_remember_nothing():
    module, x = bottlenecks()[0], torch.randn(2, 6, 9, 8)
    fresh = len(pickle.dumps(module))
    with torch.no_grad():
        module(x)
        expected = module(x)
    assert len(pickle.dumps(module)) == fresh
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            assert torch.equal(other(x), expected)
            next(other.parameters()).mul_(3)
            assert not torch.equal(other(x), expected)
    assert torch.equal(module(x).detach(), expected)


def test_a_deleted_model_is_gone_at_once():
    module, x = bottlenecks(), torch.randn(1, 6, 9, 8)
    with torch.no_grad():
        for _ in range(2):
            module(x)
    assert replays(module, x)
    weights = [weakref.ref(p) for p in module.parameters()]
    gc.collect()
    gc.disable()  # no search for cycles: there are none
    try:
        del module
        assert not [ref for ref in weights if ref() is not None]
    finally:
        gc.enable()


def test_threads_share_a_module():
    module = bottlenecks()[0]
    inputs = [torch.randn(1, 6, 9 + i % 3, 8) for i in range(24)]
    expected = [module(x).detach() for x in inputs]

    def call(x):
        with torch.no_grad():
            return module(x)

    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(call, inputs))
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_in_pieces_is_the_batch(threads, layout):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for path in ("0", "0.0.ghost1"):
            module = bottlenecks().get_submodule(path)
            for batch in (0, 1, 2, 5, 9, 16):
                x = torch.randn(2 * batch, 6, 7, 8)[::2].to(memory_format=layout)
                expected = module(x).detach()
                with torch.no_grad():
                    module(x)
                    out = module(x)
                assert replays(module, x)
                assert torch.equal(out, expected)
                assert out.stride() == expected.stride()
            x, tensors, code, numbers = calls_of(module, torch.randn(13, 6, 7, 8))
            with pytest.raises(RuntimeError, match="code: step 0: there is no op 99"):
                ops.forward_op("cpu", "program")(x, tensors, [99, *code[1:]], numbers)
    finally:
        torch.set_num_threads(before)


# ---- FusedSequential


def test_a_network_is_one_op_and_a_few_layers():
    model = networks.network("ghostnet_050")
    fused, x = fuse(model), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        fused(x)
        with Ops() as called:
            out = fused(x)
    assert [name for name in called.names if name.startswith("ghostfused.")] == ["ghostfused.replay_cpu"]
    assert len(called.names) < 16, called.names
    networks.assert_same(out, model, x)


def test_sequences_keep_their_members_and_go_again():
    model = bottlenecks()
    sequence = model[0]
    assert type(sequence) is FusedSequential
    assert [type(m) for m in (sequence[0], sequence[1][0], sequence[2][0])] == [
        FusedGhostBottleneck, FusedConvNormAct, FusedGhostBottleneck,
    ]  # fmt: skip
    assert type(fuse(model)[0]) is FusedSequential
    plain = unfuse(model)
    assert [type(m) for m in (plain[0], plain[0][0], plain[0][1][0])] == [
        nn.Sequential, paper.GhostBottleneck, paper.ConvBnAct,
    ]  # fmt: skip
    assert plain.state_dict().keys() == model.state_dict().keys()


def test_a_sequence_with_anything_else_in_it_stays():
    block = paper.GhostBottleneck(6, 12, 6)
    other = nn.Sequential(copy.deepcopy(block), nn.AvgPool2d(2), copy.deepcopy(block))
    pair = nn.Sequential(copy.deepcopy(block), copy.deepcopy(block))
    fused = fuse(nn.Sequential(other, nn.Sequential(pair, nn.Dropout())).eval())
    assert type(fused[0]) is nn.Sequential
    assert type(fused[1]) is nn.Sequential
    assert type(fused[1][0]) is FusedSequential
    assert type(fuse(nn.Sequential(pair).eval(), level="module")[0]) is nn.Sequential
    left = fuse(nn.Sequential(pair).eval(), filter_fn=lambda fqn, m: type(m) is not nn.Sequential)
    assert type(left[0]) is nn.Sequential
    alone = fuse(copy.deepcopy(pair).eval())
    assert isinstance(alone, nn.Sequential)
    assert not isinstance(alone, FusedSequential), "the model itself stays the object that it is"


# ---- the op


def calls_of(module: nn.Module, x: torch.Tensor) -> tuple:
    with torch.no_grad():
        module(x)
    (kept,) = module._cache._state.programs.values()
    return x, *kept.program


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    arguments = calls_of(bottlenecks()[0], torch.randn(2, 6, 9, 8))
    x, tensors, *rest = arguments
    torch.library.opcheck(ops.forward_op(backend, "program"), (x, [t.detach() for t in tensors], *rest))


def test_the_op_equals_its_calls():
    x, *arguments = calls_of(bottlenecks()[0], torch.randn(2, 6, 9, 8))
    out = ops.forward_op("cpu", "program")(x, *arguments)
    by_steps = encoding.run_program(lambda args: ops.forward_op("cpu", args.op)(*args), x, *arguments)
    assert torch.equal(out, by_steps)
    reference = ops.forward_op("reference", "program")(x, *arguments)
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)


def test_a_result_read_twice_by_its_last_reader():
    module, x = FusedGhostModule(4, 4, act_primary=Act.SILU).eval(), torch.randn(1, 4, 5, 5)
    args = calls_of(module, x)
    encoded = []
    with torch.no_grad():
        y = module(x)
        ghost = encoding.run_program(lambda a: encoded.append(a) or a.new_output(), *args) is not None and encoded[0]
        calls = [(ghost._replace(x=x), y)]
        z = ops.forward_op("cpu")(*ghost._replace(x=y, residual=y))
        calls.append((ghost._replace(x=y, residual=y), z))
        known = {id(t) for t in (*module.parameters(), *module.buffers())}
        assert torch.equal(ops.forward_op("cpu", "program")(x, *encoding.encode(calls, x, known)), z)
        foreign = [(ghost._replace(x=x, residual=torch.randn(1, 4, 5, 5)), y)]
        assert encoding.encode(foreign, x, known) is None, "a tensor that is nobody's"
        assert encoding.encode([], x, known) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda code: [99, *code[1:]], "code: step 0: there is no op 99"),
        (lambda code: [], "code: expected at least one call"),
        (lambda code: code[:-1], "code: step 0 .forward.: "),
        (lambda code: [code[0], 2000, *code[2:]], "code: step 0 .forward.: "),
        (lambda code: [code[0], -1, *code[2:]], "code: step 0 .forward.: x: expected a tensor"),
    ],
)
def test_a_wrong_program_is_refused(change, message):
    x, tensors, code, numbers = calls_of(FusedGhostModule(4, 8).eval(), torch.randn(1, 4, 5, 5))
    with pytest.raises(RuntimeError, match=message):
        ops.forward_op("cpu", "program")(x, tensors, change(code), numbers)
