"""What ``import ghostfused`` brings along, and the names that it shows."""

import subprocess
import sys
from pathlib import Path

import pytest

import ghostfused

ROOT = Path(__file__).parents[2]
CODE = """
import sys, torch
before = set(sys.modules)
import ghostfused
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} | ({"torch._dynamo"} & set(sys.modules) - before)))
"""


def test_nothing_heavy_is_imported():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(run.stdout.split())
    assert "ghostfused" in imported
    assert not imported & {"torch._dynamo", "matplotlib", "numpy", "sympy", "timm", "triton", "pytest"}, imported


ORDERS = {
    "before": "import torch.utils.flop_counter, ghostfused",
    "after": "import ghostfused, torch.utils.flop_counter",
    "again": "import ghostfused, sys, torch.utils.flop_counter; del sys.modules['torch.utils.flop_counter']; import torch.utils.flop_counter",
}


@pytest.mark.parametrize("order", ORDERS)
def test_flops_are_known_whenever_their_counter_is_imported(order):
    known = "torch.ops.ghostfused.forward_reference in sys.modules['torch.utils.flop_counter'].flop_registry"
    code = f"import sys; {ORDERS[order]}; print({known})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "True\n"


def test_the_public_names_are_what_is_shown():
    assert dir(ghostfused) == sorted(ghostfused.__all__)
    for name in ghostfused.__all__:
        assert getattr(ghostfused, name) is not None
