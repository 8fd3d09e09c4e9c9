"""ghostfused's benchmarks. Each command prints a table and writes JSON Lines with --output; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial

from ghostfused.cli.inputs import in_one_line

COMMANDS = ("module", "network", "memory", "launches", "overhead", "cpu_peak", "bands", "busy", "callers", "serve",
            "traffic", "profile", "suite", "compare", "predicted", "report", "readme")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"bench.{name}")
        short = (module.main.__doc__ or "").replace("%", "%%")  # argparse formats help, and no description
        sub = commands.add_parser(name, help=short, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)
    options = parser.parse_args(argv)
    return in_one_line(f"python -m bench {options.command}", partial(options.main, options))


if __name__ == "__main__":
    sys.exit(main())
