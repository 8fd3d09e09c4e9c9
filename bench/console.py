"""Progress and tables on the terminal: by rich where it is installed, else by plain prints."""

from __future__ import annotations

import sys
import time
from typing import Any

from .timing import Timing, verdict

try:
    import rich  # noqa: F401

    _RICH = True
except ImportError:
    _RICH = False


class Display:
    """A table that grows while the work goes on: ``with Display(title, columns, total) as d: d.doing(…); d.row(…)``."""

    def __init__(self, title: str, columns: list[str], total: int):
        self.title, self.columns, self.total = title, columns, total
        self.rows: list[list[str]] = []
        self.done = 0
        self.start = time.perf_counter()
        self._live: Any = None
        self._progress: Any = None
        self._case = ""

    def __enter__(self) -> Display:
        if _RICH and sys.stdout.isatty():
            from rich.live import Live
            from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

            columns = SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn()
            self._progress = Progress(*columns, transient=True)
            self._task = self._progress.add_task("", total=self.total)
            self._live = Live(get_renderable=self._frame, refresh_per_second=8, transient=True)
            self._live.__enter__()
        else:
            print(f"{self.title} ({self.total} cases)", flush=True)
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)
        if exception[0] is None:
            self.print()

    def case(self, name: str) -> None:
        """What ``doing`` is about from now on."""
        self._case = name
        self.doing("")

    def doing(self, what: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self._case} {what}")

    def row(self, cells: list[str]) -> None:
        """Adds a line for a case that is done."""
        self.rows.append(cells)
        self.done += 1
        if self._progress is not None:
            self._progress.update(self._task, completed=self.done)
        else:
            seconds = time.perf_counter() - self.start
            known = [f"{name} {_plain(c)}" for name, c in zip(self.columns, cells, strict=True) if c != "-"]
            print(f"[{self.done}/{self.total} {seconds:5.0f} s] " + ", ".join(known), flush=True)

    def _frame(self):
        from rich.console import Group

        return Group(_table(self.title, *_used(self.columns, self.rows[-12:])), self._progress)

    def print(self) -> None:
        table(self.title, self.columns, self.rows)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; columns with nothing but dashes are left out."""
    columns, rows = _used(columns, rows)
    if _RICH:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 200).print(_table(title, columns, rows))
        return
    plain = [columns, *([_plain(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in plain) for i in range(len(columns))]
    print(f"\n{title}")
    for row in plain:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


def _used(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    used = [i for i in range(len(columns)) if not rows or any(row[i] != "-" for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


def _table(title: str, columns: list[str], rows: list[list[str]]):
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


_MARKS = {"faster": "[green]", "slower": "[red]", "tie": "[dim]", "WRONG": "[bold red]", "error": "[red]"}


def _plain(cell: str) -> str:
    for mark in _MARKS.values():
        cell = cell.replace(mark, "")
    return cell


def milliseconds(ms: float) -> str:
    return f"{ms * 1e3:.1f} µs" if ms < 1 else f"{ms:.2f} ms"


def cell(row: dict, baseline: dict | None) -> str:
    """A peer's time, and its speed-up over the baseline's or that it is a tie; or its status."""
    if row["status"] != "ok":
        return "-" if row["status"] == "absent" else f"{_MARKS[row['status']]}{row['status']}"
    text = milliseconds(row["ms"]["p50"])
    if baseline is None or baseline["status"] != "ok" or baseline is row:
        return text
    base, own = Timing.from_row(baseline["ms"]), Timing.from_row(row["ms"])
    result = verdict(base, own)
    return f"{_MARKS[result]}{text} {'tie' if result == 'tie' else f'{base.p50 / own.p50:.2f}×'}"


def absences(rows: list[dict]) -> None:
    """Says once for each peer why it was absent, wrong or broke."""
    seen: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.get("status") in ("absent", "WRONG", "error"):
            key = row["peer"], row["status"], row["reason"]
            seen[key] = seen.get(key, 0) + 1
    for (peer, status, reason), count in seen.items():
        print(f"{status:7} {peer}: {reason}{f' ({count} cases)' if count > 1 else ''}")
