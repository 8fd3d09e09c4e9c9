"""ultralytics' own export of a network with fused modules: engines compute from it what the unfused one gives."""

import copy
import os

import pytest
import torch
from networks import fused_inside

from ghostfused import fuse


def by_onnxruntime(path, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def by_openvino(folder, x):
    openvino = pytest.importorskip("openvino")
    (path,) = folder.glob("*.xml")
    return openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x.numpy())[0]


@pytest.mark.parametrize(("format", "run"), [("onnx", by_onnxruntime), ("openvino", by_openvino)])
def test_engines_run_what_ultralytics_exports(format, run, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip(run.__name__.removeprefix("by_"))
    monkeypatch.setitem(os.environ, "YOLO_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "YOLO_AUTOINSTALL", "0")
    ultralytics = pytest.importorskip("ultralytics")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yolo = ultralytics.YOLO("yolov8-ghost.yaml")
    model = copy.deepcopy(yolo.model).eval()
    yolo.model = fuse(model)
    assert fused_inside(yolo.model) > (0, 0)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)[0]
    options = {"simplify": False} if format == "onnx" else {}
    exported = yolo.export(format=format, imgsz=64, verbose=False, **options)
    out = torch.from_numpy(run(tmp_path / exported, x))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
