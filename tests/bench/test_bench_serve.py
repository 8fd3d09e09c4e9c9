"""``bench serve``, and examples/serve.py, which it puts under load."""

import contextlib
import io
import json

import pytest
import torch

from bench import results, serve
from bench.__main__ import main

for package in ("starlette", "uvicorn", "timm", "PIL"):
    pytest.importorskip(package)
COMMON = ["--model", "ghostnet_050", "--size", "64", "--workers", "2", "--top", "4"]


def test_the_server_answers_as_the_model_does():
    """From many clients at once, and it says what is no image."""
    import timm
    from PIL import Image

    from ghostfused.cli.verify import calibrate

    body = serve.photo()
    with serve.server(COMMON) as server, contextlib.closing(server.connect()) as connection:
        for broken in (b"no image", body[: len(body) // 2], b""):
            status, answer = serve.post(connection, broken)
            assert status == 400
            assert answer["error"].startswith(f"body: expected an image, got {len(broken)} bytes: ")
        status, answer = serve.post(connection, body)
        times, took = serve.load(server, 4, body, 0.5)
        assert len(times) >= 4
        assert sum(times) / 4 <= took * 1e3
    assert status == 200
    torch.manual_seed(0)
    model = calibrate(timm.create_model("ghostnet_050").eval(), torch.randn(2, 3, 64, 64))
    config = timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    x = timm.data.create_transform(**config)(Image.open(io.BytesIO(body)).convert("RGB"))
    with torch.no_grad():
        scores, classes = model(x[None]).softmax(1)[0].topk(4)
    assert answer["classes"] == classes.tolist()
    assert answer["scores"] == pytest.approx(scores.tolist(), rel=1e-3)


def test_bench(tmp_path):
    output = tmp_path / "rows.jsonl"
    command = [
        "serve",
        "--model",
        "ghostnet_050",
        "--size",
        "64",
        "--clients",
        "1,2",
        "--rounds",
        "2",
        "--seconds",
        "0.3",
    ]
    assert main([*command, "--threads", "1", "--output", str(output)]) == 0
    rows = [row for row in results.read(output)[1] if row["kind"] == "serve"]
    assert {(row["execution"], row["clients"]) for row in rows} == {(e, c) for e in serve.EXECUTIONS for c in (1, 2)}
    for row in rows:
        assert row["p50_ms"] <= row["p99_ms"]
        assert len(row["rates"]) == 2
        assert min(row["rates"]) <= row["requests_per_second"] <= max(row["rates"])


def test_answers_that_differ_are_told():
    one = {"classes": [3, 1], "scores": [0.5, 0.25]}
    assert serve.differs([one, {"classes": [3, 1], "scores": [0.5001, 0.25]}]) is None
    for other in ({"classes": [3, 1], "scores": [0.51, 0.25]}, {"classes": [3, 2], "scores": [0.5, 0.25]}):
        assert json.dumps(other["classes"]) in serve.differs([one, other])


def test_a_server_that_does_not_come_up_is_an_error():
    with pytest.raises(RuntimeError, match="no_such_model"), serve.server(["--model", "no_such_model"]):
        pass
