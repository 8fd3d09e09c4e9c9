"""Predicts what share of an Arm core's multiply-adds the 1×1 convolution's inner loop reaches: ``python -m tools.arm_prediction``.

Nothing here is a measurement. The aarch64 compiler makes the loop of the largest register block as setup.py's flags make it, and
LLVM's machine code analyzer runs it on its model of a core: every load hits the first cache. The same model runs the loop's multiplications
alone, which is the peak. Only cores that LLVM models by themselves are listed: it stands in for a Cortex-A78, say, with its Cortex-A57.
A second table has the peaks themselves, from which follows what an instruction set can gain.
"""

from __future__ import annotations

import argparse
import functools
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ghostfused.cli.inputs import BadInput, in_one_line

ROOT = Path(__file__).parents[1]
CORES = [
    "cortex-a53",
    "cortex-a55",
    "cortex-a510",
    "cortex-a57",
    "neoverse-n1",
    "neoverse-n2",
    "neoverse-v1",
    "neoverse-v2",
    "a64fx",
]
"""Those with a model of their own since LLVM 17; Grace's core is the Neoverse V2."""
SVE_BITS = {"cortex-a510": 128, "neoverse-n2": 128, "neoverse-v1": 256, "neoverse-v2": 128, "a64fx": 512}
LACKS = {
    "neon_fp16": {"cortex-a53", "cortex-a55", "cortex-a57", "neoverse-n1", "a64fx"},
    "sve512": {core for core in CORES if SVE_BITS.get(core) != 512},
}
LACKS["neon_bf16"] = LACKS["neon_fp16"]
OLDEST = 17
FLAGS = ["-O3", "-fno-math-errno", "-fno-schedule-insns"]
OWN_FLAGS = {"sve512": ["-DGHOSTFUSED_SVE512", "-march=armv8.2-a+sve", "-msve-vector-bits=512"]}
"""As setup.py has them."""
LOOPS = {  # instruction set, dtype, and whether the rows are channels, as in NCHW
    "float32 nchw": ("baseline", "float", True),
    "float32 nhwc": ("baseline", "float", False),
    "float16 nhwc": ("neon_fp16", "Float16", False),
    "bfloat16 nchw": ("neon_bf16", "BFloat16", True),
    "bfloat16 nhwc": ("neon_bf16", "BFloat16", False),
    "float32 nchw, sve512": ("sve512", "float", True),
    "float32 nhwc, sve512": ("sve512", "float", False),
}
PRODUCTS = {"fmla": 4, "fmlal": 4, "fmlal2": 4, "bfdot": 8, "bfmmla": 16}
"""Of one NEON instruction."""
MULTIPLICATION = re.compile(r"\s(fmla|fmlal2?|bfdot|bfmmla)\s+([vz])")


def compiler() -> str | None:
    return shutil.which("g++" if platform.machine() == "aarch64" else "aarch64-linux-gnu-g++")


def analyzer() -> str | None:
    """The newest llvm-mca on PATH that has the models."""
    for name in [*(f"llvm-mca-{version}" for version in range(30, OLDEST - 1, -1)), "llvm-mca"]:
        if path := shutil.which(name):
            text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
            version = re.search(r"LLVM version (\d+)", text)
            if version and int(version[1]) >= OLDEST:
                return path
    return None


def missing() -> str | None:
    """What it would take to predict here; None if all of it is there."""
    if compiler() is None:
        return "no g++ for aarch64 (Debian's package g++-aarch64-linux-gnu)"
    return None if analyzer() else f"no llvm-mca of LLVM {OLDEST} or later (Debian's package llvm-19)"


@functools.cache
def inner_loop(name: str) -> list[str]:
    """The instructions of the loop over input channels."""
    isa, dtype, rows_are_channels = LOOPS[name]
    source = (ROOT / "csrc" / "cpu" / "isa" / f"{isa}.cpp").read_text()
    kernel = (
        f'#include "cpu/primary.h"\nnamespace ghostfused::cpu::{isa} {{ template void primary<{dtype}, kMaxRows<{dtype}>, kMaxVecs<{dtype}>, '
        f"{str(rows_are_channels).lower()}, false>(const Panel<{dtype}>&); }}\n"
    )
    if 'include "cpu/kernels.h"\n' not in source:
        raise RuntimeError(f"isa/{isa}.cpp: expected it to include cpu/kernels.h")
    source = source.split('#include "cpu/kernels.h"\n')[0] + kernel + ("#endif\n" if isa != "baseline" else "")
    flags = [*FLAGS, *OWN_FLAGS.get(isa, ())]
    command = [str(compiler()), "-std=c++20", *flags, f"-I{ROOT / 'csrc'}", "-S", "-x", "c++", "-", "-o", "-"]
    assembly = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return _hottest_loop(assembly)


def _hottest_loop(assembly: str) -> list[str]:
    """Of the stretches from a label to a jump back to it with no other in it, the shortest of those with the most products."""
    lines = [line.partition("//")[0].rstrip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L\w+:", line)}
    ends = {}  # by the line at which the loop begins
    for i, line in enumerate(lines):
        jump = re.match(r"\s+(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\w+)$", line)
        if jump and labels.get(jump[1], i) < i:
            ends[labels[jump[1]]] = i
    innermost = [(begin, end) for begin, end in ends.items() if not any(begin < other < end for other in ends)]
    loops = [[each for each in lines[begin + 1 : end + 1] if re.match(r"\s+[a-z]", each)] for begin, end in innermost]
    return max(loops, key=lambda loop: (sum(PRODUCTS[name] for name, _ in multiplications(loop)), -len(loop)))


def multiplications(loop: list[str]) -> list[tuple[str, str]]:
    """Their names, and v for NEON's registers, z for SVE's."""
    return [(match[1], match[2]) for line in loop if (match := MULTIPLICATION.search(line))]


def cycles(instructions: list[str], core: str, iterations: int = 200) -> float:
    """Of one iteration, in the long run."""
    command = [str(analyzer()), "-march=aarch64", f"-mcpu={core}", f"-iterations={iterations}", "-"]
    command += ["-mattr=+bf16,+fp16fml,+sve", "-instruction-info=0", "-resource-pressure=0"]
    run = subprocess.run(command, input="\n".join(instructions), capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", run.stdout)
    assert total, run.stdout
    return int(total[1]) / iterations


def independent(products: list[tuple[str, str]]) -> list[str]:
    """The multiplications, none of which waits for another."""
    operands = {
        ("fmla", "v"): "v{}.4s, v0.4s, v1.s[0]",
        ("fmla", "z"): "z{}.s, p0/m, z0.s, z1.s",
        ("bfdot", "v"): "v{}.4s, v0.8h, v1.2h[0]",
        ("bfmmla", "v"): "v{}.4s, v0.8h, v1.8h",
    }
    return [
        f"{name} {operands.get((name, registers), 'v{}.4s, v0.4h, v1.h[0]').format(8 + i % 24)}"
        for i, (name, registers) in enumerate(products)
    ]


def share(loop: list[str], core: str) -> float:
    """Of the peak."""
    rounds = 24  # as many as there are sums: each comes again behind all others, whatever the number of multiplications
    alone = cycles(independent(rounds * multiplications(loop)), core, iterations=20) / rounds
    return alone / cycles(loop, core)


def peak(name: str, registers: str, core: str) -> float:
    """Products in a cycle."""
    longer = SVE_BITS[core] // 128 if registers == "z" else 1
    return 24 * PRODUCTS[name] * longer / cycles(independent([(name, registers)] * 24), core)


def table() -> dict[str, dict[str, float | None]]:
    """Per core and loop the share; None where the core lacks the instructions."""
    loops = {name: inner_loop(name) for name in LOOPS}
    return {
        core: {
            name: None if core in LACKS.get(LOOPS[name][0], ()) else share(loop, core) for name, loop in loops.items()
        }
        for core in CORES
    }


@functools.cache
def report() -> str:
    """A line that says what it is, and the table, as docs/cpu.md has both."""
    version = subprocess.run([str(analyzer()), "--version"], capture_output=True, text=True, check=True).stdout
    number = re.search(r"LLVM version (\d+)", version)
    assert number
    rows = [
        f"| {core} | {' | '.join('–' if x is None else f'{x:.0%}' for x in shares.values())} |"
        for core, shares in table().items()
    ]
    title = f"Predicted by LLVM {number[1]}'s models, not measured: the share of the peak of multiply-adds."
    return "\n".join([title, "", f"| core | {' | '.join(LOOPS)} |", f"|{'---|' * (1 + len(LOOPS))}", *rows])


def peaks_report() -> str:
    """The same for the peaks."""
    kinds = {
        "fp32, NEON": ("fmla", "v"),
        "fp32, SVE": ("fmla", "z"),
        "bfdot": ("bfdot", "v"),
        "bfmmla": ("bfmmla", "v"),
    }
    rows = []
    for core, bits in SVE_BITS.items():
        lacking = core in LACKS["neon_bf16"]
        cells = [
            "–" if lacking and name.startswith("bf") else f"{peak(name, registers, core):.0f}"
            for name, registers in kinds.values()
        ]
        rows.append(f"| {core} | {bits} | {' | '.join(cells)} |")
    title = "Predicted by the same models: the peak, in products a cycle."
    return "\n".join(
        [title, "", f"| core | bits of SVE | {' | '.join(kinds)} |", f"|{'---|' * (2 + len(kinds))}", *rows]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.arm_prediction", description=__doc__)
    parser.parse_args(argv)
    return in_one_line("python -m tools.arm_prediction", tables)


def tables() -> int:
    """Prints them."""
    if why := missing():
        raise BadInput(why)
    print(report(), peaks_report(), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
