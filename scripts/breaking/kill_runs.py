"""Kill runs of the `textgym` command at random moments, resume them, and compare them with undisturbed ones.

    python scripts/breaking/kill_runs.py                       # 200 kills over six commands
    python scripts/breaking/kill_runs.py --kills 20 ppo sft

Of ten signals eight are SIGKILL, one SIGTERM and one SIGINT (Ctrl-C). A run that was killed is resumed until it has
come to its end; weights, metrics, samples and the names of all files must then be those of a run that was left alone. A
reward model has no checkpoints: it must be whole or not there, and training it again must give the same. Models are
small, so a run takes a second or two. Needs `fork`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

from textgym import deterministic_environment

REWARDS = """
import random

random.seed(0)

def noisy(completions):
    return [len(text) + random.random() for text in completions]
"""
ROWS = [{"prompt": f"{i} is", "completion": " one"} for i in range(12)]
PAIRS = [{"prompt": f"{i} is", "chosen": " one", "rejected": " two"} for i in range(12)]
SETTINGS: dict[str, list[str]] = {
    "ppo": ["--minibatch-size", "4", "--kl-target", "3", "--critic", "separate"],
    "grpo": ["--group-size", "4"],
    "dqn": ["--learning-starts", "8", "--batch-size", "4", "--buffer-size", "24", "--prioritised"],
    "sft": ["--data", "rows.jsonl"],
    "dpo": ["--data", "pairs.jsonl"],
    "reward-model": [],
}
"""The commands, and the settings of each."""
SIGNALS = (*[signal.SIGKILL] * 8, signal.SIGTERM, signal.SIGINT)
STOPPED = {signal.SIGTERM: (128 + signal.SIGTERM,), signal.SIGINT: (128 + signal.SIGINT,)}
"""Exit codes of a run that a signal stopped."""
FAILED = 3

ZYGOTE = """
import json, os, signal, sys
import matplotlib.figure, torch.utils.tensorboard  # which a run imports later
from textgym import cli

sys.path.append(os.getcwd())
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        code = 0
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            cli.main(json.loads(line))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 3
            print(error.code if code == 3 else "", end="", file=sys.stderr)
        except KeyboardInterrupt:
            code = 130
        except BaseException as error:
            code = 3
            print(type(error).__name__, error, file=sys.stderr)
        sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""A process that has imported everything, and forks one that runs the command for each line it reads."""


class Runner:
    """Runs commands in processes of their own, in the current folder, and kills them if asked to."""

    def __enter__(self) -> Self:
        self.errors = Path("stderr.txt").open("w")
        self.zygote = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | deterministic_environment(),
        )
        assert self._line() == "ready"
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.zygote.stdin is not None
        self.zygote.stdin.close()
        self.zygote.wait()
        self.errors.close()

    def _line(self) -> str:
        assert self.zygote.stdout is not None
        return self.zygote.stdout.readline().strip()

    def run(self, arguments: list[str], seconds: float | None = None, number: int = signal.SIGKILL) -> bool:
        """Run a command, and send it a signal after so many seconds; return whether it came to its end.

        Raises:
            RuntimeError: If it failed without having been killed.
        """
        assert self.zygote.stdin is not None
        self.zygote.stdin.write(json.dumps(arguments) + "\n")
        self.zygote.stdin.flush()
        child = int(self._line())
        killer = threading.Timer(threading.TIMEOUT_MAX if seconds is None else seconds, os.kill, (child, number))
        killer.start()
        status = int(self._line())
        killer.cancel()
        if status == 0:
            return True
        by_signal = os.WIFSIGNALED(status) and os.WTERMSIG(status) == number
        stopped = os.WIFEXITED(status) and os.WEXITSTATUS(status) in STOPPED.get(signal.Signals(number), ())
        if seconds is None or not (by_signal or stopped):
            said = Path(self.errors.name).read_text()[-2000:]
            raise RuntimeError(f"{' '.join(arguments[:3])} failed of itself with status {status}: {said}")
        return False


def prepare() -> None:
    """Write a model, data and a reward function with random numbers of its own into the current folder."""
    from textgym.testing import byte_tokenizer, mock_lm

    mock_lm().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    Path("my_noisy_rewards.py").write_text(REWARDS)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(kind: str, run: str) -> list[str]:
    """Return the command line of a short run."""
    if kind == "reward-model":
        return ["reward-model", "--preferences", "pairs.jsonl", "--epochs", "4", "--output-dir", run]
    env = {
        "prompts": ["one", "two", "three"],
        "reward": "my_noisy_rewards:noisy",
        "score_scaling": "running",
        "max_new_tokens": 4,
        **({"kl_coef": 0.1} if kind == "dqn" else {}),
    }
    length = ["--total-episodes", "64", "--episodes-per-update", "8"]
    if kind in ("sft", "dpo"):
        length = ["--max-steps", "8", "--batch-size", "4"]
    shared = ["--env", "textgym/Text-v0", "--num-envs", "8", "--env-kwargs", json.dumps(env), "--model", "model"]
    shared += ["--learning-rate", "0.01", "--checkpoint-every", "2", "--output-dir", run]
    return ["train", "--agent", kind, *length, *shared, *SETTINGS[kind]]


def differences(run: Path, whole: Path) -> list[str]:
    """Return the files in which two runs differ, apart from times, process ids, events and pictures."""
    names, others = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} for folder in (run, whole)
    )
    ignored = ("tensorboard/", "run.json", "run.lock", "textgym_manifest.json", "config.json", ".png", "training_args")
    found = [name for name in names ^ others if not any(part in name for part in ignored)]
    both = [name for name in sorted(names & others) if not any(part in name for part in ignored)]
    return found + [name for name in both if content(run / name) != content(whole / name)]


def content(path: Path) -> Any:
    """Return what counts of a file: metrics without times, agents without their machine, weights as they are."""
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
    if path.name == "agent.json":
        return {name: value for name, value in json.loads(path.read_text()).items() if name != "machine"}
    if path.suffix == ".pt" or path.name == "trainer_state.json":
        return None  # its bytes depend on memory addresses; wrong content would change the weights
    return path.read_bytes()


def kill(kind: str, kills: int, moments: random.Random, runner: Runner) -> list[str]:
    """Kill runs of a command at random moments; return the differences of the resumed runs from an undisturbed one."""
    whole, again = f"{kind}-whole", "--overwrite" if kind == "reward-model" else "--resume"
    runner.run(command(kind, whole))
    shutil.rmtree(whole)  # that run only filled the caches of the disk
    started = time.perf_counter()
    runner.run(command(kind, whole))
    length = time.perf_counter() - started
    found, killed, number = [], 0, 0
    while killed < kills:
        run, further = f"{kind}-{number}", []
        while True:
            seconds = moments.uniform(0, length) if killed < kills else None
            if runner.run([*command(kind, run), *further], seconds, moments.choice(SIGNALS)):
                break
            killed += 1
            further = [again]
            if kind == "reward-model" and Path(run).exists():
                found += [f"{run}: {name}" for name in half_written(Path(run))]
        found += [f"{run}: {name}" for name in differences(Path(run), Path(whole))]
        shutil.rmtree(run)
        number += 1
    print(f"| {kind} | {killed} | {number} | {length:.1f} | {', '.join(found) or 'none'} |", flush=True)
    return found


def half_written(folder: Path) -> list[str]:
    """Return what is wrong with a reward model that a killed process left."""
    from textgym.data.manifests import checked_manifest
    from textgym.errors import DamagedFolderError

    try:
        checked_manifest(folder)
    except DamagedFolderError as error:
        return [str(error)]
    return []


def main() -> None:
    """Kill runs of each command, and print a table; exit with 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commands", nargs="*", default=list(SETTINGS), help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments, found = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        prepare()
        print("| command | kills | runs | seconds of an undisturbed run | differences |")
        print("| --- | ---: | ---: | ---: | --- |", flush=True)
        with Runner() as runner:
            for index, kind in enumerate(arguments.commands):
                share = arguments.kills // len(arguments.commands)
                share += index < arguments.kills % len(arguments.commands)
                found += kill(kind, share, moments, runner)
        os.chdir("/")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
