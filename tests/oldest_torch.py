"""Compiles the C++ that includes torch's headers against those of the oldest torch that pyproject.toml allows: ``make check``.

The headers come from the wheel for macOS: torch's own are the same on all platforms, and without CUDA's libraries the
wheel is 80 MB. Only names and types are checked, nothing is built. Usage: python tests/oldest_torch.py FOLDER, which keeps
the headers.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def oldest() -> str:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (version,) = [match[1] for d in dependencies if (match := re.match(r"torch>=([\d.]+)", d))]
    return version


def download(version: str, folder: Path) -> None:
    """torch's own headers, without the copies of other projects' that come with them."""
    with tempfile.TemporaryDirectory() as there:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            f"--dest={there}",
        ]
        where = ["--platform=macosx_11_0_arm64", "--python-version=3.12"]
        subprocess.run([*pip, *where, f"torch=={version}"], check=True)
        with zipfile.ZipFile(next(Path(there).glob("torch-*.whl"))) as wheel:
            for name in wheel.namelist():
                if name.startswith("torch/include/torch/"):
                    wheel.extract(name, folder)
    (folder / "version").write_text(version)


def flags(version: str) -> list[str]:
    """As setup.py's, whose stable ABI must be that of ``version``."""
    major, minor = map(int, version.split(".")[:2])
    target = f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"
    if target not in (ROOT / "setup.py").read_text():
        raise SystemExit(f"setup.py: expected {target}, since pyproject.toml allows torch {version}")
    return [
        "-std=c++20",
        "-fvisibility=hidden",
        "-DUSE_CUDA",
        '-DGHOSTFUSED_ARCHITECTURES=""',
        target,
        "-DPy_LIMITED_API=0x030b0000",
    ]


def cuda_headers() -> Path:
    packages = Path(sysconfig.get_path("purelib"))
    folders = [packages / "triton/backends/nvidia/include", Path("/usr/local/cuda/include")]
    for folder in folders:
        if (folder / "cuda_runtime_api.h").exists():
            return folder
    raise SystemExit(f"no cuda_runtime_api.h in {', '.join(map(str, folders))}")


def includes_torch(compiler: list[str], file: Path) -> bool:
    """Whether ``file`` takes a header of torch's, itself or through another; so may one with a header that isn't found."""
    found = subprocess.run([*compiler, "-MM", str(file)], capture_output=True, text=True, check=False)
    return found.returncode != 0 or "/include/torch/" in found.stdout


def main(folder: Path) -> int:
    version = oldest()
    kept = folder / "version"
    if not kept.exists() or kept.read_text() != version:
        download(version, folder)
    includes = [
        ROOT / "csrc",
        sysconfig.get_path("include"),
        folder / "torch" / "include",
        cuda_headers(),
    ]
    compiler = ["g++", *flags(version), *(f"-I{i}" for i in includes)]
    sources = [file for file in sorted((ROOT / "csrc").rglob("*.cpp")) if includes_torch(compiler, file)]
    failed = sum(subprocess.run([*compiler, "-fsyntax-only", str(file)]).returncode != 0 for file in sources)
    print(f"torch {version}: {len(sources) - failed} of {len(sources)} files compile")
    return int(failed > 0 or not sources)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
