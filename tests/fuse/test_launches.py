"""How many operations, each at least one kernel, a forward takes: counted at the dispatcher, with no GPU."""

import functools
from unittest import mock

import pytest
import torch
import users_networks
from public_networks import FAMILIES

from bench import cases, launches
from ghostfused import fuse
from ghostfused.backends import BACKENDS
from ghostfused.models import paper
from ghostfused.ops import OPS
from tools.sass import tables

AT_MOST = {
    "timm_ghostnet_100": 80,
    "paper": 80,
    "seed": 90,
    "timm_ghostnetv2_100": 150,
    "timm_ghostnetv3_050": 150,
}


def on_backend(fused, backend):
    for m in fused.modules():
        if hasattr(m, "backend"):
            m.backend = backend


def count(model, backend, size=64):
    with launches.as_if_available(backend):
        meta = cases.Setting("meta").place(model.eval())
        return launches.count_ops(launches.calls_of(meta, torch.empty(1, 3, size, size, device="meta")))


@pytest.mark.parametrize("network", AT_MOST)
def test_kernels_of_a_fused_network(network):
    model = FAMILIES[network][0]().eval()
    eager, fused = count(model, None).total(), fuse(model)
    for backend in ("cuda", "triton", "cpu"):
        on_backend(fused, backend)
        kernels = count(fused, backend).total()
        assert kernels <= AT_MOST[network], (backend, eager, kernels)
        assert kernels < 0.5 * eager, (backend, eager, kernels)


def test_every_part_of_a_bottleneck_is_fused():
    ops = count(fuse(users_networks.official(), backend="cuda"), "cuda")
    assert ops == {
        "aten.conv2d": 1, "aten.batch_norm": 1, "aten.relu_": 1,  # the stem
        "ghostfused.forward_cuda": 8 + 2,  # the shortcuts' 1×1 convs are Ghost modules without ghosts
        "ghostfused.depthwise_cuda": 2 + 2,
        "ghostfused.squeeze_excite_cuda": 2 * 2,  # two kernels each
    }  # fmt: skip


@functools.cache
def fused_paper():
    return cases.Setting("meta").place(fuse(paper.GhostNet().eval()))


def ours(backend):
    """(name, arguments) of our ops in a forward of the paper's network."""
    model = fused_paper()
    on_backend(model, backend)
    with launches.as_if_available(backend):
        calls = launches.calls_of(model, torch.empty(1, 3, 224, 224, device="meta"))
    return [(name, args) for name, args in calls if launches.fused_op(name)]


def test_cuda_launches_are_those_that_ran():
    """On the machine code's simulator, whose results are committed."""
    _, sums = tables.read(tables.RESULTS / "sass_network.jsonl")
    assert launches.count_ops(ours("cuda")).total() == sums["launches"]


@pytest.mark.parametrize("backend", ["triton", "triton_two_kernel"])
def test_triton_launches_are_those_that_it_makes(backend):
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("the interpreter makes its launches by another class")
    for name, args in ours(backend):
        op, _ = launches.fused_op(name)
        with mock.patch.object(triton.runtime.jit.JITFunction, "run") as run:
            BACKENDS[backend].forward(OPS[op](*args))
        assert run.call_count == launches.kernels(name, args), name
