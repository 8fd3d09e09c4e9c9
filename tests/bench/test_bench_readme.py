"""The blocks of README and docs that `python -m bench readme` fills: they are what the committed results say."""

from __future__ import annotations

import pytest
from bench_stand_ins import module_rows, needs_matplotlib, network_rows, write

from bench import cases, readme, report
from bench.timing import Timing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paper_layers() -> list[cases.Layer]:
    return cases.layers_of(cases.network("paper"))


@needs_matplotlib
def test_generated_blocks_follow_the_results(tmp_path, monkeypatch, paper_layers):
    root = tmp_path / "results"
    rows = module_rows({"eager": 1.0, "ghostfused_reference": 0.5}, layers=paper_layers)
    path = write(root / "cpu" / "module.jsonl", rows)
    write(root / "cpu" / "network.jsonl", network_rows())
    monkeypatch.setattr(readme, "FIGURES", tmp_path / "docs" / "figures")
    text = "before\n"
    for what in ("modules", "network", "environment", "figure:speedup_cpu_float32_b1_nchw"):
        text += f"<!-- begin generated: {what} cpu -->\nold\n<!-- end generated -->\nbetween\n"
    page = tmp_path / "docs" / "page.md"
    filled = readme.fill(text, page, root)
    assert "old" not in filled
    assert filled.count("between") == 4
    assert "| 2.00× |" in filled
    assert "18.00 ms (tie)" not in filled
    name = "speedup_cpu_float32_b1_nchw"
    assert f"(figures/cpu_{name}.png)" in filled  # a link holds where the page is
    assert f"(docs/figures/cpu_{name}.png)" in readme.fill(text, tmp_path / "README.md", root)
    assert readme.fill(filled, page, root) == filled

    readme.figure_path(name, "cpu").parent.mkdir(parents=True)
    page.write_text(filled)
    assert readme.drift(page, root) == [f"page.md: cpu_{name}.png"]  # not drawn yet
    drawn = report.draw(readme.find_figure(name, readme.load("cpu", root)), tmp_path / "docs" / "figures")
    drawn.rename(readme.figure_path(name, "cpu"))
    assert readme.drift(page, root) == []

    changed = module_rows({"eager": 1.0, "ghostfused_reference": 0.8}, layers=paper_layers)
    write(path, changed)
    assert readme.drift(page, root) == ["page.md: the text between the markers", f"page.md: cpu_{name}.png"]
    assert "1.25×" in readme.fill(filled, page, root)


def test_the_headline_marks_ties_against_every_peer(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "HEADLINE", (("ghostfused_capture", 1), ("ghostfused_cpu", 1)))
    medians = {
        "eager": [9.0, 9.1, 9.0],
        "openvino": [4.1, 4.4, 4.2],  # 4.2 against 4.0: within its own spread
        "ghostfused_capture": [4.0, 4.0, 4.05],
        "ghostfused_cpu": [6.0, 6.0, 6.0],
    }
    rows = [row for row in network_rows() if row["peer"] == "eager" and row["batch"] == 1]
    rows = [rows[0] | {"peer": p, "ms": Timing.of([[m] for m in ms]).as_row()} for p, ms in medians.items()]
    write(tmp_path / "cpu" / "network.jsonl", rows)
    write(tmp_path / "cpu" / "module.jsonl", module_rows({"eager": 1.0}))
    results = readme.load("cpu", tmp_path)
    table, caption = readme.headline(results).split("\n\n")
    head, _, whole, swapped = (line.split(" | ") for line in table.splitlines())
    assert head[2:] == ["over `eager`", "over `openvino` |"]
    assert whole[1:] == ["4.00 ms", "2.25×", "1.05× (tie) |"]
    assert swapped[1:] == ["6.00 ms", "1.50×", "0.70× |"]  # slower is shown as well
    (facts,) = (facts for facts, rows in results if rows[0]["kind"] == "network")
    assert (facts["commit"] or "unknown")[:10] in caption
    assert "limit of the others' errors" not in caption
    facts["command"] += " --others-tolerance 4"  # a judgement that was milder to others is told
    assert "limit of the others' errors: 4 times ours" in readme.headline(results)
    assert "`capture(model, x)`, batch 1" in whole[0]
    assert "`fuse(model)`, batch 1" in swapped[0]
    monkeypatch.setattr(readme, "HEADLINE", (("ghostfused_cpu", 64),))
    with pytest.raises(SystemExit, match="ghostfused_cpu at batch 64"):
        readme.headline(results)


@needs_matplotlib
@pytest.mark.parametrize("page", readme.pages(), ids=lambda page: page.name)
def test_pages_agree_with_the_results(page):
    assert readme.drift(page) == []


def test_readme_begins_with_results():
    assert readme.README in readme.pages()
    lines = readme.README.read_text().splitlines()
    assert len(lines) <= 120
    (first, *_) = (line for line in lines if line.startswith("<!-- begin generated: "))
    assert "headline" in first


def test_without_eager_the_first_peer_is_the_base(tmp_path):
    rows = [row for row in network_rows() if row["peer"] == "eager"]
    others = {"openvino": [[4.0], [4.02], [3.98]], "ghostfused_frozen": [[2.0], [2.01], [1.99]]}
    rows = [row | {"peer": peer, "ms": Timing.of(ms).as_row()} for peer, ms in others.items() for row in rows]
    write(tmp_path / "engines" / "network.jsonl", rows)
    table = readme.network(readme.load("engines", tmp_path))
    base, ours = (line.split(" | ") for line in table.splitlines()[2:4])
    assert base[2].startswith("4.00 ms")
    assert "×" not in "".join(base)
    assert ours[2].startswith("2.00 ms (2.00×)")
