"""Says what works on this machine, checks fused modules against float64, and fuses a network to show what that brings."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from . import __version__
from .cli import fuse, info, verify
from .cli.inputs import in_one_line

COMMANDS = {"info": info, "verify": verify, "fuse": fuse}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ghostfused", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ghostfused {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        short = (module.main.__doc__ or "").replace("%", "%%")  # argparse formats help, and no description
        sub = commands.add_parser(name, help=short, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)
    options = parser.parse_args(argv)
    return in_one_line(f"python -m ghostfused {options.command}", partial(options.main, options))


if __name__ == "__main__":
    sys.exit(main())
