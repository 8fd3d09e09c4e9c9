"""README and docs do what they say: their snippets and commands run, and what they name exists."""

from __future__ import annotations

import argparse
import builtins
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib

import documents
import pytest
import spies
import torch
from documents import PAGES, ROOT, Block

import bench.__main__ as bench_commands
import ghostfused
import ghostfused.__main__ as commands
from ghostfused import backends
from ghostfused.spec.takes import COMMON, TAKES

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*found in sys.modules"),  # runpy runs again what is imported above
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
READ = {page: documents.read(page) for page in PAGES}
BLOCKS = [block for blocks, _ in READ.values() for block in blocks]
NEEDS = {"gpu", "network", "minutes"}
SHELLS = ("bash", "sh", "console", "shell")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def missing(block: Block) -> str | None:
    """What ``block`` needs that this machine or this version lacks."""
    for need in block.needs:
        if need.startswith("ghostfused."):
            if not hasattr(ghostfused, need.removeprefix("ghostfused.")):
                return need
        elif need not in NEEDS:
            raise ValueError(f"{block.where}: needs: expected some of {sorted(NEEDS)} or a public name, got {need!r}")
        elif need != "gpu" or not torch.cuda.is_available():
            return need
    return None


def small_model() -> torch.nn.Module:
    from ghostfused.models.paper import ConvBnAct, GhostBottleneck

    blocks = GhostBottleneck(8, 17, 12, stride=2, se_ratio=0.25), GhostBottleneck(12, 24, 12)
    pooled = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 5)
    return torch.nn.Sequential(ConvBnAct(3, 8), *blocks, *pooled).eval()


def test_blocks_have_a_language_and_known_marks():
    assert {block.language for block in BLOCKS} <= {"python", "", *SHELLS}
    for block in BLOCKS:
        missing(block)
        assert set(block.given) <= {"model"}, block.where
        assert not (block.given and block.page.name == "README.md"), (
            "a newcomer has what README gives, and nothing else"
        )


@by_page
def test_snippets_run(page, tmp_path, monkeypatch):
    """Those of a page in order, in one namespace."""
    snippets = [b for b in READ[page][0] if b.language == "python"]
    if any(re.search(r"^import timm", b.text, re.MULTILINE) for b in snippets):
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "snippet", "ghostfused": ghostfused} if page.name != "README.md" else {}
    for block in snippets:
        if missing(block) is None:
            namespace |= {name: small_model() for name in block.given}
            # as many lines above it as in the page, so that an error names the page's line
            exec(compile("\n" * block.line + block.text, str(page), "exec"), namespace)


# ---- commands


class Parsed(Exception):
    """A command's own parser has taken its arguments."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``python WORDS`` up to where its parser has taken them; SystemExit if it refuses."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        run_as_main(words)


def run_as_main(words: list[str]) -> None:
    if words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def check_pip(words: list[str]) -> None:
    extras = [extra for word in words for found in re.findall(r"^\.\[(.*)\]$", word) for extra in found.split(",")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    wanted = {re.split(r"[<>=\[]", word)[0]: word for word in words if not word.startswith(("-", "."))}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    for requirement in (*PROJECT["dependencies"], *build):
        if (name := re.split(r"[<>=;\[]", requirement)[0]) in wanted and re.search("[<>=]", wanted[name]):
            assert wanted[name] == requirement, "README and pyproject.toml ask for different versions"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


SHELL_BLOCKS = {(b.needs, command): b for b in BLOCKS if b.language in SHELLS for command in b.commands()}
"""Each command once, however many pages have it."""


@pytest.mark.parametrize(
    ("block", "command"),
    [(b, command) for (_, command), b in SHELL_BLOCKS.items()],
    ids=lambda each: each if isinstance(each, str) else each.where,
)
def test_commands_run_or_parse(block, command, tmp_path, monkeypatch):
    program, *words = [w for i, w in enumerate(shlex.split(command)) if i or "=" not in w]
    if program == "make":
        assert set(words) <= make_targets()
    elif program == "pip":
        assert words[0] == "install"
        assert missing(block), "a test installs nothing: mark the block `needs: network`"
        check_pip(words[1:])
    elif program == "python":
        if missing(block) is not None:
            parse(words, monkeypatch)
            return
        if any("timm:" in word for word in words):
            pytest.importorskip("timm")
        where = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**os.environ, **where},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        pytest.fail(f"{block.where}: no test knows how to check {program!r}")


@pytest.mark.parametrize(
    "command",
    [
        "-m ghostfused fuse timm:ghostnet_100 --no-such-option",
        "-m ghostfused fuze paper",
        "-m bench modul --dtype float32",
        "-m bench traffic --no-such-option",
    ],
)
def test_a_command_that_does_not_exist_is_found(command, monkeypatch):
    with pytest.raises(SystemExit):
        parse(command.split(), monkeypatch)


def parser_of(package: str, verb: str) -> argparse.ArgumentParser:
    module = commands.COMMANDS[verb] if package == "ghostfused" else importlib.import_module(f"bench.{verb}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser


def complaint(command: str) -> str | None:
    """What is wrong with a command in the text, which may be cut short or hold placeholders in capitals."""
    words = [word for word in command.split() if "=" not in word or word.startswith("-")]
    if words[:1] == ["make"]:
        return None if words[1] in make_targets() else f"no target {words[1]}"
    if words[:2] != ["python", "-m"]:
        return None
    package, *rest = words[2:]
    if "." in package:
        return None if importlib.util.find_spec(package) else f"no module {package}"
    if package not in ("ghostfused", "bench"):
        return None
    verbs = [*commands.COMMANDS] if package == "ghostfused" else [*bench_commands.COMMANDS]
    if not rest or rest[0].startswith("--") or rest[0].isupper():
        return None
    verb, *options = rest
    if verb not in verbs:
        return f"no command {verb} of {package}"
    known = parser_of(package, verb).format_help()
    unknown = [o for o in options if o.startswith("--") and not re.search(rf"(?<![\w-]){re.escape(o)}(?![\w-])", known)]
    return f"{verb} has no {', '.join(unknown)}" if unknown else None


@by_page
def test_commands_in_the_text_exist(page):
    wrong = {span: what for span in documents.code_spans(READ[page][1]) if (what := complaint(span))}
    assert not wrong
    assert complaint("python -m bench rehearse") == "no command rehearse of bench"
    assert complaint("python -m ghostfused verify --layouts nhwc") == "verify has no --layouts"
    assert complaint("make rehearse-nothing") == "no target rehearse-nothing"


def test_tables_of_commands_list_commands():
    text = READ[ROOT / "docs" / "benchmarks.md"][1]
    table = text[text.index("| command |") :].split("\n\n")[0].splitlines()[2:]
    listed = {re.match(r"\| `(\w+)", line)[1] for line in table}
    assert listed == {*bench_commands.COMMANDS}


# ---- names


@by_page
def test_links_exist(page):
    import api_pages

    for link in documents.links(READ[page][1]):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if path.parent == ROOT / "docs" / "api":  # made by tools/api_pages.py
            assert path.stem in {"index", *api_pages.pages()}, link
            continue
        assert path.exists(), link
        assert not anchor or anchor in documents.headings(documents.read(path)[1]), link


FOLDERS = ("csrc", "ghostfused", "bench", "tests", "docs", "examples", "tools")
FILE = re.compile(r"^\.?[\w.*/-]+\.(?:py|md|cpp|cu|cuh|h|sh|jsonl?|yml|toml|png)$")
TEXT = {path: path.read_text(encoding="utf-8") for path in documents.SOURCES}
WORDS = {word for path, text in TEXT.items() if path.name != "test_docs.py" for word in re.findall(r"\w+", text)}
NEEDED = {need for block in BLOCKS for need in block.needs}
"""Public names that this version may lack are among them."""
NOT_OURS = re.compile(r"your_\w+\.py|file\.py|out/|.*(FILE|FOLDER|NAME|BACKEND|PEER)\b")
"""Users' files, what commands write, and placeholders."""


def unknown_name(name: str) -> bool:
    """Whether ``name`` looks like a file, or like a name in the source, and there is none."""
    name = name.rstrip(".,:;()…")
    if NOT_OURS.match(name) or name.startswith("-") or {name, f"ghostfused.{name}"} & NEEDED or hasattr(builtins, name):
        return False
    if FILE.match(name) or (name.split("/")[0] in FOLDERS and re.fullmatch(r"[\w./*-]+", name) and "/" in name):
        if "/" in name:
            inner = any(
                path.as_posix().endswith(f"/{name}") for path in documents.SOURCES
            )  # a file of a room, in a drawing
            return not inner and not any(ROOT.glob(name.rstrip("/")))
        return not any(path.match(name) for path in (*documents.SOURCES, *ROOT.iterdir(), *PAGES))
    if re.fullmatch(r"(ghostfused|torch)(\.\w+)+", name):
        return not resolves(name)
    # CamelCase and snake_case: a class, a function, a field, …
    if re.fullmatch(r"[A-Za-z_]\w{3,}", name) and (re.search("[a-z][A-Z]", name) or "_" in name.strip("_")):
        return name not in WORDS
    return False


def resolves(name: str) -> bool:
    """Whether the object of a dotted name exists."""
    first, *rest = name.split(".")
    found: object = importlib.import_module(first)
    for i, part in enumerate(rest):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join([first, *rest[: i + 1]]))
            except ImportError:
                return False
        found = getattr(found, part)
    return True


@by_page
def test_names_exist(page):
    blocks, prose = READ[page]
    words = [word for span in documents.code_spans(prose) for word in re.split(r"[\s(),=|]+", span)]
    # a drawing or a call tree names files as well
    words += [w for b in blocks if not b.language for w in b.text.split() if FILE.match(w)]
    assert not {word for word in words if unknown_name(word)}


@pytest.mark.parametrize(
    "name",
    ["csrc/no_such.cuh", "docs/kernel.md", "no_such.h", "ghostfused.no_such", "FusedNothing", "no_such_function"],
)
def test_a_name_that_does_not_exist_is_found(name):
    assert unknown_name(name)


# ---- claims


def test_versions_are_those_of_the_project():
    requirement = next(r for r in PROJECT["dependencies"] if r.startswith("torch"))
    low, high = re.fullmatch(r"torch>=2\.(\d+),<2\.(\d+)", requirement).groups()
    python = PROJECT["requires-python"].removeprefix(">=")
    for page in ("README.md", "docs/install.md", "docs/stability.md"):
        text = READ[ROOT / page][1]
        assert f"PyTorch | 2.{low} to 2.{int(high) - 1}" in text or f"PyTorch 2.{low} to 2.{int(high) - 1}" in text
        assert re.search(rf"Python (\| )?{re.escape(python)} (or|and) later", text)


def test_the_changelog_has_this_version():
    assert re.search(
        rf"^## \[{re.escape(ghostfused.__version__)}\] - \d{{4}}-\d\d-\d\d$", READ[ROOT / "CHANGELOG.md"][1], re.M
    )


def coverage(row: str) -> tuple[str, str]:
    """What README's table says is one kernel, and what isn't."""
    line = next(line for line in READ[ROOT / "README.md"][1].splitlines() if line.startswith(f"| {row} |"))
    return tuple(cell.strip() for cell in line.split("|")[2:4])  # type: ignore[return-value]


def test_readme_covers_what_the_kernels_take():
    def words(text: str) -> set[str]:
        return {word.lower().replace("_", "") for word in re.split(r"[,;]\s*", text)}

    kernels, others = coverage("activation")
    assert words(kernels) == {act.name.lower().replace("_", "") for act in COMMON.acts}
    assert not others
    assert "depthwise " + ", ".join(map(str, COMMON.dw_sizes)) in coverage("cheap operation")[0]
    sizes = [str(h) if h == w else f"{h}×{w}" for h, w in COMMON.depthwise]
    assert "depthwise " + ", ".join(sizes) in coverage("bottleneck")[0]
    assert f"up to {TAKES['cpu'].auto_window_channels[0]} channels" in coverage("primary conv")[0]
    isas = {path.stem.partition("_")[0] for path in (ROOT / "csrc" / "cpu" / "isa").glob("*.cpp")}
    processors = {"avx2": "x86-64", "neon": "aarch64"}
    assert {isa for isa, name in processors.items() if name in coverage("device")[0]} == isas & set(processors)


@pytest.mark.parametrize("settings", [{"stride": 2}, {"kernel_size": 3}])
def test_fuse_takes_the_primary_convs_of_the_kernels(settings):
    """README says so of CPUs; of GPUs Triton's kernel takes both, and CUDA's the 3×3."""
    from ghostfused.models import paper

    if backends.BACKENDS["cpu"].unavailable():
        pytest.skip("no CPU kernel")
    model = torch.nn.Sequential(paper.GhostModule(4, 8, **settings)).eval()
    assert [swap.fused for swap in ghostfused.fuse_with_report(model)[1]] == [True]
    assert [swap.fused for swap in ghostfused.fuse_with_report(model, backend="triton")[1]] == [True]
    assert [swap.fused for swap in ghostfused.fuse_with_report(model, backend="cuda")[1]] == ["kernel_size" in settings]


def test_batch_statistics_take_the_training_kernels(monkeypatch):
    """Semantics says that the children don't run then, but do on a CPU and where one half is frozen."""
    calls: list = []
    module = ghostfused.FusedGhostModule(4, 8).train()
    original = module._run_children
    module._run_children = lambda *args: calls.append(args) or original(*args)  # type: ignore[method-assign]
    module(torch.randn(2, 4, 5, 5))
    assert len(calls) == 1
    calls.clear()
    spies.train_by_kernels(monkeypatch)
    module(torch.randn(2, 4, 5, 5))
    assert not calls
    module.primary_conv[1].eval()
    module(torch.randn(2, 4, 5, 5))
    assert len(calls) == 1


def test_public_functions_have_the_arguments_that_the_pages_use():
    assert set(inspect.signature(ghostfused.fuse).parameters) >= {"inplace", "level", "strict", "verbose", "backend"}
