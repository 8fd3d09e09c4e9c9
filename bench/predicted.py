"""Predicted against measured, module by module: how far each time lies above its bound, and whether both order the modules alike.

PREDICTED holds a JSON object a line, as `python -m tools.sass --json` writes it: a module's shape, dtype, layout and batch, and predicted
times in fields that end in ``_us``, the largest of which is the bound. MEASURED is what ``module`` writes. With --counters also
the profiler's instructions and bytes against the predicted ones.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from ghostfused.cli.inputs import BadInput, json_lines, text_of

from .console import table
from .results import MODULE_KEY, module_key, read

PEERS = ("ghostfused_cuda+graph", "ghostfused_cuda")
COUNTERS = {
    "instructions": "smsp__inst_executed.sum",
    "dram_read_bytes": "dram__bytes_read.sum",
    "dram_write_bytes": "dram__bytes_write.sum",
}
"""What is predicted, and the profiler's name for it."""
SHOWN = {
    "issue slots busy, %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "DRAM, %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "µs": "gpu__time_duration.sum",
}
_UNITS = {"": 1, "inst": 1, "%": 1, "byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "us": 1, "ms": 1e3,
          "nsecond": 1e-3, "usecond": 1, "msecond": 1e3}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("predicted", type=Path, nargs="+", metavar="PREDICTED.jsonl")
    parser.add_argument("measured", type=Path, metavar="MEASURED.jsonl")
    parser.add_argument("--peer", help=f"default: the first of {', '.join(PEERS)} that was measured")
    parser.add_argument(
        "--counters", type=Path, nargs=2, metavar=("NCU.csv", "ORDER.jsonl"),
        help="what `ncu --csv --page raw` wrote about `python -m bench profile ORDER.jsonl`",
    )  # fmt: skip


def times(row: dict) -> dict[str, float]:
    """The predicted times, in µs, by what takes them."""
    return {name.removesuffix("_us"): us for name, us in row.items() if name.endswith("_us") and us != 0}


def bound(row: dict) -> tuple[str, float]:
    """What limits the module by the prediction, and its time in µs."""
    name, us = max(times(row).items(), key=lambda item: item[1])
    return name, us


def predictions(path: Path) -> dict[tuple, dict]:
    """The rows of a file of predictions by ``module_key``; lines about anything but one module are left out."""
    found = {}
    for where, row in json_lines("predicted", path):
        if "in_channels" not in row:
            continue
        if missing := [field for field in MODULE_KEY if field not in row]:
            raise BadInput(f"{where}: expected the fields {', '.join(MODULE_KEY)}; missing: {', '.join(missing)}")
        if not times(row) or not all(isinstance(us, int | float) and us > 0 for us in times(row).values()):
            raise BadInput(f"{where}: expected predicted times, positive numbers in fields that end in _us")
        found[module_key(row)] = row
    if not found:
        raise BadInput(f"{path}: no predictions of modules")
    return found


def measured(path: Path, peer: str | None) -> tuple[str, list[dict]]:
    """The peer's name, and its rows that have times."""
    rows = [row for row in read(path)[1] if row["kind"] == "module" and row["status"] == "ok"]
    there = {row["peer"] for row in rows}
    chosen = peer or next((name for name in PEERS if name in there), None)
    if chosen is None or chosen not in there:
        raise BadInput(
            f"{path}: no times of {peer or ' or '.join(PEERS)}; there are {', '.join(sorted(there)) or 'none'}"
        )
    return chosen, [row for row in rows if row["peer"] == chosen]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; NaN where either is constant or there are fewer than three."""
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return math.nan
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) + 1) / 2 for v in values]


def title(row: dict) -> str:
    acts = f"{row['act_primary']}, {row['act_cheap']}"
    size = f"{row['in_channels']}→{row['out_channels']} {row['height']}×{row['width']}"
    return f"{size} {row['dw_size']}×{row['dw_size']} ({acts})"


def summary(pairs: list[tuple[dict, float]]) -> str:
    """Of the modules in one setting: (prediction, measured µs)."""
    ratios = [us / bound(p)[1] for p, us in pairs]
    measured_us = [us for _, us in pairs]
    correlations = {"the bound": rank_correlation([bound(p)[1] for p, _ in pairs], measured_us)}
    for name in times(pairs[0][0]):
        correlations[name] = rank_correlation([times(p).get(name, math.nan) for p, _ in pairs], measured_us)
    counts = [p.get("count", 1) for p, _ in pairs]
    total = sum(us * n for us, n in zip(measured_us, counts, strict=True))
    of_bounds = sum(bound(p)[1] * n for (p, _), n in zip(pairs, counts, strict=True))
    return (
        f"{len(pairs)} modules: measured / bound {math.exp(statistics.fmean(map(math.log, ratios))):.2f} in geometric mean, "
        f"{min(ratios):.2f} to {max(ratios):.2f}; sum by count {total:.0f} µs measured, {of_bounds:.0f} µs by the bounds; "
        f"rank correlation with {', '.join(f'{name} {value:.2f}' for name, value in correlations.items())}"
    )


def profiled(path: Path) -> list[dict[str, float]]:
    """The profiler's values, kernel by kernel, in plain units (instructions, bytes, %, µs)."""
    lines = [line for line in text_of("--counters", path).splitlines() if line.startswith('"')]
    rows = list(csv.DictReader(lines))
    if not rows:
        raise BadInput(f"{path}: expected what `ncu --csv --page raw` writes, with a line of units")
    units, kernels = rows[0], rows[1:]
    wanted = (*COUNTERS.values(), *SHOWN.values())
    if missing := [name for name in wanted if name not in units]:
        raise BadInput(f"{path}: no column {missing[0]}")
    if unknown := sorted({units[name] for name in wanted} - set(_UNITS)):
        raise BadInput(f"{path}: unknown unit {unknown[0]!r}")
    try:
        return [{name: float(k[name].replace(",", "")) * _UNITS[units[name]] for name in wanted} for k in kernels]
    except (AttributeError, ValueError) as error:
        raise BadInput(f"{path}: expected numbers in the profiler's columns: {error}") from None


def counter_rows(predicted: dict[tuple, dict], counters: Path, order: Path) -> Iterable[list[str]]:
    """Cells of the table of predicted against profiled counts."""
    kernels = profiled(counters)
    modules = []
    for where, row in json_lines("--counters", order):
        if missing := [field for field in (*MODULE_KEY,) if field not in row]:
            raise BadInput(f"{where}: expected what `profile` writes; missing: {', '.join(missing)}")
        modules.append(row)
    if len(kernels) != len(modules):
        raise BadInput(
            f"{counters}: {len(kernels)} kernels, but {order} has {len(modules)} modules, of one kernel each"
        )
    for module, kernel in zip(modules, kernels, strict=True):
        row = predicted.get(module_key(module), {})
        ratios = [f"{row[f] / max(kernel[name], 1):.2f}" if f in row else "-" for f, name in COUNTERS.items()]
        yield [title(module), module["layout"], *ratios, *(f"{kernel[name]:.1f}" for name in SHOWN.values())]


def main(options: argparse.Namespace) -> int:
    """compare predicted times of modules with measured ones"""
    predicted = {key: row for path in options.predicted for key, row in predictions(path).items()}
    peer, rows = measured(options.measured, options.peer)
    groups: dict[tuple, list[tuple[dict, float]]] = {}
    cells, without = [], []
    for row in rows:
        own = predicted.get(module_key(row))
        if own is None:
            without.append(title(row))
            continue
        us, (limiter, least) = row["ms"]["p50"] * 1e3, bound(own)
        setting = row["dtype"], row["layout"], f"batch {row['batch']}", row["mode"]
        groups.setdefault(setting, []).append((own | {"count": row["count"]}, us))
        marks = ["host time"] * row.get("host_bound", False) + ["below the bound"] * (us < least)
        cells.append([title(row), " ".join(setting[:3]), str(row["count"]), f"{us:.1f}", f"{least:.1f}", limiter,
                      f"{us / least:.2f}", ", ".join(marks) or "-"])  # fmt: skip
    if not cells:
        raise BadInput(f"none of the {len(rows)} measured modules is among the {len(predicted)} predicted")
    columns = ["module", "setting", "×", "measured µs", "bound µs", "by", "measured / bound", "note"]
    table(f"{peer}: measured against predicted", columns, cells)
    for setting, pairs in groups.items():
        print(f"{peer}, {' '.join(setting)}: {summary(pairs)}")
    if without:
        print(f"no prediction of {len(without)} measured modules: {', '.join(dict.fromkeys(without))}")
    if options.counters:
        heads = ["module", "layout", *(name.replace("_", " ") for name in COUNTERS), *SHOWN]
        table(
            "Predicted / profiled, and what the profiler saw", heads, list(counter_rows(predicted, *options.counters))
        )
    return 0
