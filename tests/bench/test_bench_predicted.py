"""Predictions joined with measurements, and the profiler's counters, on results made up here."""

import json
import math
import re

import pytest
from bench_stand_ins import module_rows, write

from bench import predicted, profile, results
from bench.__main__ import main
from bench.cases import CONFIGS, layers_from_rows

SETTING = {"dtype": "float32", "layout": "nchw", "batch": 1, "mode": "inference"}


@pytest.fixture(scope="module")
def layers():
    return layers_from_rows(CONFIGS, "timm/ghostnet_100@224")[:5]


def prediction(layer, **times):
    return {**layer.as_row(), **SETTING, **times}


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_modules_are_joined_by_what_they_are(tmp_path, capsys, layers):
    rows = [prediction(layer, issue_us=10.0 * i, dram_us=35.0) for i, layer in enumerate(layers, 1)]
    rows.append({**rows[0], "layout": "nhwc", "issue_us": 1e6})  # another setting of the same module
    rows.append({"sum": True, "issue_us": 150.0})  # a line about all of them
    measured = module_rows({"eager": 9.0, "ghostfused_cuda": 0.07}, layers=layers)
    for i, row in enumerate(r for r in measured if r["peer"] == "ghostfused_cuda"):
        row["ms"] = dict.fromkeys(("p20", "p50", "p80"), 0.07 + 0.01 * i) | {"medians": [0.07]}
    files = lines(tmp_path / "p.jsonl", rows[1:]), write(tmp_path / "m.jsonl", measured)
    assert main(["predicted", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "4 modules" in out
    assert f"no prediction of 1 measured modules: {predicted.title(layers[0].as_row())}" in out
    ratios = 80 / 35, 90 / 35, 100 / 40, 110 / 50
    assert f"measured / bound {math.prod(ratios) ** 0.25:.2f} in geometric mean, 2.20 to 2.57" in out
    assert "rank correlation with the bound 0.95, issue 1.00, dram nan" in out
    total = sum(us * layer.as_row()["count"] for us, layer in zip((80, 90, 100, 110), layers[1:], strict=True))
    assert f"{total} µs measured" in out


def test_a_graph_is_taken_before_a_call_and_marks_are_shown(tmp_path, capsys, layers):
    files = lines(tmp_path / "p.jsonl", [prediction(each, dram_us=35.0) for each in layers]), tmp_path / "m.jsonl"
    measured = module_rows({"ghostfused_cuda": 1.0, "ghostfused_cuda+graph": 0.01}, layers=layers)
    for row in measured:
        row["host_bound"] = True
    write(files[1], measured)
    assert main(["predicted", *map(str, files)]) == 0
    out = capsys.readouterr().out
    assert "ghostfused_cuda+graph: measured against predicted" in out
    assert out.count("host time, below the bound") == len(layers)
    assert main(["predicted", *map(str, files), "--peer", "ghostfused_cuda"]) == 0
    assert "below the bound" not in capsys.readouterr().out


def test_files_of_the_judge_are_predictions():
    """The counts of the simulator join measurements of the same modules; what takes no time limits none."""
    found = predicted.predictions(CONFIGS.parents[2] / "tools/sass/results/sass_float32_nhwc_forward.jsonl")
    assert len(found) == 22
    setting = {"dtype": "float32", "layout": "nhwc", "batch": 64, "mode": "inference"}
    for layer in layers_from_rows(CONFIGS, "timm/ghostnet_100@224"):
        row = found[results.module_key({**layer.as_row(), **setting})]
        assert predicted.bound(row)[0] == max(("issue", "shared", "dram"), key=lambda name: row[f"{name}_us"])
        assert "hmma" not in predicted.times(row)  # no tensor cores in float32


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, 1], -1), ([1, 1, 2, 3], [5, 5, 6, 7], 1), ([1, 2], [1, 2], None),
     ([1, 1, 1], [1, 2, 3], None), ([1, 2, 3, 4], [1, 3, 2, 4], 0.8)],
)  # fmt: skip
def test_rank_correlation(a, b, expected):
    found = predicted.rank_correlation(a, b)
    assert math.isnan(found) if expected is None else found == pytest.approx(expected)


NCU = [
    *predicted.COUNTERS.values(),
    *predicted.SHOWN.values(),
]


def ncu(path, *kernels, units=("inst", "Mbyte", "byte", "%", "%", "us")):
    head = ",".join(f'"{name}"' for name in ("ID", *NCU))
    body = [f'"",{",".join(units)}', *(f'"{i}",' + ",".join(f'"{v}"' for v in k) for i, k in enumerate(kernels))]
    path.write_text("==PROF== Connected\n" + "\n".join([head, *('"' + line[1:] for line in body)]) + "\n")
    return path


def test_counters_are_read_in_their_units_and_in_the_order_of_calls(tmp_path, capsys, layers):
    counts = {"instructions": 3000, "dram_read_bytes": 2_000_000, "dram_write_bytes": 500, "issue_us": 1.0}
    files = lines(tmp_path / "p.jsonl", [prediction(each, **counts) for each in layers[:2]]), tmp_path / "m.jsonl"
    write(files[1], module_rows({"ghostfused_cuda": 1.0}, layers=layers[:2]))
    order = lines(tmp_path / "o.jsonl", [prediction(each) for each in layers[:2]])
    counters = ncu(tmp_path / "c.csv", ("1,500", "1", "1,000", "50.5", "60", "7"), ("6,000", "4", "500", "1", "2", "3"))
    assert main(["predicted", *map(str, files), "--counters", str(counters), str(order)]) == 0
    out = capsys.readouterr().out
    first, second = (line.split() for line in out.splitlines()[-3:] if "→" in line or "->" in line)
    assert [cell for cell in first if cell.replace(".", "").isdigit()] == [
        "2.00",
        "2.00",
        "0.50",
        "50.5",
        "60.0",
        "7.0",
    ]
    assert [cell for cell in second if cell.replace(".", "").isdigit()] == ["0.50", "0.50", "1.00", "1.0", "2.0", "3.0"]
    short = lines(tmp_path / "short.jsonl", [prediction(layers[0])])
    assert main(["predicted", *map(str, files), "--counters", str(counters), str(short)]) == 2
    assert re.search(r"2 kernels, but .* has 1 modules", capsys.readouterr().err)
    counters = ncu(
        tmp_path / "c.csv", ("1", "1", "1", "1", "1", "1"), units=("inst", "furlong", "byte", "%", "%", "us")
    )
    assert main(["predicted", *map(str, files), "--counters", str(counters), str(short)]) == 2
    assert "unknown unit 'furlong'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("not JSON", "expected a JSON object"), ('{"in_channels": 3, "issue_us": 1}', "missing: out_channels"),
     ("[]", "expected a JSON object, got list"), ("{}", "no predictions of modules"), ('{"in_channels": 3}', "missing: out_channels")],
)  # fmt: skip
def test_files_of_something_else_are_refused(tmp_path, text, message):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        predicted.predictions(path)


def test_no_times_of_ours_is_an_error(tmp_path, layers):
    path = write(tmp_path / "m.jsonl", module_rows({"eager": 1.0}, layers=layers))
    with pytest.raises(SystemExit, match="no times of ghostfused_cuda"):
        predicted.measured(path, None)


def test_profile_writes_the_order_of_its_calls(tmp_path, monkeypatch, one_thread, capsys):
    calls = []
    monkeypatch.setattr(
        profile, "_profiled", lambda device: calls.append(device.type) or profile.contextlib.nullcontext()
    )
    path = tmp_path / "order.jsonl"
    command = ["profile", str(path), "--device", "cpu", "--backend", "reference", "--batch", "1", "--size", "32"]
    assert main([*command, "--only", "blocks.8", "--layout", "nhwc"]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(calls) > 1
    assert len({results.module_key(row) for row in rows}) == len(rows)
    assert main(["profile", str(path), "--device", "cpu"]) == 2
    assert "it takes tensors on cuda, not on cpu" in capsys.readouterr().err


def test_shards_are_the_modules(tmp_path, one_thread):
    rows = []
    for shard in ("0/2", "1/2"):
        path = tmp_path / "order.jsonl"
        command = ["profile", str(path), "--device", "cpu", "--backend", "reference", "--batch", "1", "--size", "32"]
        main([*command, "--only", "blocks.8,blocks.0", "--layout", "nhwc", "--shard", shard])
        rows += path.read_text().splitlines()
    main([*command, "--only", "blocks.8,blocks.0", "--layout", "nhwc"])
    assert sorted(rows) == sorted(path.read_text().splitlines())
    with pytest.raises(SystemExit):
        main([*command, "--shard", "2/2"])
