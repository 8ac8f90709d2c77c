"""What a new user does in the first minutes, with a stopwatch: from an empty environment to a reward of their own.

    python scripts/checks/stopwatch.py                       # constraints.txt says which versions
    python scripts/checks/stopwatch.py --episodes 256

Makes a virtual environment in a temporary folder, installs this checkout into it, and runs the commands that a new user
types, one after the other, in an empty folder. Prints a table of the commands and the seconds that each took. "A bad
token" is the one with the largest KL to the reference in the last record of the run, which the viewer shows first.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
REWARD = """def brevity(completions):
    return [-abs(len(text.split()) - 5) for text in completions]
"""


@dataclass
class Args:
    episodes: int = 1024
    """Episodes of the first training run; it is resumed to twice as many."""


@dataclass(frozen=True)
class Step:
    """What the user wants, and the commands for it."""

    goal: str
    commands: tuple[str, ...]


def steps(args: Args) -> list[Step]:
    """Return the steps in their order."""
    few = f"--total-episodes {args.episodes}"
    install = f"pip install --constraint {ROOT}/constraints.txt '{ROOT}[plots]'"
    reward = '--env-kwargs \'{"reward": "my_rewards:brevity"}\''
    return [
        Step("an installed package", ("python3 -m venv venv", install)),
        Step("a trained policy", (f"textgym train {few} --output-dir runs/first",)),
        Step("a look at a bad token", ("textgym view runs/first",)),
        Step("a resumed run", (f"textgym resume runs/first --total-episodes {2 * args.episodes}",)),
        Step("a reward function of their own", (f"textgym train {few} --output-dir runs/mine {reward}",)),
    ]


def run(command: str, folder: Path) -> None:
    """Run a command as a user of the virtual environment does; show what it printed if it fails."""
    environment = f'export PATH="{folder}/venv/bin:$PATH" OMP_NUM_THREADS=1; '
    done = subprocess.run(["bash", "-c", environment + command], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "my_rewards.py").write_text(REWARD)
        print("| goal | commands | seconds | minutes since the start |\n| --- | --- | --- | --- |")
        began = time.monotonic()
        for step in steps(args):
            started = time.monotonic()
            for command in step.commands:
                run(command, folder)
            seconds, minutes = time.monotonic() - started, (time.monotonic() - began) / 60
            print(f"| {step.goal} | {len(step.commands)} | {seconds:.0f} | {minutes:.1f} |", flush=True)
    print(f"Python {sys.version.split()[0]}, {args.episodes} episodes")


if __name__ == "__main__":
    main(tyro.cli(Args))
