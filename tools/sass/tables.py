"""Writes the tables of docs/counts.md anew, from tools/sass/results/sass_*.jsonl: ``python -m tools.sass.tables``."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .build import ROOT

PAGE = ROOT / "docs" / "counts.md"
RESULTS = Path(__file__).parent / "results"
BASELINE = RESULTS / "general"
"""Counts of the general kernels, before there were kernels of one layout each."""
TIMES = ("issue_us", "shared_us", "hmma_us", "dram_us")
NAMES = {"forward": "forward", "triton": "forward by Triton", "training": "training step"}


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The modules' lines of a file, and its sums."""
    *rows, sums = (json.loads(line) for line in path.read_text().splitlines())
    return rows, sums


def files() -> list[Path]:
    order = ["float16", "float32", "tf32", "nhwc", "nchw", "forward", "triton", "training"]

    def place(path: Path) -> list[int]:
        dtype, layout, mode = path.stem.removeprefix("sass_").split("_")
        return [order.index(mode), order.index(dtype), order.index(layout)]

    found = RESULTS.glob("sass_*_*_*.jsonl")
    return sorted((path for path in found if not path.stem.endswith("_latency")), key=place)


def sums_table() -> str:
    """A line for each setting: sums over the 32 modules of GhostNet 1.0×."""
    lines = [
        "| setting | issue before | issue | issue, mean block | shared | HMMA | DRAM | Σ largest | stores, × ideal | commit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in files():
        rows, s = read(path)
        dtype, layout, mode = path.stem.removeprefix("sass_").split("_")
        values = (s[name] for name in ("issue_us", "issue_mean_us", "shared_us", "hmma_us", "dram_us", "slowest_us"))
        baseline = BASELINE / path.name
        before = f"{read(baseline)[1]['issue_us']:.0f}" if baseline.exists() else "–"
        cells = [f"{NAMES[mode]}, {dtype}, {layout}", before, *(f"{v:.0f}" for v in values)]
        lines.append(f"| {' | '.join(cells)} | ≤ {max(r['store_sector_ratio'] for r in rows):.2f} | {s['commit']} |")
    return "\n".join(lines)


def auto_table() -> str:
    """A line for each dtype and layout in which both backends of a GPU are counted: the sums that decide ``backend="auto"``."""
    lines = ["| dtype, layout | CUDA, Σ largest | Triton, Σ largest | `auto` tries first |", "|---|---|---|---|"]
    for path in (each for each in files() if each.stem.endswith("_triton")):
        sums = {"cuda": path.with_name(path.name.replace("triton", "forward")), "triton": path}
        us = {name: read(each)[1]["slowest_us"] for name, each in sums.items()}
        setting = " ".join(path.stem.split("_")[1:3])
        lines.append(f"| {setting} | {us['cuda']:.0f} | {us['triton']:.0f} | {min(us, key=us.__getitem__)} |")
    return "\n".join(lines)


def modules_table(path: Path) -> str:
    """A line for each module of a file, with the three largest parts of its instructions."""
    lines = [
        "| module | × | issue | shared | HMMA | DRAM | stores, × ideal | error / limit | of the instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in read(path)[0]:
        parts = ", ".join(f"{name} {share:.0%}" for name, share in list(r["parts"].items())[:3])
        values = [f"{r[name]:.1f}" for name in ("issue_us", "shared_us", "hmma_us", "dram_us")]
        values += [f"{r['store_sector_ratio']:.2f}", f"{r['error'] / r['limit']:.2f}", parts]
        lines.append(f"| {' | '.join([r['module'], str(r['count']), *values])} |")
    return "\n".join(lines)


def network_table(path: Path) -> str:
    """A line for each kernel of a network: the sums over its launches."""
    rows, sums = read(path)
    kernels: dict[str, list[float]] = {}
    for r in rows:
        if r["kind"] == "launch":
            us = [r[name] for name in ("issue_us", "shared_us", "hmma_us", "dram_us")]
            total = kernels.setdefault(r["kernel"], [0.0] * 6)
            for k, v in enumerate([1.0, *us, max(us)]):
                total[k] += r["count"] * v
    kernels["all of ours"] = [sums["launches"], *(sums[n] for n in TIMES), sums["slowest_us"]]
    lines = ["| kernel | launches | issue | shared | HMMA | DRAM | Σ largest |", "|---|---|---|---|---|---|---|"]
    lines += [f"| {name} | {' | '.join(f'{v:.0f}' for v in total)} |" for name, total in kernels.items()]
    return "\n".join(lines)


def latency_table() -> str:
    """A line for each module at batch 1, in both layouts: what the timing model says of the general kernel, and of the one that runs."""
    heads = [f"{layout}, {what}" for layout in ("nhwc", "nchw") for what in ("general", "now", "blocks")]
    lines = [f"| module | × | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    results = [
        read(folder / f"sass_float16_{layout}_latency.jsonl")
        for layout in ("nhwc", "nchw")
        for folder in (BASELINE, RESULTS)
    ]
    for rows in zip(*(rows for rows, _ in results), strict=True):
        cells = [rows[0]["module"], str(rows[0]["count"])]
        for general, now in (rows[:2], rows[2:]):
            blocks = max(math.prod(launch["grid"]) for launch in now["launches"])
            cells += [f"{general['latency_us']:.1f}", f"{now['latency_us']:.1f}", str(blocks)]
        lines.append(f"| {' | '.join(cells)} |")
    sums = [f"{s['latency_us']:.0f}" for _, s in results]
    lines.append(f"| all | {results[0][1]['modules']} | {sums[0]} | {sums[1]} | | {sums[2]} | {sums[3]} | |")
    return "\n".join(lines)


def tables() -> list[str]:
    modules = modules_table(RESULTS / "sass_float16_nhwc_forward.jsonl")
    return [sums_table(), auto_table(), modules, network_table(RESULTS / "sass_network.jsonl"), latency_table()]


def written(page: str) -> str:
    """``page`` with the tables of the results in place of those with the same heads.

    Raises:
        ValueError: the page has no table, or several, of such a head.
    """
    for table in tables():
        head = re.escape(table.split("\n")[0])
        page, count = re.subn(rf"^{head}\n(\|.*\n)*", lambda _: table + "\n", page, flags=re.MULTILINE)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE}: expected one table with the head {table.split(chr(10))[0]!r}, found {count}")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
