"""The command line: info and verify, as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ghostfused import __main__ as cli
from ghostfused.backends import reference
from ghostfused.cli import verify

CONFIGS = Path(__file__).parents[1] / "data" / "ghost_configs.jsonl"


def run(*argv: str) -> int:
    return cli.main(list(argv))


def test_info(capsys):
    assert run("info") == 0
    assert "reference" in capsys.readouterr().out
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in facts["backends"].values())
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__


def test_every_row_of_the_shared_shapes(capsys):
    assert run("verify", "--configs", str(CONFIGS), "--max-size", "9", "--batch", "1", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"
    assert len(lines) > 80
    assert all(line.startswith("ok") for line in lines[:-1])


def test_a_wrong_backend_fails(capsys, monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"in_channels": 8, "out_channels": 9, "height": 5, "width": 6}\n')
    monkeypatch.setattr(verify.functional, "run", lambda args, backend: reference.ghost_module(args) * 1.001)
    assert run("verify", "--configs", str(rows), "--device", "cpu") == 1
    assert "MISS" in capsys.readouterr().out


def test_bad_rows_are_named(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"in_channels": 8}\n')
    with pytest.raises(SystemExit, match=r"rows.jsonl:1: expected"):
        run("verify", "--configs", str(rows))


def test_no_rows_is_no_success(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n")
    assert run("verify", "--configs", str(rows), "--device", "cpu") == 2


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(14, None, 14), (7, 9, 7), (112, 16, 16), (113, 16, 15), (20, 1, 1)]
)
def test_cut_keeps_parity(size, limit, expected):
    assert verify.cut(size, limit) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seed_network(capsys, dtype):
    assert run("verify", "--model", "seed", "--dtype", dtype, "--batch", "1", "--device", "cpu") == 0
    assert "30 Ghost modules and 15 bottlenecks fused" in capsys.readouterr().out


def test_model_from_a_file_with_its_input(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom ghostfused.models.paper import GhostModule\n"
        "def net():\n    return torch.nn.Sequential(GhostModule(6, 13), GhostModule(13, 7, relu=False))\n"
        "def net_and_input():\n    return net(), torch.randn(2, 6, 9, 5)\n"
    )
    assert run("verify", "--model", f"{file}:net_and_input", "--layout", "nhwc", "--device", "cpu") == 0
    assert "2 Ghost modules and 0 bottlenecks fused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [("nonsense", "expected seed, paper, timm:NAME or file.py:function"), ("missing.py:f", "not a Python file")],
)
def test_bad_model_names(model, message):
    with pytest.raises(SystemExit, match=message):
        run("verify", "--model", model)


def test_a_refused_backend_says_why():
    """An explicit backend that works nowhere on this machine ends the run with its reason."""
    result = subprocess.run(
        [sys.executable, "-m", "ghostfused", "verify", "--configs", str(CONFIGS), "--backend", "cuda", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "cuda" in result.stderr
