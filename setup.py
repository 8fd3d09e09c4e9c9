"""Builds ghostfused._C where there is a CUDA toolkit and ghostfused._cpu where there is a C++ compiler; the rest is in
pyproject.toml. An extension that can't be built leaves a note in the package, which ``python -m ghostfused info`` shows.
If neither can, the build fails, unless both were refused.

One build serves the Pythons and torches of pyproject.toml: csrc uses Python's limited API and torch's stable ABI.

Environment:
    GHOSTFUSED_CUDA       0: don't build ghostfused._C; 1: fail if it can't be built; unset: build it if possible.
    GHOSTFUSED_CPU        the same for ghostfused._cpu.
    TORCH_CUDA_ARCH_LIST  architectures, as for any torch extension; the default is below.
    MAX_JOBS              parallel compilers.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# Machine code runs on later minor versions, too: these serve 8.0, 8.6, 8.9, 9.0, 10.0, 10.3, 12.0 and 12.1, and the PTX
# what comes later. Not 8.7: a Jetson runs its own code only (and no wheel for x86-64).
ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
CXX_FLAGS = ["-std=c++20", "-g0", "-Wall", "-fvisibility=hidden"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
# on aarch64 the scheduler before register allocation makes GCC spill the 1×1 convolution's sums
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-schedule-insns"]
# SVE's vectors have a length that only a flag fixes, for a whole file
OWN_FLAGS = {"csrc/cpu/isa/sve512.cpp": ["-march=armv8.2-a+sve", "-msve-vector-bits=512"]}
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # a Python without GIL has no limited API
MANYLINUX = platform.libc_ver()[0] == "glibc" and platform.machine() in ("x86_64", "aarch64")

# Build isolation hides the torch that the package is for, and pip's CUDA packages. One from build-system.requires would be
# another, of 3 GB. The same interpreter without pip's variables tells where it finds packages, the system's among them.
if importlib.util.find_spec("torch") is None:
    usual = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    ask = [sys.executable, "-c", "import sys; print(*sys.path[1:], sep='\\n')"]
    paths = subprocess.run(ask, capture_output=True, text=True, check=True, env=usual).stdout.splitlines()
    sys.path += [path for path in paths if path not in sys.path]


def find_cuda_home() -> Path | None:
    """The toolkit's folder: CUDA_HOME, else that of the nvcc on PATH, else the one that pip's nvidia packages make up."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):  # which may be a script: nvcc itself knows where it lives
        steps = subprocess.run([nvcc, "-dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
        folders += [match[1] for match in re.finditer(r"^#\$ TOP=(.*)$", steps.stderr, re.MULTILINE)]
    if (spec := importlib.util.find_spec("nvidia")) and spec.submodule_search_locations:
        folders += [f"{path}/cu13" for path in spec.submodule_search_locations]
    folders.append("/usr/local/cuda")
    found = (Path(f) for f in folders if f)
    return next((f for f in found if (f / "bin/nvcc").exists() and (f / "include/cuda_runtime_api.h").exists()), None)


def cudart(cuda_home: Path) -> list[str]:
    """The linker's arguments for the CUDA runtime; pip's packages have it without the plain name."""
    for folder in (cuda_home / "lib64", cuda_home / "lib"):
        if (folder / "libcudart.so").exists():
            return [f"-L{folder}", "-lcudart"]
        for library in sorted(folder.glob("libcudart.so.*")):
            return [f"-L{folder}", f"-l:{library.name}"]
    raise RuntimeError(f"no libcudart in {cuda_home}")


def cpp_extension():
    """torch's builder, or a RuntimeError that says why there is none."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(f"no torch at build time ({error}): pip install torch first") from error
    return cpp_extension


def common(folder: Path, link_args: list[str]) -> dict:
    """What extensions have in common, for the one whose files are in ``folder``."""
    files = sorted(str(p.relative_to(ROOT)) for p in folder.rglob("*"))
    if MANYLINUX:
        files += ["csrc/common/manylinux.cpp"]
        link_args = ["-Wl,--version-script=csrc/exports.map", "-Wl,--wrap=dlsym", "-Wl,--strip-all", *link_args]
    return {
        "sources": [f for f in files if f.endswith((".cpp", ".cu"))],
        "extra_link_args": link_args,
        "depends": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h")),
        "include_dirs": [str(ROOT / "csrc")],
        "py_limited_api": ABI3,
    }


def linked(module, *others: str):
    """``module``, linked with the libraries that it uses. torch's have parts of a newer libstdc++ in them, which come and
    go with its versions: the compiler's own comes first."""
    libraries = ("c10", "torch", "torch_cpu", *others)
    module.libraries = ["stdc++"] * MANYLINUX + [name for name in module.libraries if name in libraries]
    return module


def cuda_extension():
    """ghostfused._C; raises RuntimeError where it can't be built."""
    cuda_home = find_cuda_home()
    if cuda_home is None:
        raise RuntimeError("no CUDA toolkit with nvcc on PATH, in CUDA_HOME or in pip's nvidia packages")
    os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it on import
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
    builder = cpp_extension()
    import torch  # whose CUDA has nvcc's major version

    # From CUDA 13 on, every driver that runs it reads what this mode packs: a quarter smaller.
    packed = ["--compress-mode=size"] if int((torch.version.cuda or "0").split(".")[0]) >= 13 else []
    module = builder.CUDAExtension(
        "ghostfused._C",
        **common(ROOT / "csrc" / "cuda", cudart(cuda_home)),
        extra_compile_args={
            # The host only plans and launches: -Os makes its part a third smaller.
            "cxx": [*CXX_FLAGS, "-Os", "-DUSE_CUDA", f'-DGHOSTFUSED_ARCHITECTURES="{architectures}"'],
            "nvcc": ["-std=c++20", "-O3", "-Xptxas=-warn-spills", "-Xfatbin=-compress-all", *packed],
        },
    )
    return linked(module, "torch_cuda")


def cpu_extension():
    """ghostfused._cpu; raises RuntimeError where it can't be built."""
    if sys.platform == "win32":
        raise RuntimeError(
            "MSVC, by which PyTorch builds extensions on Windows, has no vector extensions as g++ and clang"
        )
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        raise RuntimeError("no C++ compiler: neither g++ nor the one that CXX names")
    flags = [*CXX_FLAGS, *CPU_FLAGS, f'-DGHOSTFUSED_FLAGS="{" ".join(CPU_FLAGS)}"']
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    sve = sysconfig.get_platform() == "linux-aarch64" and "clang" not in version
    flags += ["-DGHOSTFUSED_SVE512"] * sve
    module = cpp_extension().CppExtension(
        "ghostfused._cpu", **common(ROOT / "csrc" / "cpu", []), extra_compile_args=flags
    )
    module.own_flags = OWN_FLAGS if sve else {}
    return linked(module)


failures: dict[str, str] = {}  # why an extension isn't built
required: dict[str, bool] = {}


def leave_notes(package: Path) -> None:
    """Says in ``package`` why it has no such extension; fails if one that was asked for, or all without that being asked for,
    can't be built."""
    for name in required:
        note = package / f"{name}_build_failure.txt"
        note.unlink(missing_ok=True)
        if name in failures:
            print(f"warning: ghostfused has no ghostfused.{name}: {failures[name]}", file=sys.stderr)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(failures[name] + "\n")
            if required[name]:
                raise SystemExit(f"error: ghostfused.{name} is asked for, and can't be built: {failures[name]}")
    refused = all(os.environ.get(variable) == "0" for variable in ("GHOSTFUSED_CUDA", "GHOSTFUSED_CPU"))
    if required.keys() == failures.keys() and not refused:
        reasons = "; ".join(f"ghostfused.{name}: {reason}" for name, reason in failures.items())
        raise SystemExit(f"error: no kernels can be built: {reasons}. GHOSTFUSED_CUDA=0 GHOSTFUSED_CPU=0 does without.")


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        leave_notes(ROOT / "ghostfused" if self.editable_mode else Path(self.build_lib, "ghostfused"))


def build_command(base: type) -> type:
    """``base``, torch's build_ext, but an extension that fails to build and isn't required leaves a note."""

    class Build(base):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # torch checks the CUDA toolkit before it builds anything
                others = [ext for ext in self.extensions if ext.name != "ghostfused._C"]
                if required["_C"] or len(others) == len(self.extensions):
                    raise
                failures["_C"] = str(error)
                self.extensions = others
                super().run()
            leave_notes(ROOT / "ghostfused" if self.inplace else Path(self.build_lib, "ghostfused"))

        def build_extension(self, ext) -> None:
            name = ext.name.rpartition(".")[2]
            try:
                for source, flags in getattr(ext, "own_flags", {}).items():
                    ext.sources.remove(source)
                    ext.extra_objects += self.compiler.compile(
                        [source],
                        output_dir=str(Path(self.build_temp, Path(source).stem)),
                        include_dirs=ext.include_dirs,
                        extra_postargs=[*ext.extra_compile_args, *flags],
                        depends=ext.depends,
                    )
                super().build_extension(ext)
            except Exception as error:
                if required[name]:
                    raise
                ext.optional = True  # setuptools doesn't copy what isn't there
                failures[name] = f"the build failed: {error}"

        def copy_extensions_to_source(self) -> None:
            for ext in self.extensions:  # Python would take one of another suffix first
                for old in (ROOT / "ghostfused").glob(ext.name.rpartition(".")[2] + ".*.so"):
                    old.unlink()
            super().copy_extensions_to_source()

    return Build


def main() -> None:
    modules = []
    for name, variable, make in (("_C", "GHOSTFUSED_CUDA", cuda_extension), ("_cpu", "GHOSTFUSED_CPU", cpu_extension)):
        wanted = os.environ.get(variable, "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"{variable}: expected 0, 1 or nothing, got {wanted!r}")
        required[name] = wanted == "1"
        if wanted == "0":
            failures[name] = f"{variable}=0 when it was built"
            continue
        try:
            modules.append(make())
        except RuntimeError as error:
            failures[name] = str(error)
    setup(
        ext_modules=modules,
        cmdclass={
            "build_py": BuildPython,
            "build_ext": build_command(cpp_extension().BuildExtension if modules else build_ext),
        },
        options={"bdist_wheel": {"py_limited_api": "cp311"}} if modules and ABI3 else {},
    )


if __name__ == "__main__":
    main()
