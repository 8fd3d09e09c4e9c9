"""What only Triton's training kernels are asked: launches. test_training_kernels.py has the rest."""

import pytest
import torch
from training_runtime import ALL_INPUTS
from triton_runtime import DEVICE, needs_triton

from ghostfused import ops
from ghostfused.backends import training_step
from ghostfused.backends.triton import training as triton_training
from ghostfused.spec import TENSORS
from ghostfused.testing import Case, make_args, to_device

pytestmark = [pytest.mark.triton, needs_triton]


def test_only_what_is_asked_for(monkeypatch):
    """No kernel, no partial sums and no product for gradients that nobody wants."""
    launched = []
    call = triton_training._Launch.__call__

    def spy(self, kernel, **arguments):
        launched.append((kernel.__name__, [n for n, t in arguments.items() if "partial" in n and t is not None]))
        call(self, kernel, **arguments)

    monkeypatch.setattr(triton_training._Launch, "__call__", spy)
    a = to_device(make_args(Case(height=5, width=6, out_channels=8)), DEVICE)
    grad = torch.randn(a.output_shape(), device=DEVICE)
    for asked, batch, expected in (
        ("x", False, [("cheap_backward_kernel", []), ("primary_backward_kernel", [])]),
        ("cheap_beta", True, [("cheap_backward_kernel", ["partial_ptr"])]),
        ("cheap_weight", False, [("cheap_backward_kernel", []), ("primary_backward_kernel", ["weight_partial_ptr"])]),
        ("primary_weight", True, [("cheap_backward_kernel", ["partial_ptr"]), ("primary_backward_kernel", ["partial_ptr"]),
                                  ("normalize_backward_kernel", [])]),
    ):  # fmt: skip
        launched.clear()
        ops.training_op("backward", "triton")(grad, *a, batch, "", [name == asked for name in TENSORS])
        assert launched == expected


def test_forward_is_three_kernels(monkeypatch):
    launched = []
    monkeypatch.setattr(triton_training._Launch, "__call__", lambda self, kernel, **_: launched.append(kernel.__name__))
    a = to_device(make_args(Case(**ALL_INPUTS)), DEVICE)
    training_step.train_forward(training_step.KERNELS["triton"], a, "")
    assert launched == ["primary_statistics_kernel", "cheap_statistics_kernel", "normalize_kernel"]


@pytest.mark.parametrize("half", ["primary", "cheap"])
def test_an_eps_with_which_a_sum_may_be_beyond_float32_is_named(half):
    """Also where the statistics are the batch's."""
    a = to_device(make_args(Case()), DEVICE)._replace(**dict.fromkeys(ops.STATISTICS))
    largest = torch.finfo(torch.float32).max
    for eps in (0.0, 1e-41, 0.51 * largest, largest, 1e300):
        reason = triton_training.supports(a._replace(**{f"{half}_eps": eps}))
        assert reason.startswith(f"{half}_eps {eps} "), reason
    for eps in (torch.finfo(torch.float32).tiny, 0.49 * largest):
        assert triton_training.supports(a._replace(**{f"{half}_eps": eps})) is None
