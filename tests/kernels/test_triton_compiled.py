"""What Triton's compiler makes of the kernels, with no GPU: builds for each target, resources, the barrier, and the
compiled PTX run on the CPU by ptx-on-cpu (set PTX_ON_CPU to its folder)."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_compiler import SHARED_LIMIT, compiled_on_cpu, in_short_runs, launch_on_cpu, spilled  # noqa: F401 (a fixture)

from ghostfused import ghost_module
from ghostfused.backends import triton
from ghostfused.backends.triton.compile import compile_launch
from ghostfused.backends.triton.kernels import ghost_kernel
from ghostfused.spec import GhostArgs
from ghostfused.testing import Case, judge, make_args

TARGETS = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"]
STEPS = {"triton": [(True, True)], "triton_two_kernel": [(True, False), (False, True)]}
CASES = [
    Case(batch=1, in_channels=24, out_channels=72, height=56, width=56, dtype=torch.float16, layout="nhwc"),
    Case(batch=1, in_channels=112, out_channels=672, height=14, width=14, act_primary="silu", act_cheap="hardswish"),
]
WITH_ALL_INPUTS = Case(
    batch=1, in_channels=20, out_channels=39, height=13, width=17, dtype=torch.bfloat16, norm_dtype=torch.float32,
    input_gate=True, residual=True, output_gate=True, act_primary="prelu", act_cheap="leaky_relu", ratio=3,
)  # fmt: skip


def plans(case: Case, backend: str = "triton") -> list[dict]:
    args = make_args(case)
    out = args.new_output()
    return [triton.plan(args, out, triton.scratch(args, out), *steps) for steps in STEPS[backend]]


def in_its_format(args: GhostArgs, layout: str) -> GhostArgs:
    """``args`` with the primary conv's weight as a model of that layout has it."""
    memory_format = torch.channels_last if layout == "nhwc" and args.kernel_size > 1 else torch.contiguous_format
    return args._replace(primary_weight=args.primary_weight.to(memory_format=memory_format))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [*CASES, WITH_ALL_INPUTS], ids=str)
def test_compiles(case, target):
    (plan,) = plans(case)
    compiled = compile_launch(plan, target)
    assert compiled.asm["hsaco" if target.startswith("gfx") else "cubin"]
    assert compiled.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "size", "dw_size"),
    [(16, 16, 112, 3), (160, 960, 7, 3), (672, 112, 14, 3), (61, 59, 28, 5), (64, 128, 20, 7)],
)
def test_spills_nothing(in_channels, out_channels, size, dw_size, dtype, layout, target, tmp_path):
    (plan,) = plans(Case(1, in_channels, size, size, out_channels, dw_size=dw_size, dtype=dtype, layout=layout))
    assert spilled(compile_launch(plan, target).asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("path", ["float16", "float32", "tf32"])
@pytest.mark.parametrize(("in_channels", "out_channels", "size"), [(16, 32, 32), (64, 128, 20), (128, 256, 40)])
def test_windows_spill_nothing(in_channels, out_channels, size, path, layout, target, tmp_path):
    """YOLO's 3×3 primary convs at stride 2, with small maps and large ones."""
    dtype = torch.float16 if path == "float16" else torch.float32
    args = make_args(
        Case(
            1, in_channels, size, size, out_channels, kernel_size=3, stride=2, dw_size=5, act_primary="silu",
            act_cheap="silu", dtype=dtype, layout=layout, allow_tf32=path == "tf32",
        )
    )  # fmt: skip
    args, out = in_its_format(args, layout), args.new_output()
    assert (
        spilled(compile_launch(triton.plan(args, out, triton.scratch(args, out)), target).asm["cubin"], tmp_path) == 0
    )


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_barrier_between_the_steps(case, target):
    """The compiler keeps the barrier between the stores of x1 and its loads, which the read-only cache doesn't serve."""
    (plan,) = plans(case)
    ptx = compile_launch(plan, target).asm["ptx"]
    assert "ld.global.nc" not in ptx
    primary = compile_launch(plan | {"CHEAP": False}, target).asm["ptx"].count("st.global")
    order = re.findall(r"st\.global|ld\.global|bar\.sync", ptx)
    stores = [i for i, name in enumerate(order) if name == "st.global"]
    assert len(stores) > primary > 0
    between = order[stores[primary - 1] + 1 : stores[primary]]
    assert "bar.sync" in between
    assert between[between.index("bar.sync") :].count("ld.global") >= plan["DW_SIZE"] ** 2


def test_channels_last_accesses_are_wide():
    """Without the *_ALIGN constants Triton would move one value at a time."""
    (plan,) = plans(CASES[0])
    ptx = compile_launch(plan, "sm_80").asm["ptx"]
    assert "st.global.v2.b32" in ptx or "st.global.v4.b32" in ptx
    assert not re.search(r"st\.global\.b16", ptx)


def test_refused_on_cpu_tensors():
    args = make_args(Case())
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        ghost_module(args.x, args.primary_weight, args.cheap_weight, backend="triton")


def test_import_without_triton():
    """The package imports, and says why, where Triton is not installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, ghostfused\n"
        "from ghostfused.backends import BACKENDS\n"
        "print(BACKENDS['triton'].unavailable())\n"
        "print(BACKENDS['triton_two_kernel'].unavailable())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("triton is not installed") == 2


PTX_CASES = {
    "fp16 nhwc": Case(batch=2, in_channels=40, height=12, width=20, dtype=torch.float16, layout="nhwc"),
    "fp32 nchw": Case(batch=1, in_channels=24, height=5, width=48),
    # one chain of products over all of Cin rounds away too much
    "long sums": Case(1, 1920, 7, 7, 32, layout="nhwc", act_primary="none", act_cheap="none"),
    "bf16 nchw": Case(batch=1, in_channels=70, height=14, width=14, out_channels=33, dtype=torch.bfloat16, dw_size=5),
    "tf32 nhwc": Case(batch=1, in_channels=24, height=9, width=15, layout="nhwc", allow_tf32=True),
    "all inputs": WITH_ALL_INPUTS,
    "window nhwc": Case(2, 40, 9, 11, 24, kernel_size=3, stride=2, dw_size=5, dtype=torch.float16, layout="nhwc"),
    "window nchw": Case(2, 24, 7, 13, 20, kernel_size=3, dilation=2, input_gate=True, residual=True),
    "sliced": Case(batch=2, in_channels=16, height=9, width=11, dtype=torch.float16, sliced=True),
}


def check_compiled(compiled_on_cpu, kernel, case: Case, backend: str = "triton", **own: int) -> None:  # noqa: F811
    """Judges the compiled ``kernel``, in short runs; ``own`` replaces values of its plan."""
    args = make_args(case)
    args = in_its_format(args, case.layout)
    out = args.new_output().fill_(float("nan"))
    x1 = triton.scratch(args, out).fill_(float("nan"))
    for steps in STEPS[backend]:
        plan = in_short_runs(triton.plan(args, out, x1, *steps)) | own
        launch_on_cpu(compiled_on_cpu, kernel, triton.programs(plan, len(args.x)), plan)
    verdict = judge(out, args)
    assert verdict.ok, verdict


@pytest.mark.parametrize(
    ("name", "backend"),
    # halves of one kernel: what differs between the other cases, the whole has shown
    [
        *((name, "triton") for name in PTX_CASES),
        *((name, "triton_two_kernel") for name in ("fp16 nhwc", "bf16 nchw", "all inputs")),
    ],
)
def test_compiled_ptx(name, backend, compiled_on_cpu):  # noqa: F811
    check_compiled(compiled_on_cpu, ghost_kernel, PTX_CASES[name], backend)


@pytest.mark.parametrize(
    ("layout", "file", "right", "wrong"),
    [
        ("nchw", "kernels", "        tl.debug_barrier()", "        pass"),
        ("nchw", "kernels", "halo = DW_SIZE // 2 * (W + 1) if", "halo = DW_SIZE // 2 * W if"),
        ("nchw", "kernels", "(column + dx < W)", "(column + dx <= W)"),
        ("nhwc", "kernels", "halo = DW_SIZE // 2 * W if", "halo = 0 if"),
        ("nhwc", "kernels", "begin = tl.minimum(begin, HW - run)", "begin += 0"),
        ("nhwc", "patches", "(left + column < W)", "(left + column <= W)"),
        ("nhwc", "patches", "(left + column >= 0)", "(left + column >= -1)"),
        ("nhwc", "patches", "h + (i - PAD) >= 0", "h + (i - PAD) >= -1"),
        ("nhwc", "patches", "h + (i - PAD) < H", "h + (i - PAD) <= H"),
        ("nhwc", "patches", "bottom - PATCH_H)", "bottom)"),
        ("nhwc", "patches", "W - PATCH_W)", "W)"),
        ("window", "window", "(h < x_h)", "(h <= x_h)"),
        ("window", "window", "(w >= 0)", "(w >= -1)"),
        ("window", "window", "tap % KERNEL", "tap % (KERNEL + 1)"),
        ("window", "window", "tap * TAP_STEP", "tap"),
    ],
)
def test_compiled_ptx_sees_faults(layout, file, right, wrong, compiled_on_cpu, tmp_path, monkeypatch):  # noqa: F811
    """The run above fails for kernels with a planted fault. Here runs and patches divide nothing."""
    own = {} if layout != "nhwc" else {"run": 4 * 15, "PATCH_H": 3, "PATCH_W": 4, "VECTOR": 2}
    package = tmp_path / f"faulty_{re.sub('[^a-z0-9]', '_', str(tmp_path))}"
    package.mkdir()
    for name in ("kernels", "patches", "window"):
        source = Path(sys.modules[ghost_kernel.__module__].__file__).with_stem(name).read_text()
        if name == file:
            assert source.count(right) == 1
            source = source.replace(right, wrong)
        source = re.sub(r"from \.(activations|device) ", r"from ghostfused.backends.triton.\1 ", source)
        (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"{package.name}.kernels")
    case = PTX_CASES[{"nchw": "fp32 nchw", "nhwc": "tf32 nhwc", "window": "window nhwc"}[layout]]
    with pytest.raises(AssertionError):
        check_compiled(compiled_on_cpu, module.ghost_kernel, case, **own)
