"""Bad input on any command line ends in one line, that names the option, and exit code 2; before anything is measured."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bench.__main__
import ghostfused.__main__
import tests.fuzz.__main__
import tools.resources
import tools.sass.__main__
import tools.triton_configs.__main__
from bench import timing
from bench.results import Writer
from ghostfused.cli.inputs import in_one_line

PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    "ghostfused": ghostfused.__main__.main,
    "bench": bench.__main__.main,
    "tools.sass": tools.sass.__main__.main,
    "tools.resources": tools.resources.main,
    "tools.triton_configs": tools.triton_configs.__main__.main,
    "tests.fuzz": tests.fuzz.__main__.main,
}
ROW = {"in_channels": 8, "out_channels": 9, "height": 5, "width": 6}
MEASURED = ("module", "network", "cpu_peak", "bands", "busy", "callers")
"""Verbs of bench that take a network, settings and the options of all that measure."""
COUNTED = ("memory", "launches")
PROFILE = "bench profile {new} --device cpu --backend reference"
NETWORKS = (*(f"bench {verb}" for verb in (*MEASURED, *COUNTED)), PROFILE, "tools.sass")
DEVICES = [f"bench {verb}" for verb in (*MEASURED, *COUNTED, "overhead", "serve", "memory --rss")]
NUMBERS = {  # of which none may be 0, negative, a fraction or a word
    "--size": (*NETWORKS, "bench serve", "ghostfused fuse paper", "ghostfused verify --model paper"),
    "--batch": (*(f"bench {verb}" for verb in (*MEASURED, "memory", "traffic", "profile {new}")), "tools.sass --network paper",
                "ghostfused fuse paper", "ghostfused verify --model paper"),
    "--threads": DEVICES,
    "--samples": ["bench module", "bench network", "bench cpu_peak", "bench bands"],
    "--repeats": ["bench module", "bench network", "bench cpu_peak", "bench bands", "bench overhead"],
    "--rounds": ["bench busy", "bench callers", "bench serve", "ghostfused fuse paper"],
    "--calls": ["bench overhead", "bench callers", "tests.fuzz"],
    "--callers": ["bench callers"], "--sizes": ["bench callers"], "--clients": ["bench serve"], "--bands": ["bench bands"], "--chain": ["bench bands"], "--least": ["bench bands"], "--isolate": ["bench network"],
    "--itemsize": ["bench traffic"], "--max-size": ["ghostfused verify --model paper"],
    "--jobs": ["tools.sass --network paper", "tools.resources", "tools.triton_configs"],
    "--modules": ["tests.fuzz"], "--bottlenecks": ["tests.fuzz"], "--networks": ["tests.fuzz"],
}  # fmt: skip
AMOUNTS = {
    "--max-seconds": ["bench module", "bench network", "bench cpu_peak", "bench bands"], "--time-limit": ["bench module"],
    "--seconds": ["bench busy", "bench serve"], "--others-tolerance": ["bench module", "bench network", "bench suite"],
    "--fail-above": ["bench busy"], "--fail-below": ["bench callers"], "--minutes": ["tests.fuzz"],
}  # fmt: skip
WORDS = {
    "--dtype": {"float8": [*(f"bench {verb}" for verb in (*MEASURED, "memory")), "tools.sass --network paper"],
                "torch.int8": ["bench module", "bench memory", "ghostfused fuse paper"]},
    "--layout": {"nwhc": [*(f"bench {verb}" for verb in MEASURED), "tools.sass --network paper", "ghostfused verify --model paper"]},
    "--mode": {"trainign": ["bench module", "bench network"]},
    "--peers": {"nobody": ["bench module", "bench network"], "eager,nobody*": ["bench module"]},
    "--backend": {"cudda": ["bench profile {new}", "tests.fuzz", "ghostfused fuse paper"]},
    "--shard": {"3/2": ["bench module", "bench cpu_peak"], "77/78": ["bench module", "bench cpu_peak"]},
    "--only": {"no_such_module": ["bench module", "bench cpu_peak", PROFILE,
                                  "tools.sass --configs {rows}", "tools.resources --arch sm_90"]},
    "--source": {"nowhere": ["bench traffic", "bench module --configs {rows}", "tools.sass --configs {rows}"]},
    "--arch": {"sm_9": ["tools.resources"], "hopper": ["tools.resources"]},
    "--network": dict.fromkeys(("nonsense", "timm:no_such_network", "paper:wide", "paper:-1", "missing.py:f", "{rows}:f"), NETWORKS),
    "--model": {"no_such_network": ["bench serve"]},
    "--device": {"mps": [*DEVICES, "bench suite"]},
    "--seed": {"x": ["tests.fuzz", "ghostfused fuse paper"]}, "--first": {"-1": ["tests.fuzz"]},
}  # fmt: skip
WORDS["--network"]["timm:no_such_network:deploy"] = ["bench network"]
WORDS["--network"]["paper,nonsense"] = [f"bench {verb}" for verb in ("network", *COUNTED)]
TARGETS = [*(command for command in DEVICES if "rss" not in command), "bench traffic"]
ROWS = {
    "missing": None, "a folder": "{folder}", "not UTF-8": b"\xb5\n", "not JSON": b"in_channels", "a list": b"[1, 2]",
    "a string": ROW | {"width": "6"}, "negative": ROW | {"height": -3}, "even": ROW | {"dw_size": 4}, "misspelt": ROW | {"dw_sise": 5},
    "no such activation": ROW | {"act_cheap": "elu"}, "a field missing": {"in_channels": 8, "height": 3, "width": 3},
    "too large": ROW | {"in_channels": 10**30}, "a wrong source": ROW | {"source": 3}, "nothing": b"\n",
}  # fmt: skip
READS_ROWS = [
    "bench module --configs",
    "bench cpu_peak --configs",
    "tools.sass --configs",
    "ghostfused verify --configs",
]
READS_RESULTS = ["bench report", "bench compare {results}", "bench predicted {results}", "bench predicted {predicted} {results} --counters {results}"]  # fmt: skip
OTHERS = [
    "bench", "bench modul", "bench module --no-such-option", "bench memory --batch 1,2", "bench memory --rss --network paper",
    "bench memory --rss --dtype float16", "bench report {folder}", "bench compare {results}", "bench predicted {rows} {results}",
    "bench predicted {predicted} {results} --peer nobody", "bench report {results} --output {results}",
    "bench suite --output {results}", "bench profile {folder}", "bench profile {new} --device cpu", "tools.sass", "tests.fuzz --no-such",
]  # fmt: skip


@pytest.mark.parametrize("length", [1, 100_000])
def test_output_that_nobody_reads(length, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        assert in_one_line("python -m ghostfused info", lambda: print("x" * length) or 0) == 1
        monkeypatch.undo()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=str)
@pytest.mark.parametrize("command", ["info", "info --json"])
def test_output_that_no_disk_takes(command, unbuffered):
    with open("/dev/full", "w") as full:
        words = [sys.executable, *unbuffered, "-m", "ghostfused", *command.split()]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "python -m ghostfused info: error: [Errno 28] No space left on device\n"


def test_no_output_at_all(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert in_one_line("python -m ghostfused info", lambda: print("x") or 0) == 0


def test_another_pipe_that_is_broken():
    def main() -> int:
        raise BrokenPipeError("mine")

    with pytest.raises(BrokenPipeError, match="mine"):
        in_one_line("python -m ghostfused info", main)


@pytest.fixture
def ends(tmp_path, capsys, monkeypatch):
    """A command line ends as this file says; the line is what it gives."""

    def measured(*args, **kwargs):
        raise AssertionError("something is measured")

    monkeypatch.setattr(Writer, "__enter__", measured)
    monkeypatch.setattr(timing, "time_interleaved", measured)
    places = {name: tmp_path / name for name in ("folder", "rows", "results", "predicted", "new")}
    places["folder"].mkdir()
    places["rows"].write_text(json.dumps(ROW) + "\n")
    environment = {"kind": "environment", "schema": 1, "time": "", "command": "", "device": "cpu", "packages": {}}
    places["results"].write_text(json.dumps(environment | {"threads": 1}) + "\n")
    prediction = dict.fromkeys(bench.results.MODULE_KEY, 1) | {"dram_us": 1.0}
    places["predicted"].write_text(json.dumps(prediction) + "\n")

    def end(command: str, *more: str) -> str:
        program, *words = (word.format(**places) for word in (*command.split(), *more))
        try:
            code = PROGRAMS[program](words)
        except SystemExit as ended:  # argparse's
            code = ended.code
        said = capsys.readouterr().err.splitlines()
        assert code == 2, (command, more, code, said)
        verb = rf"( {words[0]})?" if words and not words[0].startswith("-") else ""
        assert re.match(rf"python -m {re.escape(program)}{verb}: error: .*\w", said[-1]), said
        usage = [line for line in said[:-1] if not line.startswith(("usage: ", " "))]
        assert not usage, said
        assert places["folder"].is_dir()
        assert not places["new"].exists()
        return said[-1]

    end.places = places  # type: ignore[attr-defined]
    return end


def cases(table: dict, values: tuple[str, ...] = ()) -> list:
    """(command, option, value) of each."""
    found = []
    for option, commands in table.items():
        by_value = commands if isinstance(commands, dict) else dict.fromkeys(values, commands)
        found += [pytest.param(c, option, v, id=f"{c} {option} {v}") for v, cs in by_value.items() for c in cs]
    return found


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [*cases(NUMBERS, ("0", "-3", "1.5", "x")), *cases(AMOUNTS, ("0", "-1", "nan", "inf", "x")), *cases(WORDS)],
)
def test_bad_values(ends, command, option, value):
    line = ends(command, option, value)
    assert option in line or "model: " in line, line


@pytest.mark.parametrize("command", TARGETS)
def test_outputs_that_cannot_be_written(ends, command):
    for path in ("{folder}", "{rows}/below.jsonl", "a\0b", "x" * 300):
        assert "--output: expected a file to write" in ends(command, "--output", path)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("command", READS_ROWS)
def test_bad_files_of_modules(ends, command, row):
    content = ROWS[row]
    path = ends.places["new"].with_name("bad.jsonl")
    if content == "{folder}":
        path = ends.places["folder"]
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert str(path) in ends(command, str(path))


@pytest.mark.parametrize(
    "content", [None, "{folder}", b"\xb5\n{}\n", b"{\n{}\n", b"[]\n", b'{"kind": "odd"}\n', b""], ids=str
)
@pytest.mark.parametrize("command", READS_RESULTS)
def test_bad_files_of_results(ends, command, content):
    if content == "{folder}" and command == "bench report":
        return
    path = ends.places["new"].with_name("bad.jsonl")
    if content == "{folder}":
        path = ends.places["folder"]
    elif content is not None:
        path.write_bytes(content)
    more = (str(path),)
    ends(command, *more)


@pytest.mark.parametrize("command", OTHERS)
def test_other_bad_commands(ends, command):
    ends(command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command", [*DEVICES, "bench suite", "ghostfused fuse paper", "ghostfused verify --model paper"]
)
def test_a_gpu_that_is_not_there(ends, command):
    assert "--device: expected " in ends(command, "--device", "cuda")


def test_pytorchs_words_are_taken(monkeypatch, capsys):
    """Of dtypes and layouts: the options that a command then has are those of our words."""
    import argparse

    from bench import cases as bench_cases

    def options(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        bench_cases.add_setting_arguments(parser, batch="1")
        return parser.parse_args(words)

    ours = options("--dtype", "float16,bfloat16", "--layout", "nhwc,nchw")
    assert options("--dtype", "torch.half,torch.bfloat16", "--layout", "channels_last,torch.contiguous_format") == ours
    assert options("--dtype", "fp16,bf16", "--layout", "NHWC,contiguous") == ours
    words = ["--network", "paper", "--dtype", "torch.float16", "--layout", "torch.channels_last"]
    assert tools.sass.__main__.arguments(words) == tools.sass.__main__.arguments(words[:2])


def test_every_verb_is_tried():
    tried = {c.split()[1] for c in [*DEVICES, *NETWORKS, *TARGETS, *READS_RESULTS, *OTHERS] if c.startswith("bench ")}
    assert tried - {"modul"} == {*bench.__main__.COMMANDS} - {"readme"}, "which has nothing to be wrong"


def test_a_folder_that_is_missing_is_made(tmp_path):
    from ghostfused.cli import inputs

    path = Path(tmp_path / "a" / "b" / "c.jsonl")
    assert inputs.new_file(str(path)) == path
    assert not path.parent.exists()
