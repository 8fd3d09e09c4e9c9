import os
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else torch.get_num_threads())

hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,  # CI judges the code, not the draw; HYPOTHESIS_PROFILE=explore draws anew
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "explore", parent=hypothesis.settings.get_profile("default"), derandomize=False, max_examples=400
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser):
    parser.addoption(
        "--some-must-run",
        action="store_true",
        help="fail if no test ran, each skipped: for machines that have all it takes",
    )


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not session.config.getoption("some_must_run") or session.config.option.collectonly:
        return
    if exitstatus == pytest.ExitCode.OK and not reporter.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.fixture(autouse=True)
def _fixed_seed_and_settings():
    """Every test starts from one seed, and leaves PyTorch's global settings as it found them."""
    torch.manual_seed(0)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def trained_by_kernels(monkeypatch):
    """The training ops train fused modules, as on a GPU, where a user's on a CPU are trained by PyTorch."""
    from spies import train_by_kernels

    train_by_kernels(monkeypatch)


@pytest.fixture(params=["eval", "by torch", "by kernels"])
def training(request):
    """Whether to train, and who trains."""
    if request.param == "by kernels":
        request.getfixturevalue("trained_by_kernels")
    return request.param != "eval"


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads():
    """Sets PyTorch's threads, for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def host_objects(tmp_path_factory) -> Path:
    """One folder for all workers of this run: ``mutants.harness`` keeps the extension's host code there, compiled."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "host_objects"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def ghost() -> torch.nn.Module:
    """A small Ghost module for the benchmarks to run."""
    from bench_stand_ins import small_ghost_module

    return small_ghost_module()
