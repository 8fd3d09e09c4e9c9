"""What only the CUDA training kernels have: thread orders, vectors, grids, the ops' errors. test_training_kernels.py has the
rest."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cuda_runtime import _C, ON_CPU, needs_cuda, planned_for, run_in_order
from draws import DTYPES, LAYOUTS
from training_runtime import ALL_INPUTS, check, kernels, make, run

from ghostfused import ops
from ghostfused.backends import training
from ghostfused.spec import TENSORS, GhostArgs
from ghostfused.testing import Case, make_args, to_device

pytestmark = [pytest.mark.cuda, needs_cuda]

STEP = Case(2, 20, 9, 11, 39, act_primary="silu", act_cheap="none", **ALL_INPUTS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_thread_order(dtype, layout, sm_count):
    """Several blocks and rows of everything; also run in other thread orders."""
    with planned_for(sm_count):
        check("cuda", dataclasses.replace(STEP, dtype=dtype, layout=layout))


@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
@pytest.mark.parametrize("order", ["desc", "rand:7"])
def test_other_orders(order):
    run_in_order(__file__, order)


def digest() -> str:
    """Of all bits of a training step."""
    sha = hashlib.sha256()
    for layout in LAYOUTS:
        for case in (STEP, dataclasses.replace(STEP, dtype=torch.float16, ratio=3, height=17, width=16)):
            with planned_for(132):
                a, grad = make(dataclasses.replace(case, layout=layout))
                for _, t in sorted(run("cuda", a, grad, True).items()):
                    sha.update(t.float().contiguous().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
def test_same_bits_in_every_thread_order():
    """Whichever block comes last: rows are combined in one order."""
    program = "import test_cuda_training; print(test_cuda_training.digest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    digests = []
    for order in ("asc", "desc", "rand:7"):
        environment = os.environ | {"SHIM_ORDER": order, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        digests.append(done.stdout)
    assert len(set(digests)) == 1


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors(dtype, layout, width):
    """Channels and widths that vectors fit, or don't: all in one, so that every load and store is of one kind."""
    for out_channels in (32, 34, 30):
        case = Case(1, 8, 5, width, out_channels, act_primary="silu", act_cheap="none", dtype=dtype, layout=layout)
        check("cuda", case)
        check("cuda", dataclasses.replace(case, residual=True, output_gate=True), False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unaligned_gradient(layout):
    """A contiguous gradient that starts in the middle of a vector."""
    a, grad = make(Case(1, 8, 4, 8, 16, layout=layout))
    shifted = torch.zeros(grad.numel() + 1)[1:].as_strided(grad.shape, grad.stride(), 1).copy_(grad)
    results = (run("cuda", a, g, True) for g in (grad, shifted))
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_channels_and_images(layout):
    with planned_for(132):
        check("cuda", Case(1, 4, 3, 5, 280, layout=layout))
        check("cuda", Case(300, 3, 1, 2, 6, layout=layout))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_parameters(layout):
    a, grad = make(Case(2, 12, 5, 6, 24, primary_norm="bn+bias", input_gate=True, output_gate=True, layout=layout))
    strided = {}
    for name in TENSORS[1:]:
        t = getattr(a, name)
        if t is not None and name != "output_gate":
            wide = torch.full((*t.shape[:-1], 3 * t.shape[-1]), float("nan"), dtype=t.dtype)
            wide[..., ::3] = t
            strided[name] = wide[..., ::3]
    for batch in (False, True):
        plain, other = (run("cuda", x, grad, batch) for x in (a, a._replace(**strided)))
        assert all(torch.equal(plain[name], other[name].view_as(plain[name])) for name in plain)


NEEDED = [
    {"x"},
    {"residual"},
    {"cheap_beta"},
    {"cheap_weight"},
    {"primary_weight"},
    {"output_gate"},
    {"primary_slope", "x"},
]


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("asked", NEEDED, ids=lambda names: "+".join(sorted(names)))
def test_only_what_is_asked_for(asked, batch_statistics):
    """The same gradients as when all are asked for, and none besides."""
    case = dataclasses.replace(STEP, act_primary="prelu", per_channel_slope=True)
    a, grad = make(case)
    own = kernels("cuda")
    all_needs = [t is not None for t in a.tensors]
    every = training.backward(own, grad, a, batch_statistics, "", all_needs)
    every = dict(zip([n for n, need in zip(TENSORS, all_needs, strict=True) if need], every, strict=True))
    needs = [name in asked for name in TENSORS]
    results = training.backward(own, grad, a, batch_statistics, "", needs)
    for name, result in zip([n for n in TENSORS if n in asked], results, strict=True):
        assert torch.equal(result, every[name])


def test_every_kernel_is_in_the_table():
    names = [k["name"] for k in _C.kernel_attributes()]
    assert len(names) == len(set(names))
    for path in ("float16", "bfloat16", "float32"):
        assert len([n for n in names if n.startswith(f"{path}_") and "statistics" in n]) == 2 + 8


def test_forward_is_three_kernels():
    calls: list[str] = []

    def spy(name: str) -> Callable:
        return lambda *args: calls.append(name) or getattr(training.KERNELS["cuda"], name)(*args)

    spied = training.Kernels(*(spy(name) for name in training.Kernels._fields))
    training.train_forward(spied, to_device(make_args(STEP), "cuda"), "")
    assert calls == ["primary_statistics", "cheap_statistics", "normalize"]


def kernel(name: str, a: GhostArgs, *memory: object) -> None:
    ops.training_kernel(name, "cuda")(*a, *memory)


def test_errors_name_the_argument():
    a = to_device(make_args(Case(1, 8, 4, 4, 16)), "cuda")
    out, floats = a.new_output(), torch.empty(8, device="cuda")
    with pytest.raises(RuntimeError, match="mean"):
        kernel(
            "cheap_statistics",
            a._replace(cheap_mean=None, cheap_var=None, cheap_gamma=None, cheap_beta=None),
            out,
            floats[:4],
            floats,
        )
    with pytest.raises(RuntimeError, match="out: expected a dense map"):
        kernel("normalize", a, torch.empty(1, 16, 4, 8, device="cuda")[..., ::2])
    with pytest.raises(RuntimeError, match="grad"):
        kernel("cheap_backward", a, out[:, :15], out[:, :8], out[:, :8], None, None, None)
    with pytest.raises(RuntimeError, match="weight"):
        kernel("primary_backward", a, out, out[:, :8], None, None, None, False, None, None, a.cheap_weight)


@pytest.mark.skipif(ON_CPU, reason="needs PyTorch's own CUDA kernels")
def test_opcheck():
    a, grad = (to_device(make_args(STEP), "cuda"), torch.randn(STEP.batch, STEP.out_channels, STEP.height, STEP.width))
    arguments = (*(getattr(a, name) for name in ops.TRAIN_FIELDS), "")
    torch.library.opcheck(ops.training_op("train_forward", "cuda"), arguments)
    needs = [t is not None for t in a.tensors]
    torch.library.opcheck(ops.training_op("backward", "cuda"), (grad.cuda(), *a, True, "", needs))
