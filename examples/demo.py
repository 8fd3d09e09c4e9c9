"""``make demo``: two real GhostNets on a real photo, unfused against fused, on whatever device there is.

For each network: the largest error against float64, and the time per image with its spread, in a table and a bar plot
(out/demo.png).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import timm
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import ghostfused
from ghostfused.cli.fuse import time_interleaved
from ghostfused.cli.info import collect
from ghostfused.cli.verify import calibrate, network_verdict
from ghostfused.models.seed import GhostNet
from ghostfused.testing import Verdict

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent.parent / "out"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "seed GhostNet": GhostNet,
    "timm ghostnet_100": lambda: timm.create_model("ghostnet_100"),
}
SIZE = 224
TIE = "\ntie"


def photo() -> Tensor:
    """(1, 3, 224, 224) float32: the middle of a photo that scikit-learn ships, normalized as ImageNet's."""
    image = load_sample_image("flower.jpg").astype(np.float32) / 255
    top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
    x = torch.from_numpy(image[top : top + SIZE, left : left + SIZE]).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x - mean[:, None, None]) / std[:, None, None]).contiguous()


class Row(NamedTuple):
    """One network's result."""

    network: str
    modules: int
    """Ghost modules fused."""
    verdict: Verdict
    unfused: list[float]
    """Milliseconds of each call, as are those of ``fused``."""
    fused: list[float]


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(times, n=4)
    return low, median, high


def speedup(row: Row) -> str:
    """How much faster, or that the difference lies within the larger interquartile range."""
    (low, before, high), (fused_low, after, fused_high) = quartiles(row.unfused), quartiles(row.fused)
    tie = abs(before - after) <= max(high - low, fused_high - fused_low)
    return f"{before / after:.2f}×{TIE if tie else ''}"


def results_table(rows: list[Row], title: str) -> Table:
    """All of it, at most 80 columns wide."""
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.add_column("\nnetwork", no_wrap=True)
    for column in ("Ghost\nmodules", "error", "PyTorch\nerror", "unfused\nms", "fused\nms", "speed-up", "result"):
        table.add_column(column if "\n" in column else f"\n{column}", justify="right", no_wrap=True)
    for r in rows:
        cells = [r.network, str(r.modules), f"{r.verdict.error:.0e}", f"{r.verdict.torch_error:.0e}"]
        for low, median, high in (quartiles(r.unfused), quartiles(r.fused)):
            cells.append(f"{median:.2f}\n± {(high - low) / 2:.2f}")
        table.add_row(*cells, speedup(r), "[green]same" if r.verdict.ok else "[red]WRONG")
    return table


def plot(rows: list[Row], device: str, folder: Path = OUT) -> Path:
    """Medians as bars, quartiles as error bars, and every sample as a dot."""
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    at = np.arange(len(rows))
    for shift, kind, color in ((-0.2, "unfused", "#9aa5b1"), (0.2, "fused", "#2563eb")):
        samples = [getattr(r, kind) for r in rows]
        low, median, high = np.array([quartiles(each) for each in samples]).T
        spread = np.stack([median - low, high - median])
        bars = axis.bar(at + shift, median, 0.38, yerr=spread, capsize=4, label=kind, color=color)
        axis.bar_label(bars, fmt="%.2f", label_type="center", color="white")
        for x, each in zip(at + shift, samples, strict=True):
            axis.plot(np.linspace(x - 0.12, x + 0.12, len(each)), each, ".", color="#111827", alpha=0.3, markersize=3)
    axis.set_xticks(at, [r.network for r in rows])
    axis.set_ylabel("ms per image: median, quartiles")
    axis.set_ylim(0, 1.15 * max(quartiles(times)[2] for r in rows for times in (r.unfused, r.fused)))
    axis.set_title(f"One {SIZE}×{SIZE} image, {device}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    folder.mkdir(exist_ok=True)
    path = folder / "demo.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main() -> None:
    console = Console()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads"
    facts = collect()
    console.print(f"ghostfused {facts['ghostfused']}, torch {facts['torch']}, on {name}")
    for backend, reason in facts["backends"].items():
        console.print(f"  {backend:18} {'works' if reason is None else reason}", highlight=False)
    if not gpu:
        kernel = "the C++ CPU kernel" if facts["backends"]["cpu"] is None else "plain PyTorch operations"
        console.print(
            f"No GPU here: the fused networks run {kernel}, and the times below are this CPU's. They say nothing about the "
            "GPU kernels; `make test` runs those for correctness.",
            style="yellow",
        )
    rows: list[Row] = []
    rounds = 60 if gpu else 20
    x = photo()
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(NETWORKS) * (rounds + 2))
        for network, build in NETWORKS.items():
            progress.update(task, description=network)
            torch.manual_seed(0)
            model = calibrate(build(), x).to(device)
            fused = ghostfused.fuse(model)
            progress.advance(task)
            verdict = network_verdict(model, fused, x.to(device), torch.float32)
            progress.advance(task)
            with torch.inference_mode():
                on_device = x.to(device)
                milliseconds = time_interleaved(
                    {"unfused": partial(model, on_device), "fused": partial(fused, on_device)},
                    rounds,
                    device,
                    lambda: progress.advance(task),
                )
            count = sum(isinstance(m, ghostfused.FusedGhostModule) for m in fused.modules())
            rows.append(Row(network, count, verdict, **milliseconds))

    heading = f"One {SIZE}×{SIZE} photo, float32, {name}\nmedians of {rounds} calls, ± half the interquartile range"
    console.print(results_table(rows, heading))
    console.print(f"Errors are against float64, relative to the largest output. Plot: {plot(rows, name)}")
    if not all(r.verdict.ok for r in rows):
        raise SystemExit("a fused network's result differs from the unfused one's")


if __name__ == "__main__":
    main()
