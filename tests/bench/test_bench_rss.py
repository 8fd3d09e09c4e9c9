"""``bench memory --rss``: each peer's memory in a process of its own."""

import pytest
import torch

from bench import results, rss
from bench.__main__ import main


def test_peak_and_present():
    rss.forget_peak()
    before = rss.resident("VmRSS")
    held = torch.ones(20_000_000)
    assert rss.resident("VmRSS") - before > 70
    del held
    assert rss.resident("VmHWM") - before > 70
    rss.forget_peak()
    assert rss.resident("VmHWM") - before < 30


def test_each_peer_has_a_process(tmp_path, monkeypatch):
    pytest.importorskip("timm"), pytest.importorskip("onnx")
    monkeypatch.setattr(rss, "NAMES", ("eager", "ghostfused_load"))
    monkeypatch.setattr(rss, "BASELINE", "eager")
    output = tmp_path / "rows.jsonl"
    command = ["memory", "--rss", "--network", "timm:ghostnet_050", "--size", "64", "--batch", "2", "--threads", "1"]
    assert main([*command, "--output", str(output)]) == 0
    rows = [row for row in results.read(output)[1] if row["kind"] == "rss"]
    assert [(row["execution"], row["batch"]) for row in rows] == [("eager", 2), ("ghostfused_load", 2)]
    for row in rows:
        assert 0 < row["imports_mb"] < row["loaded_mb"] <= row["peak_mb"] + 0.1
        assert row["own_mb"] == pytest.approx(row["peak_mb"] - row["imports_mb"], abs=0.11)
        assert row["own_mb"] > 8, "its weights alone are 10 MB"
        assert row["peak_of_onnxruntime"] == pytest.approx(row["peak_mb"] / rows[0]["peak_mb"], abs=1e-3)


def test_a_process_that_fails_is_an_error(capsys):
    with pytest.raises(RuntimeError, match="no_such_model"):
        rss.in_process("measure", "eager", "no_such_model", 1, 64, ".", threads=1)
    assert main(["memory", "--rss", "--network", "paper"]) == 2
    assert "expected timm's, as in timm:ghostnet_100, got paper" in capsys.readouterr().err
