"""A little of ``python -m tests.fuzz``, which draws more; and that it finds what is wrong."""

import os
import re
import subprocess
import sys

import documents
import pytest

from ghostfused import backends

pytestmark = pytest.mark.skipif(
    backends.BACKENDS["cpu"].unavailable() is not None,
    reason=f"no CPU kernel: {backends.BACKENDS['cpu'].unavailable()}",
)

PLANTED = """
import os, sys
from tests.fuzz import __main__ as fuzz
import ghostfused.ops.autograd as autograd
forward_op = autograd.forward_op
def planted(*names):
    op = forward_op(*names)
    def run(x, *args):
        if x.shape[0] == 5:
            os.abort()
        return op(x, *args) * (1.001 if x.shape[0] == 3 else 1)
    return run
autograd.forward_op = planted
fuzz.main(sys.argv[1:])
"""


def fuzz(*words: str, code: str | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.fuzz", *words] if code is None else [sys.executable, "-c", code, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=documents.ROOT, env=environment, capture_output=True, text=True)


def test_some_of_each():
    counts = {"modules": 24, "bottlenecks": 5, "networks": 2, "calls": 60}
    run = fuzz(*(word for kind, count in counts.items() for word in (f"--{kind}", str(count))))
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
    for kind, count in counts.items():
        assert re.search(
            rf"^{kind}( of cpu)?: {count} drawn by seed 0 in \d+ s: 0 wrong, 0 crashed; \d", run.stdout, re.MULTILINE
        )


def test_what_is_wrong_is_found():
    """A kernel that is off by a thousandth for three images, and ends the process for five."""
    run = fuzz("--work", "modules", "0", "20", code=PLANTED)
    assert run.returncode < 0
    assert re.search(r"^\d+ WRONG AssertionError: .*error", run.stdout, re.MULTILINE)
