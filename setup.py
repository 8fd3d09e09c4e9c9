"""Builds ghostfused._C where there is a CUDA toolkit; everything else is in pyproject.toml.

Environment:
    GHOSTFUSED_CUDA       0: don't build the extension; 1: fail if it can't be built; unset: build it if possible.
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
FAILURE = ROOT / "ghostfused" / "_build_failure.txt"
"""Why the last build has no extension; ``python -m ghostfused info`` shows it."""


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


def extension():
    """(the extension module, its build command); raises RuntimeError where it can't be built."""
    cuda_home = find_cuda_home()
    if cuda_home is None:
        raise RuntimeError("no CUDA toolkit with nvcc on PATH, in CUDA_HOME or in pip's nvidia packages")
    os.environ["CUDA_HOME"] = str(cuda_home)  # torch reads it on import
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(f"no torch at build time ({error}); install with --no-build-isolation") from error

    include_dirs = [str(ROOT / "csrc")]
    if importlib.util.find_spec("pybind11"):  # else torch's copy
        import pybind11

        include_dirs.append(pybind11.get_include())
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ")
    sources = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").iterdir())
    module = cpp_extension.CUDAExtension(
        "ghostfused._C",
        sources=[str(p) for p in sources if p.suffix in (".cpp", ".cu")],
        depends=[str(p) for p in sources if p.suffix in (".h", ".cuh")],
        include_dirs=include_dirs,
        extra_compile_args={
            "cxx": [
                *("-std=c++20", "-O2", "-g0", "-Wall", "-fvisibility=hidden"),
                *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"),  # the stable ABI of torch 2.11
                f'-DGHOSTFUSED_ARCHITECTURES="{architectures}"',
            ],
            "nvcc": ["-std=c++20", "-O3", "-Xptxas=-warn-spills", "-Xfatbin=-compress-all"],
        },
        extra_link_args=cudart(cuda_home),
    )
    module.libraries = [name for name in module.libraries if name in ("c10", "torch", "torch_cpu", "torch_cuda")]
    return module, cpp_extension.BuildExtension


def optional(command: type) -> type:
    """``command``, but a build that fails leaves a note instead of an exception."""

    class Optional(command):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                without(f"the build failed: {error}")

    return Optional


def without(reason: str) -> None:
    print(f"warning: ghostfused is installed without its CUDA extension: {reason}", file=sys.stderr)
    FAILURE.write_text(reason + "\n")


def main() -> None:
    wanted = os.environ.get("GHOSTFUSED_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"GHOSTFUSED_CUDA: expected 0, 1 or nothing, got {wanted!r}")
    FAILURE.unlink(missing_ok=True)
    modules, commands = [], {}
    if wanted == "0":
        without("GHOSTFUSED_CUDA=0 when it was installed")
    else:
        try:
            module, command = extension()
            modules, commands = [module], {"build_ext": command if wanted == "1" else optional(command)}
        except RuntimeError as error:
            if wanted == "1":
                raise
            without(str(error))
    setup(ext_modules=modules, cmdclass=commands)


main()
