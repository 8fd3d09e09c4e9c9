"""What the compilers made of the kernels, with no GPU: ``python -m bench.static``. Exit code 1 if a kernel spills.

Prints a table for every module of GhostNet 1.0× and one for every op of the network fused whole, and writes their rows to
bench/results/static_BACKEND.jsonl; for CUDA see bench/static_cuda.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import static_cuda, static_network, static_triton

RESULTS = Path(__file__).parent / "results"
# A part is a module with HEADER (what is counted), COLUMNS (of the table) and rows(targets, dtypes, layouts).
PARTS = {"triton": static_triton}


def table(header: str, columns: tuple[str, ...], rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Prints ``rows`` as they come, and hands them on."""
    print(header)
    widths: list[int] = []
    for row in rows:
        cells = [str(row[name]) for name in columns]
        if not widths:
            widths = [max(len(name), len(cell)) for name, cell in zip(columns, cells, strict=True)]
            print("  ".join(name.rjust(n) for name, n in zip(columns, widths, strict=True)))
        print("  ".join(cell.rjust(n) for cell, n in zip(cells, widths, strict=True)), flush=True)
        yield row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", choices=[*PARTS, "cuda"], default=[*PARTS, "cuda"])
    parser.add_argument("--target", nargs="+", default=["sm_80", "sm_90"])
    parser.add_argument("--dtype", nargs="+", default=["float16", "float32"])
    parser.add_argument("--layout", nargs="+", default=["nchw", "nhwc"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder (default %(default)s)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    spills = 0
    status = 0
    if "cuda" in options.backend:  # has one kernel for many modules, so its own tables
        status = static_cuda.run(options.output / "static_cuda.json")
    for name in options.backend:
        if name not in PARTS:
            continue
        part = PARTS[name]
        with (options.output / f"static_{name}.jsonl").open("w") as file:
            file.write(json.dumps({"kind": "static_header", "backend": name, "counted": part.HEADER}) + "\n")
            for row in table(part.HEADER, part.COLUMNS, part.rows(options.target, options.dtype, options.layout)):
                file.write(json.dumps({"kind": "static", "backend": name, **row}) + "\n")
                spills += row["spill_bytes"] > 0
            print(f"\n{static_network.HEADER}")
            for setting in itertools.product(options.target, options.dtype, options.layout):
                rows = list(static_network.rows(name, *setting))
                print(f"\n{', '.join(setting)}: {static_network.total(rows)}")
                static_cuda.table([static_network.cells(row) for row in rows], ())
                for row in rows:
                    file.write(json.dumps({"kind": "static_network", **row}) + "\n")
                    spills += sum(n > 0 for n in row["spill_bytes"])
    print(f"{spills} kernels spill registers")
    return 1 if spills else status


if __name__ == "__main__":
    sys.exit(main())
