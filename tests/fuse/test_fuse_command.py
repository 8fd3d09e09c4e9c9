"""``python -m ghostfused fuse``, as a user runs it."""

import re
import subprocess
import sys

import pytest
import torch

from ghostfused import __main__ as cli
from ghostfused.cli import fuse as fuse_command

NET = """
import torch
from ghostfused.models import paper

def net():
    return torch.nn.Sequential(paper.GhostBottleneck(3, 16, 12, stride=2), paper.GhostModule(12, 13)), torch.randn(2, 3, 9, 8)

def nothing():
    return torch.nn.Conv2d(3, 4, 1), torch.randn(2, 3, 9, 8)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


def run(*argv: str) -> int:
    return cli.main(["fuse", *argv, "--device", "cpu", "--rounds", "5"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", ["module", "auto"])
def test_report_error_and_speed(file, capsys, dtype, level):
    assert run(f"{file}:net", "--dtype", dtype, "--level", level) == 0
    printed = capsys.readouterr().out
    fused = re.findall(r"^(\S+) +(\w+) +yes", printed, re.MULTILINE)
    modules = [("0.ghost1", "GhostModule"), ("0.ghost2", "GhostModule"), ("1", "GhostModule")]
    assert fused == ([("0", "GhostBottleneck")] if level == "auto" else []) + modules
    assert re.search(r"error against float64.*: \S+e\S+ fused, \S+e\S+ unfused, limit \S+: ok", printed)
    assert f"(2, 3, 9, 8) {dtype} on" in printed
    median, low, high = map(float, re.search(r"speed-up +(\S+) \[(\S+)–(\S+)\]", printed).groups())
    assert 0 < low <= median <= high


def test_named_networks(capsys):
    assert run("paper", "--size", "64", "--level", "module") == 0
    assert capsys.readouterr().out.count(" yes ") == 32
    pytest.importorskip("timm")
    assert run("timm:ghostnet_050", "--size", "32", "--batch", "2") == 0
    assert "(2, 3, 32, 32) float32" in capsys.readouterr().out


def test_a_wrong_result_is_an_error(file, capsys, monkeypatch):
    def wrong(model, **settings):
        fused, report = fuse_with_report(model, **settings)
        with torch.no_grad():
            fused[1].primary_conv[0].weight.mul_(1.001)
        return fused, report

    fuse_with_report = fuse_command.fuse_with_report
    monkeypatch.setattr(fuse_command, "fuse_with_report", wrong)
    assert run(f"{file}:net") == 1
    assert "MISS" in capsys.readouterr().out


def test_nothing_to_fuse(file, capsys):
    assert run(f"{file}:nothing") == 2
    assert "nothing to fuse" in capsys.readouterr().out


def test_times_are_of_calls_in_turn():
    order = []
    ticks = []
    functions = {name: lambda name=name: order.append(name) for name in "ab"}
    times = fuse_command.time_interleaved(functions, 4, torch.device("cpu"), lambda: ticks.append(1))
    assert "".join(order[6:]) == "baabbaab", "after the warm-up"
    assert len(ticks) == 4
    assert all(len(each) == 4 and min(each) >= 0 for each in times.values())


def test_quartiles_lie_among_the_values():
    assert fuse_command.quartiles([1.0, 2.0, 3.0]) == "2.00 [1.50–2.50]"
    assert fuse_command.quartiles([1.0, 9.0]) == "5.00 [3.00–7.00]"


def test_as_a_command(file):
    command = [sys.executable, "-m", "ghostfused", "fuse", f"{file}:net", "--device", "cpu", "--rounds", "3"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout
    assert "speed-up" in printed
