"""Checkpoints: whole or not there, whatever kills the process; runs that were killed end as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from textgym import cli
from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.progress import LiveProgress
from textgym.algorithms import OFFLINE
from textgym.data.files import TEMPORARY
from textgym.errors import DamagedFolderError
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.kl import AdaptiveKL
from textgym.testing import byte_tokenizer, mock_lm

REWARDS = """
import random

random.seed(0)

def noisy(completions):
    return [len(text) + random.random() for text in completions]
"""
ROWS = [{"prompt": f"{i} is", "completion": " one"} for i in range(12)]
PAIRS = [{"prompt": f"{i} is", "chosen": " one", "rejected": " two"} for i in range(12)]
WRITES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
"""Audit events of Python that come before a change on the disk."""


def make_envs(**kwargs: Any) -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two", "three"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        reference=mock_lm(),
        kl_mode="deferred",
        max_new_tokens=3,
        **kwargs,
    )


def make_agent() -> PPO:
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    return PPO(policy, make_envs(), PPOConfig(episodes_per_update=4, minibatch_size=4, learning_rate=1e-2))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- checkpoints alone ---


def test_the_newest_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=2, keep=2)
    assert checkpoints.newest() is None
    make_agent().learn(28, [checkpoints])
    assert names(checkpoints.folder) == ["step-000004", "step-000006"]
    assert checkpoints.newest() == checkpoints.folder / "step-000006"
    assert PPO.load(checkpoints.newest(), make_envs()).updates == 6


def test_order_is_by_number(tmp_path: Path) -> None:
    for number in ("999999", "1000000"):
        (tmp_path / f"step-{number}").mkdir()
    assert Checkpoints(tmp_path).newest() == tmp_path / "step-1000000"


def test_a_damaged_checkpoint_is_set_aside_for_the_newest_whole_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", every=1, keep=3)
    make_agent().learn(12, [checkpoints])
    (checkpoints.folder / "step-000003" / "state.pt").write_bytes(b"cut")
    (checkpoints.folder / "step-000002" / "policy" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"now damaged-step-00000., and the run goes on from .*step-000001") as caught:
        assert checkpoints.newest_whole() == checkpoints.folder / "step-000001"
    assert [name in str(warning.message) for name, warning in zip(("state.pt", "model"), caught, strict=True)]
    assert names(checkpoints.folder) == ["damaged-step-000002", "damaged-step-000003", "step-000001"]
    (checkpoints.folder / "step-000001" / "state.pt").unlink()
    with pytest.raises(DamagedFolderError, match=r"all checkpoints in .* are damaged: .*state.pt is missing"):
        checkpoints.newest_whole()


def test_foreign_files_beside_checkpoints_stay(tmp_path: Path) -> None:
    for name in ("step-000000", "step-by-step", ".tmp-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    checkpoints = Checkpoints(tmp_path, every=1, keep=1)
    make_agent().learn(8, [checkpoints])
    assert (tmp_path / "step-000002" / "agent.json").exists()
    for name in ("step-000000", "step-by-step", ".tmp-mine"):
        assert (tmp_path / name / "file").read_text() == "mine"


@pytest.mark.parametrize("settings", [{"every": 0}, {"keep": 0}])
def test_settings_are_checked(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(tmp_path, **settings)


def killed_at(event: int, checkpoints: Checkpoints, agent: PPO) -> bool:
    """Saves in a forked process that kills itself before so many of its writes; whether it lived so long."""
    child = os.fork()
    if child == 0:
        seen = 0

        def hook(name: str, arguments: Any) -> None:
            nonlocal seen
            if name in WRITES:
                seen += 1
                if seen == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            checkpoints.save(agent)
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), "it fails of itself"
    return status != 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 15], ids=["each", "each fifteenth"])
def test_killed_before_any_of_its_writes_the_newest_checkpoint_is_whole(tmp_path: Path, stride: int) -> None:
    agent, folder = make_agent(), tmp_path / "checkpoints"
    agent.learn(8).save(tmp_path / "second")
    weights = {2: {name: weight.clone() for name, weight in agent.policy.state_dict().items()}}
    weights[3] = agent.learn(12).policy.state_dict()
    found = []
    for event in itertools.count(1, stride):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "second", folder / "step-000002")
        checkpoints = Checkpoints(folder, keep=1)
        lived = not killed_at(event, checkpoints, agent)
        newest = checkpoints.newest()
        assert newest is not None
        checkpoints.clean()
        loaded = PPO.load(newest, make_envs())
        assert all(torch.equal(x, weights[loaded.updates][name]) for name, x in loaded.policy.state_dict().items())
        assert names(folder) == [newest.name], "what was half-written is gone"
        found.append(loaded.updates)
        if lived:
            break
    assert found == sorted(found), "once a checkpoint is there it stays"
    assert found.count(2) > 10 / stride
    assert found.count(3) > 10 / stride, "kills while the old one is removed"


# --- the command: what is resumed ends as the undisturbed run ---

SETTINGS: dict[str, list[str]] = {
    "ppo": ["--minibatch-size", "4", "--kl-target", "3", "--critic", "separate"],
    "nlpo": ["--minibatch-size", "4"],
    "grpo": ["--group-size", "4"],
    "dqn": ["--learning-starts", "8", "--batch-size", "4", "--buffer-size", "24", "--prioritised"],
    "sft": ["--data", "rows.jsonl"],
    "dpo": ["--data", "pairs.jsonl"],
}
"""Of each agent; `make test` runs one that plays episodes at once and one that remembers them."""


def train(agent: str, run: str, *further: str) -> list[str]:
    """The command line of a short run of 8 updates."""
    settings = ["--total-episodes", "64", "--episodes-per-update", "8", "--env", "textgym/Text-v0", "--num-envs", "8"]
    if agent in OFFLINE:
        settings = ["--max-steps", "8", "--batch-size", "4", "--env", "textgym/Text-v0", "--num-envs", "8"]
    env = {
        "prompts": ["one", "two", "three"],
        "reward": "my_noisy_rewards:noisy",
        "score_scaling": "running",
        "max_new_tokens": 4,
    }
    settings += ["--env-kwargs", json.dumps(env if agent != "dqn" else env | {"kl_coef": 0.1})]
    settings += ["--model", "model", "--learning-rate", "0.01", "--checkpoint-every", "2", "--output-dir", run]
    return ["train", "--agent", agent, *settings, *SETTINGS[agent], *further]


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, data and a reward function with random numbers of its own, beside the run folders."""
    mock_lm().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "my_noisy_rewards.py").write_text(REWARDS)
    for name, rows in (("rows", ROWS), ("pairs", PAIRS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def run(*arguments: str) -> None:
    """The command, in this process, as if in a new one."""
    sys.modules.pop("my_noisy_rewards", None)
    cli.main(list(arguments))


def metrics_in(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def assert_same(folder: Path, whole: Path) -> None:
    """Weights, critic, metrics and samples, bit for bit; every checkpoint is whole; nothing else is left."""
    for name in ("model.safetensors", "critic.safetensors"):
        mine, other = load_file(folder / "policy" / name), load_file(whole / "policy" / name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine), name
    assert metrics_in(folder) == metrics_in(whole)
    assert (folder / "samples.md").read_text() == (whole / "samples.md").read_text()
    assert names(folder) == names(whole)
    assert names(folder / "checkpoints") == names(whole / "checkpoints") == ["step-000006", "step-000008"]
    for path in folder.rglob("*"):
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".pt" and path.parent.name != "trainer":
            torch.load(path, weights_only=True)


@pytest.mark.bit_for_bit
@pytest.mark.parametrize(
    "agent", [pytest.param(name, marks=() if name in ("ppo", "dqn") else pytest.mark.slow) for name in SETTINGS]
)
def test_a_run_that_broke_off_ends_as_the_undisturbed_one(
    agent: str, working_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: LiveProgress, agent: Any, metrics: dict[str, float]) -> None:
        if agent.updates == 5:
            raise KeyboardInterrupt

    run(*train(agent, "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(LiveProgress, "__call__", interrupt)
        with pytest.raises(SystemExit):
            run(*train(agent, "part"))
    part = working_folder / "part"
    with (part / "metrics.jsonl").open("a") as file:
        file.write('{"episodes": 48, "obj')  # torn
    (part / f"{TEMPORARY}policy-x").mkdir()
    (part / "checkpoints" / f"{TEMPORARY}step-000006-x").mkdir()
    run(*train(agent, "part", "--resume"))
    assert_same(part, working_folder / "whole")
    events = EventAccumulator(str(part / "tensorboard")).Reload()
    clock = "updates" if agent in OFFLINE else "episodes"
    metric = "loss" if agent in OFFLINE else "objective/scores"
    assert [event.step for event in events.Scalars(metric)] == [int(row[clock]) for row in metrics_in(part)]


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(working_folder: Path) -> None:
    run(*train("ppo", "run"))
    shutil.copytree("run", "before")
    run(*train("ppo", "run", "--resume"))
    assert_same(working_folder / "run", working_folder / "before")


@pytest.mark.slow
def test_resuming_without_a_checkpoint_begins_anew(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*train("ppo", "run", "--resume"))
    assert "run has no checkpoint to resume from: it starts again" in " ".join(capsys.readouterr().out.split())
    assert len(metrics_in(working_folder / "run")) == 8


def test_checkpoints_are_not_written_over_and_settings_must_be_the_same(working_folder: Path) -> None:
    run(*train("sft", "run"))
    with pytest.raises(SystemExit, match=r"run holds a run already: go on with it \(--resume\)"):
        run(*train("sft", "run"))
    with pytest.raises(SystemExit, match=r"other settings, .*: seed was 0 and is 1$"):
        run(*train("sft", "run", "--resume", "--max-steps", "9", "--seed", "1"))
    rows = [*ROWS, {"prompt": "more", "completion": " rows"}]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match="was trained on other data"):
        run(*train("sft", "run", "--resume", "--checkpoint-every", "3"))


# --- kill -9 ---

ZYGOTE = """
import json, os, sys
import matplotlib.figure, torch.utils.tensorboard  # what a run imports by and by
from textgym import cli, flags

print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        cli.main(json.loads(line))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""
"""A process that has imported everything, and forks one that runs the command for each line it reads."""


@pytest.mark.bit_for_bit
@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:.*saved with other inputs")  # the environments that it loads into are simpler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_random_moments_and_resumed_each_time_a_run_ends_as_the_undisturbed_one(
    working_folder: Path,
) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    zygote = subprocess.Popen([sys.executable, "-c", ZYGOTE], text=True, **pipes)
    assert zygote.stdin is not None
    assert zygote.stdout is not None

    def live(*arguments: str, seconds: float = threading.TIMEOUT_MAX) -> bool:
        """Runs the command for so many seconds at most; whether it came to its end."""
        zygote.stdin.write(json.dumps(arguments) + "\n")
        zygote.stdin.flush()
        child = int(zygote.stdout.readline())
        killer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL))
        killer.start()
        status = int(zygote.stdout.readline())
        killer.cancel()
        assert status in (0, signal.SIGKILL), "it fails of itself"
        return status == 0

    assert zygote.stdout.readline() == "ready\n"
    assert live(*train("ppo", "whole"))  # which also warms up the disk
    shutil.rmtree("whole")
    started = time.perf_counter()
    assert live(*train("ppo", "whole"))
    length = time.perf_counter() - started
    moments, kills = random.Random(0), 0
    for number in itertools.count():
        resume: list[str] = []
        while kills < 20 and not live(*train("ppo", f"run-{number}", *resume), seconds=moments.uniform(0, length)):
            kills, resume = kills + 1, ["--resume"]
            for path in Path(f"run-{number}").glob("checkpoints/step-*"):
                envs = make_envs(kl_coef=AdaptiveKL(target=3.0))
                assert PPO.load(path, envs).updates == int(path.name[-6:])
        if kills == 20:  # a busy machine, which needs longer than the undisturbed run did, is let come to an end
            assert live(*train("ppo", f"run-{number}", "--resume"))
        assert_same(working_folder / f"run-{number}", working_folder / "whole")
        if kills == 20:
            break
    zygote.stdin.close()
    assert zygote.wait() == 0
