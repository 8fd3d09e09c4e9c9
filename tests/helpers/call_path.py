"""The call path that docs/kernels.md lists, and the one that a call takes."""

from __future__ import annotations

import inspect
import itertools
import re
from pathlib import Path
from typing import NamedTuple

import torch
from documents import ROOT

import ghostfused

PAGE = ROOT / "docs" / "kernels.md"
BACKENDS = ("CUDA", "CPU", "Triton")
"""As the page calls them."""
REPLAY = "The second call"
_PACKAGE = Path(ghostfused.__file__).parent
_HOP = re.compile(r"^(\d)  (\S+) +(\S+\.\w+) ", re.MULTILINE)
CHECKS = ["ghostfused/ops/refusals.py", "ghostfused/ops/implementations.py"]
"""What stands between the third hop and a kernel in Python: for a gradient's sake, and to check the arguments."""


class Hop(NamedTuple):
    number: int
    name: str
    file: str


def listed(backend: str) -> list[Hop]:
    """The page's hops to a kernel of ``backend``: those of all, and the last ones. Or those of a replay."""
    text = PAGE.read_text()
    text = text[text.index("## The call path") : text.index("## The steps")]
    own = re.search(rf"^{backend}:\n\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert own, backend
    shared = [] if backend == REPLAY else _HOP.findall(text[: text.index("CUDA:")])
    found = shared + _HOP.findall(own[1])
    return [Hop(int(number), name, file) for number, name, file in found]


def files_until(monkeypatch, module, name: str, backend: str, device: str = "cpu", replayed: bool = False) -> list[str]:
    """The package's files through which a Ghost module of ``backend`` comes to call ``module``'s ``name``, outermost first."""
    ghost = ghostfused.FusedGhostModule(4, 8, backend=backend).to(device).eval()
    x = torch.randn(1, 4, 5, 5, device=device)
    if replayed:
        with torch.inference_mode():
            ghost(x)
    function = getattr(module, name)
    stacks = []

    def look(*args):
        stacks.append([Path(frame.filename) for frame in reversed(inspect.stack())])
        return function(*args)

    monkeypatch.setattr(module, name, look)
    with torch.inference_mode(replayed):  # with gradients it is read afresh
        ghost(x)
    inside = [str(path.relative_to(_PACKAGE.parent)) for path in stacks[0] if _PACKAGE in path.parents]
    return [path for path, _ in itertools.groupby(inside)]


def python_files() -> list[str]:
    """The files on the way to the launch of Triton's kernel; the op itself is PyTorch's dispatcher."""
    hops = listed("Triton")
    return [hop.file for hop in hops[:3]] + CHECKS + [hop.file for hop in hops[4:5]]
