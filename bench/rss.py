"""Memory that loading and running a network takes: ``python -m bench memory --rss``.

Each peer has a process of its own. It imports torch, notes its resident memory, loads the network, runs it ten times and says
how much more memory was resident at most. Engines load an ONNX file, ``ghostfused_load`` what ``Captured.save`` wrote;
the others make the network with timm, which ``imports_mb`` contains, as it contains whatever else a peer imports.
``own_mb`` is the peak without the imports. Every result is compared with eager's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ENGINES = ("onnxruntime", "openvino")
NAMES = ("eager", "ghostfused_capture", "ghostfused_load", *ENGINES)
BASELINE = "onnxruntime"
CALLS = 10
OF = {"peak_mb": "peak_of_onnxruntime", "own_mb": "own_of_onnxruntime"}
COLUMNS = [
    "network",
    "batch",
    "execution",
    "imported",
    "loaded",
    "peak, MB",
    "of onnxruntime",
    "own, MB",
    "of onnxruntime",
]


def cells(row: dict[str, Any]) -> list[str]:
    """A row as a line of the table of ``COLUMNS``."""
    ratios = {field: "–" if row[of] is None else f"{row[of]:.2f}" for field, of in OF.items()}
    megabytes = [f"{row[field]:.0f}" for field in ("imports_mb", "loaded_mb", "peak_mb")]
    ends = [*megabytes, ratios["peak_mb"], f"{row['own_mb']:.0f}", ratios["own_mb"]]
    return [f"{row['name']} at {row['size']}²", str(row["batch"]), row["execution"], *ends]


def resident(field: str) -> float:
    """MB: "VmRSS" is what this process has, "VmHWM" the most that it had since ``forget_peak``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# ---- in a peer's process: nothing is imported above but torch


def made(name: str) -> torch.nn.Module:
    """timm's network, the same weights each time."""
    import timm

    torch.manual_seed(0)
    return timm.create_model(name).eval()


def loaded(peer: str, name: str, x: torch.Tensor, folder: Path) -> tuple[float, Callable[[torch.Tensor], Any]]:
    """The memory after the imports, and the network as ``peer`` runs it."""
    if peer in ("eager", "ghostfused_capture"):
        import timm  # noqa: F401
    if peer.startswith("ghostfused"):
        import ghostfused
        import ghostfused.capture.saved
    if peer == "onnxruntime":
        import onnxruntime as ort
    if peer == "openvino":
        import openvino as ov
    imports = resident("VmRSS")
    if peer == "eager":
        return imports, made(name)
    if peer == "ghostfused_capture":
        return imports, ghostfused.capture(made(name), x, partial=True)
    if peer == "ghostfused_load":
        return imports, ghostfused.load(folder / "network.pt2")
    onnx = str(folder / "network.onnx")
    if peer == "onnxruntime":
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        session = ort.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        return imports, lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(onnx, "CPU", settings | {"PERFORMANCE_HINT": "LATENCY"})
    return imports, lambda x: torch.from_numpy(compiled([x.numpy()])[0])


def measure(peer: str, name: str, batch: int, size: int, folder: Path) -> dict[str, float]:
    """Loads and runs; leaves the result in ``folder``, for comparison."""
    forget_peak()
    before = resident("VmRSS")
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
    imports, run = loaded(peer, name, x, folder)
    after_load = resident("VmRSS")
    with torch.inference_mode():
        for _ in range(CALLS):
            out = run(x)
    peak = resident("VmHWM")
    torch.save(out, folder / f"{peer}.pt")
    values = {"imports_mb": imports, "loaded_mb": after_load, "peak_mb": peak}
    return {field: round(value - before, 1) for field, value in values.items()} | {"own_mb": round(peak - imports, 1)}


def write_files(peers: list[str], name: str, batch: int, size: int, folder: Path) -> None:
    """What engines and ``ghostfused.load`` read, if they are among the ``peers``."""
    import ghostfused

    from .engines import to_onnx

    x = torch.zeros(batch, 3, size, size)
    if set(peers) & set(ENGINES):
        (folder / "network.onnx").write_bytes(to_onnx(made(name), x))
    if "ghostfused_load" in peers:
        ghostfused.capture(made(name), x, partial=True).save(folder / "network.pt2")


# ---- in the command's process


def in_process(task: str, *arguments: object, threads: int) -> str:
    """What a fresh Python says that does ``task`` of this file.

    Raises:
        RuntimeError: it failed; the message has its last lines.
    """
    command = [sys.executable, "-m", "bench.rss", str(threads), task, *map(str, arguments)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def main(options: argparse.Namespace) -> int:
    from ghostfused.cli.inputs import BadInput

    from . import cases, measure
    from .console import table
    from .engines import missing
    from .environment import title
    from .results import Writer

    device, threads = measure.set_device(options, only="cpu"), torch.get_num_threads()
    names = options.network.split(",")
    if others := [name for name in names if not name.startswith("timm:")]:
        raise BadInput(f"--network: with --rss expected timm's, as in timm:ghostnet_100, got {others[0]}")
    if options.dtype != "float32":
        raise BadInput(f"--dtype: with --rss expected float32, got {options.dtype}")
    cases.networks(options.network, options.size)
    peers = [peer for peer in NAMES if peer not in ENGINES or not missing(peer)]
    shown = []
    with Writer(options.output, device) as writer:
        for name in names:
            for batch in options.batches:
                with tempfile.TemporaryDirectory() as temporary:
                    folder, what = Path(temporary), (name.removeprefix("timm:"), batch, options.size)
                    in_process("write", ",".join(peers), *what, folder, threads=threads)
                    rows: dict[str, dict[str, Any]] = {}
                    for peer in peers:
                        found = json.loads(in_process("measure", peer, *what, folder, threads=threads).splitlines()[-1])
                        rows[peer] = {"kind": "rss", "name": name, "size": options.size, "batch": batch}
                        rows[peer] |= {"dtype": "float32", "threads": threads, "execution": peer} | found
                    eager = torch.load(folder / "eager.pt")
                    for peer, row in rows.items():
                        torch.testing.assert_close(torch.load(folder / f"{peer}.pt"), eager, rtol=1e-3, atol=1e-3)
                        base = rows.get(BASELINE)
                        for field, of in OF.items():
                            row[of] = round(row[field] / base[field], 3) if base else None
                        writer.write(row)
                        shown.append(cells(row))
    table(f"Resident memory beyond import torch; {title(writer.environment)}", COLUMNS, shown)
    return 0


if __name__ == "__main__":
    _threads, _task, *_rest = sys.argv[1:]
    torch.set_num_threads(int(_threads))
    _peers, _name, _batch, _size, _folder = _rest
    if _task == "write":
        write_files(_peers.split(","), _name, int(_batch), int(_size), Path(_folder))
    else:
        print(json.dumps(measure(_peers, _name, int(_batch), int(_size), Path(_folder))))
