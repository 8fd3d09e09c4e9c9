"""Builds ghostfused._C where there is a CUDA toolkit and ghostfused._cpu where there is a C++ compiler; the rest is in
pyproject.toml. An extension that can't be built leaves a note that ``python -m ghostfused info`` shows.

Environment:
    GHOSTFUSED_CUDA       0: don't build ghostfused._C; 1: fail if it can't be built; unset: build it if possible.
    GHOSTFUSED_CPU        the same for ghostfused._cpu.
    TORCH_CUDA_ARCH_LIST  architectures, as for any torch extension; the default is below.
    MAX_JOBS              parallel compilers.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0+PTX"
CXX_FLAGS = ["-std=c++20", "-g0", "-Wall", "-fvisibility=hidden"]
CXX_FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # the stable ABI of torch 2.11
# on aarch64 the scheduler before register allocation makes GCC spill the 1×1 convolution's sums
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-schedule-insns"]


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
        raise RuntimeError(f"no torch at build time ({error}); install with --no-build-isolation") from error
    return cpp_extension


def common(folder: Path) -> dict:
    """Sources and include folders of an extension whose files are in ``folder``."""
    files = sorted(str(p.relative_to(ROOT)) for p in folder.rglob("*"))
    include_dirs = [str(ROOT / "csrc")]
    if importlib.util.find_spec("pybind11"):  # else torch's copy
        import pybind11

        include_dirs.append(pybind11.get_include())
    return {
        "sources": [f for f in files if f.endswith((".cpp", ".cu"))],
        "depends": sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*h")),
        "include_dirs": include_dirs,
    }


def cuda_extension():
    """ghostfused._C; raises RuntimeError where it can't be built."""
    cuda_home = find_cuda_home()
    if cuda_home is None:
        raise RuntimeError("no CUDA toolkit with nvcc on PATH, in CUDA_HOME or in pip's nvidia packages")
    os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it on import
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
    module = cpp_extension().CUDAExtension(
        "ghostfused._C",
        **common(ROOT / "csrc" / "cuda"),
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-O2", "-DUSE_CUDA", f'-DGHOSTFUSED_ARCHITECTURES="{architectures}"'],
            "nvcc": ["-std=c++20", "-O3", "-Xptxas=-warn-spills", "-Xfatbin=-compress-all"],
        },
        extra_link_args=cudart(cuda_home),
    )
    module.libraries = [name for name in module.libraries if name in ("c10", "torch", "torch_cpu", "torch_cuda")]
    return module


def cpu_extension():
    """ghostfused._cpu; raises RuntimeError where it can't be built."""
    if sys.platform == "win32":
        raise RuntimeError(
            "MSVC, by which PyTorch builds extensions on Windows, has no vector extensions as g++ and clang"
        )
    if not shutil.which(os.environ.get("CXX", "g++")):
        raise RuntimeError("no C++ compiler: neither g++ nor the one that CXX names")
    flags = [*CXX_FLAGS, *CPU_FLAGS, f'-DGHOSTFUSED_FLAGS="{" ".join(CPU_FLAGS)}"']
    module = cpp_extension().CppExtension("ghostfused._cpu", **common(ROOT / "csrc" / "cpu"), extra_compile_args=flags)
    module.libraries = [name for name in module.libraries if name in ("c10", "torch", "torch_cpu")]
    return module


def failure(name: str) -> Path:
    return ROOT / "ghostfused" / f"{name}_build_failure.txt"


def without(name: str, reason: str) -> None:
    print(f"warning: ghostfused is installed without ghostfused.{name}: {reason}", file=sys.stderr)
    failure(name).write_text(reason + "\n")


def build_command(required: dict[str, bool]) -> type:
    """torch's build_ext, but an extension that fails to build and isn't required leaves a note."""

    class Build(cpp_extension().BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # torch checks the CUDA toolkit before it builds anything
                others = [ext for ext in self.extensions if ext.name != "ghostfused._C"]
                if required.get("_C", True) or len(others) == len(self.extensions):
                    raise
                without("_C", str(error))
                self.extensions = others
                super().run()

        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                name = ext.name.rpartition(".")[2]
                if required[name]:
                    raise
                ext.optional = True  # setuptools doesn't copy what isn't there
                without(name, f"the build failed: {error}")

    return Build


def main() -> None:
    modules, required = [], {}
    for name, variable, make in (("_C", "GHOSTFUSED_CUDA", cuda_extension), ("_cpu", "GHOSTFUSED_CPU", cpu_extension)):
        wanted = os.environ.get(variable, "")
        if wanted not in ("", "0", "1"):
            raise SystemExit(f"{variable}: expected 0, 1 or nothing, got {wanted!r}")
        failure(name).unlink(missing_ok=True)
        required[name] = wanted == "1"
        if wanted == "0":
            without(name, f"{variable}=0 when it was installed")
            continue
        try:
            modules.append(make())
        except RuntimeError as error:
            if required[name]:
                raise
            without(name, str(error))
    setup(ext_modules=modules, cmdclass={"build_ext": build_command(required)} if modules else {})


if __name__ == "__main__":
    main()
