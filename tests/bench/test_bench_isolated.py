"""``bench network --isolate``: a process a peer, rounds in turn, joined to one row."""

import os

import pytest
import torch

from bench import isolate, results
from bench.__main__ import main

NETWORK = """
from torch import nn
from ghostfused import FusedGhostModule

def build():
    return nn.Sequential(FusedGhostModule(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
"""


def test_each_peer_has_processes_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NETWORK)
    ran = []
    run = isolate.measured
    monkeypatch.setattr(isolate, "measured", lambda peer, options: ran.append(peer) or run(peer, options))
    output = tmp_path / "rows.jsonl"
    command = ["network", "--network", f"{tmp_path}/net.py:build", "--size", "16", "--batch", "1,2", "--layout", "nchw"]
    command += ["--peers", "eager,bn_folded", "--isolate", "2", "--device", "cpu", "--threads", "1", "--samples", "2"]
    assert main([*command, "--repeats", "1", "--output", str(output)]) == 0
    assert ran == ["eager", "bn_folded", "bn_folded", "eager"]
    rows = [row for row in results.read(output)[1] if row["kind"] == "network"]
    assert {(row["peer"], row["batch"]) for row in rows} == {(p, b) for p in ("eager", "bn_folded") for b in (1, 2)}
    for row in rows:
        assert row["rounds"] == len(row["ms"]["medians"]) == 2
        assert min(row["ms"]["medians"]) <= row["ms"]["p50"] <= max(row["ms"]["medians"])
        assert row["images_per_second"] == pytest.approx(row["batch"] / row["ms"]["p50"] * 1e3, abs=0.01)


def test_a_round_that_failed_is_told():
    row = {"peer": "p", "batch": 1, "status": "ok", "ms": {"p20": 1.0, "p50": 2.0, "p80": 3.0, "medians": [2.0]}}
    wrong = {"peer": "p", "status": "WRONG", "reason": "error 1, limit 0: not timed"}
    assert isolate.joined([row, wrong]) == wrong
    slow = row | {"ms": {"p20": 5.0, "p50": 6.0, "p80": 7.0, "medians": [6.0]}}
    assert isolate.joined([row, slow, slow])["ms"] == {"p20": 5.0, "p50": 6.0, "p80": 7.0, "medians": [2.0, 6.0, 6.0]}


def test_a_process_that_dies_is_an_error(tmp_path):
    """The network can be made in the command's process, where it is tried, and not in the peer's."""
    file = tmp_path / "dies.py"
    file.write_text(
        "import os\nfrom ghostfused.models.paper import GhostNet\n"
        f"def build():\n    if os.getpid() != {os.getpid()}:\n        os._exit(3)\n    return GhostNet(width=0.1)\n"
    )
    command = ["network", "--network", f"{file}:build", "--peers", "eager", "--isolate", "1", "--device", "cpu"]
    with pytest.raises(RuntimeError, match=r"dies\.py.*exit status 3"):
        main([*command, "--size", "32"])


def test_named_forms_of_networks():
    from bench import cases

    pytest.importorskip("timm")
    deployed = cases.network("timm:ghostnetv3_050:deploy")
    assert sum(p.numel() for p in deployed.parameters()) < sum(
        p.numel() for p in cases.network("timm:ghostnetv3_050").parameters()
    )
    pytest.importorskip("ultralytics")
    with torch.inference_mode():
        assert cases.network("yolov8n-ghost-backbone")(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 2, 2)
