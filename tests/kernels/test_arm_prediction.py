"""What GCC makes of the 1×1 convolution's inner loop on aarch64, and what LLVM's models of cores say to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import arm_prediction

needs_compiler = pytest.mark.skipif(arm_prediction.compiler() is None, reason="no g++ for aarch64")
needs_models = pytest.mark.skipif(arm_prediction.missing() is not None, reason=str(arm_prediction.missing()))
DOCS = Path(__file__).parents[2] / "docs" / "cpu.md"
PRODUCTS_OF_A_LOOP = {"float32": 64, "float16": 128, "bfloat16": 32}
"""8 rows × 2 vectors × 4 lanes; fp16: of two channels each; bf16: 4 rows × 4 vectors × 2 quads of channels, two rows by two
columns each."""


@needs_compiler
@pytest.mark.parametrize("name", arm_prediction.LOOPS)
def test_sums_stay_in_registers(name):
    loop = arm_prediction.inner_loop(name)
    products = arm_prediction.multiplications(loop)
    assert len(products) == (24 if "sve" in name else PRODUCTS_OF_A_LOOP[name.split()[0]])
    assert not [line for line in loop if "[sp" in line]
    kind = {"float32": "fmla", "float16": "fmlal", "bfloat16": "bfmmla"}[name.split()[0]]
    assert {registers for _, registers in products} == {"z" if "sve" in name else "v"}
    assert all(product.startswith(kind) for product, _ in products)


@needs_models
def test_the_table_of_the_docs():
    """Every core reaches 60 % of its peak; the docs have these very numbers, if this LLVM is theirs."""
    printed = arm_prediction.report()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([\w-]*\d\w*) \| (.*) \|$", printed, re.MULTILINE)}
    assert set(rows) == set(arm_prediction.CORES)
    for core, (row,) in rows.items():
        cells = dict(zip(arm_prediction.LOOPS, row.split(" | "), strict=True))
        shares = {name: int(share[:-1]) for name, share in cells.items() if share != "–"}
        assert len(shares) >= 2
        for name, share in shares.items():
            assert share >= 60, (core, name)
    title, _, table = printed.partition("\n\n")
    if title in DOCS.read_text():
        assert table.strip() in DOCS.read_text()


@needs_models
def test_what_an_instruction_set_can_gain():
    """SVE only where its vectors are longer than all units of NEON together; bfmmla everywhere, with a loop that feeds it."""
    for core, bits in arm_prediction.SVE_BITS.items():
        gain = arm_prediction.peak("fmla", "z", core) / arm_prediction.peak("fmla", "v", core)
        assert round(gain) == (4 if bits == 512 else 1), core
    loop = arm_prediction.inner_loop("bfloat16 nchw")
    products = sum(arm_prediction.PRODUCTS[name] for name, _ in arm_prediction.multiplications(loop))
    for core in ("neoverse-n2", "neoverse-v1", "neoverse-v2"):
        assert products / arm_prediction.cycles(loop, core) > 1.5 * arm_prediction.peak("bfdot", "v", core)
    printed = arm_prediction.peaks_report()
    if arm_prediction.report().partition("\n\n")[0] in DOCS.read_text():
        assert printed in DOCS.read_text()
