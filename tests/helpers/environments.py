"""Virtual environments to install into."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def make(folder: Path, *options: str) -> Path:
    """A new one in ``folder`` that sees this one's packages, but for those that are installed editable; returns the folder of its
    own packages."""
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    # Python reads no further .pth files in a folder that one names: an editable install there stays out
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return packages
