"""Fused modules on CUDA tensors are replayed as one op, ``ghostfused::replay_cuda``: on a GPU, or with none under ptx-on-cpu."""

from __future__ import annotations

import copy

import pytest
import torch
from cuda_runtime import needs_cuda
from networks import assert_same
from spies import Ops
from torch import Tensor, nn

from ghostfused import FusedGhostModule, fuse
from ghostfused.cli.verify import calibrate
from ghostfused.models import paper
from ghostfused.numerics import TOLERANCES, relative_error

pytestmark = [pytest.mark.cuda, needs_cuda]

FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.fixture(scope="module")
def unfused() -> nn.Module:
    """Two bottlenecks, with all that one may have, and a 1×1 conv between them."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        paper.GhostBottleneck(6, 13, 9, stride=2, se_ratio=0.25),
        nn.Sequential(paper.ConvBnAct(9, 9)),
        nn.Sequential(paper.GhostBottleneck(9, 15, 9)),
    )
    return calibrate(nn.Sequential(blocks), torch.randn(4, 6, 9, 8))


def ops(module: nn.Module, x: Tensor) -> list[str]:
    with torch.inference_mode(), Ops() as called:
        module(x)
    return called.names


def assert_right(out: Tensor, model: nn.Module, x: Tensor) -> None:
    assert_same(out.cpu(), copy.deepcopy(model).to(x.dtype), x)


@pytest.mark.parametrize(
    ("path", "layout", "dtype"),
    [
        (path, layout, (torch.float32, torch.float16)[(i + j) % 2])
        for i, path in enumerate(["0", "0.0", "0.2.0", "0.0.ghost1"])
        for j, layout in enumerate(FORMATS)
    ],
)
def test_same_bits(unfused, path, layout, dtype):
    module = fuse(unfused).to(dtype).cuda().get_submodule(path)
    channels = next(module.parameters()).shape[1]
    for size in ((2, channels, 7, 5), (1, channels, 9, 8), (3, channels, 1, 1)):  # one program serves all sizes
        x = torch.randn(size).to(dtype, memory_format=FORMATS[layout])
        on_gpu = x.cuda()
        with torch.no_grad():
            outs = [module(on_gpu), module(on_gpu), module(on_gpu)]
            assert ops(module, on_gpu) == ["ghostfused.replay_cuda"]
        with torch.inference_mode():
            outs.append(module(on_gpu))
        for out in outs[1:]:
            assert torch.equal(out.cpu(), outs[0].cpu())
            assert out.stride() == outs[0].stride()
        assert_right(outs[-1], unfused.get_submodule(path), x)


def test_on_a_named_backend(unfused):
    module = fuse(unfused, backend="cuda").cuda()[0]
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        first, second = module(x.cuda()), module(x.cuda())
    assert ops(module, x.cuda()) == ["ghostfused.replay_cuda"]
    assert torch.equal(first.cpu(), second.cpu())
    assert_right(second, unfused[0], x)


@pytest.mark.parametrize("how", ["data", "in place", "attribute"])
def test_a_change_takes_effect(unfused, how):
    module, changed = fuse(unfused).cuda()[0], copy.deepcopy(unfused)[0]
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        module(x.cuda())
        before = module(x.cuda())
        bn, own = module[0].ghost1.primary_conv[1], changed[0].ghost1.primary_conv[1]
        own.weight.mul_(-2)
        if how == "data":
            bn.weight.data = own.weight.data.cuda()
        elif how == "in place":
            bn.weight.copy_(own.weight)
        else:
            bn.weight = nn.Parameter(own.weight.cuda())
        after = module(x.cuda())
        again = module(x.cuda())
    assert not torch.equal(after.cpu(), before.cpu())
    assert torch.equal(after.cpu(), again.cpu())
    assert_right(after, changed, x)


def test_wrong_inputs_are_named(unfused):
    module = fuse(unfused).cuda()[0]
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        module(x.cuda())
        expected = module(x.cuda())
        for wrong in (x[:, :5].contiguous(), x[0], x.double()):
            with pytest.raises((TypeError, ValueError), match="expected") as replayed:
                module(wrong.cuda())
            with torch.enable_grad(), pytest.raises(replayed.type) as afresh:
                module(wrong.cuda())
            assert str(replayed.value) == str(afresh.value)
        assert torch.equal(module(x.cuda()).cpu(), expected.cpu())  # goes on as before


@pytest.mark.parametrize(("first", "then"), [("high", "highest"), ("highest", "high")])
def test_tf32_setting_takes_effect(first, then):
    """A float32 module computes in TF32 while the setting allows it, replayed or not."""
    torch.set_float32_matmul_precision("highest")
    module = FusedGhostModule(64, 32).eval()
    x = torch.randn(1, 64, 6, 6)
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(x.double())
    fresh, on_gpu = copy.deepcopy(module).cuda(), x.cuda()
    module.cuda()
    with torch.no_grad():
        torch.set_float32_matmul_precision(first)
        for _ in range(2):
            before = module(on_gpu)
        assert ops(module, on_gpu) == ["ghostfused.replay_cuda"]
        torch.set_float32_matmul_precision(then)
        after, expected = module(on_gpu), fresh(on_gpu)
    assert torch.equal(after.cpu(), expected.cpu())
    errors = {first: relative_error(before.cpu(), exact), then: relative_error(after.cpu(), exact)}
    assert errors["highest"] <= TOLERANCES[torch.float32].floor < errors["high"] <= TOLERANCES["tf32"].floor
