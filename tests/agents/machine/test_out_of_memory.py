"""A GPU that is out of memory in the middle of an update: one line that says what to lower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest
import torch

from textgym import cli
from textgym.agents import PPO, SFT, PPOConfig, SFTConfig
from textgym.agents.machine import out_of_memory
from textgym.agents.runs.checkpoints import Checkpoints
from textgym.models.actor_critic import ActorCritic
from textgym.testing import byte_tokenizer, mock_lm

ROWS = [{"prompt": f"{i} is", "completion": " one"} for i in range(8)]


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets so many steps of AdamW go by, and raises what torch raises at the next."""

    def arrange(steps: int) -> None:
        step = torch.optim.AdamW.step

        def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", limited)

    return arrange


def make_envs() -> Any:
    return gym.make_vec(
        "textgym/Text-v0",
        num_envs=4,
        prompts=["one", "two"],
        tokenizer=byte_tokenizer(),
        reward=lambda completions: [float(len(text)) for text in completions],
        reference=mock_lm(),
        kl_mode="deferred",
        max_new_tokens=3,
    )


def test_the_error_says_what_took_the_memory_and_what_to_lower(full_after: Any, tmp_path: Path) -> None:
    config = PPOConfig(episodes_per_update=4, minibatch_size=4, num_epochs=1, bf16=True)
    agent = PPO(ActorCritic.from_pretrained(mock_lm()), make_envs(), config)
    checkpoints = Checkpoints(tmp_path, every=1)
    full_after(2)
    with pytest.raises(MemoryError, match=r"was out of memory in update 3\. At the peak") as said:
        agent.learn(32, [checkpoints])
    text = str(said.value)
    assert "\n" not in text
    for part in ("policy ", "reference ", "optimiser ", "activations and the rest "):
        assert part in text
    for setting in ("micro_batch_size (now None)", "episodes_per_update (now 4)", "gradient_checkpointing=True"):
        assert setting in text
    assert "bf16=True" not in text, "it is on already"
    assert isinstance(said.value.__cause__, torch.OutOfMemoryError)
    newest = checkpoints.newest()
    assert newest is not None
    assert PPO.load(newest, make_envs()).updates == 2


def test_parts_that_are_above_the_measured_peak_leave_no_rest(full_after: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(out_of_memory, "peak_memory", lambda device: 1)
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), ROWS, byte_tokenizer(), SFTConfig(batch_size=4))
    full_after(0)
    with pytest.raises(MemoryError, match=r"At the peak 0\.00 GiB were in use: policy ") as said:
        agent.learn()
    assert "activations and the rest" not in str(said.value)


def test_agents_that_learn_from_data_say_so_too(full_after: Any) -> None:
    agent = SFT(ActorCritic.from_pretrained(mock_lm()), ROWS, byte_tokenizer(), SFTConfig(batch_size=4))
    full_after(1)
    with pytest.raises(MemoryError, match=r"out of memory in update 2\..* policy .*optimiser .*Lower micro_batch_size"):
        agent.learn()


def test_the_command_ends_with_the_line(full_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mock_lm().save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    full_after(0)
    arguments = ["--model", "model", "--num-envs", "4", "--episodes-per-update", "4", "--minibatch-size", "4"]
    arguments += ["--env", "textgym/Text-v0", "--total-episodes", "8", "--output-dir", "run", "--device", "cpu"]
    arguments += ["--env-kwargs", '{"prompts": ["one"], "reward": "textgym.rewards.functions:DistinctN"}']
    with pytest.raises(SystemExit, match=r"^textgym: cpu was out of memory in update 1\."):
        cli.main(["train", *arguments])
