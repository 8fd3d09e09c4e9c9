"""The examples, as a user runs them, on small inputs; and with a planted fault, which they have to notice."""

import copy
import csv
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ghostfused
from ghostfused.cli.verify import calibrate
from ghostfused.fuse import Report

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def faulty(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by a thousandth."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)
    return model


def test_timm_features(capsys, monkeypatch):
    pytest.importorskip("timm"), pytest.importorskip("sklearn")
    example = load("timm_features")
    arguments = ["--model", "ghostnet_050", "--size", "64", "--top", "3", "--device", "cpu"]
    assert example.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("same") == 6, "the classes, and features at five sizes"
    assert printed.count("fused 0.") == 6
    monkeypatch.setattr(ghostfused, "fuse", faulty)
    assert example.main(arguments) == 1
    assert "WRONG" in capsys.readouterr().out


def test_yolo_ghost(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # unless it is imported already
    pytest.importorskip("ultralytics")
    from PIL import Image

    example = load("yolo_ghost")
    drawn = tmp_path / "boxes.jpg"
    arguments = ["--size", "160", "--max-det", "7", "--device", "cpu", "--output", str(drawn)]
    assert example.main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "38 modules fused; 7 detections unfused, 7 fused, 7 in common" in printed
    with Image.open(drawn) as image, Image.open(example.ASSETS / "bus.jpg") as photo:
        assert image.size == photo.size
    monkeypatch.setattr(ghostfused, "fuse_with_report", lambda model: (faulty(faulty(model)), Report()))
    assert example.main(arguments) == 1


# ---- the demo


def demo_rows(demo) -> list:
    """As wide as they get: a slow machine, long names, a wrong result."""
    from ghostfused.testing import Verdict

    slow, fast = [1234.5 + i for i in range(20)], [1000.25 + i / 2 for i in range(20)]
    return [
        demo.Row("timm ghostnet_100", 32, Verdict(1.2e-10, 4.2e-10, 8e-10), slow, fast),
        demo.Row("seed GhostNet", 30, Verdict(1.0, 3.5e-10, 7e-10), slow, [t + 1 for t in slow]),
    ]


def test_the_demos_table_fits_80_columns():
    for package in ("timm", "sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    from rich.console import Console

    demo = load("demo")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.results_table(demo_rows(demo), "a title"))
    printed = console.export_text()
    assert "…" not in printed
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    for text in ("network", "modules", "PyTorch", "unfused", "speed-up", "result"):
        assert text in printed
    times, spreads = (i for i, line in enumerate(lines) if "timm ghostnet_100" in line or "± 2.62" in line)
    assert lines[times].split() == [
        "timm",
        "ghostnet_100",
        "32",
        "1e-10",
        "4e-10",
        "1244.00",
        "1005.00",
        "1.24×",
        "same",
    ]
    assert lines[spreads].split() == ["±", "5.25", "±", "2.62"]
    (wrong,) = (i for i, line in enumerate(lines) if "WRONG" in line)
    assert lines[wrong + 1].split()[-1] == "tie"


def test_the_demos_plot_shows_spread(monkeypatch, tmp_path):
    for package in ("timm", "sklearn", "matplotlib", "rich"):
        pytest.importorskip(package)
    demo = load("demo")
    figures = []
    monkeypatch.setattr(demo.plt, "close", figures.append)
    assert demo.plot(demo_rows(demo), "a device", tmp_path).stat().st_size > 0
    (axis,) = figures[0].axes
    bars = [c for c in axis.containers if hasattr(c, "errorbar") and c.errorbar is not None]
    assert len(bars) == 2
    (segments,) = bars[1].errorbar[2][0].get_segments()[:1]  # of the first network, fused
    low, _, high = demo.quartiles(demo_rows(demo)[0].fused)
    assert sorted(segments[:, 1]) == pytest.approx([low, high])


# ---- batch inference


@pytest.fixture
def folder(tmp_path):
    """Seven images of several sizes and modes in two folders, and one that is cut off."""
    from PIL import Image

    (tmp_path / "images" / "more").mkdir(parents=True)
    for i in range(7):
        pixels = torch.randint(0, 255, (40 + 5 * i, 60, 3), dtype=torch.uint8).numpy()
        place = tmp_path / "images" / ("more" if i % 2 else "") / ("2\nlines.png" if i == 2 else f"{i}.png")
        Image.fromarray(pixels).convert("L" if i == 3 else "RGB").save(place)
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "0.png").read_bytes()[:200])
    return tmp_path / "images"


SETTINGS = [
    "--model",
    "ghostnet_050",
    "--size",
    "64",
    "--batch",
    "3",
    "--top",
    "4",
    "--workers",
    "1",
    "--device",
    "cpu",
]


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Scores of all classes by the unfused network, one image at a time."""
    import timm
    from PIL import Image

    torch.manual_seed(0)
    model = calibrate(timm.create_model("ghostnet_050").eval(), torch.randn(2, 3, 64, 64))
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    transform = timm.data.create_transform(**config)
    with torch.no_grad():
        return {
            str(path): model(transform(Image.open(path).convert("RGB"))[None]).softmax(1)[0]
            for path in folder.rglob("*.png")
            if path.name != "broken.png"
        }


def check(rows: list[dict], folder: Path) -> None:
    assert [row["path"] for row in rows] == sorted(str(p) for p in folder.rglob("*.*"))
    scores = expected(folder)
    for row in rows:
        if row["path"].endswith("broken.png"):
            assert row["error"].startswith("OSError: ")
            assert not row.get("classes")
            continue
        assert not row.get("error")
        found = torch.tensor(row["scores"])
        assert len(found) == 4
        torch.testing.assert_close(found, scores[row["path"]][row["classes"]], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found, scores[row["path"]].topk(4).values, rtol=1e-3, atol=1e-6)


def from_csv(path: Path) -> list[dict]:
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            classes = [int(row[f"class{i}"]) for i in range(1, 5) if row[f"class{i}"]]
            scores = [float(row[f"score{i}"]) for i in range(1, 5) if row[f"score{i}"]]
            rows.append({"path": row["path"], "error": row["error"], "classes": classes, "scores": scores})
    return rows


def from_json_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_batch_inference(folder, tmp_path, suffix, capsys):
    pytest.importorskip("timm"), pytest.importorskip("rich")
    output = tmp_path / "out" / f"predictions.{suffix}"
    load("batch_inference").main([str(folder), str(output), *SETTINGS])
    check((from_csv if suffix == "csv" else from_json_lines)(output), folder)
    assert "broken.png: OSError: " in capsys.readouterr().err


def test_batch_inference_under_torchrun(folder, tmp_path):
    pytest.importorskip("timm"), pytest.importorskip("rich")
    output = tmp_path / "predictions.csv"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "batch_inference.py"), str(folder), str(output), *SETTINGS]
    # a session of its own: whatever torchrun signals at its end, it is not the test run
    subprocess.run(command, check=True, timeout=300, cwd=EXAMPLES.parent, start_new_session=True)
    check(from_csv(output), folder)
    assert not list(tmp_path.glob("*part*"))


def test_batch_inference_by_ray_data(folder, tmp_path):
    pytest.importorskip("timm"), pytest.importorskip("rich")
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    output = tmp_path / "predictions.jsonl"
    ray.init(num_cpus=3, include_dashboard=False)
    try:
        load("batch_inference").main([str(folder), str(output), *SETTINGS, "--ray", "1"])
    finally:
        ray.shutdown()
    check(from_json_lines(output), folder)


def test_batch_inference_names_what_is_wrong(folder, capsys):
    pytest.importorskip("timm"), pytest.importorskip("rich")
    main = load("batch_inference").main
    for arguments, message in (
        ([str(folder), "predictions.txt"], "expected a name ending in .jsonl or .csv, got predictions.txt"),
        (["nowhere", "predictions.csv"], "images: nowhere is no folder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_batch_inference_takes_pytorchs_words(folder, capsys):
    pytest.importorskip("timm"), pytest.importorskip("rich")
    arguments = load("batch_inference").arguments
    for word in ("torch.float16", "half", "float16"):
        assert arguments([str(folder), "predictions.csv", "--dtype", word]).dtype == "float16"
    with pytest.raises(SystemExit):
        arguments([str(folder), "predictions.csv", "--dtype", "torch.int8"])
    assert "argument --dtype: invalid choice: 'int8'" in capsys.readouterr().err
