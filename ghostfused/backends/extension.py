"""Loads a compiled extension, or says why there is none. Importing the package never fails for one."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parents[1]


class Extension:
    """``ghostfused.<name>``; importing it registers its op.

    Attributes:
        module: the extension itself; None if there is none.
        failure: why it can't be used here; None if it can.
    """

    def __init__(self, name: str):
        self.name = f"ghostfused.{name}"
        self.module = None
        self.failure: str | None = None
        if importlib.util.find_spec(self.name) is None:
            note = _PACKAGE / f"{name}_build_failure.txt"  # setup.py writes it
            why = f": {note.read_text().strip()}" if note.exists() else ""
            if (other := _installed_elsewhere(name)) is not None:
                why = f": Python takes the package from {_PACKAGE.parent}, not the one with this extension in {other.parent}"
            self.failure = f"the extension {self.name} is not built{why}"
            return
        try:
            self.module = importlib.import_module(self.name)
        except ImportError as error:  # built for another Python, torch or CUDA runtime
            self.failure = f"the extension {self.name} can't be loaded: {error}"
        else:
            self.failure = self.module.build_info().get("error")

    def build_info(self) -> dict | None:
        """What it was built for; None where there is no extension."""
        return None if self.module is None else self.module.build_info()


def _installed_elsewhere(name: str) -> Path | None:
    """An installed ghostfused that has the extension: in a checkout's folder Python takes the checkout."""
    for distribution in importlib.metadata.distributions(name="ghostfused"):
        package = Path(str(distribution.locate_file("ghostfused"))).resolve()
        if package != _PACKAGE.resolve() and any(package.glob(f"{name}.*")):
            return package
    return None


def op(name: str) -> Callable[..., Any]:
    """The op ``ghostfused::<name>``, which an extension computes."""
    return getattr(torch.ops.ghostfused, name).default
