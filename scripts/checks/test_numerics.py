"""Run the tests that are sensitive to rounding with several numerical settings, and print a table.

    python scripts/checks/test_numerics.py
    python scripts/checks/test_numerics.py --capabilities default --cbwr COMPATIBLE --threads 1

`ATEN_CPU_CAPABILITY` selects PyTorch's kernels ("native" for PyTorch's own choice), `MKL_CBWR` those of MKL, and
`OMP_NUM_THREADS` the number of parts of sums. A row runs the tests marked `numerics`, then trains for a few updates,
kills the run with SIGKILL, resumes it, and compares the bytes of its weights with those of an uninterrupted run.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
TRAIN = [
    *("--env", "textgym/Sentiment-v0", "--env-kwargs", json.dumps({"max_new_tokens": 4})),
    *("--num-envs", "16", "--episodes-per-update", "16", "--total-episodes", "64", "--checkpoint-every", "1"),
]
"""Arguments of a PPO run with four updates."""
DIES = """
import os, signal, sys

from textgym.models.machine.determinism import prepare_environment

prepare_environment(sys.argv)

from textgym.agents.runs.checkpoints import Checkpoints
from textgym.cli import main

save = Checkpoints.save


def save_and_die(self, agent):
    save(self, agent)
    if agent.updates == 2:
        os.kill(os.getpid(), signal.SIGKILL)


Checkpoints.save = save_and_die
main(sys.argv[1:])
"""
"""The command, which kills itself after its second checkpoint: a signal from outside might come too late."""


@dataclass
class Config:
    capabilities: tuple[str, ...] = ("default", "avx2", "native")
    cbwr: tuple[str, ...] = ("unset", "COMPATIBLE", "AVX2,STRICT")
    threads: tuple[int, ...] = (1, 2)
    resume: bool = True
    """Whether each row kills and resumes a run."""


def environment(capability: str, cbwr: str, threads: int) -> dict[str, str]:
    """Return the environment variables of a row of the table."""
    variables = {name: text for name, text in os.environ.items() if name not in ("ATEN_CPU_CAPABILITY", "MKL_CBWR")}
    if capability != "native":
        variables["ATEN_CPU_CAPABILITY"] = capability
    if cbwr != "unset":
        variables["MKL_CBWR"] = cbwr
    # Waiting threads must not spin: if another process runs, two spinning threads are many times slower.
    return variables | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}


def run_tests(variables: dict[str, str], folder: Path) -> tuple[int, int, float]:
    """Return the number of passed tests, of failed tests, and the seconds; print the names of failed tests."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-m", "numerics", "--quiet", "--tb=short", f"--junitxml={report}"]
    result = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    if not report.exists():
        raise SystemExit(f"pytest did not run:\n{result.stdout}{result.stderr}")

    (suite,) = xml.etree.ElementTree.parse(report).iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    if failed:
        print(result.stdout)
    return counts["tests"] - failed - counts["skipped"], failed, float(suite.attrib["time"])


def resumes(variables: dict[str, str], folder: Path) -> bool:
    """Return whether a run that is killed and resumed ends with the bytes of an uninterrupted one."""

    def train(name: str, *flags: str, program: tuple[str, str] = ("-m", "textgym")) -> int:
        # Equal bits need the variables that --deterministic sets unless the row sets them: docs/rounding.md
        command = [sys.executable, *program, "train", "--deterministic", "--output-dir", str(folder / name)]
        with (folder / f"{name}.log").open("ab") as log:
            return subprocess.call([*command, *TRAIN, *flags], env=variables, stdout=log, stderr=log)

    whole = train("whole")
    killed = train("part", program=("-c", DIES)) == -signal.SIGKILL
    if train("part", "--resume") or whole or not killed:
        print((folder / "part.log").read_text(), (folder / "whole.log").read_text())
        return False
    files = sorted((folder / "whole" / "policy").glob("*.safetensors"))
    return bool(files) and all(
        file.read_bytes() == (folder / "part" / "policy" / file.name).read_bytes() for file in files
    )


def processor() -> str:
    """Return the name of the processor, if the system has it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def main(config: Config) -> bool:
    """Print the table, and return whether all rows passed."""
    print(f"{processor()}; {platform.platform()}\n", flush=True)
    print("| ATEN_CPU_CAPABILITY | MKL_CBWR | threads | passed | failed | seconds | killed and resumed |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    right = True
    for capability, cbwr, threads in itertools.product(config.capabilities, config.cbwr, config.threads):
        variables = environment(capability, cbwr, threads)
        with tempfile.TemporaryDirectory() as name:
            passed, failed, seconds = run_tests(variables, Path(name))
            same = resumes(variables, Path(name)) if config.resume else None
        word = {None: "-", True: "equal bytes", False: "DIFFERENT"}[same]
        print(f"| {capability} | {cbwr} | {threads} | {passed} | {failed} | {seconds:.0f} | {word} |", flush=True)
        right = right and passed > 0 and not failed and same is not False
    return right


if __name__ == "__main__":
    if not main(tyro.cli(Config)):
        raise SystemExit(1)
