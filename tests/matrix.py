"""The tests on each Python and torch that the package is for: ``make matrix``.

A cell is one Python and one torch with its triton, on a CPU. In an environment of its own, which is removed afterwards, it
installs the wheel that ``make wheels`` has built (one serves all cells), runs README's first example in a folder that is not
the clone and with no compiler, takes the time of the guard of replays, which each Python has its own means for, and runs the
tests named below, against the installed package. Its row is appended to RESULTS, and a cell that has one is not run again, so
that an interrupted run goes on where it was. ``--table`` writes docs/matrix.md.

    python tests/matrix.py FOLDER [3.12x2.11 ...] [--again] [--table]

PYTHON311, PYTHON312 and PYTHON313 name those Pythons' programs, where they aren't python3.11 … on PATH.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests/data/matrix.jsonl"
PAGE = ROOT / "docs/matrix.md"
PYTHONS = ("3.11", "3.12", "3.13")
TORCHES = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}
"""With the torchvision of each, for timm. torch brings its triton."""
PACKAGES = ["numpy", "timm", "pytest", "hypothesis"]
TESTS = [
    "docs/test_import.py", "nn/test_guard.py", "nn/test_kept_programs.py", "nn/test_transforms.py::test_compilers",
    "nn/test_transforms.py::test_tracers", "fuse/test_random_forwards.py", "fuse/test_fuse.py", "capture/test_capture.py",
    "training/test_training.py", "kernels/test_functional.py",
]  # fmt: skip
"""What depends on Python's frames, code and dictionaries, and on torch's dispatcher, compiler and autograd."""
SAME_NETWORK = "fuse/test_fuse.py::test_a_fused_network_is_the_same_network"
LEFT_OUT = [
    "capture/test_capture.py::test_networks_in_parts", "capture/test_capture.py::test_one_op",
    "capture/test_capture.py::test_whole_networks", "fuse/test_fuse.py::test_gradients_and_running_statistics",
    *(f"{SAME_NETWORK}[timm_ghostnet{width}]" for width in ("_050", "_130", "v2_130", "v2_160", "v3_100", "v3_130", "v3_160")),
]  # fmt: skip
"""Large networks, other widths and kernels' dtypes: most of the time, and they ask of Python and torch what the others ask."""
LIMIT_S = 3000
GUARD = ["-m", "bench", "overhead", "--device", "cpu", "--calls", "1", "--repeats", "41", "--output", "overhead.jsonl"]


class Unavailable(Exception):
    """Why there is no such cell here."""


def run(command: list, log: Path, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    with log.open("a") as file:
        file.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    return done


def last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def find_python(version: str) -> str:
    name = os.environ.get("PYTHON" + version.replace(".", ""), f"python{version}")
    check = f"import sys; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    if not shutil.which(name) or subprocess.run([name, "-c", check], check=False).returncode != 0:
        raise Unavailable(f"no Python {version}: {name} is not its program")
    return name


def wheel() -> Path:
    """The newest that serves this machine."""
    found = sorted((ROOT / "dist").glob(f"*-abi3-*{os.uname().machine}.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit("no wheel in dist: run make wheels first")
    return found[-1]


def readme_example() -> str:
    return re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]  # type: ignore[index]


def copy_tests(to: Path) -> None:
    """All of the tree but the package: tests import the one that is installed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith("ghostfused/") and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_cell(python: str, torch: str, folder: Path, tests_too: bool, keep: bool) -> dict:
    """What came of it, as RESULTS has it."""
    log = folder / f"{python}x{torch}.log"
    log.unlink(missing_ok=True)
    program = find_python(python)
    environment, empty = folder / "environment", folder / "empty"
    if not keep:
        shutil.rmtree(environment, ignore_errors=True)
    shutil.rmtree(empty, ignore_errors=True)
    empty.mkdir(parents=True)
    try:
        inside = environment / "bin/python"
        if not inside.exists():
            run([program, "-m", "venv", environment], log)
        pip = [inside, "-m", "pip", "install", "--quiet", "--no-compile", f"--cache-dir={folder / 'pip'}"]
        packages = [f"torch=={torch}.*", f"torchvision=={TORCHES[torch]}.*", *PACKAGES]
        if (done := run([*pip, *packages, wheel()], log)).returncode != 0:
            raise Unavailable(f"pip: {last_line(done.stdout)}")
        versions = "import sys, torch, triton; print(sys.version.split()[0], torch.__version__, triton.__version__)"
        row = dict(
            zip(
                ("full_python", "full_torch", "triton"),
                run([inside, "-c", versions], log).stdout.split()[-3:],
                strict=True,
            )
        )
        bare = {"PATH": "", "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1"}
        example = run([inside, "-c", readme_example()], log, cwd=empty, env=bare)
        unfused = len(re.findall(r"^\S+ +\S+ +no ", example.stdout, re.MULTILINE))
        row["readme"] = f"{unfused} modules unfused" if unfused else "ok"
        if example.returncode != 0:
            row["readme"] = last_line(example.stdout)
        copy_tests(empty)
        row["guard_us"] = guard_us(inside, log, empty)
        if not tests_too:
            return row
        pytest = [
            inside,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-rfE",
            "-m",
            "not triton and not cuda",
            "--durations=20",
        ]
        begin = time.monotonic()
        try:
            tests = run(
                [*pytest, *(f"--deselect=tests/{name}" for name in LEFT_OUT), *(f"tests/{name}" for name in TESTS)],
                log,
                cwd=empty,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                timeout=LIMIT_S,
            )
        except subprocess.TimeoutExpired:
            return row | {"failed": [f"the tests took longer than {LIMIT_S} s"]}
        counts = {
            word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last_line(tests.stdout))
        }
        failed = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", tests.stdout, re.MULTILINE)
        if tests.returncode < 0:
            return row | {"failed": [f"the tests were stopped after {round(time.monotonic() - begin)} s"]}
        if tests.returncode not in (0, 1):
            failed.append(last_line(tests.stdout))
        return row | {
            "passed": counts.get("passed", 0),
            "skipped": counts.get("skipped", 0),
            "failed": sorted(set(failed)),
            "seconds": round(time.monotonic() - begin),
        }
    finally:
        if not keep:
            shutil.rmtree(environment, ignore_errors=True)
        shutil.rmtree(empty, ignore_errors=True)


def guard_us(python: Path, log: Path, tree: Path) -> float | None:
    """What the guard of replays costs a forward of a network, by the benchmark's median."""
    if run([python, *GUARD], log, cwd=tree, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode != 0:
        return None
    rows = map(json.loads, (tree / GUARD[-1]).read_text().splitlines())
    return next((row["us"] for row in rows if row.get("step", "").startswith("guard")), None)


def results() -> dict[tuple[str, str], dict]:
    """The last row of each cell."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {(row["python"], row["torch"]): row for row in map(json.loads, lines)}


def commit() -> str:
    """The one of which the wheel was built: the last before it."""
    built = f"--before=@{int(wheel().stat().st_mtime)}"
    git = ["git", "-C", str(ROOT), "rev-list", "-1", "--first-parent", "--abbrev-commit", "--abbrev=10", built, "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def table() -> str:
    lines = ["| Python | torch | triton | README's example | tests | guard, ms | of | run on |", f"|{'---|' * 8}"]
    rows, notes = results(), []
    for python in PYTHONS:
        for torch in TORCHES:
            row = rows.get((python, torch))
            if row is None or "unavailable" in row:
                why = "not run" if row is None else f"not to be had: {row['unavailable']}"
                lines.append(f"| {python} | {torch} | | | {why} | | | {row['date'] if row else ''} |")
                continue
            tests = f"{row['passed']} passed" if "passed" in row else "not run"
            if row.get("skipped"):
                tests += f", {row['skipped']} skipped"
            if row.get("failed"):
                tests += f", {len(row['failed'])} failed"
                notes += [f"- {python} × {torch}: `{name}`" for name in row["failed"]]
            guard = f"{row['guard_us'] / 1000:.3f}" if row.get("guard_us") else ""
            lines.append(
                f"| {row['full_python']} | {row['full_torch']} | {row['triton']} | {row['readme']} | {tests} | {guard} "
                f"| {row['commit']} | {row['date']} |"
            )
    return "\n".join([*lines, *(["", "Failed:", "", *notes] if notes else []), ""])


def write_page() -> None:
    begin, end = "<!-- begin generated: matrix -->\n", "<!-- end generated -->"
    head, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(head + begin + table() + end + rest.partition(end)[2])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps logs and pip's cache")
    parser.add_argument("cells", nargs="*", help="such as 3.12x2.11; all by default")
    parser.add_argument("--again", action="store_true", help="run also the cells that have a result")
    parser.add_argument("--example", action="store_true", help="run no tests")
    parser.add_argument("--keep", action="store_true", help="use the environment that is there, and don't remove it")
    parser.add_argument("--table", action="store_true", help="only write docs/matrix.md from the results")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    cells = [(python, torch) for python in PYTHONS for torch in TORCHES]
    names = {f"{python}x{torch}": (python, torch) for python, torch in cells}
    if unknown := set(options.cells) - set(names):
        parser.error(f"cells: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    for cell in [] if options.table else [names[name] for name in options.cells] or cells:
        row = results().get(cell)
        if row and not options.again and (options.example or "failed" in row or "unavailable" in row):
            continue
        row = {"python": cell[0], "torch": cell[1], "commit": commit(), "date": datetime.date.today().isoformat()}
        try:
            row |= run_cell(*cell, options.folder.resolve(), not options.example, options.keep)
        except Unavailable as error:
            row["unavailable"] = str(error)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    write_page()
    return int(any(row.get("failed") or row.get("readme", "ok") != "ok" for row in results().values()))


if __name__ == "__main__":
    sys.exit(main())
