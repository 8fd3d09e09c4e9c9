"""fuse(model): finds the Ghost modules of a model, swaps them and changes nothing else."""

import torch
from torch import nn

from ghostfused import FusedGhostModule, fuse
from ghostfused.fuse import fuse_with_report
from ghostfused.models import paper, seed


def randomized(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.running_mean, std=0.3)
            nn.init.normal_(m.bias, std=0.3)
    return model.eval().double()


def test_fused_network_is_the_same_network():
    model = randomized(seed.GhostNet(num_classes=5))
    before = model.state_dict()
    fused, report = fuse_with_report(model)
    assert sum(row.fused for row in report) == 30
    assert not any(isinstance(m, FusedGhostModule) for m in model.modules()), "not inplace: the model stays as it was"
    after = fused.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(after.values(), before.values(), strict=True))
    x = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    assert fuse_with_report(fused)[1] == [], "nothing is left to fuse"


def test_inplace_root_and_shared_modules():
    root = randomized(paper.GhostModule(6, 8))
    assert isinstance(fuse(root), FusedGhostModule)
    shared = paper.GhostModule(6, 6)
    model = randomized(nn.Sequential(shared, nn.ReLU(), shared))
    weight = shared.primary_conv[0].weight
    assert fuse(model, inplace=True) is model
    assert model[0] is model[2]
    assert isinstance(model[0], FusedGhostModule)
    assert model[0].primary_conv[0].weight is weight
