"""Writes docs/api: a page for each public function and class, which mkdocstrings fills from its docstring.

    python tools/api_pages.py

The package is read, not imported, so that the site builds without PyTorch. mkdocs.yml lists the pages in its navigation;
tests/docs/test_docs_site.py compares that list with ``pages()``, and ``pages()`` with ``ghostfused.__all__``.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ghostfused"
API = ROOT / "docs" / "api"
MEMBERS = {
    "functional": ("conv1x1", "depthwise", "squeeze_excite"),  # ghost_module has its page under the shorter name
    "models": ("paper.GhostNet", "seed.GhostNet"),
}
"""What is public in the public modules; all else that ``__all__`` lists is a function or a class."""


def public_names() -> list[str]:
    """``ghostfused.__all__``."""
    for node in _tree("ghostfused").body:
        if isinstance(node, ast.Assign) and [t.id for t in node.targets if isinstance(t, ast.Name)] == ["__all__"]:
            return ast.literal_eval(node.value)
    raise SystemExit(f"{PACKAGE / '__init__.py'}: expected a list named __all__")


def pages() -> dict[str, str]:
    """The public name of each documented object, without the package's, and where it is defined."""
    names = [f"{name}.{member}" for name in public_names() for member in MEMBERS.get(name, ())]
    names += [name for name in public_names() if name not in MEMBERS]
    return {name: definition(f"ghostfused.{name}") for name in sorted(names, key=str.lower)}


def definition(name: str) -> str:
    """The dotted name under which an object is defined: imports are followed to where ``class`` or ``def`` stands."""
    module, _, attribute = name.rpartition(".")
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return name
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return definition(f"{_imported(module, node)}.{alias.name}")
    raise SystemExit(f"{module}: defines no class and no function named {attribute}, and imports none")


def _imported(module: str, node: ast.ImportFrom) -> str:
    """The absolute name of the module that ``node``, a statement of ``module``, imports from."""
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    above = parts[: len(parts) - node.level + (_path(module).name == "__init__.py")]
    return ".".join([*above, *([node.module] if node.module else [])])


def _path(module: str) -> Path:
    folder = ROOT.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def main() -> None:
    API.mkdir(exist_ok=True)
    for old in API.glob("*.md"):
        old.unlink()
    found = pages()
    for public, defined in found.items():
        text = f"::: {defined}\n    options:\n      heading: ghostfused.{public}\n      heading_level: 1\n      show_root_heading: true\n"
        (API / f"{public}.md").write_text(text, encoding="utf-8")
    lines = [f"- [`ghostfused.{public}`]({public}.md)" for public in found]
    text = '# API\n\nEvery public function and class has a page. [Stability](../stability.md) says what "public" promises.\n\n'
    (API / "index.md").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
