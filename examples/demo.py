"""``make demo``: two real GhostNets on a real photo, unfused against fused, on whatever device there is.

For each network: the largest error against float64, the median time per image, a table, and a bar plot (out/demo.png).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import ghostfused
from ghostfused.fuse_command import time_interleaved
from ghostfused.info import collect
from ghostfused.models.seed import GhostNet
from ghostfused.verify import calibrate, network_verdict

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent.parent / "out"
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "seed GhostNet": GhostNet,
    "timm ghostnet_100": lambda: timm.create_model("ghostnet_100"),
}
SIZE = 224


def photo() -> Tensor:
    """(1, 3, 224, 224) float32: the middle of a photo that scikit-learn ships, normalized as ImageNet's."""
    image = load_sample_image("flower.jpg").astype(np.float32) / 255
    top, left = (image.shape[0] - SIZE) // 2, (image.shape[1] - SIZE) // 2
    x = torch.from_numpy(image[top : top + SIZE, left : left + SIZE]).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x - mean[:, None, None]) / std[:, None, None]).contiguous()


def plot(rows: list[dict], device: str) -> Path:
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    at = np.arange(len(rows))
    for shift, kind, color in ((-0.2, "unfused", "#9aa5b1"), (0.2, "fused", "#2563eb")):
        bars = axis.bar(at + shift, [r[kind][0] for r in rows], 0.38, label=kind, color=color)
        axis.bar_label(bars, fmt="%.2f", padding=2)
    axis.set_xticks(at, [r["network"] for r in rows])
    axis.set_ylabel("ms per image (median)")
    axis.set_title(f"One 224×224 image, {device}")
    axis.margins(y=0.15)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    OUT.mkdir(exist_ok=True)
    path = OUT / "demo.png"
    figure.savefig(path, dpi=150)
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
    rows = []
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
            quartiles = {kind: statistics.quantiles(each, n=4) for kind, each in milliseconds.items()}
            times = {kind: (q[1], q[2] - q[0]) for kind, q in quartiles.items()}
            count = sum(isinstance(m, ghostfused.FusedGhostModule) for m in fused.modules())
            rows.append({"network": network, "modules": count, "verdict": verdict, **times})

    table = Table(
        title=f"One {SIZE}×{SIZE} photo, float32, {name}; medians of {rounds}, ± half the interquartile range"
    )
    for column in (
        "network",
        "Ghost modules fused",
        "error",
        "PyTorch's error",
        "unfused ms",
        "fused ms",
        "speed-up",
        "",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    for r in rows:
        (before, before_iqr), (after, after_iqr) = r["unfused"], r["fused"]
        tie = abs(before - after) <= max(before_iqr, after_iqr)
        table.add_row(
            r["network"],
            str(r["modules"]),
            f"{r['verdict'].error:.1e}",
            f"{r['verdict'].torch_error:.1e}",
            f"{before:.2f} ± {before_iqr / 2:.2f}",
            f"{after:.2f} ± {after_iqr / 2:.2f}",
            f"{before / after:.2f}×{' (tie)' if tie else ''}",
            "[green]same result" if r["verdict"].ok else "[red]WRONG",
        )
    console.print(table)
    console.print(f"Errors are against float64, relative to the largest output. Plot: {plot(rows, name)}")
    if not all(r["verdict"].ok for r in rows):
        raise SystemExit("a fused network's result differs from the unfused one's")


if __name__ == "__main__":
    main()
