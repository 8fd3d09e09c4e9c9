"""Two results files, row by row: faster, slower or tie by the spread; counts (bytes saved, operations) exactly.

A tie is a difference no larger than the larger spread of the two. Spreads are of repeats within a run and know nothing
of a machine that changed between runs: differences of the environments are printed first.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from .console import milliseconds, table
from .results import key, read
from .timing import Timing, verdict

_COUNTS = {"memory": "saved_bytes", "launches": "ops"}
_ENVIRONMENT = ("gpu", "cpu", "threads", "packages", "cuda", "commit", "dirty", "flags", "matmul_precision")


def timing(row: dict) -> Timing | None:
    """The row's timing, if it has one."""
    if "ms" in row:
        return Timing.from_row(row["ms"])
    if row["kind"] == "overhead":
        ms, half = row["us"] / 1e3, row["spread_us"] / 2e3
        return Timing(ms - half, ms, ms + half, (ms - half, ms + half))
    return None


def judge(a: dict, b: dict) -> tuple[str, float | None]:
    """(verdict on b against a, b's speed-up or the inverse ratio of counts)."""
    if a.get("status", "ok") != b.get("status", "ok"):
        return f"{a.get('status')} → {b.get('status')}", None
    first, second = timing(a), timing(b)
    if first is not None and second is not None:
        return verdict(first, second), first.p50 / second.p50
    if a["kind"] in _COUNTS:
        field = _COUNTS[a["kind"]]
        word = "tie" if a[field] == b[field] else "fewer" if b[field] < a[field] else "more"
        return word, a[field] / max(b[field], 1)
    return "not timed", None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.jsonl", help="before")
    parser.add_argument("b", type=Path, metavar="B.jsonl", help="after")
    parser.add_argument("--all", action="store_true", help="ties and rows without times too")
    parser.add_argument(
        "--fail-on-slower", action="store_true", help="exit code 1 if any row is slower, more or newly wrong"
    )


def main(options: argparse.Namespace) -> int:
    """compare two results files: faster, slower or tie per row"""
    (env_a, rows_a), (env_b, rows_b) = read(options.a), read(options.b)
    for field in _ENVIRONMENT:
        if env_a.get(field) != env_b.get(field):
            print(f"differs  {field}: {env_a.get(field)} → {env_b.get(field)}")
    before = {key(row): row for row in rows_a if row["kind"] not in ("roofs", "end")}
    after = {key(row): row for row in rows_b if row["kind"] not in ("roofs", "end")}
    counts: dict[str, int] = {}
    ratios: dict[str, list[float]] = {}
    shown = []
    bad = False
    for k in before.keys() & after.keys():
        a, b = before[k], after[k]
        word, ratio = judge(a, b)
        counts[word] = counts.get(word, 0) + 1
        bad |= word in ("slower", "more") or (word.startswith("ok →"))
        who = a.get("peer") or a.get("execution") or a.get("backend") or ""
        if ratio is not None:
            ratios.setdefault(who, []).append(ratio)
        if options.all or word not in ("tie", "not timed"):
            shown.append(
                (list(before).index(k), [_what(a), who, _value(a), _value(b), f"{ratio:.2f}×" if ratio else "-", word])
            )
    shown.sort(key=lambda pair: pair[0])
    table(
        f"{options.a} → {options.b}",
        ["row", "peer", "before", "after", "ratio", "verdict"],
        [cells for _, cells in shown],
    )
    for who, values in sorted(ratios.items()):
        mean = math.exp(sum(math.log(v) for v in values) / len(values))
        print(f"{who:32} geometric mean of {len(values):3} ratios: {mean:.3f}×")
    print(", ".join(f"{n} {word}" for word, n in sorted(counts.items())) or "no row in common")
    for name, missing in ((options.b, before.keys() - after.keys()), (options.a, after.keys() - before.keys())):
        if missing:
            print(f"{len(missing)} rows are not in {name}")
    return int(bad and options.fail_on_slower) if counts else 2


def _what(row: dict) -> str:
    parts = [
        row["kind"],
        row.get("name"),
        row.get("step"),
        row.get("batch"),
        row.get("dtype"),
        row.get("layout"),
        row.get("mode"),
    ]
    return " ".join(str(p) for p in parts if p is not None)


def _value(row: dict) -> str:
    measured = timing(row)
    if measured is not None:
        return f"{milliseconds(measured.p50)} ± {milliseconds(measured.spread / 2)}"
    return str(row[_COUNTS[row["kind"]]]) if row["kind"] in _COUNTS else row["status"]
