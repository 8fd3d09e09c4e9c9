"""What README tells a newcomer, in its order, in a fresh virtual environment: from the installation to the first speed-up.

``.ci/run`` calls it. The environment is new but for the packages of the interpreter that runs this: PyTorch alone is gigabytes, so
README's first command finds it there. No CUDA kernel is built: no GPU is there to run one, and the tests have compiled it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "helpers"))
import documents


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        checkout, environment = Path(folder, "ghostfused"), Path(folder, "environment")
        subprocess.run(["git", "clone", "--quiet", documents.ROOT, checkout], check=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        python = environment / "bin" / "python"
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
        packages.joinpath("others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        variables = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "GHOSTFUSED_CUDA": "0",
        }

        def run(command: list[str | Path]) -> None:
            print("$", *command[-1:], flush=True)
            subprocess.run(command, cwd=checkout, env=variables, check=True)

        for block in documents.read(checkout / "README.md")[0]:
            if block.language == "bash":
                for command in block.commands():
                    run(["bash", "-c", command])
            elif block.language == "python":
                run([python, "-c", block.text])
        run([python, "-c", "from ghostfused.cli import info; assert info.collect()['backends']['cpu'] is None"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
