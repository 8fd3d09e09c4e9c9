"""ghostfused's benchmarks. Each command prints a table and writes JSON Lines with --output; see docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys

COMMANDS = ("module", "network", "memory", "launches", "overhead", "cpu_peak", "busy", "callers", "serve",
            "profile", "suite", "compare", "predicted", "report", "readme")  # fmt: skip
FORWARDED = {"traffic": "bytes moved, by arithmetic"}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in FORWARDED:  # they have parsers of their own
        sys.argv[1:] = argv[1:]
        runpy.run_module(f"bench.{argv[0]}", run_name="__main__", alter_sys=True)
        return 0
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f"bench.{name}")
        short = (module.main.__doc__ or "").replace("%", "%%")  # argparse formats help, and no description
        sub = commands.add_parser(name, help=short, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)
    for name, what in FORWARDED.items():
        commands.add_parser(name, help=what.replace("%", "%%"))
    options = parser.parse_args(argv)
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
