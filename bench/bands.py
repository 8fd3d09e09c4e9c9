"""Whether bottlenecks are faster by bands of rows, whose maps stay in the second cache: each whole, and cut into bands.

A band is a captured, frozen program for fewer rows, with those around it that its results need (``halo``: made anew in each band). The
same without them is the least that any scheme could take. ``--chain 2`` cuts bottlenecks that follow each other, so that also what is
between them stays in cache. A part with squeeze-and-excite has no bands: its gate needs the mean of the whole map.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ghostfused
from ghostfused.cli import inputs

from . import cases, measure
from .console import milliseconds, table
from .environment import title
from .results import Writer
from .timing import Timed, Timing, time_interleaved


class Part(NamedTuple):
    """Bottlenecks that follow each other, and what comes in: (C, H, W)."""

    name: str
    module: nn.Sequential
    shape: tuple[int, int, int]


class Reach(NamedTuple):
    """Rows of the input: from a row of the result to the next, and before and behind its first that it needs as well."""

    stride: int
    before: int
    behind: int

    def band(self, begin: int, end: int, height: int) -> tuple[int, int]:
        """The rows of the input that the rows begin … end - 1 of the result need: the first, and how many. Windows lie in the
        band as in the whole."""
        first = max(begin * self.stride - self.before, 0) // self.stride * self.stride
        return first, min((end - 1) * self.stride + self.behind + 1, height) - first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    several = inputs.several
    parser.add_argument("--network", default="timm:ghostnet_100", help="as in `network`")
    parser.add_argument("--size", type=inputs.positive, default=224)
    parser.add_argument(
        "--least", type=inputs.positive, default=56, help="rows of the smallest map that is cut, default 56"
    )
    parser.add_argument("--bands", default="2,4", type=several(inputs.positive), metavar="N,N", help="default 2,4")
    parser.add_argument("--chain", default="1,2", type=several(inputs.positive), metavar="N,N", help="default 1,2")
    cases.add_setting_arguments(parser, batch="1,16", modes=False)
    measure.add_arguments(parser, cache="warm")


def parts(model: nn.Module, size: int, least: int, lengths: list[int]) -> Iterator[Part]:
    """The bottlenecks of ``model`` on maps of at least so many rows, alone and with those that follow."""
    fused = ghostfused.fuse(model)
    names = [name for name, m in fused.named_modules() if isinstance(m, ghostfused.FusedGhostBottleneck)]
    given: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: given.update({name: (x[0], y)}))
        for name in names
    ]
    model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    for i, first in enumerate(names):
        for length in lengths:
            chain = names[i : i + length]
            follows = all(given[b][0] is given[a][1] for a, b in itertools.pairwise(chain))
            if len(chain) == length and follows and given[chain[-1]][0].shape[2] >= least:
                module = nn.Sequential(*map(model.get_submodule, chain)).eval()
                yield Part(" → ".join(chain), module, tuple(given[first][0].shape[1:]))  # type: ignore[arg-type]


def reach_of(part: Part) -> Reach | None:
    """By the gradient of a row in the middle; None if a row needs the whole map."""
    height = part.shape[1]
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.rand(1, *part.shape, requires_grad=True)
        y = part.module(x)
        middle = y.shape[2] // 2
        (grad,) = torch.autograd.grad(y[:, :, middle].square().sum(), x)
    rows = grad.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    stride = height // y.shape[2]
    if rows[0] == 0 or height % y.shape[2]:
        return None
    return Reach(stride, middle * stride - rows[0], rows[-1] - middle * stride)


def _calls(part: Part, heights: list[int], setting: cases.Setting) -> Callable[[object], None]:
    module, programs = setting.place(part.module), {}
    given = [setting.input((part.shape[0], height, part.shape[2])) for height in heights]
    for x in given:
        if x.shape[2] not in programs:
            programs[x.shape[2]] = ghostfused.capture(module, x, freeze=True)
    calls = [(programs[x.shape[2]], x) for x in given]

    def run(_: object) -> None:
        for program, x in calls:
            program(x)

    return run


def _ratio(timing: Timing, whole: Timing) -> dict[str, float]:
    each = [a / b for a, b in zip(timing.medians, whole.medians, strict=True)]
    return {"p50": round(statistics.median(each), 3), "low": round(min(each), 3), "high": round(max(each), 3)}


def main(options: argparse.Namespace) -> int:
    """time of bottlenecks cut into bands of rows over that of the whole, on the CPU"""
    device = measure.set_device(options, only="cpu")
    how = measure.method(options)
    (model,) = cases.networks(options.network, options.size).values()
    shown = []
    with Writer(options.output, device) as writer, torch.inference_mode():
        found = list(parts(model, options.size, options.least, options.chain))
        if not found:
            print(f"absent  {options.network}: no bottlenecks on maps of {options.least} rows or more")
            return 1
        for part in found:
            reach = reach_of(part)
            if reach is None:
                print(f"absent  {part.name}: a row of its result needs the whole map")
                continue
            height = part.shape[1]
            for setting in cases.settings(options):
                functions = {"whole": Timed(_calls(part, [height], setting))}
                for bands in options.bands:
                    edges = [i * (height // reach.stride) // bands for i in range(bands + 1)]
                    ends = list(itertools.pairwise(edges))
                    halo = [reach.band(begin, end, height)[1] for begin, end in ends]
                    functions[f"{bands}"] = Timed(_calls(part, halo, setting))
                    own = [(end - begin) * reach.stride for begin, end in ends]
                    functions[f"{bands} without"] = Timed(_calls(part, own, setting))
                timings = time_interleaved(functions, [torch.zeros(1)], how).of
                for bands in options.bands:
                    row = {
                        "kind": "bands", "name": options.network, "part": part.name, "size": options.size, **vars(setting),
                        "shape": list(part.shape), "rows_around": [reach.before, reach.behind], "bands": bands,
                        "ms": timings["whole"].as_row(), "ratio": _ratio(timings[f"{bands}"], timings["whole"]),
                        "ratio_without": _ratio(timings[f"{bands} without"], timings["whole"]),
                    }  # fmt: skip
                    writer.write(row)
                    cells = [
                        f"{row[r]['p50']:.2f} ({row[r]['low']:.2f}–{row[r]['high']:.2f})"
                        for r in ("ratio", "ratio_without")
                    ]
                    what = f"{setting.batch} {setting.dtype} {setting.layout}"
                    shown.append([part.name, what, milliseconds(timings["whole"].p50), str(bands), *cells])
    heading = f"{options.network} at {options.size}² in bands, captured and frozen; {title(writer.environment)}"
    table(heading, ["part", "setting", "whole", "bands", "bands / whole", "without halo"], shown)
    return 0
