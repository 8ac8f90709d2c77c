"""A disk that is full and a folder that nobody may write to, as the operating system reports them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from textgym.agents import PPO, PPOConfig
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.agents.runs.run_folder import RunFolder
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def make_envs() -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        max_new_tokens=2,
    )


@pytest.fixture
def agent() -> PPO:
    return PPO(ActorCritic.from_pretrained(mock_lm()), make_envs(), PPOConfig(episodes_per_update=4))


def error_in_fork(restrict: Callable[[], None], act: Callable[[], Any]) -> str:
    """What an action ends with in a forked process under a restriction that would last."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        said = "it succeeded"
        try:
            restrict()
            act()
        except OSError as error:
            said = str(error)
        except BaseException:
            said = traceback.format_exc()
        os.write(writable, said.encode())
        os._exit(0)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "room", [100, pytest.param(0, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.slow)]
)
def test_a_full_disk_changes_nothing(room: int, agent: PPO, tmp_path: Path) -> None:
    """The limit of a file's size is reported as a full disk is: by an error of `write`, wherever it comes."""
    resource = pytest.importorskip("resource")
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(agent)
    before = contents(tmp_path)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    said = error_in_fork(fill, lambda: checkpoints.save(agent.learn(4)))
    assert "could not write" in said
    assert "step-000001" in said
    assert "check the free disk space and the permissions" in said
    assert contents(tmp_path) == before
    assert PPO.load(tmp_path / "checkpoints" / "step-000000", make_envs()).updates == 0


def test_a_folder_that_cannot_be_written_is_named(agent: PPO, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    folder.chmod(0o555)

    def be_nobody() -> None:
        if os.geteuid() == 0:  # for whom there are no permissions
            tmp_path.chmod(0o755)
            os.setuid(65534)

    for act in (
        lambda: agent.save(folder / "agent"),
        lambda: Checkpoints(folder / "checkpoints").save(agent),
        lambda: agent.policy.save_pretrained(folder / "policy"),
        lambda: RunFolder(folder / "run", PPOConfig()),
    ):
        said = error_in_fork(be_nobody, act)
        assert str(folder) in said
        assert "Permission denied" in said
    assert list(folder.iterdir()) == []
