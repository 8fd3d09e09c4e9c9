"""``python -m bench bands``: a band of rows has all the rows that its results need, and no more."""

import itertools

import pytest
import torch
from modules import randomized
from torch import nn

from bench import bands
from bench.__main__ import main
from bench.results import read
from ghostfused.models.paper import GhostBottleneck


def part(module: nn.Module, height: int) -> bands.Part:
    return bands.Part("part", nn.Sequential(randomized(module)).float().eval(), (8, height, 9))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dw_size", [3, 5])
@torch.no_grad()
def test_a_band_makes_its_rows_of_the_whole(stride, dw_size):
    case = part(GhostBottleneck(8, 16, 8, dw_size, stride, se_ratio=0.0), 48)
    reach = bands.reach_of(case)
    assert reach is not None
    assert reach.stride == stride
    x = torch.randn(1, *case.shape)
    whole, height = case.module(x), x.shape[2]
    edges = [i * whole.shape[2] // 4 for i in range(5)]
    for begin, end in itertools.pairwise(edges):
        first, rows = reach.band(begin, end, height)
        skipped = begin - first // stride
        made = case.module(x[:, :, first : first + rows])[:, :, skipped : skipped + end - begin]
        torch.testing.assert_close(made, whole[:, :, begin:end])
        if first > 0 and first + rows < height and stride == 1:  # a row less is too few
            fewer = case.module(x[:, :, first + 1 : first + rows])[:, :, skipped - 1 : skipped - 1 + end - begin]
            assert not torch.allclose(fewer, whole[:, :, begin:end], rtol=1e-3)


def test_squeeze_and_excite_needs_the_whole_map():
    assert bands.reach_of(part(GhostBottleneck(8, 16, 8, 3, 1, se_ratio=0.25), 48)) is None


def test_the_command(tmp_path, capsys):
    output = tmp_path / "bands.jsonl"
    options = [
        "--network",
        "paper:0.5",
        "--size",
        "64",
        "--least",
        "32",
        "--batch",
        "1",
        "--layout",
        "nchw",
        "--bands",
        "2",
    ]
    assert (
        main(["bands", *options, "--device", "cpu", "--samples", "2", "--repeats", "2", "--output", str(output)]) == 0
    )
    rows = [row for row in read(output)[1] if row["kind"] == "bands"]
    assert rows
    assert all(row["bands"] == 2 and row["ratio"]["low"] <= row["ratio"]["high"] for row in rows)
    assert "without halo" in capsys.readouterr().out
