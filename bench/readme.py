"""Fills the generated blocks of README and docs from the committed results, so that no number there is typed by hand.

A block is what lies between ``<!-- begin generated: WHAT FOLDER -->`` and ``<!-- end generated -->``; FOLDER is one in
bench/results, WHAT is headline, modules, network, memory, rss, launches, overhead, environment, or figure:NAME with a PNG's
name in the report, such as figure:speedup_cpu_float32_b1_nhwc. Figures go to docs/figures.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from ghostfused.cli.inputs import BadInput

from . import report
from . import rss as rss_table
from .cases import ROOT
from .environment import title
from .results import read
from .suite import RESULTS
from .timing import Timing, verdict

README = ROOT / "README.md"
FIGURES = ROOT / "docs" / "figures"
BLOCK = re.compile(r"(<!-- begin generated: (\S+) (\S+) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)

HEADLINE = (
    ("ghostfused_capture", 1), ("ghostfused_capture", 16), ("ghostfused_bf16", 1), ("ghostfused_bf16", 16),
    ("ghostfused_cpu", 1),
)  # fmt: skip
"""The rows of the table that README begins with: one of ours, and the batch."""
SETTING = ("float32", "nchw", "inference")
"""Its dtype, layout and mode: the one that every engine takes."""
WHAT_RAN = {
    "ghostfused_capture": "`capture(model, x)`",
    "ghostfused_bf16": '`capture(model, x, freeze=True, dtype="bfloat16")`',
    "ghostfused_cpu": "`fuse(model)`",
}
"""Ours in a user's words."""

Results = list[tuple[dict, list[dict]]]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _rows(results: Results, kind: str) -> list[dict]:
    rows = [row for _, rows in results for row in rows if row["kind"] == kind]
    if not rows:
        raise BadInput(f"a page has a block for {kind}, of which the results folder has no row")
    return rows


def modules(results: Results) -> str:
    """A line for each setting and peer: geometric mean of its speed-ups over eager; modules faster, tie, slower."""
    cases: dict[tuple, dict[tuple, Timing]] = {}
    others: dict[tuple, list[str]] = {}
    for r in _rows(results, "module"):
        setting = r["dtype"], r["batch"], r["layout"], r["mode"], r["peer"]
        if r["status"] == "ok":
            cases.setdefault(setting, {})[r["name"], r["height"]] = Timing.from_row(r["ms"])
        elif r["status"] != "absent":
            others.setdefault(setting, []).append(r["status"])
    lines = []
    for setting, timings in cases.items():
        base = cases.get((*setting[:-1], "eager"), {})
        if setting[-1] == "eager" or not base:
            continue
        pairs = [(base[m], t) for m, t in timings.items() if m in base]
        words = [verdict(a, b) for a, b in pairs]
        mean = math.exp(sum(math.log(a.p50 / b.p50) for a, b in pairs) / len(pairs))
        dtype, batch, layout, mode, peer = setting
        what = f"{dtype}, batch {batch}, {layout}" + ("" if mode == "inference" else f", {mode.replace('_', ' ')}")
        wrong = others.get(setting, [])
        left_out = ", ".join(f"{wrong.count(w)} {w}" for w in dict.fromkeys(wrong)) or "–"
        lines.append(
            [what, f"`{peer}`", f"{mean:.2f}×", *(str(words.count(w)) for w in ("faster", "tie", "slower")), left_out]
        )
    return _markdown(
        ["setting", "peer", "speed-up over eager, geometric mean", "faster", "tie", "slower", "not timed"], lines
    )


def _of_kind(results: Results, kind: str) -> Results:
    """The files that have rows of ``kind``."""
    found = [(facts, rows) for facts, rows in results if any(row["kind"] == kind for row in rows)]
    return found or [({}, _rows(results, kind))]


def headline(results: Results) -> str:
    """For each of ``HEADLINE``'s rows its time, and its speed-up over everybody else who takes the same input."""
    timed = [r for r in _rows(results, "network") if (r["dtype"], r["layout"], r["mode"]) == SETTING]
    timed = [r for r in timed if r["status"] == "ok"]
    by_case = {(r["peer"], r["batch"]): Timing.from_row(r["ms"]) for r in timed}
    others = [p for p in dict.fromkeys(p for p, _ in by_case) if not p.startswith("ghostfused")]
    networks = sorted({f"{r['name']} at {r['size']}²" for r in timed})
    lines = []
    for ours, batch in HEADLINE:
        if (ours, batch) not in by_case:
            raise BadInput(f"the headline wants {ours} at batch {batch}, which the results folder has not")
        own = by_case[ours, batch]
        cells = [_speedup(by_case.get((p, batch)), own) for p in others]
        lines.append([f"{WHAT_RAN[ours]}, batch {batch}", f"{own.p50:.2f} ms", *cells])
    head = [f"{', '.join(networks)}, {SETTING[0]}", "time", *(f"over `{p}`" for p in others)]
    return _markdown(head, lines) + f"\n*{environment(_of_kind(results, 'network')).strip()}*\n"


def _speedup(other: Timing | None, own: Timing) -> str:
    """``own``'s speed-up over ``other``, and whether it is within the spread."""
    if other is None:
        return "–"
    return f"{other.p50 / own.p50:.2f}×{' (tie)' if verdict(other, own) == 'tie' else ''}"


def network(results: Results) -> str:
    """ms per batch, a line for each peer, a column for each batch; in brackets the speed-up over eager, or without it over
    the first peer."""
    rows = _rows(results, "network")
    batches = sorted({r["batch"] for r in rows})
    lines: dict[tuple, dict[int, dict]] = {}
    for r in rows:
        if r["status"] != "absent":
            lines.setdefault((r["name"], r["dtype"], r["layout"], r["mode"], r["peer"]), {})[r["batch"]] = r
    body = []
    for (*where, peer), by_batch in lines.items():
        first = next(peer for *same, peer in lines if same == where)
        base = lines.get((*where, "eager"), lines[*where, first])
        cells = [_network_cell(by_batch.get(b), base.get(b)) for b in batches]
        *what, mode = where
        what += [] if mode == "inference" else [mode.replace("_", " ")]
        body.append([", ".join(what), f"`{peer}`", *cells])
    return _markdown(["network", "peer", *(f"batch {b}" for b in batches)], body)


def _network_cell(row: dict | None, base: dict | None) -> str:
    if row is None or row["status"] != "ok":
        return "–" if row is None else row["status"]
    timing = Timing.from_row(row["ms"])
    text = f"{timing.p50:.2f} ms"
    if base is None or base is row or base["status"] != "ok":
        return text
    first = Timing.from_row(base["ms"])
    return f"{text} (tie)" if verdict(first, timing) == "tie" else f"{text} ({first.p50 / timing.p50:.2f}×)"


def memory(results: Results) -> str:
    rows = _rows(results, "memory")
    base = {(r["name"], r["mode"]): r["saved_bytes"] for r in rows if r["execution"] == "eager"}
    return _markdown(
        ["network", "mode", "execution", "saved MB per image", "of eager"],
        [[r["name"], r["mode"].replace("_", " "), f"`{r['execution']}`", f"{r['saved_bytes'] / r['batch'] / 1e6:.1f}",
          f"{r['saved_bytes'] / base[r['name'], r['mode']]:.0%}"] for r in rows],
    )  # fmt: skip


def rss(results: Results) -> str:
    return _markdown(rss_table.COLUMNS, [rss_table.cells(row) for row in _rows(results, "rss")])


def launches(results: Results) -> str:
    rows = _rows(results, "launches")
    return _markdown(
        ["network", "execution", "operations per forward", "kernels per forward, profiled"],
        [[r["name"], f"`{r['execution']}`", str(r["ops"]), str(r["kernels"] or "–")] for r in rows],
    )


def overhead(results: Results) -> str:
    rows = _rows(results, "overhead")
    return _markdown(
        ["backend", "from", "µs per call", "± half the spread", "of which this step"],
        [[f"`{r['backend']}`", r["step"], f"{r['us']:.1f}", f"{r['spread_us'] / 2:.1f}",
          "–" if r["adds_us"] is None else f"{r['adds_us']:.1f}"] for r in rows],
    )  # fmt: skip


def environment(results: Results) -> str:
    """Where and how the folder's results were made."""
    facts = [e for e, _ in results]
    where = sorted({title(e) for e in facts})
    commits = sorted({f"{(e['commit'] or 'unknown')[:10]}{' with changes' if e['dirty'] else ''}" for e in facts})
    wider = sorted({m[1] for e in facts if (m := re.search(r"--others-tolerance (\S+)", e["command"])) and m[1] != "1"})
    days = sorted({e["time"][:10] for e in facts})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    limit = f"; limit of the others' errors: {', '.join(wider)} times ours" if wider else ""
    return f"{'; '.join(where)}; commit {', '.join(commits)}; {when}{limit}.\n"


BLOCKS: dict[str, Callable[[Results], str]] = {
    f.__name__: f for f in (headline, modules, network, memory, rss, launches, overhead, environment)
}


def load(folder: str, root: Path = RESULTS) -> Results:
    return [read(path) for path in report.files([root / folder])]


def find_figure(name: str, results: Results) -> report.Figure:
    known = {f[1]: f for e, rows in results for f in report.figures_of(e, rows)}
    if name not in known:
        raise BadInput(f"a page wants figure:{name}; the results allow {', '.join(known)}")
    return known[name]


def figure_path(name: str, folder: str) -> Path:
    return FIGURES / f"{folder}_{name}.png"


def pages() -> list[Path]:
    """README and the pages of docs that have a block."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in found if BLOCK.search(page.read_text(encoding="utf-8"))]


def fill(text: str, page: Path = README, root: Path = RESULTS) -> str:
    """``text``, that of ``page``, with every block made anew; draws nothing."""

    def block(match: re.Match) -> str:
        begin, what, folder, _, end = match.groups()
        results = load(folder, root)
        if what.startswith("figure:"):
            name = what.removeprefix("figure:")
            heading = find_figure(name, results)[0]
            target = os.path.relpath(figure_path(name, folder), page.parent)
            content = f"![{heading}]({Path(target).as_posix()})\n"
        elif what in BLOCKS:
            content = BLOCKS[what](results)
        else:
            raise BadInput(f"{page.name}: no block {what!r}; there are {', '.join(BLOCKS)} and figure:NAME")
        return begin + content + end

    return BLOCK.sub(block, text)


def drift(page: Path, root: Path = RESULTS) -> list[str]:
    """What in ``page`` and its figures is not what the results say."""
    text = page.read_text(encoding="utf-8")
    wrong = [f"{page.name}: the text between the markers"] if fill(text, page, root) != text else []
    for _, what, folder, *_ in BLOCK.findall(text):
        if what.startswith("figure:"):
            name = what.removeprefix("figure:")
            path = figure_path(name, folder)
            if not path.is_file() or source_of(path) != report.digest(find_figure(name, load(folder, root))[2]):
                wrong.append(f"{page.name}: {path.name}")
    return wrong


def source_of(path: Path) -> str | None:
    """The hash of the rows that a PNG of ours was drawn from."""
    match = re.search(rb"tEXtSource\x00([0-9a-f]{16})", path.read_bytes())
    return match[1].decode() if match else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if pages and results differ")


def main(options: argparse.Namespace) -> int:
    """fill the generated blocks and figures of README and docs from bench/results"""
    blocks = 0
    wrong: list[str] = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        found = BLOCK.findall(text)
        blocks += len(found)
        if options.check:
            wrong += drift(page)
            continue
        page.write_text(fill(text, page), encoding="utf-8")
        for _, what, folder, *_ in found:
            if what.startswith("figure:"):
                name = what.removeprefix("figure:")
                FIGURES.mkdir(parents=True, exist_ok=True)
                drawn = report.draw(find_figure(name, load(folder)), FIGURES)
                drawn.rename(figure_path(name, folder))
    if options.check:
        print("\n".join(f"differs: {w}" for w in wrong) or f"{blocks} blocks agree with the results")
        return int(bool(wrong))
    print(f"{blocks} blocks filled")
    return 0 if blocks else 2
