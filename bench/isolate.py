"""Whole networks, each peer in a process of its own, in turns, round after round: ``python -m bench network --isolate ROUNDS``.

In one process peers are not alone: an engine's threads go on spinning for a while after its call, and slow down whoever is next.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from .console import Display, absences, cell
from .environment import title
from .results import Writer, key, read

_OWN = ("command", "main", "isolate", "peers", "output")
"""Options that a peer's process gets from here."""


def arguments(options: argparse.Namespace) -> list[str]:
    """The command line that says what ``options`` say, for one peer."""
    given = {name: value for name, value in vars(options).items() if name not in _OWN and value is not None}
    texts = {n: ",".join(map(str, v)) if isinstance(v, list) else str(v) for n, v in given.items()}
    return [part for name, text in texts.items() for part in (f"--{name.replace('_', '-')}", text)]


def measured(peer: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A process's rows of ``peer``.

    Raises:
        RuntimeError: the process died; the message has its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.jsonl"
        command = [
            sys.executable,
            "-m",
            "bench",
            "network",
            *arguments(options),
            "--peers",
            peer,
            "--output",
            str(output),
        ]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
        rows = read(output)[1] if output.exists() else []
    if done.returncode and not any(row.get("status") in ("WRONG", "error") for row in rows):
        raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return [row for row in rows if row["kind"] == "network"]


def joined(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of a peer's rows for the same setting: medians over the rounds, ``medians`` holding each round's."""
    failed = [row for row in rounds if row["status"] != "ok"]
    if failed:
        return failed[0]
    each = [row["ms"] for row in rounds]
    ms = {name: round(statistics.median(times[name] for times in each), 6) for name in ("p20", "p50", "p80")}
    row = rounds[-1] | {"ms": ms | {"medians": [times["p50"] for times in each]}, "rounds": len(rounds)}
    return row | {"images_per_second": round(row["batch"] / ms["p50"] * 1e3, 2)}


def main(options: argparse.Namespace, peers: list[str], baseline: str) -> int:
    """Runs the rounds, the order of the peers reversed in every second one."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    with Writer(options.output, torch.device(options.device)) as writer:
        heading = f"Whole networks at {options.size}², a process a peer, time per batch; {title(writer.environment)}"
        with Display(heading, ["network", "setting", *peers], options.isolate * len(peers)) as display:
            for number in range(options.isolate):
                for peer in peers if number % 2 == 0 else reversed(peers):
                    display.case(f"round {number + 1}: {peer}")
                    for row in measured(peer, options):
                        found.setdefault(key(row), []).append(row)
            cases: dict[tuple, dict[str, dict[str, Any]]] = {}
            for rounds in found.values():
                row = joined(rounds)
                writer.write(row)
                setting = row["name"], row["batch"], row["dtype"], row["layout"], row["mode"]
                cases.setdefault(setting, {})[row["peer"]] = row
            for (name, batch, dtype, layout, mode), rows in cases.items():
                what = f"batch {batch} {dtype} {layout}" + ("" if mode == "inference" else f" {mode}")
                display.row([name, what, *(cell(rows[peer], rows.get(baseline)) for peer in peers)])
        absences(writer.rows)
    return int(any(row.get("status") in ("WRONG", "error") for row in writer.rows))
