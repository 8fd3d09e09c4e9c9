"""What GCC makes of the 1×1 convolution's inner loop on aarch64, and what LLVM's models of cores say to it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import arm_prediction

needs_compiler = pytest.mark.skipif(arm_prediction.compiler() is None, reason="no g++ for aarch64")
needs_models = pytest.mark.skipif(arm_prediction.missing() is not None, reason=str(arm_prediction.missing()))
DOCS = Path(__file__).parents[2] / "docs" / "cpu.md"
REORDERING = {"cortex-a57", "neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2"}


@needs_compiler
@pytest.mark.parametrize("name", arm_prediction.LOOPS)
def test_sums_stay_in_registers(name):
    loop = arm_prediction.inner_loop(name)
    products = sum(bool(arm_prediction.MULTIPLICATION.search(line)) for line in loop)
    assert products == (48 if name.startswith("float16") else 24)  # 8 rows × 3 vectors; fp16: of two channels each
    assert not [line for line in loop if "[sp" in line]
    kind = {"float32": "fmla", "float16": "fmlal", "bfloat16": "bfdot"}[name.split()[0]]
    assert all(kind in line for line in loop if arm_prediction.MULTIPLICATION.search(line))


@needs_models
def test_the_table_of_the_docs():
    """Cores that reorder reach 60 % of their peak; the docs have these very numbers, if this LLVM is theirs."""
    printed = arm_prediction.report()
    rows = {row[0]: row[1:] for row in re.findall(r"^\| ([\w-]+\d) \| (.*) \|$", printed, re.MULTILINE)}
    assert set(rows) == set(arm_prediction.CORES)
    for core in REORDERING:
        shares = [int(share) for share in re.findall(r"(\d+)%", rows[core][0])]
        assert len(shares) >= 2
        assert min(shares) >= 60, core
    title, _, table = printed.partition("\n\n")
    if title in DOCS.read_text():
        assert table.strip() in DOCS.read_text()
