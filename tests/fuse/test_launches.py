"""How many operations, each at least one kernel, a forward takes: counted at the dispatcher, with no GPU."""

import families
import pytest
import torch
from public_networks import FAMILIES

from bench import cases, launches
from ghostfused import fuse

AT_MOST = {
    "timm_ghostnet_100": 80,
    "timm_ghostnet_050": 80,
    "paper": 80,
    "seed": 90,
    "timm_ghostnetv2_100": 150,
    "timm_ghostnetv3_100": 150,
}


def count(model, backend, size=64):
    with launches.as_if_available(backend):
        meta = cases.Setting("meta").place(model.eval())
        return launches.count_ops(launches.calls_of(meta, torch.empty(1, 3, size, size, device="meta")))


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@pytest.mark.parametrize("network", AT_MOST)
def test_kernels_of_a_fused_network(network, backend):
    model = FAMILIES[network][0]().eval()
    eager, fused = count(model, None).total(), count(fuse(model, backend=backend), backend).total()
    assert fused <= AT_MOST[network], (eager, fused)
    assert fused < 0.5 * eager, (eager, fused)


def test_every_part_of_a_bottleneck_is_fused():
    ops = count(fuse(families.official(), backend="cuda"), "cuda")
    assert ops == {
        "aten.conv2d": 1, "aten.batch_norm": 1, "aten.relu_": 1,  # the stem
        "ghostfused.forward_cuda": 8 + 2,  # the shortcuts' 1×1 convs are Ghost modules without ghosts
        "ghostfused.depthwise_cuda": 2 + 2,
        "ghostfused.squeeze_excite_cuda": 2 * 2,  # two kernels each
    }  # fmt: skip
