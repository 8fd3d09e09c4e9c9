"""``python -m ghostfused info | verify | fuse``."""

from __future__ import annotations

import argparse
import sys

from .cli import fuse, info, verify

COMMANDS = {"info": info, "verify": verify, "fuse": fuse}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ghostfused", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        short = (module.main.__doc__ or "").replace("%", "%%")  # argparse formats help, and no description
        sub = commands.add_parser(name, help=short, description=module.__doc__)
        module.add_arguments(sub)
        sub.set_defaults(main=module.main)
    options = parser.parse_args(argv)
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
