"""One self-contained HTML page and its figures as PNGs, from results files."""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ghostfused.cli.inputs import BadInput, new_folder

from .environment import title
from .results import read
from .timing import Timing, verdict

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #111827 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #e5e7eb; text-align: right }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto } img { max-width: 100%; border: 1px solid #e5e7eb }
.faster { color: #15803d } .slower { color: #b91c1c } .tie { color: #6b7280 } .WRONG, .error { color: #b91c1c; font-weight: bold }
dt { font-weight: 600; float: left; clear: left; width: 11rem } dd { margin-left: 12rem }
"""
COUNTED = (
    ("memory", "saved_bytes", "MB per image", "Activations saved for backward, counted", 1e6, ".1f"),
    (
        "launches",
        "ops",
        "operations per forward",
        "Operations per forward, each at least one kernel; counted",
        1,
        ".0f",
    ),
)
METHOD = """All peers of a case ran in one process on the same weights and inputs and took turns, call by call. Each output was
compared with float64 before anything was timed; one beyond its limit is WRONG and not timed. Times are medians; a
difference no larger than the spread (the range of the repeats' medians, the larger of the two) is a tie. “cache” says
whether the last-level cache was overwritten before each call (flush), inputs were rotated, or nothing was done (warm)."""


def files(paths: list[Path]) -> list[Path]:
    """The results files among ``paths``, those in folders included."""
    found = [f for p in paths for f in (sorted(p.glob("*.jsonl")) if p.is_dir() else [p])]
    # others write tables there too
    found = [f for f in found if not f.name.startswith("static_")]
    if not found:
        raise BadInput(f"no results files (*.jsonl) in {', '.join(map(str, paths))}")
    return found


def digest(rows: list[dict]) -> str:
    """A hash of what a figure shows."""
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


FIRST = ("latency", "speedup", "roofline", "memory", "launches")
"""What figures' names begin with, in the order of the page: how long a network takes comes first."""
Figure = tuple[str, str, list[dict], Callable[[], Any]]
"""Heading, file name without .png, the rows that it shows, and what draws it."""


def figures_of(environment: dict, rows: list[dict]) -> Iterator[Figure]:
    """Every figure that the rows of one file allow."""
    from . import figures

    where, device = title(environment), environment["device"]
    modules = [r for r in rows if r["kind"] == "module"]
    for (_, dtype, batch, layout, mode), timed in figures.by_group(modules).items():
        setting = f"{dtype}, batch {batch}, {layout}, {mode.replace('_', ' ')}"
        name = f"{device}_{dtype}_b{batch}_{layout}" + ("" if mode == "inference" else f"_{mode}")
        below = f"{setting}, cache: {timed[0]['cache']}\n{where}"
        heading = f"Ghost modules, {below}"
        peers = {r["peer"] for r in timed}
        if figures.BASELINE in peers and len(peers) > 1:
            yield f"Speed-up per module: {setting}", f"speedup_{name}", timed, partial(figures.speedup, timed, heading)
        if mode == "inference":
            roofs = next((r for r in rows if r["kind"] == "roofs" and r["dtype"] == dtype), None)
            shown = [r for r in timed if figures.is_ours(r["peer"]) or r["peer"] == figures.BASELINE]
            make = partial(figures.roofline, shown, roofs, predictions(timed), below)
            yield f"Roofline: {setting}", f"roofline_{name}", shown, make
    networks: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["kind"] == "network" and row["status"] == "ok":
            networks.setdefault(tuple(row[f] for f in ("name", "dtype", "layout", "mode")), []).append(row)
    for (network, dtype, layout, mode), timed in networks.items():
        setting = f"{network}, {dtype}, {layout}, {mode.replace('_', ' ')}"
        name = f"latency_{device}_{re.sub(r'[^A-Za-z0-9]+', '_', network)}_{dtype}_{layout}" + (
            "" if mode == "inference" else f"_{mode}"
        )
        make = partial(figures.latency, timed, f"Whole network at {timed[0]['size']}²: {setting}\n{where}")
        yield f"Latency against batch: {setting}", name, timed, make
    for kind, field, unit, heading, scale, form in COUNTED:
        groups: dict[str, dict[str, float]] = {}
        own = [r for r in rows if r["kind"] == kind]
        for r in own:
            block = r["name"] + (f", {r['mode'].replace('_', ' ')}, {r['dtype']}" if kind == "memory" else "")
            groups.setdefault(block, {})[r["execution"]] = r[field] / scale / r.get("batch", 1)
        if groups:
            yield heading, f"{kind}_{device}", own, partial(figures.bars, groups, unit, heading, form)


def draw(figure: Figure, folder: Path) -> Path:
    """Writes the figure's PNG."""
    from . import figures

    _, name, rows, make = figure
    return figures.save(make(), folder / f"{name}.png", digest(rows))


def predictions(rows: list[dict]) -> list[dict]:
    """FLOPs and fused bytes of each module in float16, of which roofline() makes upper bounds."""
    itemsize = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
    modules = {(r["name"], r["height"]): r for r in rows}.values()
    return [{"flops": r["flops"], "floor_bytes": r["floor_bytes"] * 2 // itemsize[r["dtype"]]} for r in modules]


def _cells(cells: list[str], tag: str = "td") -> str:
    return "<tr>" + "".join(c if c.startswith("<td") else f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    body = "\n".join(_cells(r) for r in rows)
    return f'<div class="wide"><table>{_cells([html.escape(h) for h in head], "th")}\n{body}</table></div>'


def comparison_table(rows: list[dict]) -> str:
    """A line for each case, a column for each peer that was timed or wrong anywhere."""
    peers = [
        p
        for p in dict.fromkeys(r["peer"] for r in rows)
        if any(r["peer"] == p and r["status"] != "absent" for r in rows)
    ]
    lines: dict[tuple, dict[str, dict]] = {}
    for r in rows:
        key = r["name"], r.get("height"), r["batch"], r["dtype"], r["layout"], r["mode"]
        lines.setdefault(key, {})[r["peer"]] = r
    body = []
    for key, by_peer in lines.items():
        first = next(iter(by_peer.values()))
        shape = (
            f" {first['in_channels']}→{first['out_channels']} {first['height']}²" if first["kind"] == "module" else ""
        )
        base = by_peer.get("eager")
        cells = [html.escape(first["name"]) + shape, f"{key[2]}", f"{key[3]} {key[4]} {key[5].replace('_', ' ')}"]
        body.append(cells + [_comparison_cell(by_peer.get(p), base) for p in peers])
    return _table(["", "batch", "setting", *peers], body)


def _comparison_cell(row: dict | None, base: dict | None) -> str:
    if row is None or row["status"] == "absent":
        return "–"
    if row["status"] != "ok":
        return f'<td class="{row["status"]}" title="{html.escape(row["reason"])}">{row["status"]}</td>'
    timing = Timing.from_row(row["ms"])
    text = f"{timing.p50:.3g} ms"
    tip = f"p20 {timing.p20:.3g}, p80 {timing.p80:.3g}, spread {timing.spread:.2g}, error {row['error']:.1e}"
    for field, name in (
        ("gb_s", "GB/s"),
        ("copy_percent", "% of copy bandwidth"),
        ("floor_percent", "% of the fused floor"),
    ):
        tip += f", {row[field]} {name}" if field in row else ""
    word = ""
    if base is not None and base["status"] == "ok" and base is not row:
        first = Timing.from_row(base["ms"])
        word = verdict(first, timing)
        text += " tie" if word == "tie" else f" {first.p50 / timing.p50:.2f}×"
    return f'<td class="{word}" title="{html.escape(tip)}">{text}</td>'


def absent_table(rows: list[dict]) -> str:
    """Why peers didn't take part, or weren't timed."""
    seen = dict.fromkeys((r["peer"], r["status"], r["reason"]) for r in rows if r.get("status", "ok") != "ok")
    return _table(["peer", "status", "reason"], [[html.escape(c) for c in each] for each in seen]) if seen else ""


def page(results: list[tuple[dict, list[dict]]], drawn: list[tuple[str, Path]]) -> str:
    """The HTML, with the pictures inside."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>ghostfused benchmarks</title><style>{STYLE}</style>"
    ]
    parts.append(f"<h1>ghostfused benchmarks</h1><p>{html.escape(METHOD)}</p>")
    for heading, path in drawn:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f'<h2>{html.escape(heading)}</h2><img alt="{html.escape(heading)}" src="data:image/png;base64,{data}">'
        )
    for environment, rows in results:
        command = environment["command"]
        parts.append(f"<h2><code>{html.escape(command)}</code></h2><p>{html.escape(title(environment))}</p>")
        comparisons = [r for r in rows if r["kind"] in ("module", "network")]
        if comparisons:
            parts += [comparison_table(comparisons), absent_table(comparisons)]
        for kind, fields in (
            ("memory", ("name", "mode", "execution", "batch", "dtype", "saved_bytes", "peak_bytes")),
            ("launches", ("name", "execution", "ops", "fused_ops", "kernels")),
            ("overhead", ("backend", "step", "us", "spread_us", "adds_us")),
        ):
            own = [r for r in rows if r["kind"] == kind]
            if own:
                text = [["–" if r.get(f) is None else html.escape(str(r[f])) for f in fields] for r in own]
                parts.append(_table(list(fields), text))
        facts = "".join(
            f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in environment.items() if k != "kind"
        )
        complete = any(r["kind"] == "end" for r in rows)
        state = "" if complete else "<p class=WRONG>This run broke off: its file has no last line.</p>"
        parts.append(f"{state}<details><summary>environment</summary><dl>{facts}</dl></details>")
    return "\n".join(parts) + "</html>\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, help="results files, or folders of them")
    parser.add_argument("--output", type=new_folder, default=Path("out/report"), metavar="DIR")


def main(options: argparse.Namespace) -> int:
    """make an HTML page and PNGs of results files"""
    results = [read(path) for path in files(options.results)]
    results.sort(key=lambda result: not any(row["kind"] == "network" for row in result[1]))
    figures = [figure for environment, rows in results for figure in figures_of(environment, rows)]
    figures.sort(key=lambda figure: FIRST.index(figure[1].partition("_")[0]))
    drawn = [(figure[0], draw(figure, options.output)) for figure in figures]
    target = options.output / "index.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page(results, drawn), encoding="utf-8")
    print(f"{target} ({target.stat().st_size / 1e6:.1f} MB, {len(drawn)} figures)")
    return 0
