"""What README tells a newcomer, in its order, in a fresh virtual environment: from the installation to the first speed-up.

``.ci/run`` calls it. The environment is new but for the packages of the interpreter that runs this: PyTorch alone is gigabytes, so
README's first command finds it there. What takes minutes is left out: of the CPU kernels all but those that this machine takes, and
the CUDA kernels, which no GPU is there to run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
import cpu_sources
import documents
import environments

from ghostfused.backends import cpu


def main() -> int:
    built = cpu.build_info()
    if built is None:
        raise SystemExit(f"{cpu.unavailable()}: expected one, whose kernels a newcomer would get")
    with tempfile.TemporaryDirectory() as folder:
        checkout, environment = Path(folder, "ghostfused"), Path(folder, "environment")
        subprocess.run(["git", "clone", "--quiet", documents.ROOT, checkout], check=True)
        isas = checkout / "csrc/cpu/isa"
        chosen = (isas / f"{built['chosen']}.cpp").read_text()  # it may name tables of others
        for isa in isas.glob("*.cpp"):
            if not re.search(rf"\b{cpu_sources.table_of(isa.stem)}\b", chosen):
                isa.write_text(cpu_sources.absent_kernels([isa.stem]))
        environments.make(environment)
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "GHOSTFUSED_CUDA": "0"}

        def run(*command: str) -> None:
            print("$", command[-1], flush=True)
            subprocess.run(command, cwd=checkout, env=variables, check=True)

        for block in documents.read(checkout / "README.md")[0]:
            if block.language == "bash":
                for command in block.commands():
                    run("bash", "-c", command)
            elif block.language == "python":
                run("python", "-c", block.text)
        run("python", "-c", _KERNELS.format(isa=built["chosen"], folder=str(checkout)))
    return 0


_KERNELS = """
import ghostfused
from ghostfused.backends import cpu

assert ghostfused.__file__.startswith({folder!r})
assert cpu.unavailable() is None and cpu.build_info()["chosen"] == {isa!r}
"""


if __name__ == "__main__":
    sys.exit(main())
