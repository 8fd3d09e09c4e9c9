"""examples/train_digits.py, in short: training on real images, unfused and fused; and the memory that training takes."""

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from bench import cases, launches, memory
from ghostfused import FusedGhostModule, fuse

pytest.importorskip("sklearn"), pytest.importorskip("matplotlib"), pytest.importorskip("rich")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(example):
    return example.compare(example.parser().parse_args(["--epochs", "6", "--device", "cpu"]))


def test_same_losses_for_the_first_steps(results):
    first = [torch.tensor(result.losses[:6]) for result in results.values()]
    torch.testing.assert_close(*first, rtol=1e-5, atol=1e-6)
    assert first[0][0] > 2  # ln 10, before it has learned anything


def test_same_accuracy_in_the_end(results):
    unfused, fused = (result.accuracies[-1] for result in results.values())
    assert min(unfused, fused) > 0.95
    assert abs(unfused - fused) <= 0.01


def test_fused_is_fused(example):
    modules = [m for m in fuse(example.NarrowGhostNet()).modules() if isinstance(m, FusedGhostModule)]
    assert len(modules) == 8


def test_as_a_user_runs_it(example, tmp_path, capsys, monkeypatch):
    path = tmp_path / "deeper" / "curves.png"
    arguments = ["train_digits.py", "--epochs", "1", "--batch", "256", "--device", "cpu", "--output", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    example.main()
    printed = capsys.readouterr().out
    assert "test accuracy: unfused" in printed
    assert path.stat().st_size > 10_000


@functools.cache
def on_meta(name):
    return cases.network(name).to("meta"), fuse(cases.network(name), backend="triton").to("meta")


@pytest.mark.parametrize("name", ["seed", "timm:ghostnet_100"])
@pytest.mark.parametrize("mode", memory.MODES)
def test_training_saves_at_most_half(name, mode):
    """Of what the unfused network saves, counted by saved_tensors_hooks with unique storages."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    x = torch.empty(2, 3, 224, 224, device="meta")
    with launches.as_if_available("triton"):
        unfused, fused = (memory.saved_bytes(m.train(memory.MODES[mode]), x) for m in on_meta(name))
    assert fused <= 0.5 * unfused
