"""The command line: info and verify, as a user runs them."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ghostfused
from ghostfused import __main__ as cli
from ghostfused.backends import BACKENDS, reference
from ghostfused.cli import info, verify
from ghostfused.spec.takes import TAKES, Takes
from tools.sass import build

CONFIGS = Path(__file__).parents[1] / "data" / "ghost_configs.jsonl"


def run(*argv: str) -> int:
    return cli.main(list(argv))


def test_info(capsys):
    assert run("info") == 0
    assert "reference" in capsys.readouterr().out
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in facts["backends"].values())
    assert facts["torch"] == torch.__version__.split("+")[0] or facts["torch"] == torch.__version__


@pytest.mark.parametrize("field", Takes._fields)
def test_info_says_all_of_what_a_kernel_takes(field):
    some = TAKES["cuda"]._replace(auto_window_channels=(8.0, 4.0))
    other = some._replace(
        **{field: not value if isinstance(value := getattr(some, field), bool) else value[:-1] or (9,)}
    )
    if field in ("window_widths", "auto_window_channels", "eps"):
        other = some._replace(**{field: (1.0, 2.0, 3)[: len(value)]})
    assert info.described(some) != info.described(other)


def test_info_is_what_an_issue_wants(capsys, monkeypatch):
    """Where the package is, on what, at which instruction set, with which variables: the same in text and in JSON."""
    monkeypatch.setenv("GHOSTFUSED_SOMETHING", "on")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("SECRET", "not for an issue")
    assert run("info", "--json") == 0
    text = capsys.readouterr().out
    facts = json.loads(text)
    assert run("info") == 0
    printed = capsys.readouterr().out
    json.loads(text, parse_constant=pytest.fail)  # Infinity is Python's own
    assert re.search(r"triton\n(    .*\n)*    eps of a norm +1.18e-38 to 3.4e\+38\n", printed)
    assert facts["package"] == str(Path(ghostfused.__file__).parent)
    assert facts["machine"] == platform.machine()
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert facts["environment"].items() >= {"GHOSTFUSED_SOMETHING": "on", "OMP_NUM_THREADS": "1"}.items()
    assert "not for an issue" not in text + printed
    told = [facts["package"], facts["python"], facts["machine"], facts["cpu"]["name"], "GHOSTFUSED_SOMETHING"]
    told += [reason for reason in facts["backends"].values() if reason]
    for value in told:
        assert value in printed


@pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="ghostfused._cpu is not built")
def test_info_tells_the_instruction_set_and_who_asked_for_it():
    def facts(isa: str) -> dict:
        command = [sys.executable, "-m", "ghostfused", "info", "--json"]
        environment = {**os.environ, "GHOSTFUSED_CPU_ISA": isa}
        return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    free, forced, refused = facts(""), facts("baseline"), facts("none_such")
    built = free["extensions"]["cpu"]
    assert built["flags"].startswith("-O")
    assert built["compiler"]
    assert free["instruction_sets"] == {"found": built["supported"], "runs": built["chosen"], "forced": None}
    assert forced["instruction_sets"] == {"found": built["supported"], "runs": "baseline", "forced": "baseline"}
    assert refused["instruction_sets"]["runs"] is None
    assert refused["backends"]["cpu"] == "GHOSTFUSED_CPU_ISA=none_such: no such instruction set"


def test_windows_gets_the_reference_and_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(
        RuntimeError, match="MSVC, by which PyTorch builds extensions on Windows, has no vector extensions"
    ):
        build.setup_functions()["cpu_extension"]()


def test_info_on_a_machine_without_the_extension(capsys, monkeypatch):
    reason = "the extension ghostfused._cpu is not built: no C++ compiler"
    monkeypatch.setattr(BACKENDS["cpu"], "build_info", lambda: None)
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: reason)
    assert run("info") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^instruction sets +none$", printed, re.MULTILINE)
    assert re.search(r"^cpu build +not built$", printed, re.MULTILINE)
    assert f"no: {reason}" in printed


def test_every_row_of_the_shared_shapes(capsys):
    assert run("verify", "--configs", str(CONFIGS), "--max-size", "9", "--batch", "1", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 1} passed, 0 failed"
    assert len(lines) > 80
    assert all(line.startswith("ok") for line in lines[:-1])


def test_a_wrong_backend_fails(capsys, monkeypatch, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"in_channels": 8, "out_channels": 9, "height": 5, "width": 6}\n')
    monkeypatch.setattr(verify.functional, "run", lambda args, backend: reference.ghost_module(args) * 1.001)
    assert run("verify", "--configs", str(rows), "--device", "cpu") == 1
    assert "MISS" in capsys.readouterr().out


ROW = {"in_channels": 8, "out_channels": 9, "height": 5, "width": 6}
BAD_ROWS = {
    "a field missing": ({"in_channels": 8}, "expected a JSON object with"),
    "a string": (ROW | {"width": "6"}, r"width: expected a whole number of at least 1 and below 2\^31, got '6'"),
    "negative": (ROW | {"dw_size": -3}, r"dw_size: expected a whole number of at least 1 and below 2\^31, got -3"),
    "no ghosts": (ROW | {"ratio": 1}, r"ratio: expected a whole number of at least 2 and below 2\^31, got 1"),
    "a bool": (ROW | {"height": True}, "height: expected a whole number"),
    "no activation": (ROW | {"act_cheap": "elu"}, "act_cheap: expected one of .*'relu'.*, got 'elu'"),
    "misspelt": (ROW | {"dw_sise": 5}, "expected no fields beside .*, got dw_sise"),
    "a list": ([1, 2], "expected a JSON object"),
}


def refused(capsys, *argv: str) -> str:
    """The one line that a command ends with."""
    assert run(*argv) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"python -m ghostfused {argv[0]}: error: ")
    return line


@pytest.mark.parametrize("what", BAD_ROWS)
def test_bad_rows_are_named(tmp_path, capsys, what):
    row, message = BAD_ROWS[what]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    assert re.search(
        rf"rows.jsonl:2: .*{message}", refused(capsys, "verify", "--configs", str(rows), "--device", "cpu")
    )


def test_bad_files_are_named(tmp_path, capsys):
    (tmp_path / "latin.jsonl").write_bytes(b"\xb5\n")
    for path in (tmp_path, tmp_path / "missing.jsonl", tmp_path / "latin.jsonl"):
        said = refused(capsys, "verify", "--configs", str(path), "--device", "cpu")
        assert f"--configs: expected a text file in UTF-8, got {str(path)!r}" in said


def test_no_rows_is_no_success(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n")
    assert run("verify", "--configs", str(rows), "--device", "cpu") == 2


@pytest.mark.parametrize(
    ("size", "limit", "expected"), [(14, None, 14), (7, 9, 7), (112, 16, 16), (113, 16, 15), (20, 1, 1)]
)
def test_cut_keeps_parity(size, limit, expected):
    assert verify.cut(size, limit) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_seed_network(capsys, dtype):
    assert run("verify", "--model", "seed", "--dtype", dtype, "--batch", "1", "--device", "cpu") == 0
    assert "30 Ghost modules and 15 bottlenecks fused" in capsys.readouterr().out


def test_a_limit_that_decides_nothing_is_no_success(tmp_path, capsys):
    """Where float16 overflows in both, and where it doesn't in PyTorch: the first says so, the second is a miss."""
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom ghostfused.models.paper import GhostModule\n"
        "def net():\n    return torch.nn.Sequential(GhostModule(3, 8)), 1e6 * torch.randn(1, 3, 6, 5)\n"
    )
    command = ["verify", "--model", f"{file}:net", "--device", "cpu"]
    assert run(*command, "--dtype", "float16") == 2
    said = capsys.readouterr().out
    assert said.startswith("VOID ")
    assert said.splitlines()[-1] == "0 passed, 0 failed, 1 void: the limit decides nothing"
    assert run(*command) == 0
    assert run("fuse", *command[2:], "--dtype", "float16", "--rounds", "2") == 0
    said = capsys.readouterr().out
    assert "VOID" in said
    assert "the limit decides nothing about fused" in said
    assert verify.word_of(verify.Verdict(float("inf"), 1e-3, 2e-3)) == "MISS"
    assert verify.word_of(verify.Verdict(0.24, 0.37, 0.74)) == "VOID"


def test_model_from_a_file_with_its_input(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\nfrom ghostfused.models.paper import GhostModule\n"
        "def net():\n    return torch.nn.Sequential(GhostModule(6, 13), GhostModule(13, 7, relu=False))\n"
        "def net_and_input():\n    return net(), torch.randn(2, 6, 9, 5)\n"
    )
    assert run("verify", "--model", f"{file}:net_and_input", "--layout", "nhwc", "--device", "cpu") == 0
    assert "2 Ghost modules and 0 bottlenecks fused" in capsys.readouterr().out


NETS = """
import torch
from torch import nn
from ghostfused.models.paper import GhostModule

class Net(nn.Module):
    def __init__(self, give, embed=False):
        super().__init__()
        self.embed = nn.Embedding(5, 3) if embed else nn.Identity()
        self.ghost, self.give = GhostModule(3, 8), give

    def forward(self, x):
        x = self.embed(x)
        return self.give(self.ghost(x.movedim(-1, 1) if isinstance(self.embed, nn.Embedding) else x))

def a_number_first():
    return Net(lambda x: {"count": 3, "maps": x}), torch.randn(1, 3, 6, 5)

def nested():
    return Net(lambda x: [[], (None, {"maps": x})]), torch.randn(1, 3, 6, 5)

def indices():
    return Net(lambda x: x, embed=True), torch.ones(2, 6, 5, dtype=torch.long)
"""


@pytest.mark.parametrize("net", ["a_number_first", "nested", "indices"])
@pytest.mark.parametrize("command", ["verify", "fuse"])
def test_a_network_of_any_input_and_output(tmp_path, capsys, command, net):
    file = tmp_path / "net.py"
    file.write_text(NETS)
    more = (
        ["--model", f"{file}:{net}", "--layout", "torch.channels_last"]
        if command == "verify"
        else [f"{file}:{net}", "--rounds", "2"]
    )
    assert run(command, *more, "--device", "cpu", "--dtype", "torch.half") == 0
    assert " float16" in capsys.readouterr().out


def test_nothing_to_fuse_is_one_line(tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\nfrom ghostfused.models.paper import GhostModule\n"
        "def net():\n    ghost = GhostModule(3, 8)\n    ghost.primary_conv[0].padding_mode = 'circular'\n"
        "    return nn.Sequential(ghost)\n"
    )
    said = refused(capsys, "verify", "--model", f"{file}:net", "--size", "8", "--device", "cpu")
    assert re.search(r"found no Ghost module to fuse in .*: 0: .*circular", said)


BAD_MODELS = {
    "nonsense": "expected seed, paper, timm:NAME or file.py:function",
    "missing.py:f": "not a Python file",
    "{net}:raises": "raised RuntimeError .*net.py:2.*: mine",
    "{net}:missing": "has no function 'missing'",
    "{net}:takes": "raised TypeError .*: takes.. missing 1 required",
    "{net}:nothing": "to return an nn.Module, or one and an input, got int",
    "{net}:three": "to return an nn.Module, or one and an input, got tuple",
    "{net}:exits": "raised SystemExit .*: 7",
    "{net}:other": "given .* raised RuntimeError .*: Given groups=1, weight of size",
    "{net}:no_tensor": "to give a tensor, got str",
    "{net}:on_meta": "to have values, got tensors on the meta device",
    "{net}:empty": "to give a tensor of finite numbers, got an empty one",
    "{net}:nan": "to give a tensor of finite numbers, got others",
    "{net}:bool": "to give a tensor of finite numbers, got torch.bool",
    "{net}:no_text": "raised NoText .*: an error without a text",
    "{net}:tires": "in float32 raised RuntimeError .*: tired",
    "{net}:only_eval": "in train mode raised RuntimeError .*: only eval",
    "{net}:only_float32": "in float64 raised RuntimeError",
    "{net}:half": "to have parameters in float32, got torch.float16",
    "{broken}:f": "raised SyntaxError",
    "timm:no_such_network": "raised RuntimeError",
}


@pytest.mark.parametrize("model", BAD_MODELS)
@pytest.mark.parametrize("command", ["verify", "fuse"])
def test_bad_models_are_named(tmp_path, capsys, command, model):
    if model.startswith("timm"):
        pytest.importorskip("timm")
    net, broken = tmp_path / "net.py", tmp_path / "broken.py"
    net.write_text(
        "def raises():\n    raise RuntimeError('mine')\ndef takes(x):\n    pass\n"
        "def nothing():\n    return 1\ndef three():\n    return 1, 2, 3\n"
        "def exits():\n    raise SystemExit(7)\n"
        "from torch import nn\nclass Text(nn.Module):\n    def forward(self, x):\n        return 'x'\n"
        "def no_tensor():\n    return Text()\ndef other():\n    return nn.Conv2d(5, 4, 1)\n"
        "def on_meta():\n    return nn.Conv2d(3, 4, 1, device='meta')\ndef half():\n    return nn.Conv2d(3, 4, 1).half()\n"
    )
    with net.open("a") as file:
        file.write(
            "import torch\nclass Own(nn.Sequential):\n    def forward(self, x):\n"
            "        if self.training:\n            raise RuntimeError('only eval')\n        return super().forward(x)\n"
            "class Float(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x.float())\n"
            "class Bool(nn.Sequential):\n    def forward(self, x):\n        return super().forward(x) > 0\n"
            "def bool():\n    return Bool(nn.Conv2d(3, 4, 1))\n"
            "class NoText(Exception):\n    def __str__(self):\n        raise RuntimeError\n"
            "def no_text():\n    raise NoText\n"
            "class Tires(nn.Sequential):\n    left = [6]\n    def forward(self, x):\n"
            "        self.left[0] -= 1\n        if self.left[0] < 0:\n            raise RuntimeError('tired')\n"
            "        return super().forward(x)\n"
            "def tires():\n    from ghostfused.models.paper import GhostModule\n    return Tires(GhostModule(3, 4))\n"
            "def empty():\n    return nn.Conv2d(3, 4, 1), torch.zeros(0, 3, 4, 4)\n"
            "def nan():\n    return nn.Conv2d(3, 4, 1), torch.full((1, 3, 4, 4), torch.nan)\n"
            "def only_eval():\n    return Own(nn.Conv2d(3, 4, 1))\n"
            "def only_float32():\n    return Float(nn.Conv2d(3, 4, 1))\n"
        )
    broken.write_text("def f(:\n")
    argv = [command, *(["--model"] if command == "verify" else []), model.format(net=net, broken=broken)]
    assert re.search(BAD_MODELS[model], refused(capsys, *argv, "--device", "cpu"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "xla", "meta"])
def test_an_unknown_device_is_named(capsys, device):
    assert "--device: expected a device of this machine" in refused(capsys, "fuse", "paper", "--device", device)


@pytest.mark.parametrize("command", [("verify", "--model", "paper"), ("fuse", "paper")], ids=" ".join)
def test_a_cpu_has_no_tf32(capsys, command):
    """Its limit would prove nothing of float32's products."""
    assert "--dtype: expected another one than tf32 on a CPU" in refused(
        capsys, *command, "--dtype", "tf32", "--device", "cpu"
    )


@pytest.mark.parametrize(
    "option", [("--size", "0"), ("--batch", "-1"), ("--batch", "x"), ("--rounds", "1"), ("--seed", "9" * 30)]
)
def test_numbers_are_checked(capsys, option):
    with pytest.raises(SystemExit) as ended:
        run("fuse", "paper", *option)
    assert ended.value.code == 2
    assert f"argument {option[0]}: expected" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--version")
    assert not ended.value.code
    assert capsys.readouterr().out == f"ghostfused {ghostfused.__version__}\n"


def test_a_refused_backend_says_why():
    """An explicit backend that works nowhere on this machine ends the run with its reason."""
    result = subprocess.run(
        [sys.executable, "-m", "ghostfused", "verify", "--configs", str(CONFIGS), "--backend", "cuda", "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "cuda" in result.stderr


@pytest.mark.parametrize("command", [("fuse",), ("verify", "--model")])
def test_a_backend_that_runs_elsewhere_is_named(capsys, command):
    said = refused(capsys, *command, "paper", "--backend", "cuda", "--device", "cpu")
    assert said.endswith("--backend cuda: it takes tensors on cuda, not on cpu")
