"""What users do to a FusedGhostModule: change its weights and children, copy, save, cast it, wrap it in DDP."""

import copy
import io
import pickle

import pytest
import torch
from modules import FLOAT64, example, independent_copy, runs_fused, unfused
from torch import nn
from torch.nn.utils import prune as pruning

from ghostfused.numerics import TOLERANCES, relative_error

# ---- nothing goes stale


def change_in_place(m):
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1.5).add_(0.1)


def change_statistics(m):
    m.primary_conv[1].running_var.fill_(3.0)
    m.cheap_op[1].running_mean = torch.ones_like(m.cheap_op[1].running_mean)


def change_data(m):
    m.primary_conv[0].weight.data = -m.primary_conv[0].weight.data


def step(m):
    optimizer = torch.optim.SGD(m.parameters(), 0.5)
    m(torch.randn(2, 6, 4, 4, dtype=torch.float64)).square().mean().backward()
    optimizer.step()


def load(m):
    m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()})


def load_assign(m):
    m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True)


def replace_parameter(m):
    m.primary_conv[0].weight = nn.Parameter(torch.randn(6, 6, 1, 1, dtype=torch.float64))


def replace_conv(m):
    m.primary_conv[0] = nn.Conv2d(6, 6, 1, bias=True).double()


def replace_activation(m):
    m.cheap_op[2] = nn.LeakyReLU(0.2)


def change_eps(m):
    m.primary_conv[1].eps = 0.5


def fold_norm(m):
    m.primary_conv[0] = torch.nn.utils.fuse_conv_bn_eval(*m.primary_conv[:2])
    m.primary_conv[1] = nn.Identity()


def pad_by_reflection(m):
    m.cheap_op[0].padding_mode = "reflect"


def parametrize(m):
    torch.nn.utils.parametrizations.weight_norm(m.primary_conv[0])


def hook(m):
    m.cheap_op[0].register_forward_hook(lambda module, inputs, out: out * 2)


def hook_on_half(m):
    m.primary_conv.register_forward_pre_hook(lambda module, inputs: inputs[0] + 1)


def replace_forward(m):
    conv = m.primary_conv[0]
    forward = conv.forward
    conv.forward = lambda x: forward(x) * 3


def append_layer(m):
    m.cheap_op.append(nn.Tanh())


def prune(m):
    pruning.l1_unstructured(m.primary_conv[0], "weight", 0.5)


def sync_norm(m):
    m = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert isinstance(m.cheap_op[1], nn.SyncBatchNorm)


FUSED_AFTER = [
    change_in_place, change_statistics, change_data, step, load, load_assign, replace_parameter, replace_conv,
    replace_activation, change_eps, fold_norm, sync_norm,
]  # fmt: skip
UNFUSED_AFTER = [
    pad_by_reflection, parametrize, hook, hook_on_half, replace_forward, append_layer, prune,
]  # fmt: skip


@pytest.mark.parametrize("change", FUSED_AFTER + UNFUSED_AFTER, ids=lambda f: f.__name__)
def test_changes_take_effect(change):
    m, x = example()
    before = m(x)
    change(m)
    assert runs_fused(m) == (change in FUSED_AFTER)
    assert ("one by one" in repr(m)) == (change in UNFUSED_AFTER)
    after = m(x)
    torch.testing.assert_close(after, unfused(m, x), **FLOAT64)
    if change not in (fold_norm, sync_norm, parametrize):
        assert (after - before).abs().max() > 1e-6


def test_hooks_on_the_module_and_its_children_fire():
    m, x = example()
    seen = []
    m.register_forward_pre_hook(lambda *_: seen.append("pre"))
    m.primary_conv[1].register_forward_hook(lambda *_: seen.append("inner"))
    m.register_forward_hook(lambda *_: seen.append("post"))
    m(x)
    assert seen == ["pre", "inner", "post"]


# ---- copies, files, dtypes, layouts


def through_file(m):
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file])
@pytest.mark.parametrize("keys", ["seed", "ultralytics"])
def test_copies_are_independent(duplicate, keys):
    m, x = example(keys=keys, act_cheap=nn.LeakyReLU(0.3), backend="reference")
    twin = independent_copy(m, x, duplicate)
    assert (twin.backend, twin.out_channels, repr(twin)) == (m.backend, m.out_channels, repr(m))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    m, x = example(torch.float32)
    x = x.to(dtype)
    for norms_in_float32 in (False, True):
        m.to(dtype)
        if norms_in_float32:
            for bn in (m.primary_conv[1], m.cheap_op[1]):
                bn.float()
        out = m(x)
        assert out.dtype == dtype
        assert runs_fused(m)
        expected = unfused(copy.deepcopy(m).double(), x.double())
        tolerance = TOLERANCES[dtype]
        own_error = relative_error(unfused(m, x), expected)
        assert relative_error(out, expected) <= max(tolerance.factor * own_error, tolerance.floor)


def test_channels_last():
    m, x = example(torch.float32)
    x = x.to(memory_format=torch.channels_last)
    for m_ in (m, copy.deepcopy(m).to(memory_format=torch.channels_last)):
        out = m_(x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, unfused(m_, x))


@pytest.mark.usefixtures("trained_by_kernels")
def test_autocast():
    m, x = example(torch.float32)
    for training in (False, True):
        m.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            out = m(x)
            assert out.dtype == torch.bfloat16
            torch.testing.assert_close(out, unfused(m, x), rtol=2**-6, atol=2**-6)


def test_functional_call():
    m, x = example()
    other = {k: v * 1.5 if v.is_floating_point() else v for k, v in m.state_dict().items()}
    twin = copy.deepcopy(m)
    twin.load_state_dict(other)
    torch.testing.assert_close(torch.func.functional_call(m, other, (x,)), twin(x), **FLOAT64)


def test_distributed_data_parallel(training, tmp_path):
    m, x = example()
    twin = copy.deepcopy(m)
    m.train(training), twin.train(training)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(m)
        wrapped(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    unfused(twin, x).square().sum().backward()
    for a, b in zip(m.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, **FLOAT64)
