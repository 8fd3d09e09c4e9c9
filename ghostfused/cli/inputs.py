"""What people type at a command, checked before anything runs: an error is one line."""

from __future__ import annotations

import argparse
import copy
import errno
import importlib.util
import json
import math
import os
import select
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import backends
from ..spec import words

BACKEND = "what the fused modules run on (default auto)"
"""The help of each command's --backend."""


class BadInput(SystemExit):
    """Ends a command with one line and exit code 2."""


def in_one_line(command: str, main: Callable[[], int]) -> int:
    """``main()``, the exit code of ``command``; bad input is a line on stderr and exit code 2. If nobody reads what is printed,
    as after ``| head``, it is 1; and a line too where a disk is full, that of the output or another."""
    try:
        code = main()
        if sys.stdout is not None:  # as after ``>&-``
            sys.stdout.flush()
        return code
    except BadInput as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _nobody_reads():  # it was another pipe
            raise
        _print_no_more()
        return 1
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _print_no_more()
        print(f"{command}: error: {error}", file=sys.stderr)
        return 1


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _print_no_more() -> None:
    """What is left to print goes nowhere: Python flushes once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nobody_reads() -> bool:
    """Whether the output is a pipe whose reader has gone."""
    try:
        output = select.poll()
        output.register(sys.stdout, 0)
        return any(event & select.POLLERR for _, event in output.poll(0))
    except (OSError, ValueError):  # it is no file
        return False


def positive(text: str) -> int:
    """An ``argparse`` type: an int of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """An ``argparse`` type: an int of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**31:
        limit = f"of at least {least}" if value < least else "below 2^31"
        raise argparse.ArgumentTypeError(f"expected a whole number {limit}, got {text!r}")
    return value


def amount(text: str) -> float:
    """An ``argparse`` type: a finite number above 0, such as of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def several(each: Callable[[str], Any], known: Collection[str] | None = None) -> Callable[[str], list]:
    """An ``argparse`` type: what ``each`` makes of every part of a text with commas, which is one of ``known`` if that is given."""

    def parse(text: str) -> list:
        values = [each(part) for part in text.split(",")]
        if known is not None and (unknown := [value for value in values if value not in known]):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
        return values

    return parse


def new_file(text: str) -> Path:
    """An ``argparse`` type: a file that can be written, in a folder that is there or can be made."""
    return _writable(text, folder=False)


def new_folder(text: str) -> Path:
    """An ``argparse`` type: a folder that is there or can be made."""
    return _writable(text, folder=True)


def _writable(text: str, folder: bool) -> Path:
    path, kind = Path(text), "folder" if folder else "file"
    try:
        if "\0" in text:
            raise ValueError("it has a null byte")
        if path.exists() and path.is_dir() != folder:
            raise OSError(f"it is a {'file' if folder else 'folder'}")
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        if there != path and not there.is_dir():
            raise OSError(f"{str(there)!r} is no folder")
        if not os.access(there, os.W_OK):
            raise OSError(f"no permission to write to {str(there)!r}")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"expected a {kind} to write, got {text!r}: {_first_line(error)}") from None
    return path


def dtype(text: str) -> str:
    """An ``argparse`` type: the name of a dtype in any of the words for it, such as ``torch.half`` or ``fp16``."""
    found = words.dtype_of(text)
    return text.removeprefix("torch.") if found is None else str(found).removeprefix("torch.")


def layout(text: str) -> str:
    """An ``argparse`` type: "nchw" or "nhwc", also in PyTorch's words, such as ``torch.channels_last``."""
    return words.layout_of(text)


def device(name: str | None, dtype: str = "float32") -> torch.device:
    """The device of that name, on which a tensor of that dtype can be made; the first GPU, or else the CPU, if None is asked for."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
        if found.type == "meta":
            raise ValueError("it has no values")
    except Exception as error:
        raise BadInput(f"--device: expected a device of this machine, got {name!r}: {_first_line(error)}") from None
    if dtype == "tf32" and found.type == "cpu":
        raise BadInput("--dtype: expected another one than tf32 on a CPU, whose products are float32's")
    return found


def text_of(option: str, path: Path) -> str:
    """What is in a file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise BadInput(f"{option}: expected a text file in UTF-8, got {str(path)!r}: {_first_line(error)}") from None


def json_lines(option: str, path: Path, cut: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one a line, each with where it stands; empty lines are left out.

    The last line of a file that is ``cut``, as whoever was stopped while writing leaves it, may be part of one.
    """
    *whole, last = text_of(option, path).split("\n")
    for number, line in enumerate([*whole, last], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if cut and line is last:
                return
            raise BadInput(f"{path}:{number}: expected a JSON object: {_first_line(error)}") from None
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}:{number}", row


def load_model(name: str) -> tuple[nn.Module, Tensor | None]:
    """The network that a command's ``model`` names, and its input where the name's function gives one."""
    if name in ("seed", "paper"):
        from .. import models

        return getattr(models, name).GhostNet(), None
    if name.startswith("timm:"):
        return attempt(name, lambda: _timm(name.removeprefix("timm:"))), None
    path, _, function = name.rpartition(":")
    if not path:
        raise BadInput(f"model: expected seed, paper, timm:NAME or file.py:function, got {name!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise BadInput(f"model: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    attempt(path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
    if not callable(getattr(module, function, None)):
        raise BadInput(f"model: {path!r} has no function {function!r}")
    made = attempt(name, getattr(module, function))
    model, x = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module) or not isinstance(x, Tensor | None):
        raise BadInput(f"model: expected {name} to return an nn.Module, or one and an input, got {type(made).__name__}")
    return model, x


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def attempt(name: str, function: Callable[[], Any]) -> Any:
    """``function()``, whose errors are those of the input ``name``: also if it is code that calls ``sys.exit``."""
    try:
        return function()
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise BadInput(f"model: {name} raised {type(error).__name__} ({where}): {_first_line(error)}") from None


def run_once(name: str, model: nn.Module, x: Tensor) -> None:
    """Raises BadInput if ``model``, what ``name`` stands for, is none that x can be given to, in float32 and float64."""
    if odd := {str(t.dtype) for t in model.parameters() if t.dtype not in (torch.float32, torch.float64)}:
        raise BadInput(f"model: expected {name} to have parameters in float32, got {', '.join(sorted(odd))}")
    if any(t.is_meta for t in (x, *model.parameters(), *model.buffers())):
        raise BadInput(f"model: expected {name} to have values, got tensors on the meta device")
    given = f"{name} given {tuple(x.shape)}"
    with torch.no_grad():
        attempt(given, lambda: copy.deepcopy(model).eval()(x.clone()))
        out = attempt(
            f"{given} in float64", lambda: copy.deepcopy(model).eval().double()(cast(x, torch.float64).clone())
        )
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
        raise BadInput(f"model: expected {name} to give a tensor, got {type(out).__name__}")
    result = first_tensor(out)
    odd_dtype = result.is_complex() or result.dtype == torch.bool
    if odd_dtype or result.numel() == 0 or not result.isfinite().all():
        what = str(result.dtype) if odd_dtype else "an empty one" if result.numel() == 0 else "others"
        raise BadInput(f"model: expected {given} to give a tensor of finite numbers, got {what}")


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in ``dtype``, unless it holds integers, such as indices."""
    return x.to(dtype) if x.is_floating_point() else x


def first_tensor(out: Any) -> Tensor:
    """The first tensor of what a network gives, in whatever containers."""
    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def backend_on(backend: str, device: torch.device) -> None:
    """Raises BadInput if no kernel of ``backend`` runs there."""
    if backend != "auto" and (reason := backends.unavailable_on(backend, device.type)):
        raise BadInput(f"--backend {backend}: {reason}")


def seed(text: str) -> int:
    """An ``argparse`` type: a seed that PyTorch takes."""
    try:
        torch.Generator().manual_seed(int(text))
        return int(text)
    except (ValueError, RuntimeError, OverflowError):
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^63, got {text!r}") from None


def _first_line(error: BaseException) -> str:
    try:
        return str(error).strip().partition("\n")[0]
    except Exception:  # somebody's class of errors
        return "an error without a text"
