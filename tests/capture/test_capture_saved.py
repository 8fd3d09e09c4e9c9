"""A captured network in a file: another process runs it, and a file that is more than data is refused."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import networks
import pytest
import torch
from capture_network import made
from spies import needs_cpu_kernels

import ghostfused
from ghostfused.backends import cpu

pytestmark = needs_cpu_kernels
ROOT = Path(__file__).parents[2]
RUN = """
import sys, torch, ghostfused
captured = ghostfused.load(sys.argv[1])
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save([captured(x) for x in inputs], sys.argv[3])
print(captured)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_process_computes_the_same(dtype, tmp_path):
    model, x = made()
    model.to(dtype)
    examples = [x.to(dtype), torch.randn(1, 3, 12, 9).to(dtype, memory_format=torch.channels_last)]
    captured = ghostfused.capture(model, examples)
    captured.save(tmp_path / "net.pt2")
    torch.save(examples, tmp_path / "in.pt")
    run = subprocess.run(
        [sys.executable, "-c", RUN, *(str(tmp_path / name) for name in ("net.pt2", "in.pt", "out.pt"))],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"{captured}\n"
    for x, out in zip(examples, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
        assert torch.equal(out, captured(x))
        networks.assert_same(out, model, x)


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_parts_and_any_batch(tmp_path):
    model = ghostfused.fuse(networks.network("attention"))
    captured = ghostfused.capture(model, torch.randn(1, 3, 16, 12), partial=True, dynamic_batch=True)
    captured.save(tmp_path / "net.pt2")
    loaded = ghostfused.load(tmp_path / "net.pt2")
    for batch in (1, 3):
        x = torch.randn(batch, 3, 16, 12)
        assert torch.equal(loaded(x), captured(x))
    with pytest.raises(ValueError, match=r"expected \(batch, 3, 16, 12\)"):
        loaded(torch.randn(1, 3, 16, 13))
    assert str(loaded) == str(captured)


def test_shapes_share_their_weights(tmp_path):
    model, x = made()
    ghostfused.capture(model, [x, x[:1]]).save(tmp_path / "net.pt2")
    first, second = ghostfused.load(tmp_path / "net.pt2")._variants.values()
    for name, t in first.exported.state_dict.items():
        assert second.exported.state_dict[name] is t


def changed(path: Path, change) -> Path:
    """A copy of the archive, each member as ``change(name, content)`` returns it."""
    other = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for member in source.namelist():
            target.writestr(member, change(member, source.read(member)))
    return other


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def pickled_inputs(name, content):
    if "sample_inputs" not in name:
        return content
    buffer = io.BytesIO()
    torch.save(Evil(), buffer, pickle_module=pickle)
    return buffer.getvalue()


def in_model(edit):
    def change(name, content):
        if "/models/" not in name:
            return content
        described = json.loads(content)
        edit(described)
        return json.dumps(described).encode()

    return change


EVIL = {
    r"is pickled": pickled_inputs,
    r"has pickled tensors": lambda name, content: content.replace(b'"use_pickle": false', b'"use_pickle": true'),
    r"calls torch\.load": in_model(lambda d: d["graph_module"]["graph"]["nodes"][0].update(target="torch.load")),
    r"has Python source": in_model(lambda d: d.update(guards_code=["__import__('os')"])),
    r"no sum or product": in_model(lambda d: d.update(extra=[{"expr_str": "__import__('os').getpid()"}])),
}


@pytest.mark.parametrize("message", EVIL)
def test_a_file_that_is_more_than_data_is_refused(message, tmp_path, capsys):
    model, x = made()
    ghostfused.capture(model, x).save(tmp_path / "net.pt2")
    with pytest.raises(ValueError, match=f"path: expected a file that Captured.save wrote, got .*{message}"):
        ghostfused.load(changed(tmp_path / "net.pt2", EVIL[message]))
    assert "unpickled" not in capsys.readouterr().out


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "other"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"expected a file that Captured\.save wrote, got '.*other': it is no archive"):
        ghostfused.load(path)
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="it holds no captured network"):
        ghostfused.load(path)
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    torch.export.save(program, path)
    with pytest.raises(ValueError, match=r"expected a file that Captured\.save wrote"):
        ghostfused.load(path)
    with pytest.raises(FileNotFoundError):
        ghostfused.load(tmp_path / "missing")


def test_without_the_extension_the_reason_is_told(monkeypatch, tmp_path):
    model, x = made()
    ghostfused.capture(model, x).save(tmp_path / "net.pt2")
    monkeypatch.setattr(cpu.extension, "failure", "the extension ghostfused._cpu is not built")
    monkeypatch.setattr(cpu.extension, "module", None)
    for call in (lambda: ghostfused.capture(model, x, partial=True), lambda: ghostfused.load(tmp_path / "net.pt2")):
        with pytest.raises(ghostfused.NotCaptured, match=r"no program runs on this CPU: .*_cpu is not built"):
            call()
