"""A captured network in one file, in the format of ``torch.export``.

The file is data: ``read`` refuses one that would have PyTorch unpickle anything, or that calls anything but operators, before
PyTorch sees it.
"""

from __future__ import annotations

import copy
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2, package_pt2

from ..spec import memory_format

_SETTINGS = "ghostfused.json"
_TARGETS = re.compile(r"torch\.ops\.(aten|ghostfused)\.\w+(\.\w+)?|_operator\.\w+|torch\.sym_\w+")
"""What a graph may call. The rest of PyTorch can do anything, such as loading pickles."""
_SIZES = re.compile(r"(Symbol\('[su]\d+'(, \w+=True)*\)|Integer\(-?\d+\)|(Add|Mul|Max|Min)\(|[-+*(), \d])*")
"""Sizes that depend on the batch. PyTorch evaluates them as Python."""


def write(path: str | os.PathLike[str], programs: list[ExportedProgram], settings: dict[str, Any]) -> None:
    """``programs``, of the same model for several shapes, as one file."""
    bare = {f"program_{i}": copy.copy(each) for i, each in enumerate(programs)}
    for each in bare.values():
        each._example_inputs = None  # would be pickled
        each._guards_code = []  # Python source: a captured network checks its inputs by itself
    package_pt2(path, exported_programs=bare, extra_files={_SETTINGS: json.dumps(settings)})  # type: ignore[arg-type]


def read(path: str | os.PathLike[str]) -> tuple[list[ExportedProgram], dict[str, Any]]:
    """What ``write`` wrote. Programs share the tensors that have one name.

    Raises:
        ValueError: the file isn't one of ``write``'s, or holds more than data.
    """
    with open(path, "rb") as file:
        content = file.read()  # checked and loaded are the same bytes
    try:
        names = _check(content)
        loaded = load_pt2(io.BytesIO(content))
        settings = json.loads(loaded.extra_files[_SETTINGS])
        programs = [loaded.exported_programs[name] for name in names]
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"path: expected a file that Captured.save wrote, got {os.fspath(path)!r}: {reason}"
        ) from error
    first = programs[0].state_dict
    for program in programs[1:]:
        program.state_dict.update({name: first[name] for name in program.state_dict if name in first})
    return programs, settings


def _check(content: bytes) -> list[str]:
    """The names of the programs in an archive that holds nothing but data."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile:
        raise ValueError("it is no archive") from None
    members = archive.namelist()
    if len(set(members)) < len(members):
        raise ValueError("two members of one name")
    names = []
    for member in members:
        parts = member.split("/")
        if "sample_inputs" in parts and archive.getinfo(member).file_size:
            raise ValueError(f"{member} is pickled")
        if parts[-1].startswith(("custom_obj", "opaque_obj")) or "aotinductor" in parts or "executorch" in parts:
            raise ValueError(f"{member} is code")
        if not member.endswith(".json") or parts[-1] == _SETTINGS:
            continue
        described = json.loads(archive.read(member))
        for key, value in _walk(described):
            if (key == "use_pickle" and value) or (key == "custom_obj_name" and value):
                raise ValueError(f"{member} has pickled tensors or objects")
            if key == "target" and isinstance(value, str) and not _TARGETS.fullmatch(value):
                raise ValueError(f"{member} calls {value}")
            if key == "expr_str" and not (isinstance(value, str) and _SIZES.fullmatch(value)):
                raise ValueError(f"{member} has a size that is no sum or product: {value}")
            if key == "guards_code" and value:
                raise ValueError(f"{member} has Python source")
        if "models" in parts:
            names.append(parts[-1].removesuffix(".json"))
    if not names or not any(member.endswith(f"/{_SETTINGS}") for member in members):
        raise ValueError("it holds no captured network")
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested dicts and lists."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)


def inputs_like(exported: ExportedProgram) -> tuple[Tensor, ...]:
    """Inputs of the shapes, strides and dtypes that ``exported`` was made for; of any batch, where that is free, two."""
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    inputs = []
    for name in exported.graph_signature.user_inputs:
        value = values[name]
        layout = memory_format(value) if value.dim() == 4 else torch.contiguous_format
        sizes = [size if isinstance(size, int) else 2 for size in value.shape]
        inputs.append(torch.zeros(sizes, dtype=value.dtype, device=value.device).contiguous(memory_format=layout))
    return tuple(inputs)
