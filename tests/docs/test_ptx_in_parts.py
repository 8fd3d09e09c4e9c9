"""tests/helpers/ptx_in_parts.py, by which ``make test`` translates the compiled kernels."""

import re

import ptx_in_parts


def kernel(name: str, lines: int) -> str:
    body = "\n".join(["mov.b32 {%r1, %r2}, %rd1;", "{", "add.f32 %f1, %f2, %f3;", "}", *["ret;"] * lines])
    return f".visible .entry {name}(\n.param .u64 {name}_param_0\n)\n.maxntid 256\n{{\n{body}\n}}\n"


HEAD = ".version 9.0\n.target sm_80\n.extern .shared .align 16 .b8 memory[];\n"
FUNCTION = ".func (.param .b32 result) curved(.param .b32 x)\n{\nret;\n}\n"


def test_each_kernel_is_in_one_part_and_the_rest_in_all():
    sizes = {"a": 1, "b": 20_000, "c": 30_000, "d": 2, "e": 60_000}
    kernels = {name: kernel(name, lines) for name, lines in sizes.items()}
    ptx = HEAD + kernels["a"] + kernels["b"] + FUNCTION + kernels["c"] + kernels["d"] + kernels["e"]
    parts = ptx_in_parts.parts(ptx)
    names = [re.findall(r"\.entry (\w+)", part) for part in parts]
    assert names == [["a", "b"], ["c", "d"], ["e"]]
    for part, inside in zip(parts, names, strict=True):
        assert part.startswith(HEAD)
        assert part.count(FUNCTION) == 1
        assert all(kernels[name].strip() in part for name in inside)
        assert len(part) < len(HEAD + FUNCTION) + ptx_in_parts.LIMIT + 100 or len(inside) == 1


def test_the_tool_finds_the_kernels_of_every_file(tmp_path, monkeypatch, capfd):
    whole = tmp_path / "cuobjdump"
    whole.write_text(
        f'#!/bin/sh\necho "$@"\nfor i in 1 2; do printf "{HEAD}{kernel("k", 1)}" > x.$i.ptx; done\nexit 3\n'
    )
    whole.chmod(0o755)
    monkeypatch.setenv("CUOBJDUMP", str(whole))
    monkeypatch.delenv(ptx_in_parts.WHOLE, raising=False)
    for name, value in ptx_in_parts.variables().items():
        monkeypatch.setenv(name, value)
    assert ptx_in_parts.variables() == {}, "set once"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cuobjdump", "-xptx", "all", "library"])
    assert ptx_in_parts.main() == 3
    assert capfd.readouterr().out == "-xptx all library\n"
    assert sorted(path.name for path in tmp_path.glob("*.ptx")) == ["x.1.0.ptx", "x.2.0.ptx"]
