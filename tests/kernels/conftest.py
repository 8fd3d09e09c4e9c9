import kernel_backends
import pytest


@pytest.fixture(scope="module", params=kernel_backends.params("cpu", "cuda", "triton"))
def backend(request) -> kernel_backends.Backend:
    return kernel_backends.Backend(request.param)
