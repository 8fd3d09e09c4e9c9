"""What README and docs consist of, for the tests that hold them to what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "api")
SOURCES = [
    path
    for folder in ("ghostfused", "csrc", "bench", "tests", "examples", "tools")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".sh", ".json", ".jsonl")
]
_MARK = re.compile(r"^<!-- (needs|given): (.*?) -->$")
_FENCE = re.compile(r"^\s*```(\w*)$")
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


class Block(NamedTuple):
    """A fenced block, with the marks in the comments right above it."""

    page: Path
    line: int
    language: str
    text: str
    needs: tuple[str, ...]
    given: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[str]:
        """The commands of a shell block, without prompts, comments and continued lines."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        stripped = (re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ") for line in lines)
        return [line for line in stripped if line]


def read(page: Path) -> tuple[list[Block], str]:
    """The blocks of a page, and its prose: all lines outside of them, with empty lines in their place."""
    blocks: list[Block] = []
    prose: list[str] = []
    marks: dict[str, tuple[str, ...]] = {}
    fence: tuple[int, str, list[str]] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        opening = _FENCE.match(line)
        if fence is None and opening:
            fence = number, opening[1], []
        elif fence is not None and line.strip() == "```":
            start, language, lines = fence
            blocks.append(
                Block(page, start, language, "\n".join(lines), marks.get("needs", ()), marks.get("given", ()))
            )
            fence, marks = None, {}
        elif fence is not None:
            fence[2].append(line)
        else:
            if mark := _MARK.match(line):
                marks[mark[1]] = tuple(each.strip() for each in mark[2].split(","))
            elif line.strip():
                marks = {}
            prose.append(line)
            continue
        prose.append("")
    if fence is not None:
        raise ValueError(f"{page.name}:{fence[0]}: the block has no end")
    return blocks, "\n".join(prose)


def code_spans(prose: str) -> list[str]:
    """What stands in backticks."""
    return [match[2].strip() for match in _CODE.finditer(re.sub(r"<!--.*?-->", "", prose, flags=re.DOTALL))]


def headings(prose: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def links(prose: str) -> list[str]:
    """The targets of links and images."""
    return re.findall(r"\]\(([^)\s]+)\)", _CODE.sub("", prose))
