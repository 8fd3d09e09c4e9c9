"""The report's figures, from rows of results files. Measured values are filled marks; predictions are hollow and say so."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from .timing import Timing, verdict

BACKENDS = {
    "cuda": "#2563eb", "triton_two_kernel": "#9333ea", "triton": "#0d9488", "cpu": "#65a30d", "reference": "#94a3b8",
    "capture": "#166534", "frozen_bf16": "#4d7c0f", "bf16": "#3f6212", "frozen": "#a3e635",
}  # fmt: skip
OTHERS = {
    "bn_folded": "#b45309", "compile_default": "#dc2626", "compile_max_autotune": "#db2777", "compile_freezing": "#6b7280",
    "eager+graph": "#ca8a04", "compile_max_autotune+graph": "#7c2d12", "onnxruntime": "#0891b2",
    "onnxruntime_cuda": "#4338ca", "onnxruntime_tensorrt": "#475569", "openvino": "#be123c",
    "openvino_default": "#f97316", "torch_tensorrt": "#c026d3", "compile_default+graph": "#7f1d1d",
}  # fmt: skip
MARKERS = "oshD^v<>PX*dp"
VARIANTS = (("+graph", "////", "--"), ("+compile", "....", ":"), ("_module", "\\\\\\\\", "-."))
"""What a name of ours holds beside its backend, and how bars and lines show it."""
BASELINE = "eager"
CARDS = {"H100 SXM": (3350, 989e3), "A100 SXM 80 GB": (2039, 312e3)}
"""GB/s and dense float16 GFLOP/s of the data sheets."""
GROUP = ("device", "dtype", "batch", "layout", "mode")


def is_ours(name: str) -> bool:
    return name.startswith("ghostfused")


class Style(NamedTuple):
    color: str
    marker: str
    hatch: str | None = None
    line: str = "-"


def style(peer: str) -> Style:
    """How a peer looks, which is the same in every figure: ours by backend, in colours that no other peer has."""
    if is_ours(peer):
        backend = next((name for name in BACKENDS if peer.startswith(f"ghostfused_{name}")), "reference")
        hatch, line = next(((h, ln) for part, h, ln in VARIANTS if part in peer), (None, "-"))
        variant = next((i + 1 for i, each in enumerate(VARIANTS) if each[0] in peer), 0)
        return Style(
            BACKENDS[backend], MARKERS[(list(BACKENDS).index(backend) + 5 * variant) % len(MARKERS)], hatch, line
        )
    if peer == BASELINE:
        return Style("#111827", "o")
    names = list(OTHERS)
    index = names.index(peer) if peer in names else zlib.crc32(peer.encode()) % len(names)
    return Style(OTHERS[names[index]], MARKERS[index])


def label(row: dict) -> str:
    return row["peer"] + (f" ({row['precision']})" if "precision" in row else "")


def by_group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Timed rows by setting."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if row.get("status") == "ok":
            groups.setdefault(tuple(row[f] for f in GROUP), []).append(row)
    return groups


def module_label(row: dict) -> str:
    times = f" ×{row['count']}" if row["count"] > 1 else ""
    return f"{row['name']}{times}  {row['in_channels']}→{row['out_channels']} {row['height']}²"


def save(figure, path: Path, source: str) -> Path:
    """Writes a PNG that names the data it was made from (a hash) in its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Source": source, "Software": None})
    plt.close(figure)
    return path


def _clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)


def speedup(rows: list[dict], title: str):
    """Bars: our speed-up over eager for each module, pale where it is a tie. Marks: the other peers."""
    modules = {(r["name"], r["height"]): r for r in rows}
    timings = {(r["name"], r["height"], r["peer"]): Timing.from_row(r["ms"]) for r in rows}
    peers = [p for p in dict.fromkeys(r["peer"] for r in rows) if p != BASELINE]
    ours, others = [p for p in peers if is_ours(p)], [p for p in peers if not is_ours(p)]
    lanes = (len(others) + 5) // 6  # for the marks, below the bars: many side by side would hide each other
    inches = max(0.4, 0.085 * len(ours) + 0.13 * lanes)  # of a module
    figure, axis = plt.subplots(figsize=(9, 1.7 + inches * len(modules)), layout="constrained")
    at = np.arange(len(modules))[::-1]
    below = 0.13 * lanes / inches
    height = min((0.9 - below) / max(len(ours), 1), 0.45)
    high = (height * len(ours) + below) / 2
    for y, key in zip(at, modules, strict=True):
        if y % 2:
            axis.axhspan(y - 0.5, y + 0.5, color="#f3f4f6", linewidth=0, zorder=0)
        for peer in (*ours, *others):
            base, own, look = timings.get((*key, BASELINE)), timings.get((*key, peer)), style(peer)
            if base is None or own is None:
                continue
            ratio, alpha = base.p50 / own.p50, 0.35 if verdict(base, own) == "tie" else 1
            if is_ours(peer):
                middle = y + high - height * (ours.index(peer) + 0.5)
                hatch: dict = {"hatch": look.hatch, "edgecolor": "white", "linewidth": 0} if look.hatch else {}
                axis.barh(middle, ratio - 1, height * 0.9, left=1, color=look.color, alpha=alpha, **hatch)
            else:
                lane = y - high + below * (others.index(peer) % lanes + 0.5) / lanes
                axis.plot(ratio, lane, look.marker, color=look.color, markersize=4.5, alpha=alpha)
    axis.axvline(1, color="#111827", linewidth=1)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.2g}×"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_yticks(at, [module_label(r) for r in modules.values()], fontsize=8)
    axis.set_ylim(-0.5, len(modules) - 0.5)
    axis.tick_params(axis="x", labeltop=len(modules) > 8)
    axis.grid(axis="x", color="#e5e7eb", linewidth=0.6)
    axis.set_xlabel("speed-up over PyTorch eager; pale: a tie, the difference lies inside the spread")
    axis.set_title(title, fontsize=9)
    _clean(axis)
    looks = {p: style(p) for p in peers}
    handles: list = [
        Patch(facecolor=looks[p].color, hatch=looks[p].hatch, edgecolor="white", linewidth=0, label=p) for p in ours
    ]
    handles += [
        Line2D([], [], color=looks[p].color, marker=looks[p].marker, markersize=4.5, linestyle="", label=p)
        for p in others
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _log_labels(side: Axis, form: str) -> None:
    """Labels decades, and what lies between where there are few."""
    low, high = side.get_view_interval()
    digits = "23456789" if high < 4 * low else "25" if high < 300 * low else ""
    side.set_major_formatter(FuncFormatter(lambda v, _: form.format(v)))
    side.set_minor_formatter(FuncFormatter(lambda v, _: form.format(v) if f"{v:.0e}"[0] in digits else ""))


def _roofs(axis: Axes, gb_s: float, gflops: float, x: np.ndarray, color: str, name: str, style: str) -> None:
    axis.plot(x, np.minimum(gb_s * x, gflops), style, color=color, linewidth=1.2, label=name)


def roofline(measured: list[dict], roofs: dict | None, predicted: list[dict], title: str):
    """Left: modules as measured, under the measured roofs. Right: where data sheets put the fused kernel, not measured.

    Arithmetic intensity counts the fused module's bytes: x read once, the output written once.
    """
    panels = [kind for kind, there in (("measured", measured and roofs), ("predicted", predicted)) if there]
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 4.6), layout="constrained", squeeze=False)
    for axis, kind in zip(axes[0], panels, strict=True):
        rows = measured if kind == "measured" else predicted
        intensities = np.array([r["flops"] / r["floor_bytes"] for r in rows])
        x = np.geomspace(intensities.min() / 3, intensities.max() * 30, 200)
        if kind == "measured":
            assert roofs is not None
            name = f"measured roofs: copy {roofs['copy_gb_s']:.0f} GB/s, matmul {roofs['matmul_gflops']:,.0f} GFLOP/s"
            _roofs(axis, roofs["copy_gb_s"], roofs["matmul_gflops"], x, "#111827", name, "-")
            for peer in dict.fromkeys(r["peer"] for r in rows):
                own, look = [r for r in rows if r["peer"] == peer], style(peer)
                axis.plot(
                    [r["flops"] / r["floor_bytes"] for r in own], [r["flops"] / r["ms"]["p50"] / 1e6 for r in own],
                    look.marker, color=look.color, markersize=5, alpha=0.8, label=peer,
                )  # fmt: skip
            axis.set_title(f"Measured: {title}", fontsize=9)
        else:
            for (card, (gb_s, gflops)), color, marker in zip(CARDS.items(), ("#111827", "#b45309"), "os", strict=True):
                _roofs(
                    axis, gb_s, gflops, x, color, f"{card} data sheet: {gb_s:,} GB/s, {gflops / 1e3:.0f} TFLOP/s", "--"
                )
                axis.plot(
                    intensities, np.minimum(gb_s * intensities, gflops), marker, markerfacecolor="none",
                    markeredgecolor=color, markersize=6, label=f"{card}: upper bound for a fused module",
                )  # fmt: skip
            axis.set_title("PREDICTED, not measured: bound from bytes and FLOPs\nfloat16, each module", fontsize=9)
            axis.set_facecolor("#fafaf5")
        axis.set_xscale("log")
        axis.set_yscale("log")
        for side in (axis.xaxis, axis.yaxis):
            _log_labels(side, "{:,.12g}")
        axis.set_xlabel("FLOP per byte of the fused module")
        axis.set_ylabel("GFLOP/s")
        axis.grid(color="#e5e7eb", linewidth=0.6)
        _clean(axis)
        axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.16))
    return figure


def latency(rows: list[dict], title: str):
    """Time per image against batch, one line a peer; bands are p20 to p80."""
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for peer in dict.fromkeys(r["peer"] for r in rows):
        look = style(peer)
        own = sorted((r for r in rows if r["peer"] == peer), key=lambda r: r["batch"])
        batches = [r["batch"] for r in own]
        p20, p50, p80 = ([r["ms"][q] / r["batch"] for r in own] for q in ("p20", "p50", "p80"))
        width = 2.2 if is_ours(peer) else 1.2
        axis.plot(
            batches,
            p50,
            look.line + look.marker,
            color=look.color,
            linewidth=width,
            markersize=5,
            label=label(own[0]),
        )
        axis.fill_between(batches, p20, p80, color=look.color, alpha=0.12, linewidth=0)
    batches = sorted({r["batch"] for r in rows})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [str(b) for b in batches])
    _log_labels(axis.yaxis, "{:g}")
    axis.tick_params(axis="y", which="both", labelsize=8)
    axis.set_xlabel("batch")
    axis.set_ylabel("ms per image (median)")
    axis.grid(which="both", axis="y", color="#e5e7eb", linewidth=0.6)
    axis.set_title(title, fontsize=9)
    _clean(axis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def bars(groups: dict[str, dict[str, float]], unit: str, title: str, form: str):
    """Horizontal bars, one per execution, in blocks."""
    entries = [(group, name, value) for group, values in groups.items() for name, value in values.items()]
    figure, axis = plt.subplots(figsize=(8, 1.3 + 0.32 * (len(entries) + len(groups))), layout="constrained")
    y = 0.0
    ticks, names = [], []
    largest = max(value for *_, value in entries)
    for group, values in groups.items():
        first = next(iter(values.values()))
        axis.text(largest * 0.006, y, group, fontsize=9, fontweight="bold", va="center")
        for name, value in values.items():
            y -= 1
            axis.barh(y, value, 0.75, color=BACKENDS["cuda"] if is_ours(name) else "#9aa5b1")
            axis.text(value + largest * 0.01, y, f"{value:{form}}  ({value / first:.0%})", va="center", fontsize=8)
            ticks.append(y)
            names.append(name)
        y -= 1.2
    axis.set_yticks(ticks, names, fontsize=8)
    axis.set_ylim(y + 0.5, 0.8)
    axis.set_xlim(0, largest * 1.18)
    axis.set_xlabel(unit)
    axis.set_title(title, fontsize=9)
    _clean(axis)
    return figure
