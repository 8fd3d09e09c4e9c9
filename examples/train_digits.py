"""Trains a narrow GhostNet on scikit-learn's handwritten digits twice from one seed, unfused and fused.

Both see the same batches. Prints the losses of the first steps side by side and the final test accuracies, and plots both
curves to out/train_digits.png. ``python examples/train_digits.py --help`` for the options; it runs on the CPU in a minute.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import ghostfused
from ghostfused.models.paper import GhostBottleneck

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).parent.parent / "out"


class Digits(NamedTuple):
    x: Tensor  # (N, 1, 8, 8), in 0 … 1
    y: Tensor  # (N,)


class Result(NamedTuple):
    losses: list[float]
    """After each step."""
    accuracies: list[float]
    """On the test images, after each epoch."""


def digits(device: torch.device, seed: int) -> tuple[Digits, Digits]:
    """The 1,797 images of ``sklearn.datasets.load_digits``: 1,198 to train on and 599 to test, split at random."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(x) * 2 // 3], order[len(x) * 2 // 3 :]
    return tuple(Digits(x[part].to(device), y[part].to(device)) for part in (train, test))  # type: ignore[return-value]


class NarrowGhostNet(nn.Module):
    """The paper's bottlenecks, few and narrow, on 8×8 images: (N, 1, 8, 8) → (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.blocks = nn.Sequential(
            GhostBottleneck(12, 24, 16, 3, stride=1),
            GhostBottleneck(16, 48, 24, 3, stride=2, se_ratio=0.25),
            GhostBottleneck(24, 72, 24, 3, stride=1),
            GhostBottleneck(24, 96, 40, 5, stride=2, se_ratio=0.25),
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def train(
    model: nn.Module, data: Digits, test: Digits, epochs: int, batch: int, lr: float, seed: int, tick=lambda: None
) -> Result:
    """SGD with momentum and a one-cycle schedule; ``seed`` decides the order of the images. ``tick`` after each step."""
    steps = len(data.x) // batch
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    losses, accuracies = [], []
    for _ in range(epochs):
        model.train()
        order = torch.randperm(len(data.x), generator=generator)
        for i in range(steps):
            own = order[i * batch : (i + 1) * batch].to(data.x.device)
            loss = F.cross_entropy(model(data.x[own]), data.y[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            tick()
        model.eval()
        with torch.no_grad():
            accuracies.append(float((model(test.x).argmax(1) == test.y).float().mean()))
    return Result(losses, accuracies)


def compare(options: argparse.Namespace, progress: Progress | None = None) -> dict[str, Result]:
    """Both runs, "unfused" and "fused", from the same weights on the same batches."""
    device = torch.device(options.device)
    data, test = digits(device, options.seed)
    torch.manual_seed(options.seed)
    unfused = NarrowGhostNet().to(device)
    models = {"unfused": unfused, "fused": ghostfused.fuse(copy.deepcopy(unfused), backend=options.backend)}
    results = {}
    for name, model in models.items():
        tick = lambda: None  # noqa: E731
        if progress is not None:
            task = progress.add_task(name, total=options.epochs * (len(data.x) // options.batch))
            tick = lambda task=task: progress.advance(task)  # noqa: E731
        results[name] = train(model, data, test, options.epochs, options.batch, options.lr, options.seed, tick)
    return results


def plot(results: dict[str, Result], path: Path) -> None:
    """Loss by step and test accuracy by epoch, both runs over each other."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, result), style in zip(results.items(), ("-", "--"), strict=True):
        left.plot(result.losses, style, label=name, linewidth=1)
        right.plot(range(1, len(result.accuracies) + 1), [100 * a for a in result.accuracies], style, label=name)
    left.set(xlabel="step", ylabel="training loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy, %")
    left.legend(), right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--epochs", type=int, default=15)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--lr", type=float, default=0.05, help="the highest of the one-cycle schedule")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--backend", default="auto", help="of the fused network")
    arguments.add_argument("--output", type=Path, default=OUT / "train_digits.png")
    return arguments


def main() -> None:
    options = parser().parse_args()
    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        results = compare(options, progress)
    unfused, fused = results["unfused"], results["fused"]
    table = Table(title="Training loss, step by step")
    for header in ("step", "unfused", "fused", "difference"):
        table.add_column(header, justify="right")
    for step in range(min(6, len(fused.losses))):
        a, b = unfused.losses[step], fused.losses[step]
        table.add_row(str(step + 1), f"{a:.7f}", f"{b:.7f}", f"{abs(a - b):.1e}")
    console.print(table)
    console.print(f"test accuracy: unfused {unfused.accuracies[-1]:.2%}, fused {fused.accuracies[-1]:.2%}")
    plot(results, options.output)
    console.print(f"curves: {options.output}")


if __name__ == "__main__":
    main()
