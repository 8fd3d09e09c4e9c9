"""bench/gpu_session.sh with no GPU: its commands exist, and whatever fails on the way, the rest comes back."""

import itertools
import os
import shlex
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

import ghostfused.__main__
from bench import peers
from bench.__main__ import main

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_session.sh"
PYTHON = """#!/usr/bin/env bash
# Stands for python: writes a row where it is told to, and fails or hangs where a test says.
[[ -z $FAILS || ! "$*" =~ $FAILS ]] || { echo planted; exit 3; }
[[ -z $HANGS || ! "$*" =~ $HANGS ]] || sleep 100
while (($#)); do
  [[ $1 != --output ]] || echo '{"kind": "module", "row": 1}' >"$2"
  shift
done
"""


def session(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {
        k: v for k, v in os.environ.items() if k not in ("PRINT", "REHEARSAL", "LAUNCH", "SECONDS_LEFT", "PYTHON")
    }
    variables |= {"FAILS": "", "HANGS": "", **environment}
    command = ["bash", str(SCRIPT), str(folder / "out"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=folder)


@pytest.fixture
def stand_in(tmp_path):
    """A folder of commands that come first on PATH, python among them."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def add(name: str, text: str) -> None:
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    add("python3", PYTHON)
    for name in ("ncu", "compute-sanitizer"):  # found, and doing nothing
        add(name, "#!/usr/bin/env bash\n")
    add.path = f"{folder}:{os.environ['PATH']}"
    return add


def steps(folder: Path) -> dict[str, str]:
    lines = (folder / "out" / "steps.txt").read_text().splitlines()
    return {name: outcome for name, _, outcome in (line.partition(": ") for line in lines)}


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "out" / "results.tgz") as tar:
        return {name.removeprefix("./") for name in tar.getnames()}


def test_usage():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    for arguments in ([], ["--help"], ["out", "5"]):
        usage = subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
        assert usage.returncode == 2
        assert "compute-sanitizer" in usage.stdout
        assert "set -uo" not in usage.stdout


def commands(tmp_path, minutes: str) -> dict[str, list[str]]:
    done = session(tmp_path, minutes, PRINT="1", PYTHON="the-python")
    assert done.returncode == 0, done.stderr
    lines = [line.partition(": ") for line in done.stdout.splitlines() if "the-python" in line]
    return {name: shlex.split(command.partition("the-python ")[2]) for name, _, command in lines if " -m " in command}


def test_what_is_most_valuable_comes_first(tmp_path):
    """A stopped run has the build, the check, the table of modules and its comparison with the predictions."""
    quick, whole = commands(tmp_path, "3"), commands(tmp_path, "10")
    assert list(whole)[: len(quick)] == list(quick)
    assert list(quick)[:4] == ["info", "verify", "module", "predicted"]
    assert {"tests", "triton", "nchw", "batch1", "float32", "network", "training", "memcheck"} <= set(whole) - set(
        quick
    )
    module = quick["module"]
    assert module[module.index("--peers") + 1] == "eager,eager+graph,ghostfused_cuda,ghostfused_cuda+graph"


def test_every_command_exists(tmp_path, capsys):
    found = commands(tmp_path, "10")
    for name, arguments in found.items():
        module, verb = arguments[1], arguments[2]
        if module == "pytest":
            assert arguments[-1] == "tests"
            continue
        run = {"bench": main, "ghostfused": ghostfused.__main__.main}[module]
        with pytest.raises(SystemExit) as stopped:
            run([*arguments[2:], "--help"])
        assert stopped.value.code == 0, (name, capsys.readouterr().err)
        for flag, value in itertools.pairwise(arguments):
            if flag == "--peers":
                peers.select(value)
            if verb == "predicted" and value.startswith("tools/sass/results"):
                assert (ROOT / value).is_file()


def test_all_steps_and_what_they_wrote_come_back(tmp_path, stand_in):
    done = session(tmp_path, "10", PATH=stand_in.path)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = steps(tmp_path)
    assert outcomes.pop("build") == "skipped, ghostfused._C is there, for this GPU, and loads"
    assert all(outcome.startswith("ok") for outcome in outcomes.values()), outcomes
    assert {"verify.txt", "module.jsonl", "network.jsonl", "training.jsonl", "versions.txt", "steps.txt"} <= packed(
        tmp_path
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"steps.txt", "results.tgz"}


@pytest.mark.parametrize(
    ("fails", "step"),
    [("setup.py|import _C", "build"), ("bench module .*--peers eager,eager.graph,ghostfused", "module"), ("verify", "verify"),
     ("bench launches", "launches")],
)  # fmt: skip
def test_a_step_that_fails_costs_itself_only(tmp_path, stand_in, fails, step):
    done = session(tmp_path, "10", PATH=stand_in.path, FAILS=fails)
    assert done.returncode == 1
    outcomes = steps(tmp_path)
    assert outcomes[step].startswith("FAILED with exit code 3")
    assert f"{step}.txt" in packed(tmp_path)
    assert outcomes["network"].startswith("ok")
    assert {"network.jsonl", "memory.jsonl"} <= packed(tmp_path)


def test_without_the_extension_the_modules_are_those_of_triton(tmp_path, stand_in):
    stand_in("python3", PYTHON.replace("#!/usr/bin/env bash", '#!/usr/bin/env bash\necho "$@"'))
    session(tmp_path, "3", PATH=stand_in.path, FAILS="setup.py|import _C")
    with tarfile.open(tmp_path / "out" / "results.tgz") as tar:
        text = tar.extractfile("./module.txt").read().decode()
    assert "eager,eager+graph,ghostfused_triton,ghostfused_triton+graph" in text


def test_tests_that_collect_nothing_have_failed(tmp_path, stand_in):
    stand_in("python3", PYTHON.replace("exit 3", "exit 5"))
    assert session(tmp_path, "10", PATH=stand_in.path, FAILS="-m pytest").returncode == 1
    assert steps(tmp_path)["tests"].startswith("FAILED with exit code 5")


def test_a_step_that_hangs_is_stopped_and_what_came_before_is_there(tmp_path, stand_in):
    session(tmp_path, "3", PATH=stand_in.path, HANGS="predicted", SECONDS_LEFT="9")
    outcomes = steps(tmp_path)
    assert outcomes["predicted"].startswith("stopped after")
    assert outcomes["compiled"] == "skipped, no time left"
    assert "module.jsonl" in packed(tmp_path)


def test_a_signal_packs_what_the_running_step_has_written(tmp_path, stand_in):
    stand_in(
        "python3",
        PYTHON.replace("while (($#))", "echo begun >&2\nwhile (($#))").replace(
            "sleep 100", "{ echo part; sleep 100; }"
        ),
    )
    variables = {k: v for k, v in os.environ.items() if k not in ("PRINT", "REHEARSAL", "LAUNCH", "PYTHON")}
    variables |= {"FAILS": "", "HANGS": "predicted", "PATH": stand_in.path}
    running = subprocess.Popen(
        ["bash", str(SCRIPT), "out", "3"], env=variables, cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    for _ in range(200):
        time.sleep(0.1)
        if (tmp_path / "out/steps.txt").exists() and "module: ok" in (tmp_path / "out/steps.txt").read_text():
            break
    time.sleep(1)
    running.terminate()
    assert running.wait(20) == 1
    assert "stopped by a signal" in (tmp_path / "out/steps.txt").read_text()
    assert {"module.jsonl", "predicted.txt"} <= packed(tmp_path)


def test_where_nothing_can_be_packed_the_rows_come_as_they_are(tmp_path, stand_in):
    stand_in("tar", "#!/usr/bin/env bash\nexit 2\n")
    done = session(tmp_path, "10", PATH=stand_in.path)
    assert done.returncode == 1
    assert "pack: FAILED" in done.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"steps.txt", "module.jsonl", "network.jsonl"} <= files
    assert len(files) <= 8
    assert steps(tmp_path)["memory"].startswith("ok")


def test_a_file_that_is_too_large_loses_the_profilers_reports(tmp_path, stand_in):
    report = '[[ $1 != -o ]] || head -c 17000000 /dev/urandom >"$2.ncu-rep"'
    stand_in("ncu", f"#!/usr/bin/env bash\nwhile (($#)); do\n{report}\nshift\ndone\n")
    session(tmp_path, "3", PATH=stand_in.path)
    assert "full.ncu-rep" not in packed(tmp_path)
    assert {"module.jsonl", "full.txt"} <= packed(tmp_path)


def test_without_a_gpu_it_says_so(tmp_path, stand_in):
    done = session(tmp_path, "3", PATH=stand_in.path, FAILS="is_available")
    assert done.returncode == 1
    assert "torch sees no CUDA GPU here" in done.stdout


def test_steps_by_name(tmp_path, stand_in):
    done = session(tmp_path, "3", "launches", "nonsense", PATH=stand_in.path)
    assert done.returncode == 1
    outcomes = steps(tmp_path)
    assert list(outcomes) == ["launches", "nonsense"]
    assert outcomes["nonsense"] == "FAILED, no such step"
