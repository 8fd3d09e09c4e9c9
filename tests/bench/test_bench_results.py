"""What reads the benchmarks' results, and the commands as a whole: compare, report, README, suite. No times are judged."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from bench_stand_ins import (
    QUICK,
    SHAPE,
    Clock,
    Planted,
    environment,
    module_rows,
    needs_matplotlib,
    network_rows,
    write,
)

from bench import cases, compare, launches, measure, memory, module, peers, report, results, suite, timing
from bench import environment as facts
from bench.__main__ import main
from bench.cases import Setting, Unfused
from bench.timing import Timing
from ghostfused import FusedGhostModule
from ghostfused.numerics import relative_error

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def paper_layers() -> list[cases.Layer]:
    return cases.layers_of(cases.network("paper"))


def test_modules_of_the_paper_network_are_those_of_the_shared_file(paper_layers):
    def count(layers):
        fields = ("in_channels", "out_channels", "height", "width", "kernel_size", "stride", "dw_size", "ratio")
        counts: Counter[tuple] = Counter()
        for layer in layers:
            row = layer.as_row()
            counts[tuple(row[f] for f in (*fields, "act_primary", "act_cheap"))] += row["count"]
        return counts

    from_hooks = count(paper_layers)
    assert sum(from_hooks.values()) == 32
    assert from_hooks == count(cases.layers_from_rows(source="timm/ghostnet_100@224"))


def test_a_layer_knows_its_output_and_its_floor():
    layer = cases.layer("strided", Unfused(FusedGhostModule(6, 10, 2, 3, 2)), (6, 9, 12))
    out = layer.calibrated()(torch.zeros(2, *layer.shape))
    assert out.shape == (2, layer.out_channels, layer.out_height, layer.out_width)
    assert layer.floor_bytes(2, 4) == 4 * (2 * 6 * 9 * 12 + out.numel())
    assert layer.flops(1) == 2 * 5 * 6 * (6 * 9 * 5 + 5 * 9)


def test_oracle_measures_as_the_package_does(ghost):
    from bench.correctness import Exact

    setting = Setting(batch=20)  # more than one chunk
    x = setting.input(SHAPE)
    exact = Exact(ghost, x, setting)
    with torch.no_grad():
        out = ghost(x)
        assert relative_error(exact.expected[0].float(), ghost.double()(x.double())) < 1e-7
    ghost.float()
    assert exact.judge([out]).ok
    assert not exact.judge([out + 1e-4 * out.abs().max()]).ok
    half = out.bfloat16().float()
    assert not exact.judge([half]).ok
    assert exact.judge([half], torch.bfloat16).ok  # by the tolerance of the precision that it says it has


def test_planted_slowdown_shows_in_compare(tmp_path, capsys, paper_layers):
    before = module_rows({"eager": 1.0, "ghostfused_reference": 0.5}, layers=paper_layers)
    after = module_rows({"eager": 1.0, "ghostfused_reference": 0.5}, layers=paper_layers)
    slow = next(row for row in after if row["name"] == "blocks.6.3.ghost1" and row["peer"] == "ghostfused_reference")
    slow["ms"] = Timing.of([[0.6], [0.61], [0.6]]).as_row()
    jittered = next(row for row in after if row["name"] == "blocks.0.0.ghost1")
    jittered["ms"] = Timing.of([[1.01], [1.0], [1.02]]).as_row()
    a, b = write(tmp_path / "a.jsonl", before), write(tmp_path / "b.jsonl", after)
    assert main(["compare", str(a), str(b), "--fail-on-slower"]) == 1
    printed = capsys.readouterr().out
    assert "1 slower" in printed
    assert f"{len(before) - 1} tie" in printed
    assert "blocks.6.3.ghost1" in printed
    assert "blocks.0.0.ghost1" not in printed
    assert main(["compare", str(b), str(a), "--fail-on-slower"]) == 0  # the other way round it is faster
    assert "1 faster" in capsys.readouterr().out


def test_planted_slowdown_goes_all_the_way(tmp_path, monkeypatch, capsys, ghost):
    """From a peer that takes longer, by measure and results file, to compare's exit code; on a clock of our own."""
    files = []
    for name, ms in (("before", 2.0), ("after", 2.5)):
        clock = Clock()
        monkeypatch.setattr(timing, "time", clock)
        wait = clock.function(ms)
        peer = Planted("planted", lambda out, wait=wait: (wait.call(out), out)[1])
        rows = measure.measure(ghost, SHAPE, Setting(), {"planted": peer}, QUICK)
        monkeypatch.undo()
        layer = cases.layer("one", Unfused(FusedGhostModule(8, 12)), SHAPE)
        for row in rows:
            row |= {"kind": "module", **layer.as_row(), **vars(Setting()), "floor_bytes": 1, "flops": 1}
        files.append(str(write(tmp_path / f"{name}.jsonl", rows)))
    assert main(["compare", *files, "--fail-on-slower"]) == 1
    assert "0.800×" in capsys.readouterr().out


def test_compare_reports_a_peer_that_became_wrong(tmp_path, capsys, paper_layers):
    before = module_rows({"eager": 1.0}, layers=paper_layers[:2])
    after = json.loads(json.dumps(before))
    after[0] |= {"status": "WRONG", "reason": "planted"}
    del after[0]["ms"]
    a, b = write(tmp_path / "a.jsonl", before), write(tmp_path / "b.jsonl", after)
    assert main(["compare", str(a), str(b), "--fail-on-slower"]) == 1
    assert "ok → WRONG" in capsys.readouterr().out
    assert compare.key(before[0]) == compare.key(after[0])


@needs_matplotlib
def test_report_is_self_contained_and_has_every_module(tmp_path, capsys, paper_layers):
    peers_ms = {"eager": 1.0, "onnxruntime": 0.7, "ghostfused_reference": 0.5}
    write(tmp_path / "in" / "module.jsonl", [
        {"kind": "roofs", "dtype": "float32", "copy_gb_s": 20.0, "matmul_gflops": 60.0},
        *module_rows(peers_ms, layers=paper_layers),
    ])  # fmt: skip
    write(tmp_path / "in" / "network.jsonl", network_rows())
    assert main(["report", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    for layer in paper_layers:
        assert layer.name in page
    for text in (*peers_ms, "2.00×", "openvino_default", "AMD" if "AMD" in environment()["cpu"] else "environment"):
        assert text in page
    assert "http" not in page
    pngs = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pngs == {
        "speedup_cpu_float32_b1_nchw.png", "roofline_cpu_float32_b1_nchw.png", "latency_cpu_paper_float32_nchw.png",
    }  # fmt: skip
    assert page.count("data:image/png;base64,") == len(pngs)
    first, second, *_ = re.findall("<h2>(.*?)</h2>", page)
    assert first.startswith("Latency against batch")
    assert second.startswith("Speed-up per module")
    assert page.index("openvino_default") < page.index(paper_layers[0].name)  # networks' tables too come first


@needs_matplotlib
def test_speedup_figure_has_a_bar_for_every_module(paper_layers):
    from bench import figures

    figure = figures.speedup(module_rows({"eager": 1.0, "ghostfused_reference": 0.5}, layers=paper_layers), "title")
    axis = figure.axes[0]
    assert len(axis.containers) == len(paper_layers)
    assert [t.get_text() for t in axis.get_yticklabels()] == [
        figures.module_label(layer.as_row()) for layer in paper_layers
    ]


@needs_matplotlib
def test_no_two_peers_look_alike():
    from bench import figures

    looks = {name: figures.style(name) for name in peers.all_peers() if "_module" not in name}
    assert len({(look.color, look.marker) for look in looks.values()}) == len(looks)
    ours = {n: look for n, look in looks.items() if figures.is_ours(n)}
    assert len({(look.color, look.hatch) for look in ours.values()}) == len(ours)  # as bars
    others = {look.color for n, look in looks.items() if n not in ours and n != figures.BASELINE}
    assert not others & {look.color for look in ours.values()}
    assert set(looks) - set(ours) - {figures.BASELINE} == set(figures.OTHERS)


@needs_matplotlib
def test_no_speedup_figure_without_the_baseline(paper_layers):
    rows = module_rows({"onnxruntime": 0.7, "ghostfused_reference": 0.5}, layers=paper_layers[:2])
    assert not [f[1] for f in report.figures_of(environment(), rows) if f[1].startswith("speedup")]


@needs_matplotlib
def test_predictions_look_different_and_say_so(paper_layers):
    from bench import figures

    rows = module_rows({"ghostfused_reference": 0.5}, layers=paper_layers)
    roofs = {"copy_gb_s": 20.0, "matmul_gflops": 60.0}
    measured, predicted = figures.roofline(rows, roofs, report.predictions(rows), "title").axes
    assert "PREDICTED, not measured" in predicted.get_title()
    assert "Measured" in measured.get_title()
    hollow = [line for line in predicted.lines if line.get_linestyle() == "None"]
    assert hollow
    assert all(line.get_markerfacecolor() == "none" for line in hollow)
    assert all(line.get_markerfacecolor() != "none" for line in measured.lines)


def test_results_of_a_run_are_no_change_of_what_the_next_one_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "ROOT", tmp_path)
    files = {
        "bench/results/cpu/a.jsonl": False,
        "tools/sass/results/a.jsonl": False,
        "bench/cases.py": True,
        "csrc/a.cu": True,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    me = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*me, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert not facts.has_changes()
    for name, counts in files.items():
        (tmp_path / name).write_text("after")
        assert facts.has_changes() == counts, name
        subprocess.run(["git", "checkout", "-q", "."], cwd=tmp_path, check=True)


@pytest.fixture
def small_cache(monkeypatch):
    """A copy that measures the bandwidth of a server's memory takes gigabytes."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**20)


def test_module_command_writes_rows_of_the_schema(tmp_path, capsys, small_cache):
    path = tmp_path / "m.jsonl"
    arguments = ["--peers", "eager,eager+graph,ghostfused_reference", "--only", "blocks.8.0.ghost1", "--device", "cpu"]
    arguments += ["--samples", "3", "--repeats", "2", "--threads", "1", "--output", str(path)]
    assert main(["module", *arguments]) == 0
    environment, rows = results.read(path)  # checks every row
    assert environment["threads"] == 1
    assert {"cpu", "commit", "dirty", "flags", "packages"} <= set(environment)
    assert rows[-1]["kind"] == "end"
    timed = [row for row in rows if row.get("status") == "ok"]
    assert len(timed) == 4  # two peers, two layouts
    for row in timed:
        assert {"gb_s", "copy_percent", "floor_percent"} <= set(row) or row["peer"] != "eager"
        assert row["floor_bytes"] == 4 * 49 * (row["in_channels"] + row["out_channels"])
        assert row["clock"] == "wall"
    assert "CUDA graphs need a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"kind": "unknown"}, {"count": "1"}, {"status": "fine"}, {"ms": None, "status": "absent"}, {"status": "WRONG"}],
)
def test_rows_that_break_the_schema_are_refused(change, paper_layers):
    row = module_rows({"eager": 1.0}, layers=paper_layers[:1])[0] | change
    with pytest.raises(ValueError, match=r"expected|a row"):
        results.check(row)


def test_a_preliminary_row_stands_until_another_follows(tmp_path, paper_layers):
    (row,) = module_rows({"eager": 1.0}, layers=paper_layers[:1])
    other = row | {"batch": 2}
    path = write(tmp_path / "a.jsonl", [row | {"preliminary": True}, other | {"preliminary": True}, row])
    _, rows = results.read(path)
    assert [(r["batch"], r.get("preliminary")) for r in rows if r["kind"] == "module"] == [(2, True), (1, None)]


def test_first_times_outlive_a_peer_that_broke_later(tmp_path, paper_layers):
    (row,) = module_rows({"eager": 1.0}, layers=paper_layers[:1])
    broken = {k: v for k, v in row.items() if k != "ms"} | {"status": "error", "reason": "RuntimeError: out of memory"}
    path = write(tmp_path / "a.jsonl", [row | {"preliminary": True}, broken])
    assert [r["status"] for r in results.read(path)[1] if r["kind"] == "module"] == ["ok"]
    path = write(tmp_path / "b.jsonl", [broken | {"preliminary": True}, broken])
    assert [r["status"] for r in results.read(path)[1] if r["kind"] == "module"] == ["error"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path, paper_layers):
    path = write(tmp_path / "a.jsonl", module_rows({"eager": 1.0}, layers=paper_layers[:2]))
    text = path.read_text().rstrip()
    path.write_text(text[: text.rindex("\n") + 20])
    assert [r["kind"] for r in results.read(path)[1]] == ["module", "module"]


def test_a_run_that_is_stopped_has_all_modes_of_its_modules(tmp_path, small_cache):
    path = tmp_path / "out.jsonl"
    command = ["module", "--size", "32", "--only", "blocks.0,blocks.8", "--peers", "eager", "--layout", "nhwc"]
    command += ["--mode", "training_forward,backward", "--batch", "2,3", "--samples", "3", "--repeats", "2"]
    assert main([*command, "--device", "cpu", "--output", str(path)]) == 0
    rows = [row for row in results.read(path)[1] if row["kind"] == "module"]
    assert [(row["batch"], row["mode"]) for row in rows[:2]] == [(2, "training_forward"), (2, "backward")]
    assert rows[0]["name"] == rows[1]["name"]
    assert [row["batch"] for row in rows] == sorted(row["batch"] for row in rows)


def test_rates():
    row = {"ms": {"p50": 2.0}, "floor_bytes": 10**7}
    assert module.rates(row, 4 * 10**7, 40.0) == {
        "floor_percent": 12.5, "moved_bytes": 4 * 10**7, "gb_s": 20.0, "copy_percent": 50.0,
    }  # fmt: skip


@pytest.mark.parametrize("backend", launches.KERNEL_BACKENDS)
def test_launches_counts_one_op_for_a_fused_module(backend):
    fused = FusedGhostModule(8, 12, backend=backend).eval()
    x = torch.empty(1, 8, 4, 4, device="meta")
    assert len(launches.calls_of(Unfused(fused).to("meta"), x)) == 7
    with launches.as_if_available(backend):
        ops = launches.count_ops(launches.calls_of(fused.to("meta"), x))
    assert ops == {f"ghostfused.forward_{backend}": 2 if backend == "triton_two_kernel" else 1}


def test_saved_bytes_counts_each_storage_once():
    class Model(torch.nn.Module):
        def forward(self, x):
            y = x.exp()  # saves its result
            return y[:, :2] * y[:, 2:]  # saves two views of it

    x = torch.randn(3, 4, requires_grad=True)
    assert memory.saved_bytes(Model(), x) == 3 * 4 * 4
    assert memory.saved_bytes(torch.nn.Linear(4, 5), x) == 0  # x and the weight are there anyway


def test_fused_training_with_frozen_statistics_saves_less():
    module = FusedGhostModule(8, 12, backend="triton").eval()
    x = torch.empty(2, 8, 4, 4, device="meta", requires_grad=True)
    with launches.as_if_available("triton"):
        assert memory.saved_bytes(module.to("meta"), x) == 0  # x alone, and it is there anyway
    assert memory.saved_bytes(Unfused(module), x) > 0


def test_help_and_unknown_names(capsys):
    for command in (
        "module",
        "network",
        "memory",
        "launches",
        "overhead",
        "cpu_peak",
        "busy",
        "callers",
        "serve",
        "suite",
        "compare",
        "report",
        "readme",
    ):
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
    with pytest.raises(SystemExit, match="no peer 'nobody'"):
        peers.select("nobody")
    with pytest.raises(SystemExit):
        main(["module", "--dtype", "float8"])
    with pytest.raises(SystemExit, match="expected a part of a module's name, got 'nothing'"):
        module.layers(argparse.Namespace(configs=cases.CONFIGS, source=None, only="nothing"))


def test_core_runs_without_rich_timm_and_matplotlib():
    """As on a bare machine with a GPU, for bench/gpu_session.sh."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('rich', 'timm', 'matplotlib', 'onnx', 'onnxruntime', 'openvino')));"
        "from bench import timing; timing.cache_bytes = lambda device: 2**20;"
        "from bench.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["module", "--only", "blocks.8.0.ghost1", "--peers", "eager,openvino,onnxruntime,ghostfused_reference"]
    arguments += ["--threads", "1", "--device", "cpu", "--samples", "3", "--repeats", "2", "--layout", "nchw"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "onnx can't be imported" in done.stdout
    assert "160→960 7×7" in done.stdout


def test_suite_runs_commands_that_exist():
    for device, commands in suite.COMMANDS.items():
        for arguments in commands.values():
            with pytest.raises(SystemExit) as stopped:
                main([*arguments, "--device", device, "--help"])
            assert stopped.value.code == 0
