"""Results files: JSON Lines, an environment first, then a row for each measurement, at the end a line that it is complete."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from ghostfused.cli.inputs import BadInput, json_lines

from . import environment

_CONTEST = {
    "name": str, "count": int, "batch": int, "dtype": str, "layout": str, "mode": str, "device": str, "peer": str,
    "status": str,
}  # fmt: skip
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "environment": {"schema": int, "time": str, "command": str, "device": str, "packages": dict, "threads": int},
    "roofs": {"copy_gb_s": float, "matmul_gflops": float, "dtype": str},
    "module": {**_CONTEST, "in_channels": int, "out_channels": int, "height": int, "width": int, "floor_bytes": int,
               "flops": int},
    "network": {**_CONTEST, "size": int},
    "memory": {"name": str, "mode": str, "execution": str, "batch": int, "dtype": str, "saved_bytes": int},
    "rss": {"name": str, "execution": str, "batch": int, "threads": int, "imports_mb": float, "loaded_mb": float,
            "peak_mb": float, "own_mb": float},
    "launches": {"name": str, "execution": str, "ops": int, "by_op": dict},
    "overhead": {"backend": str, "step": str, "us": float, "spread_us": float},
    "cpu_peak": {"name": str, "count": int, "batch": int, "dtype": str, "layout": str, "isa": str, "gflops": float,
                 "peak_gflops": float, "peak_percent": float},
    "bands": {"name": str, "part": str, "bands": int, "batch": int, "dtype": str, "layout": str, "ms": dict, "ratio": dict,
              "ratio_without": dict},
    "busy": {"name": str, "batch": int, "dtype": str, "layout": str, "quiet_ms": dict, "busy_ms": dict, "ratio": float},
    "callers": {"name": str, "sizes": list, "batches": list, "dtype": str, "layout": str, "threads": int, "callers": int,
                "one_per_second": list, "many_per_second": list, "ratio": float, "growth_mb": float},
    "serve": {"name": str, "execution": str, "threads": int, "clients": int, "rates": list,
              "requests_per_second": (int, float), "p50_ms": (int, float), "p99_ms": (int, float)},
    "end": {"seconds": float},
}  # fmt: skip
"""Fields that a row of each kind has at least."""
STATUSES = ("ok", "absent", "WRONG", "error")
_KEY = ("kind", "name", "height", "width", "in_channels", "out_channels", "size", "device", "batch", "dtype", "layout",
        "mode", "peer", "execution", "backend", "step", "threads", "callers", "clients", "part", "bands")  # fmt: skip


def key(row: dict) -> tuple:
    """What two rows must have in common to be compared: what was measured."""
    return tuple(row.get(field) for field in _KEY)


def check(row: dict) -> None:
    """Raises ValueError unless ``row`` has its kind's fields."""
    kind = row.get("kind")
    if kind not in FIELDS:
        raise ValueError(f"kind: expected one of {sorted(FIELDS)}, got {kind!r}")
    for field, types in FIELDS[kind].items():
        if not isinstance(row.get(field), types):
            raise ValueError(f"{kind} row: {field}: expected {types}, got {row.get(field)!r}")
    if "status" in FIELDS[kind]:
        if row["status"] not in STATUSES:
            raise ValueError(f"status: expected one of {STATUSES}, got {row['status']!r}")
        if (row["status"] == "ok") != ("ms" in row):
            raise ValueError(f"a row has times if and only if its status is ok: {row}")
        if row["status"] != "ok" and not row.get("reason"):
            raise ValueError(f"a row that is not ok has a reason: {row}")


MODULE_KEY = ("in_channels", "out_channels", "height", "width", "kernel_size", "stride", "dw_size", "ratio", "act_primary",
              "act_cheap", "dtype", "layout", "batch", "mode")  # fmt: skip
"""What a module's time depends on, beside who computes it: measurements and predictions are joined by it."""


def module_key(row: dict) -> tuple:
    """The ``MODULE_KEY`` of a row of `module`, of `profile` or of a file of predictions."""
    return tuple(row[field] for field in MODULE_KEY)


class Writer:
    """Writes rows as they come; a file of a run that broke off lacks the "end" line. A row marked "preliminary" stands until
    one of the same key follows; one with times outlives an error."""

    def __init__(self, path: Path | None, device: torch.device):
        self.start = time.perf_counter()
        self.rows: list[dict] = []
        self.device = device
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8")
        self.environment = environment.collect(device)
        self.write(self.environment)

    def write(self, row: dict) -> None:
        check(row)
        if not row.get("preliminary"):
            self.rows.append(row)
        if self._file is not None:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is None:
            end: dict = {"kind": "end", "seconds": round(time.perf_counter() - self.start, 1)}
            if self.device.type == "cuda":
                end["gpu_state"] = environment.gpu_state()
            self.write(end)
        if self._file is not None:
            self._file.close()


def read(path: Path) -> tuple[dict, list[dict]]:
    """(environment, rows) of a results file."""
    rows = []
    for where, row in json_lines("results", path, cut=True):
        try:
            check(row)
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
        rows.append(row)
    if not rows or rows[0]["kind"] != "environment":
        raise BadInput(f"{path}: expected a results file of python -m bench, whose first line is the environment")
    timed = {key(row) for row in rows if row.get("preliminary") and row["status"] == "ok"}
    # a peer that broke while all were timed together took the others' final times along: their first ones stand
    rows = [row for row in rows if row.get("preliminary") or row.get("status") != "error" or key(row) not in timed]
    final = {key(row) for row in rows if not row.get("preliminary")}
    return rows[0], [row for row in rows[1:] if not row.get("preliminary") or key(row) not in final]
