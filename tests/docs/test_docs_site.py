"""The documentation site: its API pages are the public names, and it builds strictly without a network."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import api_pages
import pytest

import ghostfused

ROOT = Path(__file__).parents[2]


def test_every_public_name_has_a_page():
    assert api_pages.public_names() == ghostfused.__all__
    modules = {name for name in ghostfused.__all__ if type(getattr(ghostfused, name)).__name__ == "module"}
    assert modules == set(api_pages.MEMBERS)
    assert set(api_pages.pages()) >= set(ghostfused.__all__) - modules


def resolve(dotted: str) -> object:
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize(("public", "defined"), api_pages.pages().items(), ids=list(api_pages.pages()))
def test_a_page_documents_what_its_name_is(public, defined):
    found: object = ghostfused
    for part in public.split("."):
        found = getattr(found, part)
    assert resolve(defined) is found
    assert found.__doc__


def test_the_navigation_lists_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^      - (\S+): api/(\S+)\.md$", text, re.MULTILINE)
    assert listed[0] == ("Overview", "index")
    assert listed[1:] == [(name, name) for name in api_pages.pages()]


OFFLINE = """
import socket, sys
def refuse(*args, **kwargs):
    raise RuntimeError("the build opened a connection")
socket.socket.connect = socket.socket.connect_ex = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(sys.argv[1:])
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs the extra docs: mkdocs, mkdocs-material, mkdocstrings",
)
def test_the_site_builds_strictly_and_fetches_nothing(tmp_path):
    subprocess.run([sys.executable, "tools/api_pages.py"], cwd=ROOT, check=True)
    command = [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > len(api_pages.pages())
    for page in built:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"""<(?:script|img|iframe)[^>]*\ssrc=["']?(?:https?:)?//""", text), page.name
        assert not re.search(
            r"""<link[^>]*rel=["']?(?:stylesheet|preconnect|icon)[^>]*href=["']?(?:https?:)?//""", text
        )
        assert "::: ghostfused" not in text
