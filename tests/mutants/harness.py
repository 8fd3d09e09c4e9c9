"""Builds the extension with a fault, or without one, for a few kernels; and runs ``subset.py`` with it under ptx-on-cpu.

Only the files that a fault changes are compiled anew, to PTX alone. tests/kernels/test_sass.py builds machine code instead.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from .mutants import Mutant

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SUBSET = Path(__file__).with_name("subset.py")
ORDERS = ("asc", "desc", "rand:7")
HOST_SOURCES = sorted(path.relative_to(CSRC) for path in (CSRC / "cuda").rglob("*.cpp"))
LAYOUTS = (("nchw", "false"), ("nhwc", "true"))
PATHS = {"float16": "Float16", "bfloat16": "BFloat16", "tf32": "TF32", "float32": "Float32"}


def missing() -> str | None:
    """Why the check can't run here; None if it can."""
    tool = os.environ.get("PTX_ON_CPU")
    if not tool or not (ROOT / tool / "run-extension").exists():
        return "the mutation check needs PTX_ON_CPU set to a ptx-on-cpu folder"
    if not shutil.which("nvcc"):
        return "the mutation check needs nvcc on PATH"
    return None


def forms(kernel: str) -> set[str]:
    """The table entries that ``kernel`` stands for: all tiles of a name without tiles, and what runs beside it.

    excite follows squeeze; a depthwise convolution whose channels don't fill half a vector takes the kernel for any;
    ``float32_training_dw3_nhwc`` stands for the six of a training step, as ``…_any_nchw`` does, with ``strips`` or ``masked``
    for dw3 for the six of channels_last. ``float16_nchw_window_dw3`` stands for the kernel that has 3×3 primary convs beside others.
    """
    path, _, *rest = kernel.split("_")
    names = {kernel}
    if "_squeeze_" in kernel:
        names.add(f"{path}_excite")
    if "_depthwise_" in kernel:
        names.add(f"{path}_depthwise_any")
    names |= {kernel.replace("_nhwc_", f"_nhwc_t{tiles}_") for tiles in (1, 2, 3)}
    if "_nchw_window_" in kernel:
        names.add(f"{path}_nchw_w4_t2_{rest[-1]}_any")
    elif "_nchw_w" in kernel:
        width, *variant = rest
        names |= {f"{path}_nchw_{width}_t{tiles}_{'_'.join(variant)}" for tiles in (1, 2, 3, 4)}
    if "_training_" in kernel:
        dw, layout = rest
        if dw in ("strips", "masked"):
            other = "strips" if dw == "masked" else "strips_masked"
            names |= {name for name in training_nhwc_kernels(path) if not name.endswith(other)}
            return names | ({f"{path}_primary_statistics_nhwc"} if path == "float32" else set())
        names |= {f"{path}_{step}_{layout}" for step in ("primary_statistics", "normalize", "normalize_backward")}
        steps = ("cheap_statistics", "cheap_backward", "primary_backward")
        names |= {f"{path}_{step}_{form}" for step in steps for form in (dw, f"{dw}_{layout}")}
    return names


def kernel_tables(kernels: Iterable[str]) -> str:
    """A .cu file with ``kernels`` (see ``forms``) in place of all of them.

    Raises:
        ValueError: the extension has no such kernel.
    """
    tables = {(path, table): entries for path in PATHS for table, entries in tables_of(path).items()}
    layouts = {f"change_layout_{n}_bytes": f"reinterpret_cast<const void*>(&change_layout<{n}>)" for n in (2, 4)}
    tables["", "Layout[kLayoutKernels]"] = layouts
    known = {name for entries in tables.values() for name in entries}
    wanted = {kernel: forms(kernel) & known for kernel in kernels}
    if unknown := [kernel for kernel, names in wanted.items() if not names]:
        raise ValueError(f"kernels: expected names of the extension's, got {', '.join(sorted(unknown))}")
    built = set().union(*wanted.values())
    headers = (
        "bottleneck/bottleneck", "ghost/forward", "ghost/nchw/forward", "ghost/nhwc/forward", "layout/layout",
        "training/kernels", "training/primary", "training/nhwc",
    )  # fmt: skip
    lines = [*(f'#include "cuda/{header}.cuh"' for header in headers), "namespace ghostfused {"]
    for (path, table), entries in tables.items():
        values = [
            f'{{{entry.replace("<P", f"<Path::k{PATHS.get(path)}", 1)}, "{name}"}}' if name in built else "{}"
            for name, entry in entries.items()
        ]
        lines.append(f"const Kernel k{PATHS.get(path, '')}{table} = {{{', '.join(values)}}};")
    return "\n".join([*lines, "}", ""])


def tables_of(path: str) -> dict[str, dict[str, str]]:
    """The extension's tables of one path: for each the kernels by name, in its order; P stands for the path."""
    general = {"dw3_nchw": "3, false", "any_nchw": "0, false", "any_nhwc": "0, true"}
    count = "kKernelsPerPath"
    if path in ("tf32", "float32"):
        count = "kFloatKernelsPerPath"
        del general["dw3_nchw"]
    tables = {f"Kernels[{count}]": {f"{path}_{form}": f"kernel<P, {last}>()" for form, last in general.items()}}

    def add(table: str, functions: dict[str, str]) -> None:
        tables[table] = {name: f"reinterpret_cast<const void*>(&{function})" for name, function in functions.items()}

    add(
        "Statistics[2]",
        {f"{path}_primary_statistics_{layout}": f"primary_statistics<P, {last}>" for layout, last in LAYOUTS},
    )
    if path != "tf32":
        add("Bottleneck[kBottleneckKernels]", bottleneck_kernels(path))
        add("Training[kTrainingKernels]", training_kernels(path))
    if path in ("tf32", "float32"):
        add("NhwcKernels[kNhwcFloatKernelsPerPath]", nhwc_kernels(path))
        add(f"NchwKernels[kNchw{PATHS[path]}Kernels]", nchw_kernels(path))
    if path in ("float16", "bfloat16"):
        add("NhwcKernels[kNhwcKernelsPerPath]", nhwc_kernels(path))
        add("NchwKernels[kNchwKernelsPerPath]", nchw_kernels(path))
        add("NhwcTraining[kTrainingNhwcKernels]", training_nhwc_kernels(path))
    if path == "float32":
        add("NhwcTraining[kTrainingNhwcFloatKernels]", training_nhwc_kernels(path))
    return tables


def nchw_kernels(path: str) -> dict[str, str]:
    """Those of ghost/nchw/forward.cuh's; a name without tiles stands for all of them, too."""
    maps = {"w8": "Wide8", "w4": "Wide4", "w14": "Fourteen", "w7": "Seven"}
    tiles = {
        "dw3": "w8_t1 w8_t2 w4_t2 w4_t4 w14_t2 w14_t4 w7_t3",
        "dw3_any": "w8_t2 w4_t2 w14_t2 w7_t3",
        "dw5_any": "w8_t2 w4_t2 w14_t2 w7_t3",
    }
    if path == "tf32":
        tiles = {"dw3": "w4_t2 w14_t2 w7_t3"}
    if path == "float32":
        tiles = {"dw3": "w4_t2 w14_t2 w7_t2", "dw3_any": "w4_t2 w14_t2 w7_t2"}
    return {
        f"{path}_nchw_{form}_{variant}": f"ghost_nchw<NchwConfig<P, NchwMap::k{maps[form.split('_')[0]]}, "
        f"{form[-1]}, {variant[2]}, {str('any' in variant).lower()}>>"
        for variant, forms in tiles.items()
        for form in forms.split()
    }


def nhwc_kernels(path: str) -> dict[str, str]:
    """Those of ghost/nhwc/forward.cuh's; a kernel's name stands for all its tiles, among which the planner picks."""
    forms = ("1_dw3 2_dw3 2_dw3_any") if path in ("tf32", "float32") else (
        "1_dw3_none 1_dw3_relu 1_dw3_any 2_dw3_none 2_dw3_relu 2_dw3_any 3_dw3_none 3_dw3_relu 2_dw5_any 2_dw1_any"
    )  # fmt: skip
    epilogues = {"none": "None", "relu": "ReLU", "any": "Any", "": "Lowest"}
    entries = {}
    for form in forms.split():
        tiles, dw, *epilogue = form.split("_")
        function = f"nhwc_forward<P, {tiles}, {dw[-1]}, Epilogue::k{epilogues[''.join(epilogue)]}>"
        entries[f"{path}_nhwc_t{form}"] = function
    return entries


def bottleneck_kernels(path: str) -> dict[str, str]:
    """The entries of bottleneck.cuh's table by name, P standing for the path."""
    entries = {
        f"{path}_depthwise_w{w}_s{s}_{layout}": f"depthwise_conv<P, {w}, {s}, {last}>"
        for w, s in ((1, 1), (3, 1), (5, 1), (3, 2), (5, 2))
        for layout, last in LAYOUTS
    }
    entries[f"{path}_depthwise_any"] = "depthwise_conv<P, 0, 0, false>"
    entries |= {f"{path}_squeeze_{layout}": f"squeeze<P, {last}>" for layout, last in LAYOUTS}
    entries[f"{path}_excite"] = "excite<P>"
    return entries


def training_kernels(path: str) -> dict[str, str]:
    """Those of training/kernels.cuh's."""
    entries = {
        f"{path}_{step}_{layout}": f"{step}<P, Layout::k{layout.capitalize()}>"
        for step in ("normalize", "normalize_backward")
        for layout, _ in LAYOUTS
    }
    forms = {"dw3_nhwc": "3, Layout::kNhwc", "any": "0, Layout::kEither"}
    return entries | {
        f"{path}_{step}_{form}": f"{step}<P, {arguments}>"
        for step in ("cheap_statistics", "cheap_backward", "primary_backward")
        for form, arguments in forms.items()
    }


def training_nhwc_kernels(path: str) -> dict[str, str]:
    """Those of training/nhwc.cuh's."""
    entries = {
        f"{path}_{step}_pixels_{vector}": f"{step}_pixels<P, {vector}>"
        for step in ("normalize", "normalize_backward")
        for vector in ((2, 4) if path == "float32" else (4, 8))
    }
    entries |= {
        f"{path}_{step}_strips{masked}": f"{step}_strips<P, {str(bool(masked)).lower()}>"
        for step in ("cheap_statistics", "cheap_backward", "primary_backward")
        for masked in (("_masked",) if path == "float32" else ("", "_masked"))
    }
    if path != "float32":
        entries |= {f"{path}_primary_statistics_nhwc_{n}": f"primary_statistics_nhwc<P, {n}>" for n in (1, 2, 3, 4)}
    return entries


def run(command: list[str], **kwargs) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **kwargs)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout[-4000:]}")


PTX = ("-gencode=arch=compute_80,code=compute_80",)


def compile_file(source: Path, output: Path, csrc: Path, target: Iterable[str] = PTX) -> None:
    from torch.utils import cpp_extension

    command = ["nvcc", "-std=c++20", "-c", str(source), "-o", str(output), f"-I{csrc}", "-Xcompiler=-fPIC"]
    if source.suffix == ".cu":
        command += ["-O0", *target]  # of the host's half; kernels are optimized as ever
    else:
        folders = [sysconfig.get_path("include"), *cpp_extension.include_paths()]
        command += ["-O0", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += ['-DGHOSTFUSED_ARCHITECTURES="8.0+PTX"', "-DTORCH_EXTENSION_NAME=_C"]
        for folder in folders:
            command += ["-isystem", folder]
    run(command)


def build(
    folder: Path, shared: Path, kernels: Iterable[str], mutant: Mutant | None, target: Iterable[str] = PTX
) -> Path:
    """A copy of the package in ``folder`` whose extension has ``kernels`` and the fault.

    Args:
        shared: keeps the object files of sources that no fault changes; several processes may use it.
        target: nvcc's options for the kernels.
    """
    from torch.utils import cpp_extension

    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("cpu"))
    shutil.copytree(
        ROOT / "ghostfused", folder / "ghostfused", ignore=shutil.ignore_patterns("*.so", "*.txt", "__pycache__")
    )
    if mutant is not None:
        text = (csrc / mutant.file).read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
        (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    objects = []
    for name in HOST_SOURCES:
        object_name = "_".join(name.parts)
        if mutant is not None and (mutant.file == str(name) or mutant.file.endswith(".h")):
            objects.append(folder / f"{object_name}.o")
            compile_file(csrc / name, objects[-1], csrc)
        else:
            objects.append(shared / f"{object_name}.o")
            with open(shared / f"{object_name}.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not objects[-1].exists():
                    compile_file(CSRC / name, objects[-1], CSRC)
    (csrc / "kernels.cu").write_text(kernel_tables(kernels))
    objects.append(folder / "kernels.o")
    compile_file(csrc / "kernels.cu", objects[-1], csrc, target)
    extension = folder / "ghostfused" / "_C.so"
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_cuda"]
    run(["nvcc", "-shared", "--cudart=shared", "-o", str(extension), *map(str, objects), *libraries])
    return extension


def run_subset(extension: Path, kernels: Iterable[str], order: str) -> tuple[bool, str]:
    """Whether all cases passed, and the last of them or what the tool said.

    Raises:
        RuntimeError: something failed that is no verdict on the kernel.
    """
    environment = os.environ | {
        "PTX_ON_CPU_CACHE": str(extension.parents[1] / "ptx"),
        "OPT": "-O1",
        "FLAGS": f"-include {ROOT / 'tests' / 'helpers' / 'ptx_kernels.h'}",
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(map(str, (extension.parents[1], ROOT / "tests" / "helpers"))),
        "SHIM_ORDER": order,
    }
    tool = str((ROOT / os.environ["PTX_ON_CPU"]).resolve() / "run-extension")
    command = [tool, str(extension), sys.executable, str(SUBSET), *kernels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    last = (result.stdout.splitlines() or [""])[-1]
    if result.returncode == 0 or (result.returncode == 1 and ": error " in last):
        return result.returncode == 0, last
    tool_says = [line for line in result.stderr.splitlines() if "SHIM ERROR" in line or "PTX" in line]
    if last and tool_says:
        return False, last + tool_says[0]
    raise RuntimeError(f"exit status {result.returncode}: {' '.join(command)}\n{last}\n{result.stderr[-4000:]}")


def find(folder: Path, shared: Path, kernels: Iterable[str], mutant: Mutant | None) -> str | None:
    """The order and the case that find a fault; None if no case does."""
    extension = build(folder, shared, kernels, mutant)
    first = mutant.order if mutant else ORDERS[0]
    for order in sorted(ORDERS, key=lambda o: o != first):
        passed, last = run_subset(extension, kernels, order)
        if not passed:
            return f"{order}: {last}"
    return None
