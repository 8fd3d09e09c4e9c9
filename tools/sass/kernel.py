"""Reads a kernel out of a cubin: instructions with their source lines, parameters, constants, resources."""

from __future__ import annotations

import dataclasses
import functools
import re
import struct
import subprocess
from pathlib import Path

from . import build

PARAMETERS_AT = 0x210
"""Where sm_90 has a kernel's parameters in constant bank 0."""
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.x]*)\s*([^;]*);")
_SOURCE = re.compile(r'//## File "([^"]*)", line (\d+)')
_KPARAM_INFO, _KPARAM_INFO_V2 = 0x17, 0x45


@dataclasses.dataclass(slots=True)
class Instruction:
    pc: int
    guard: str
    """The predicate, as in ``@!P0``; empty if there is none."""
    name: str
    modifiers: tuple[str, ...]
    operands: list[str]
    source: tuple[tuple[str, int], ...]
    """(file, line) from the innermost inlined function outwards."""
    text: str

    @property
    def opcode(self) -> str:
        return ".".join((self.name, *self.modifiers))


@dataclasses.dataclass
class Kernel:
    name: str
    instructions: dict[int, Instruction]
    """By address."""
    parameters: list[tuple[int, int]]
    """(offset, size) of each parameter in bytes, from the first one's address."""
    constants: dict[int, bytes]
    registers: int
    stack: int
    static_shared: int

    def __str__(self) -> str:
        return short_name(self.name)


def short_name(mangled: str) -> str:
    """The function's name without namespaces, and its template arguments as the compiler writes them."""
    if not mangled.startswith("_ZN"):
        return mangled
    at, names = 3, []
    while match := re.match(r"(\d+)", mangled[at:]):
        start = at + len(match[1])
        at = start + int(match[1])
        names.append(mangled[start:at])
    arguments = re.match(r"I((?:L(?:N[^E]*E|[a-z])\w*?E)+)E", mangled[at:])
    values = re.findall(r"L(?:NS?\w*?\d+[A-Za-z]\w*?E|[a-z])(\w+?)E", arguments[1]) if arguments else []
    return names[-1] + (f"<{', '.join(values)}>" if values else "")


def sections(data: bytes) -> dict[str, bytes]:
    """An ELF file's sections by name."""
    (start,) = struct.unpack_from("<Q", data, 40)
    size, count, names_index = struct.unpack_from("<HHH", data, 58)
    heads = [struct.unpack_from("<IIQQQQIIQQ", data, start + i * size) for i in range(count)]
    names = data[heads[names_index][4] :][: heads[names_index][5]]
    out = {}
    for head in heads:
        name = names[head[0] : names.index(b"\0", head[0])].decode()
        out[name] = data[head[4] : head[4] + head[5]] if head[1] != 8 else b""
    return out


def kernel_names(cubin: Path) -> list[str]:
    prefix = ".nv.info."
    return [name.removeprefix(prefix) for name in sections(cubin.read_bytes()) if name.startswith(prefix)]


def parameters(info: bytes) -> list[tuple[int, int]]:
    """(offset, size) of each parameter, from a kernel's .nv.info section."""
    found, at = {}, 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # the value is in those two bytes
            continue
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at)
            found[ordinal] = (offset, flags >> 18)
        elif attribute == _KPARAM_INFO_V2:
            raise NotImplementedError("parameters of the second form (EIATTR_KPARAM_INFO_V2)")
        at += size
    return [found[i] for i in range(len(found))]


def _run(tool: str, *arguments: str) -> str:
    path = build.nvidia_tool(tool)
    if path is None:
        raise RuntimeError(f"no {tool}: install triton or the CUDA toolkit")
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def split_operands(text: str) -> list[str]:
    """At the commas outside brackets."""
    out, depth, current = [], 0, ""
    for character in text.strip():
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        out.append(current.strip())
    return [operand.replace(".reuse", "") for operand in out]


def _source_lines(listing: str) -> dict[int, tuple[tuple[str, int], ...]]:
    """The source of each address of a function, from nvdisasm's listing of it."""
    lines: dict[int, tuple[tuple[str, int], ...]] = {}
    chain: tuple[tuple[str, int], ...] = ()
    fresh = True
    for line in listing.splitlines():
        if match := _SOURCE.search(line):
            item = (match[1], int(match[2]))
            chain = (item,) if fresh else (*chain, item)
            fresh = False
        elif match := _LINE.match(line):
            lines[int(match[1], 16)] = chain
            fresh = True
    return lines


@functools.cache
def _by_function(cubin: Path, tool: str, *options: str, head: str) -> dict[str, str]:
    """What a tool says of each function of a file, after the line that ``head`` matches and names it by its group. All at once:
    a run for each of them takes most of its time to read the file."""
    parts = re.split(head, _run(tool, *options, str(cubin)), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.cache
def load(cubin: Path, name: str) -> Kernel:
    data = sections(cubin.read_bytes())
    lines = _source_lines(_by_function(cubin, "nvdisasm", "-c", "-gi", head=r"^\.text\.(.+):$").get(name, ""))
    code = _by_function(cubin, "cuobjdump", "-sass", head=r"^\s*Function : (\S+)$").get(name, "")
    instructions = {}
    for line in code.splitlines():
        if match := _LINE.match(line):
            pc, guard, opcode, rest = int(match[1], 16), (match[2] or "").strip(), match[3], match[4]
            head, *modifiers = opcode.split(".")
            text = f"{guard} {opcode} {rest}".strip()
            source = lines.get(pc, ())
            instructions[pc] = Instruction(pc, guard, head, tuple(modifiers), split_operands(rest), source, text)
    if not instructions:
        raise RuntimeError(f"no function {name} in {cubin}")
    banks = {}
    for section, raw in data.items():
        if match := re.fullmatch(r"\.nv\.constant(\d+)\." + re.escape(name), section):
            banks[int(match[1])] = raw
    usage = _by_function(cubin, "cuobjdump", "-res-usage", head=r"^\s*Function (\S+):\s*$").get(name, "")
    match = re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"no resource usage of {name} in {cubin}")
    layout = parameters(data[f".nv.info.{name}"])
    return Kernel(name, instructions, layout, banks, int(match[1]), int(match[2]), int(match[3]))


def index(cubins: list[Path]) -> dict[str, Path]:
    """Which file has which kernel."""
    return {name: cubin for cubin in cubins for name in kernel_names(cubin)}
