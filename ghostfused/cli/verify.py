"""Checks Ghost modules or whole networks against float64, beside the error that PyTorch itself makes.

``--configs FILE.jsonl`` checks one module a row; a row has in_channels, out_channels, height, width and optionally
kernel_size, stride, dw_size, ratio, act_primary, act_cheap. ``--model`` checks a network, fused against unfused: "seed"
(the blog's GhostNet), "paper", "timm:NAME", or "file.py:function" (a function that returns the model, or the model and an
input). Prints a line a case: ok, MISS, or VOID where PyTorch's own error in the dtype is so large that the limit decides nothing.
The exit code is 1 if any misses its limit, 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, functional
from ..fuse import fuse_with_report
from ..nn.bottleneck import FusedGhostBottleneck
from ..nn.ghost_module import FusedGhostModule
from ..numerics import TOLERANCES, relative_error, rounded_anew
from ..spec.activations import BY_NAME
from ..testing import Case, Verdict, judge, make_args, to_device
from . import inputs
from .inputs import BadInput, first_tensor, load_model, positive

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
_SHAPE = ("in_channels", "out_channels", "height", "width")
_SETTINGS = {"kernel_size": 1, "stride": 1, "dw_size": 3, "ratio": 2, "act_primary": "relu", "act_cheap": "relu"}
"""What a row may leave out."""
_LABELS = ("source", "count")
"""What a row may say beside; nothing is computed of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--configs", type=Path, metavar="FILE.jsonl", help="check one module a row")
    what.add_argument("--model", metavar="seed|paper|timm:NAME|file.py:function", help="check a whole network")
    parser.add_argument("--backend", default="auto", choices=["auto", *backends.BACKENDS], help=inputs.BACKEND)
    parser.add_argument("--dtype", type=inputs.dtype, default="float32", choices=list(DTYPES), help="default float32")
    parser.add_argument("--layout", type=inputs.layout, default="nchw", choices=["nchw", "nhwc"], help="default nchw")
    parser.add_argument("--batch", type=positive, default=2, help="images of an input (default 2)")
    parser.add_argument("--max-size", type=positive, help="cut height and width to this, keeping odd sizes odd")
    parser.add_argument(
        "--size", type=positive, default=224, help="height and width of a network's input (default 224)"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--seed", type=inputs.seed, default=0, help="of the random numbers (default 0)")


def main(options: argparse.Namespace) -> int:
    """compare modules or networks with float64; exit code 1 on any miss"""
    device = str(inputs.device(options.device, options.dtype))
    cases = _modules(options, device) if options.configs else _network(options, device)
    counts: Counter[str] = Counter()
    for name, verdict, note in cases:
        counts[word := word_of(verdict)] += 1
        print(
            f"{word:4} {name}  error {verdict.error:.2e}  "
            f"torch {verdict.torch_error:.2e}  limit {verdict.limit:.2e}{f'  ({note})' if note else ''}",
            flush=True,
        )
    void = f", {counts['VOID']} void: the limit decides nothing" if counts["VOID"] else ""
    print(f"{counts['ok']} passed, {counts['MISS']} failed{void}")
    return 1 if counts["MISS"] else 0 if counts["ok"] else 2


def word_of(verdict: Verdict) -> str:
    """ "ok", "MISS", or "VOID" of a result within a limit that decides nothing."""
    return "MISS" if not verdict.ok else "ok" if verdict.decides else "VOID"


def read_rows(path: Path, source: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a JSON Lines file of Ghost modules, of one ``source`` or of all, each with where it stands.

    Raises:
        BadInput: the file has none, or one says something else than a Ghost module's sizes and activations.
    """
    rows = [(where, _checked(where, row)) for where, row in inputs.json_lines("--configs", path)]
    found = [(where, row) for where, row in rows if source is None or row.get("source") == source]
    if not found:
        option, which = ("--source", f" from {source!r}") if source else ("--configs", "")
        raise BadInput(f"{option}: expected rows{which}, got none in {str(path)!r}")
    return found


def _checked(where: str, row: dict[str, Any]) -> dict[str, Any]:
    fields = (*_SHAPE, *_SETTINGS, *_LABELS)
    if missing := [name for name in _SHAPE if name not in row]:
        raise BadInput(f"{where}: expected a JSON object with {', '.join(_SHAPE)}, got none of {', '.join(missing)}")
    if unknown := sorted(row.keys() - set(fields)):
        raise BadInput(f"{where}: expected no fields beside {', '.join(fields)}, got {', '.join(unknown)}")
    for name, value in row.items():
        if name.startswith("act_"):
            if not isinstance(value, str) or value.lower() not in BY_NAME:
                raise BadInput(f"{where}: {name}: expected one of {[*BY_NAME]}, got {value!r}")
        elif name == "source":
            if not isinstance(value, str):
                raise BadInput(f"{where}: source: expected a string, got {value!r}")
        elif type(value) is not int or not (least := 2 if name == "ratio" else 1) <= value < 2**31:
            raise BadInput(
                f"{where}: {name}: expected a whole number of at least {least} and below 2^31, got {value!r}"
            )
    for name in ("kernel_size", "dw_size"):
        if row.get(name, 1) % 2 == 0:
            raise BadInput(f"{where}: {name}: expected an odd number, got {row[name]}")
    return _SETTINGS | {"count": 1} | row


def read_cases(path: Path, max_size: int | None = None, **settings) -> list[Case]:
    """The distinct Ghost modules of a JSON Lines file as Cases; ``settings`` are further fields of Case."""
    rows = [{name: value for name, value in row.items() if name not in _LABELS} for _, row in read_rows(path)]
    sides = [{side: cut(row[side], max_size) for side in ("height", "width")} for row in rows]
    return list(dict.fromkeys(Case(**(row | side), **settings) for row, side in zip(rows, sides, strict=True)))


def cut(size: int, max_size: int | None) -> int:
    """``size``, or the largest number up to ``max_size`` that is odd where ``size`` is."""
    if max_size is None or size <= max_size:
        return size
    return max(max_size - (max_size - size) % 2, 1)


def _torch_runs_on(device: str) -> bool:
    """False where "cuda" tensors exist and our kernels run, but PyTorch's own don't (PTX on the CPU)."""
    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError:
        return False
    return True


def _modules(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Verdict, str]]:
    settings = {
        "batch": options.batch,
        "dtype": DTYPES[options.dtype],
        "layout": options.layout,
        "allow_tf32": options.dtype == "tf32",
        "seed": options.seed,
    }
    torch_runs = _torch_runs_on(device)
    for case in read_cases(options.configs, options.max_size, **settings):
        try:
            args = make_args(case)
        except (RuntimeError, ValueError) as error:  # such as no memory for so much
            raise BadInput(f"--configs: {case}: {str(error).strip().partition(chr(10))[0]}") from None
        on_device = to_device(args, device)
        backend, note = options.backend, ""
        if backend != "auto" and (reason := backends.BACKENDS[backend].supports(on_device)):
            if unavailable := backends.unavailable_on(backend, torch.device(device).type):
                raise BadInput(f"--backend {backend}: {unavailable}")
            backend, note = "auto", f"by another path, since {backend} doesn't take {reason}"
            on_device = on_device if torch_runs else args
        with torch.inference_mode():
            out = functional.run(on_device, backend)
        yield str(case), judge(out, args), note


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor, batches: int = 4) -> nn.Module:
    """Gives an untrained network's BatchNorms statistics of its own activations on noisy copies of x, and signs mixed
    into their weights, so that its output depends on every layer. Returns the model in eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        if m.affine:
            m.weight.mul_(torch.empty_like(m.weight).uniform_(0.5, 1.5))
            m.bias.add_(torch.empty_like(m.bias).normal_(std=0.3))
    momenta = [m.momentum for m in norms]
    model.train()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # a plain average
    for _ in range(batches):
        model(torch.cat([x, x.flip(-1)]) + 0.3 * torch.randn(2 * len(x), *x.shape[1:]))
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
    return model.eval()


def calibrated(name: str, model: nn.Module, x: Tensor) -> nn.Module:
    """``calibrate(model, x)``; an error in it is one of ``name``, what ``model`` comes from."""
    return inputs.attempt(f"{name} in train mode", lambda: calibrate(model, x))


def network_verdict(model: nn.Module, fused: nn.Module, x: Tensor, dtype: torch.dtype, tf32: bool = False) -> Verdict:
    """Errors of ``fused`` and of ``model`` in ``dtype``, each against ``model`` in float64 on the CPU.

    Each is the median of five, on inputs that differ by less than rounding: in one run either may be small by luck.
    """
    device = x.device
    plain, fused = (copy.deepcopy(m).to(device, dtype) for m in (model, fused))
    # weights rounded to dtype first: the reference answers the same question
    exact = copy.deepcopy(model).cpu().to(dtype).double()
    errors = []
    given = inputs.cast(x.cpu(), dtype)
    near = rounded_anew(given, 4) if given.is_floating_point() else []
    with torch.inference_mode():
        for each in (given, *near):
            expected = first_tensor(exact(inputs.cast(each, torch.float64)))
            errors.append([relative_error(first_tensor(m(each.to(device))), expected) for m in (fused, plain)])
    error, torch_error = map(statistics.median, zip(*errors, strict=True))
    tolerance = TOLERANCES["tf32" if tf32 else dtype]
    return Verdict(error, torch_error, max(tolerance.factor * torch_error, tolerance.floor))


def _network(options: argparse.Namespace, device: str) -> Iterator[tuple[str, Verdict, str]]:
    inputs.backend_on(options.backend, torch.device(device))
    torch.manual_seed(options.seed)
    model, x = load_model(options.model)
    size = cut(options.size, options.max_size)
    given = torch.randn(options.batch, 3, size, size) if x is None else x
    inputs.run_once(options.model, model, given)
    if x is None:
        x, model = given, calibrated(options.model, model, given)
    model.eval()
    fused, report = fuse_with_report(model, backend=options.backend)
    modules, bottlenecks = (
        sum(isinstance(m, kind) for m in fused.modules()) for kind in (FusedGhostModule, FusedGhostBottleneck)
    )
    if not modules:
        reasons = "; ".join(f"{swap.fqn or '(root)'}: {swap.reason}" for swap in report if swap.reason)
        raise BadInput(f"--model: found no Ghost module to fuse in {options.model}{reasons and f': {reasons}'}")
    memory_format = torch.channels_last if options.layout == "nhwc" and x.dim() == 4 else torch.contiguous_format
    x = x.to(device).contiguous(memory_format=memory_format)
    if options.dtype == "tf32":
        torch.set_float32_matmul_precision("high")
    dtype, tf32 = DTYPES[options.dtype], options.dtype == "tf32"
    verdict = inputs.attempt(
        f"{options.model} in {options.dtype}", lambda: network_verdict(model, fused, x, dtype, tf32)
    )
    yield (
        f"{options.model} {tuple(x.shape)} {options.dtype}",
        verdict,
        f"{modules} Ghost modules and {bottlenecks} bottlenecks fused",
    )
