"""What only CUDA's training kernels are asked: thread orders, vectors, each kernel for channels_last, the ops' errors.
test_training_kernels.py has the rest."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

import pytest
import torch
from cuda_runtime import _C, ON_CPU, needs_cuda
from kernel_backends import Backend
from strategies import DTYPES, LAYOUTS
from training_runtime import ALL_INPUTS, check, check_args, kernels, make, run

from ghostfused import ops
from ghostfused.backends import cuda_training, reference_training, training_step
from ghostfused.backends.extension import op
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, make_args, relative_error, to_device

pytestmark = [pytest.mark.cuda, needs_cuda]

CUDA = Backend("cuda")
STEP = Case(2, 20, 9, 11, 39, act_primary="silu", act_cheap="none", **ALL_INPUTS)


NHWC = Case(2, 40, 9, 16, 40, dtype=torch.float16, layout="nhwc", act_primary="silu", act_cheap="none")
"""What the kernels for channels_last take."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_thread_order(dtype, layout, sm_count):
    """Several blocks and rows of everything; also run in other thread orders."""
    with CUDA.planned_for(sm_count):
        check(CUDA, dataclasses.replace(STEP, dtype=dtype, layout=layout))


@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize("width", [14, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_thread_order_of_the_nhwc_kernels(dtype, width, sm_count):
    with CUDA.planned_for(sm_count):
        check(CUDA, dataclasses.replace(NHWC, dtype=dtype, width=width))


def digest() -> str:
    """Of all bits of a training step."""
    sha = hashlib.sha256()
    for layout in LAYOUTS:
        for case in (STEP, dataclasses.replace(STEP, dtype=torch.float16, ratio=3, height=17, width=16), NHWC):
            with CUDA.planned_for(132):
                a, grad = make(dataclasses.replace(case, layout=layout))
                for _, t in sorted(run(CUDA, a, grad, True).items()):
                    sha.update(t.float().contiguous().numpy().tobytes())
    return sha.hexdigest()


@pytest.mark.skipif(not ON_CPU, reason="a GPU's order of threads can't be chosen")
def test_same_bits_in_every_thread_order():
    """Whichever block comes last: rows are combined in one order."""
    program = "import test_cuda_training; print(test_cuda_training.digest())"
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    digests = [digest()]
    for order in ("desc", "rand:7"):
        environment = os.environ | {"SHIM_ORDER": order, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        digests.append(done.stdout.strip())
    assert len(set(digests)) == 1


@pytest.mark.parametrize("width", [8, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors(dtype, layout, width):
    """Channels and widths that vectors fit, or don't: all in one, so that every load and store is of one kind."""
    for out_channels in (32, 34, 30):
        case = Case(1, 8, 5, width, out_channels, act_primary="silu", act_cheap="none", dtype=dtype, layout=layout)
        check(CUDA, case)
        check(CUDA, dataclasses.replace(case, residual=True, output_gate=True), False)


# ---- the kernels for channels_last


NHWC_STEPS = {
    "primary_statistics": "nhwc_3",
    "cheap_statistics": "strips",
    "normalize": "pixels_4",
    "cheap_backward": "strips",
    "primary_backward": "strips",
    "normalize_backward": "pixels_4",
}
SHAPE = {"batch": 64, "in_channels": 24, "height": 56, "width": 56, "init_channels": 36, "out_channels": 72}
BACKWARD, STENCILS = ("cheap_backward", "primary_backward"), ("cheap_statistics", "cheap_backward", "primary_backward")
OTHER_KERNELS: list[tuple[dict, tuple[str, ...]]] = [
    ({"path": "float32"}, ("primary_statistics",)),
    ({"channels_last": False}, tuple(NHWC_STEPS)),
    ({"gates": True}, ("primary_statistics", "normalize", *BACKWARD)),
    ({"prelu": True}, STENCILS),
    ({"batch_statistics": False}, BACKWARD),
    ({"dw_size": 5}, STENCILS),
    ({"ratio": 3, "out_channels": 108}, (*STENCILS, "normalize")),
    ({"out_channels": 71}, (*STENCILS, "primary_statistics", "normalize")),
    ({"init_channels": 35, "out_channels": 70}, tuple(NHWC_STEPS)),
    ({"init_channels": 34, "out_channels": 68}, ("primary_statistics", "normalize", "normalize_backward")),
    ({"in_channels": 20}, ("primary_statistics",)),
    ({"in_channels": 2400}, ("primary_statistics",)),
]


def nhwc_steps(**changes: object) -> dict[str, str]:
    """What kernels, of those for channels_last, are planned by step."""
    names = {step: _C.plan_training(step, **(SHAPE | changes))["kernel"] for step in NHWC_STEPS}
    kinds = {step: name.split(f"{step}_")[1] for step, name in names.items()}
    return {step: kind for step, kind in kinds.items() if kind.startswith(("strips", "pixels", "nhwc_"))}


def test_which_kernel_runs():
    for path in ("float16", "bfloat16"):
        assert nhwc_steps(path=path) == NHWC_STEPS
    fp32 = {step: kind.replace("strips", "strips_masked") for step, kind in NHWC_STEPS.items()}
    del fp32["primary_statistics"]
    assert nhwc_steps(path="float32") == fp32
    assert nhwc_steps(path="float32", init_channels=34, out_channels=68)["normalize"] == "pixels_2"
    assert nhwc_steps(width=57)["cheap_statistics"] == "strips_masked"
    assert nhwc_steps(init_channels=40, out_channels=80)["normalize"] == "pixels_8"
    for changes, steps in OTHER_KERNELS:
        assert set(nhwc_steps(**changes)) == set(NHWC_STEPS) - set(steps), changes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sm_count", [1, 132])
@pytest.mark.parametrize(
    ("batch", "cin", "height", "width", "cp", "acts"),
    [
        (2, 8, 9, 14, 12, ("silu", "none")),  # two strips side by side
        (1, 16, 20, 7, 40, ("relu", "relu")),  # one, of several heights
        (3, 40, 3, 9, 56, ("hardswish", "leaky_relu")),  # the last one cut; half a k block
        (5, 72, 1, 2, 136, ("none", "relu6")),  # two pixels; an odd number of k blocks
        (1, 24, 2, 15, 268, ("leaky_relu", "silu")),  # channel blocks, the last one cut
        (40, 8, 4, 7, 4, ("relu6", "hardswish")),  # many images
    ],
)
def test_every_nhwc_step(batch, cin, height, width, cp, acts, sm_count, dtype):
    """Each against the reference's in float64 on the same numbers: a map is a rounding away, a sum less."""
    case = Case(batch, cin, height, width, 2 * cp, dtype=dtype, layout="nhwc", act_primary=acts[0], act_cheap=acts[1])
    a, grad = make(case)
    own, reference = kernels(CUDA), training_step.KERNELS["reference"]
    exact = GhostArgs(*(v.double() if isinstance(v, torch.Tensor) else v for v in a))
    norms = [f"{half}_{name}" for half in ("primary", "cheap") for name in ("mean", "var", "gamma", "beta")]
    a = a._replace(**{name: getattr(a, name).float() for name in norms})
    rounding, last = 0.51 * torch.finfo(dtype).eps, {"memory_format": torch.channels_last}
    if dtype == torch.float32:  # as coarse as the sums
        rounding = 3e-6

    def close(got: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        assert relative_error(got, expected.double()) < limit

    def of(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        var, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        return mean, var

    def statistics(results: tuple[torch.Tensor, torch.Tensor], stored: torch.Tensor) -> None:
        for got, expected in zip(results, of(stored), strict=True):
            close(got, expected, 1e-5)

    with CUDA.planned_for(sm_count):
        bare = a._replace(**dict.fromkeys(ops.STATISTICS))
        out, expected = (torch.full_like(t.new_output(), float("nan"), **last) for t in (a, exact))
        results = own.primary_statistics(bare, out)
        reference.primary_statistics(exact._replace(**dict.fromkeys(ops.STATISTICS)), expected)
        close(out[:, :cp], expected[:, :cp], rounding)
        assert out[:, cp:].isnan().all()
        statistics(results, out[:, :cp])
        y1 = out[:, :cp].contiguous(**last)
        expected = torch.cat([y1, y1], 1).double()
        results = own.cheap_statistics(a, out)
        reference.cheap_statistics(exact, expected)
        close(out[:, cp:], expected[:, cp:], rounding)
        assert torch.equal(out[:, :cp], y1)
        statistics(results, out[:, cp:])
        expected = out.double()
        own.normalize(a, mine := out.clone(**last))
        reference.normalize(exact, expected)
        close(mine, expected, rounding)

        grad = grad.contiguous(**last)
        dz2, y2, sums = own.cheap_backward(a, grad, y1, True, True, None)
        close(y2, out[:, cp:], 1e-12)
        half, y, grad2 = reference_training._half(exact, "cheap"), y2.double(), grad[:, cp:].double()
        z = half.normed(y)
        dz = half.activate_backward(grad2, z)  # of the stored y2: the other side of a kink is far away
        close(dz2, dz, rounding)
        close(sums[:2], half.sums(grad2, dz, z, y)[:2], 1e-5)
        means = sums[:2] / grad[:, 0].numel()
        rest = (y1, dz2, y2, means)
        dz1, sums, weight = own.primary_backward(a, grad, *rest, True, True, True, True)
        expected = reference.primary_backward(exact, grad.double(), *(t.double() for t in rest), True, True, True, True)
        close(dz1, expected[0], rounding)
        close(sums[:2], expected[1][:2], 1e-5)
        close(weight, expected[2], rounding)
        means = sums[:2] / grad[:, 0].numel()
        expected = dz1.double()
        own.normalize_backward(a, mine := dz1.clone(**last), y1, means)
        reference.normalize_backward(exact, expected, y1.double(), means.double())
        close(mine, expected, rounding)


def test_nhwc_kernels_beside_others():
    """Where some steps aren't taken: a slice of x, addresses in the middle of a vector, a residual, PReLU."""
    check(CUDA, dataclasses.replace(NHWC, sliced=True, act_cheap="silu", width=5))
    check(CUDA, dataclasses.replace(NHWC, residual=True, width=7))
    check(CUDA, dataclasses.replace(NHWC, act_primary="prelu", per_channel_slope=True, width=5))
    a, grad = make(dataclasses.replace(NHWC, batch=1, width=7))
    shifted = torch.zeros(grad.numel() + 1, dtype=grad.dtype)[1:].as_strided(grad.shape, grad.stride(), 1).copy_(grad)
    check_args(CUDA, a, shifted)


# ---- NCHW, whose large maps are copied to channels_last


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes", [{}, {"residual": True}, {"sliced": True}, ALL_INPUTS, {"act_primary": "prelu"}], ids=str
)
def test_nchw_in_channels_last(dtype, changes, monkeypatch):
    copies = []
    monkeypatch.setattr(cuda_training, "_LEAST_BYTES", 0)
    monkeypatch.setattr(cuda_training, "op", lambda name: copies.append(name) or op(name))
    case = dataclasses.replace(NHWC, dtype=dtype, layout="nchw", act_cheap="silu", **changes)
    for batch_statistics in (True, False):
        check(CUDA, case, batch_statistics)
    forward = 2 + ("residual" in changes)  # x, the output
    backward = 3 + ("output_gate" in changes)  # x, the output's gradient; the gradient of x
    assert copies.count("change_layout_cuda") == forward + 2 * backward, copies


def test_layout_of_a_step():
    """By size, and of a 3×3 depthwise conv alone; one channel or pixel has both layouts."""
    limit = cuda_training._LEAST_BYTES
    a = make_args(Case(1, 8, 1, 2, 24, layout="nchw"))

    def layout(x: torch.Tensor, dw_size: int = 3) -> torch.memory_format:
        weight = torch.empty(12, 1, dw_size, dw_size, device="meta", dtype=x.dtype)
        return cuda_training.layout(a._replace(x=x, cheap_weight=weight))

    for dtype in DTYPES:
        pixels = limit // (32 * torch.empty(0, dtype=dtype).element_size())  # 8 channels of x, 24 of the output
        small, large = (torch.empty(1, 8, 1, n, device="meta", dtype=dtype) for n in (pixels - 1, pixels))
        assert layout(small) == layout(large, 5) == torch.contiguous_format
        assert layout(large) == torch.channels_last
        assert layout(large[:, :1]) == layout(large[..., :1].expand(pixels, -1, -1, -1)) == torch.contiguous_format
        assert layout(small.contiguous(memory_format=torch.channels_last)) == torch.channels_last


def test_every_kernel_is_in_the_table():
    names = [k["name"] for k in _C.kernel_attributes()]
    assert len(names) == len(set(names))
    for path in ("float16", "bfloat16", "float32"):
        own = ("_strips", "_pixels", "_statistics_nhwc_")
        nhwc = [n for n in names if n.startswith(f"{path}_") and any(part in n for part in own)]
        assert len(nhwc) == (7 if path == "float32" else 14)
        assert len([n for n in names if n.startswith(f"{path}_") and "statistics" in n and n not in nhwc]) == 2 + 2


def kernel(name: str, a: GhostArgs, *memory: object) -> None:
    op(f"{name}_cuda")(*a, *memory)


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
