"""Builds what the simulator runs: the extension for sm_90 with line numbers, and the runtime that takes CUDA's place."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "out" / "sass"
ARCHITECTURE = "9.0"


def nvidia_tool(name: str) -> Path | None:
    """``nvdisasm`` or ``cuobjdump``: Triton's, else the one on PATH."""
    if (spec := importlib.util.find_spec("triton")) and spec.origin:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        if path.exists():
            return path
    found = shutil.which(name)
    return Path(found) if found else None


def missing() -> str | None:
    """Why kernels can't be built and read here; None if they can."""
    if setup_functions()["find_cuda_home"]() is None:
        return "no nvcc"
    for name in ("nvdisasm", "cuobjdump"):
        if nvidia_tool(name) is None:
            return f"no {name}: install triton or the CUDA toolkit"
    return None if shutil.which("g++") else "no g++"


def setup_functions() -> dict:
    """setup.py's functions, so that both builds have the same sources and flags."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


def nvcc_version() -> str:
    home = setup_functions()["find_cuda_home"]()
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match[1] if match else "unknown"


def sources_hash() -> str:
    """Of all that the extension is made of."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def extension() -> Path:
    """The built ``_C``, which GHOSTFUSED_SASS_EXTENSION may name; else only what changed is compiled again."""
    if given := os.environ.get("GHOSTFUSED_SASS_EXTENSION"):
        return Path(given)
    folder = CACHE / "extension"
    stamp = folder / "built"
    key = sources_hash()
    found = sorted(folder.glob("lib/ghostfused/_C*.so"))
    if found and stamp.exists() and stamp.read_text() == key:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    print(f"building the extension for sm_90 in {folder} …", file=sys.stderr)
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ARCHITECTURE, "MAX_JOBS": os.environ.get("MAX_JOBS", "2")}
    environment.pop("LD_PRELOAD", None)
    command = [sys.executable, "-m", "tools.sass.build", str(folder)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (folder / "log").write_text(run.stdout + run.stderr)
    if run.returncode:
        raise RuntimeError(f"the extension's build failed:\n{(run.stdout + run.stderr)[-3000:]}")
    stamp.write_text(key)
    return sorted(folder.glob("lib/ghostfused/_C*.so"))[0]


def build_extension(folder: Path) -> None:
    """setup.py's extension with line numbers, into ``folder``."""
    from setuptools import Distribution

    module = setup_functions()["cuda_extension"]()  # sets CUDA_HOME, which torch reads on import
    from torch.utils.cpp_extension import BuildExtension

    module.extra_compile_args["nvcc"].append("-lineinfo")
    command = BuildExtension(Distribution({"name": "ghostfused", "ext_modules": [module]}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()


def cubins(library: Path) -> list[Path]:
    """The sm_90 machine code in ``library``, a file for each of its sources."""
    folder = CACHE / "cubins" / hashlib.sha256(library.read_bytes()).hexdigest()[:16]
    if not folder.exists():
        temporary = folder.with_suffix(f".{os.getpid()}")
        temporary.mkdir(parents=True)
        command = [str(nvidia_tool("cuobjdump")), "-xelf", "all", str(library)]
        subprocess.run(command, cwd=temporary, capture_output=True, check=True)
        for other in folder.parent.iterdir():  # of earlier builds
            if other != temporary:
                shutil.rmtree(other, ignore_errors=True)
        temporary.rename(folder)
    return sorted(folder.glob("*.cubin"))


def runtime() -> Path:
    """A folder with the stand-ins for libcudart (to be preloaded) and libcuda."""
    sources = [HERE / "runtime.cpp", HERE / "driver.cpp"]
    key = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:16]
    folder = CACHE / f"runtime-{key}"
    if not folder.exists():
        temporary = folder.with_suffix(f".{os.getpid()}")
        temporary.mkdir(parents=True)
        include = setup_functions()["find_cuda_home"]() / "include"
        common = ["g++", "-std=c++17", "-O2", "-Wall", "-shared", "-fPIC", f"-I{include}"]
        subprocess.run([*common, str(sources[0]), "-o", str(temporary / "libcudart-sass.so")], check=True)
        named = ["-Wl,-soname,libcuda.so.1", "-o", str(temporary / "libcuda.so.1")]
        subprocess.run([*common, str(sources[1]), *named], check=True)
        temporary.rename(folder)
    return folder


if __name__ == "__main__":
    build_extension(Path(sys.argv[1]))
