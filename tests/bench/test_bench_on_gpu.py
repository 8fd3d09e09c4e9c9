"""The benchmarks' code for CUDA devices, run on a fake one (fake_gpu.py): every row is judged, no time is.

In each row a peer's output was compared with float64 by bench/measure.py before its status became "ok", so that a graph
which replays nothing, say, is a row that is WRONG.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_runtime import ON_CPU, needs_cuda

from bench import results

ROOT = Path(__file__).parents[2]
PEERS = ["eager", "eager+graph", "ghostfused_cuda", "ghostfused_cuda+graph"]
FEW = ["--samples", "3", "--repeats", "1", "--layout", "nhwc"]
MODULE = {"source": "test", "in_channels": 8, "out_channels": 13, "height": 5, "width": 6}
NETWORK = ["--network", "tests/helpers/small_network.py:small", "--size", "16"]

pytestmark = [
    pytest.mark.cuda,
    needs_cuda,
    pytest.mark.skipif(not ON_CPU, reason="rehearses what a GPU does better; runs under $PTX_ON_CPU/run-extension"),
]


def bench(output: Path, command: str, *arguments: str) -> list[dict]:
    """The rows that ``python -m bench command`` writes on the fake GPU."""
    run = [sys.executable, "tests/helpers/fake_gpu.py", "-m", "bench", command, *arguments, "--output", str(output)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    environment, rows = results.read(output)
    assert (environment["device"], environment["gpu"]) == ("cuda", "PTX on CPU")
    assert rows[-1]["kind"] == "end"
    return rows


def module(folder: Path, *arguments: str) -> list[dict]:
    configs = folder / "configs.jsonl"
    configs.write_text(json.dumps(MODULE) + "\n")
    return bench(folder / "module.jsonl", "module", "--configs", str(configs), *FEW, "--device", "cuda", *arguments)


def statuses(rows: list[dict], *fields: str) -> dict[tuple, str]:
    """The status of each row with a peer, which must all differ in ``fields``."""
    own = [row for row in rows if "peer" in row]
    found = {tuple(row[field] for field in fields): row["status"] for row in own}
    assert len(found) == len(own)
    return found


def test_modules_in_inference(tmp_path):
    dtypes = ["float16", "float32", "tf32"]
    rows = module(tmp_path, "--peers", ",".join(PEERS), "--dtype", ",".join(dtypes))
    assert statuses(rows, "dtype", "peer") == {(dtype, peer): "ok" for dtype in dtypes for peer in PEERS}
    assert [row["dtype"] for row in rows if row["kind"] == "roofs"] == dtypes


def test_modules_in_training(tmp_path):
    modes = ["training_forward", "backward"]
    peers = ["eager", "ghostfused_cuda"]
    rows = module(tmp_path, "--peers", ",".join(peers), "--dtype", "float16", "--batch", "2", "--mode", ",".join(modes))
    assert statuses(rows, "mode", "peer") == {(mode, peer): "ok" for mode in modes for peer in peers}


def test_network_and_report(tmp_path):
    arguments = [*NETWORK, "--batch", "1,2", "--dtype", "float16", *FEW]
    results_of = tmp_path / "results"
    rows = bench(results_of / "network.jsonl", "network", *arguments, "--peers", ",".join(PEERS), "--device", "cuda")
    assert statuses(rows, "batch", "peer") == {(batch, peer): "ok" for batch in (1, 2) for peer in PEERS}
    assert {row["clock"] for row in rows if "clock" in row} == {"wall", "events"}
    pytest.importorskip("matplotlib")
    report = [sys.executable, "-m", "bench", "report", str(results_of), "--output", str(tmp_path / "report")]
    done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    page = next((tmp_path / "report").glob("*.html")).read_text()
    assert "PTX on CPU" in page
    assert all(peer in page for peer in PEERS)


def test_overhead(tmp_path):
    rows = bench(tmp_path / "overhead.jsonl", "overhead", "--calls", "2", "--repeats", "2", "--device", "cuda")
    assert {row["backend"] for row in rows if row["kind"] == "overhead"} == {"eager", "cuda", "reference"}
    assert all(row["us"] > 0 for row in rows if row["kind"] == "overhead")


@pytest.mark.parametrize("command", ["launches", "memory"])
def test_counts_of_a_network(command, tmp_path):
    arguments = [*NETWORK, "--device", "cuda", *(["--batch", "2"] if command == "memory" else [])]
    rows = bench(tmp_path / "rows.jsonl", command, *arguments)
    field = "kernels" if command == "launches" else "peak_bytes"
    on_gpu = {row["execution"] for row in rows if row["kind"] == command and row[field] is not None}
    assert on_gpu == {"eager", "ghostfused_cuda", "ghostfused_cuda_module"}
    if command == "memory":
        assert all(row[field] > 0 for row in rows if row["kind"] == command and row["execution"] in on_gpu)
