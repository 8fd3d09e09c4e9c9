"""What only Triton's kernels are asked: launches, runs, 64-bit indices; on a GPU, or in Triton's interpreter
(TRITON_INTERPRET=1). What they compute is in test_ghost.py, test_depthwise.py, test_squeeze_excite.py and test_every_op.py."""

import dataclasses

import call_path
import fuzz_raw_ops
import pytest
import torch
from kernel_backends import Backend
from strategies import LAYOUTS
from triton_runtime import DEVICE, needs_triton

from ghostfused.backends import triton
from ghostfused.backends.triton import bottleneck as triton_bottleneck
from ghostfused.backends.triton.configs import run_length, window_run_length
from ghostfused.ops import forward_op
from ghostfused.testing import Case, DepthwiseCase, SqueezeExciteCase, judge, make, make_args, to_device

pytestmark = [pytest.mark.triton, needs_triton]
NAMES = ["triton", "triton_two_kernel"]
TRITON = Backend("triton")
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def test_the_call_path_is_the_one_that_the_docs_list(monkeypatch):
    assert call_path.files_until(monkeypatch, triton, "launch_kernel", "triton", DEVICE) == call_path.python_files()


@pytest.mark.parametrize("name", NAMES)
@each_layout
@pytest.mark.parametrize("optional", [(), ("input_gate",), ("residual",), ("output_gate",)], ids=str)
def test_no_ghosts_is_one_launch_with_nothing_allocated(optional, layout, name, monkeypatch):
    """A module cut off after its first half: the 1×1 conv alone, even if the depthwise conv would be 5×5 with 3 ghosts."""
    launches, allocated, empty, run = [], [], torch.empty, triton.launch_kernel
    monkeypatch.setattr(triton, "launch_kernel", lambda *a: launches.append(a) or run(*a))
    case = Case(out_channels=20, init_channels=20, height=9, layout=layout, act_cheap="prelu", dw_size=5, ratio=3)
    args = make_args(dataclasses.replace(case, **dict.fromkeys(optional, True)))
    on_device = to_device(args._replace(cheap_weight=args.cheap_weight.transpose(2, 3)), DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *a, **k: allocated.append(a) or empty(*a, **k))
        out = forward_op(name)(*on_device)
    assert judge(out, args).ok
    (launch,) = launches
    assert not launch[2]["CHEAP"]
    assert allocated == [(out.shape,)]


def test_one_launch_and_two(monkeypatch):
    launches, run = [], triton_bottleneck.launch_kernel
    monkeypatch.setattr(triton_bottleneck, "launch_kernel", lambda *a: launches.append(a) or run(*a))
    for case, count in ((DepthwiseCase(dtype=torch.float16), 1), (SqueezeExciteCase(3, 70, 30, 40, 40), 2)):
        TRITON.run(make(case))
        assert len(launches) == count
        launches.clear()


@pytest.mark.parametrize("run", [16, 32, 48, 112])
def test_runs_shorter_than_the_halo(run, monkeypatch):
    blocks = triton.blocks
    monkeypatch.setattr(triton, "blocks", lambda *args: blocks(*args) | {"run": run})
    TRITON.check(Case(height=9, width=29, dw_size=5, layout="nchw", batch=1))


@pytest.mark.parametrize("width", [5, 29])
@pytest.mark.parametrize("rows", [1, 2, 4, 9])
@pytest.mark.parametrize("patch", [(1, 1, 1), (2, 3, 2), (4, 5, 4)], ids=str)
def test_patches_that_divide_nothing(patch, rows, width, monkeypatch):
    """The last runs, and the last patches of a run and of a row, move back over their neighbours."""
    blocks, (patch_h, *rest) = triton.blocks, patch
    own = dict(zip(("PATCH_H", "PATCH_W", "VECTOR"), (min(patch_h, rows), *rest), strict=True)) | {"run": rows * width}
    monkeypatch.setattr(triton, "blocks", lambda *args: blocks(*args) | own)
    TRITON.check(
        Case(1, 6, 9, width, 20, dw_size=5, layout="nhwc"), Case(1, 6, 9, width, 27, 3, layout="nhwc", residual=True)
    )


@pytest.mark.parametrize("units", [1, 2, 64, 5000])
@pytest.mark.parametrize(("pixels", "halo"), [(12544, 113), (784, 58), (784, 0), (49, 8), (1, 2)])
def test_run_length(pixels, halo, units):
    run, step = run_length(pixels, halo, units, 32), 32
    assert run % step == 0
    assert run < pixels + step
    assert run >= min(halo, pixels)
    assert run < max(8 * halo, 1024) + step
    if run > max(halo, 1) + step:  # a shorter run would give more programs than are wanted
        assert -(-pixels // (run - step)) * units >= 528


@pytest.mark.parametrize("units", [1, 2, 64, 5000])
@pytest.mark.parametrize(("pixels", "halo"), [(25600, 322), (1600, 82), (100, 22), (1, 4)])
def test_window_run_length(pixels, halo, units):
    """A window's halo costs as much as its run: fewer runs than of a 1×1 conv, unless multiprocessors would be idle."""
    run, step = window_run_length(pixels, halo, units, 64), 64
    assert run % step == 0
    assert run < pixels + step
    if units >= 132:
        assert run >= pixels
    if units == 1 and pixels > 132 * step:
        assert -(-pixels // run) > 100


@each_layout
@pytest.mark.parametrize("programs", [1, 528])
def test_how_squeezing_is_shared_out(programs, layout, monkeypatch):
    """One program per multiprocessor is wanted: of a small device, each takes several images; of a large one, few pixels."""
    monkeypatch.setattr(triton_bottleneck, "PROGRAMS", programs)
    plan = triton_bottleneck.squeeze_plan(make(SqueezeExciteCase(5, 70, 20, 60, 50, layout=layout)))
    assert plan["IMAGES"] == (4 if programs == 1 else 1)
    assert plan["chunk"] < 60 * 50
    large = triton_bottleneck.squeeze_plan(make(SqueezeExciteCase(1, 72, 20, 112, 112, layout=layout)))
    assert 112 * 112 / large["chunk"] > 6


@each_layout
@pytest.mark.parametrize("optional", [False, True])
def test_64_bit_indices(layout, optional, monkeypatch):
    for module in (triton, triton_bottleneck):
        monkeypatch.setattr(module, "reach", lambda t: 2**31)
    options = dict.fromkeys(("input_gate", "residual", "output_gate"), optional)
    TRITON.check(Case(layout=layout, height=9, sliced=True, **options))
    Backend("triton_two_kernel").check(Case(layout=layout, height=9, dtype=torch.float16, **options))
    TRITON.check(DepthwiseCase(sliced=True, layout=layout), SqueezeExciteCase(sliced=True, layout=layout))


def test_two_kernels_have_the_other_ops_too():
    Backend("triton_two_kernel").check(DepthwiseCase(), SqueezeExciteCase())


def test_more_programs_than_a_launch_has_are_refused():
    huge = make_args(Case(batch=1, height=1, width=1))
    huge = huge._replace(x=huge.x.expand(2**31, -1, -1, -1))
    assert "programs" in triton.supports(huge if DEVICE == "cpu" else to_device(huge, "cuda"))


@pytest.mark.parametrize(("name", "calls"), [("triton", 40), ("triton_two_kernel", 15)])
def test_malformed_calls(name, calls):
    """``python -m tests.fuzz --calls 5000 --backend triton`` draws more."""
    counts = fuzz_raw_ops.run(seed=3, calls=calls, backend=name)
    assert counts["error"] > 0, counts
    assert counts["right result"] > 0, counts
