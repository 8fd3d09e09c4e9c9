"""The bytes that a network's Ghost modules move to and from memory, by arithmetic.

Counted per execution, each kernel reading its inputs and writing its output once, weights left out (they are small):

- eager: conv, BN, activation, depthwise conv, BN, activation, concat, a kernel each;
- compiled: what TorchInductor makes of it: conv, BN + activation, depthwise conv, BN + activation + concat;
- two kernels: 1×1 + epilogue and depthwise + epilogue, both written in the concat's place;
- fused: x read once, the output written once.

No cache is modelled and nothing is measured here. Writes docs/traffic.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ghostfused.cli import inputs
from ghostfused.cli.verify import read_rows

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "tests" / "data" / "ghost_configs.jsonl"
EXECUTIONS = ("eager", "compiled", "two kernels", "fused")


def module_traffic(row: dict, batch: int, itemsize: int) -> dict[str, int]:
    """Bytes of one Ghost module in each execution; ``row`` as in ghost_configs.jsonl, 1×1 at stride 1."""
    cin, cout = row["in_channels"], row["out_channels"]
    init = -(-cout // row["ratio"])
    new = cout - init
    acts = [row["act_primary"] != "none", row["act_cheap"] != "none"]
    conv, depthwise = cin + init, init + new
    concat = 2 * (init + new)
    channels = {
        "eager": conv + 2 * init * (1 + acts[0]) + depthwise + 2 * new * (1 + acts[1]) + concat,
        "compiled": conv + 2 * init + depthwise + concat,
        "two kernels": conv + depthwise,
        "fused": cin + cout,
    }
    plane = batch * row["height"] * row["width"] * itemsize
    return {execution: n * plane for execution, n in channels.items()}


def network_traffic(source: str, batch: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """(Ghost modules, bytes per execution) of the rows of ghost_configs.jsonl from ``source``."""
    rows = [row for _, row in read_rows(CONFIGS, source) if row["kernel_size"] == row["stride"] == 1]
    total = dict.fromkeys(EXECUTIONS, 0)
    for row in rows:
        for execution, n in module_traffic(row, batch, itemsize).items():
            total[execution] += n * row["count"]
    return sum(r["count"] for r in rows), total


def plot(title: str, total: dict[str, int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    names = list(total)[::-1]
    megabytes = [total[n] / 1e6 for n in names]
    colors = ["#2563eb" if n == "fused" else "#9aa5b1" for n in names]
    bars = axis.barh(names, megabytes, color=colors)
    labels = [f"{mb:,.0f} MB  ({mb * 1e6 / total['fused']:.2f}×)" for mb in megabytes]
    axis.bar_label(bars, labels, padding=4)
    axis.set_xlabel("bytes to and from memory, by arithmetic (MB)")
    axis.set_title(title, fontsize=10)
    axis.set_xlim(0, max(megabytes) * 1.25)
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", default="timm/ghostnet_100@224", help="a source in ghost_configs.jsonl")
    parser.add_argument("--batch", type=inputs.positive, default=64)
    parser.add_argument("--itemsize", type=inputs.positive, default=2, help="bytes per element (2: float16)")
    parser.add_argument("--output", type=inputs.new_file, default=ROOT / "docs" / "traffic.png")


def main(options: argparse.Namespace) -> int:
    """bytes moved, by arithmetic"""
    count, total = network_traffic(options.source, options.batch, options.itemsize)
    title = f"{options.source}: {count} Ghost modules, batch {options.batch}, {options.itemsize} bytes per element"
    print(title)
    for execution, n in total.items():
        print(f"{execution:12} {n / 1e6:9.1f} MB  {n / total['fused']:5.2f}×")
    plot(title, total, options.output)
    return 0
