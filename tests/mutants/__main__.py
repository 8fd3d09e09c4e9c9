"""Plants each fault in turn: ``python -m tests.mutants [NAME…]``. Exit status 1 if the cases miss one, or fail without."""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .harness import find, missing
from .mutants import MUTANTS, Mutant


def main(words: list[str]) -> int:
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    controls = sorted({kernel for m in chosen for kernel in m.kernels})
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as root, ThreadPoolExecutor(2) as pool:
        shared = Path(root) / "shared"
        shared.mkdir()

        def job(index: int, kernels: tuple[str, ...], mutant: Mutant | None) -> bool:
            begin = time.monotonic()
            found = find(Path(root) / str(index), shared, kernels, mutant)
            name = f"unchanged {kernels[0]}" if mutant is None else mutant.name
            good = (found is None) == (mutant is None)
            print(
                f"{'ok' if good else 'BAD':4}{name} → {found or 'all pass'}  ({time.monotonic() - begin:.0f} s)",
                flush=True,
            )
            return good

        jobs: list[tuple[tuple[str, ...], Mutant | None]] = [(m.kernels, m) for m in chosen]
        jobs += [((kernel,), None) for kernel in controls]
        results = list(pool.map(lambda j: job(j[0], *j[1]), enumerate(jobs)))
    print(f"{sum(results)} of {len(results)} as they should be, in {time.monotonic() - start:.0f} s")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
