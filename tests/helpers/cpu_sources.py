"""Builds of the CPU kernels for a few instruction sets: each takes as long to compile as all the rest."""

from collections.abc import Iterable


def table_of(isa: str) -> str:
    """The name of the table of an instruction set's kernels."""
    return "k" + "".join(map(str.capitalize, isa.split("_")))


def absent_kernels(isas: Iterable[str]) -> str:
    """A source with empty tables in place of the kernels of ``isas``, which dispatch.cpp lists."""
    names = map(table_of, sorted(isas))
    tables = "".join(f"extern const Kernels {name}{{}};" for name in names)
    return f'#include "cpu/dispatch.h"\nnamespace ghostfused::cpu {{ {tables} }}\n'
