"""Run the fast tests with the oldest versions that pyproject.toml allows.

    make test-oldest
    python scripts/checks/test_oldest.py --python python3.12 --folder /tmp/oldest -- -x tests/agents

It makes a virtual environment of several GB, because PyPI's torch contains CUDA, and installs every lower bound
`name>=version` of the dependencies and of the extras below as `name==version`. Their own dependencies have the newest
versions. Arguments after `--` go to pytest. The environment is kept, and made again when the bounds change.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXTRAS = ("contrib", "lora", "metrics", "tasks", "trackers", "dev")
NOT_TESTED = ("mypy", "pre-commit", "ruff")  # tools that no test imports


def oldest() -> list[str]:
    """Return the oldest allowed version of every dependency that tests use, as requirements of pip."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    bounds = [*project["dependencies"], *(bound for extra in EXTRAS for bound in extras[extra])]
    return [bound.replace(">=", "==") for bound in bounds if bound.partition(">=")[0] not in NOT_TESTED]


def find_python() -> str:
    """Return Python 3.12, which GPU machines usually have, or this Python."""
    return shutil.which("python3.12") or sys.executable


def install(python: str, folder: Path) -> Path:
    """Make the environment unless it already has these versions; return its Python."""
    wanted, done, interpreter = "\n".join(oldest()), folder / "installed.txt", folder / "bin" / "python"
    if not done.exists() or done.read_text() != wanted:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [interpreter, "-m", "pip", "install"]
        subprocess.run([*pip, *oldest()], check=True)
        subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT], check=True)
        done.write_text(wanted)
    return interpreter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=find_python(), help="the Python of the environment (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "oldest", help="default: %(default)s")
    parser.add_argument("tests", nargs="*", help="arguments of pytest; default: all fast tests")
    options = parser.parse_args()

    interpreter = install(options.python, options.folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sys.exit(subprocess.run([interpreter, "-m", "pytest", *options.tests], cwd=ROOT, env=environment).returncode)


if __name__ == "__main__":
    main()
