"""Stock SB3 trains encoder-decoder policies: the buffer puts prompt and response together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from textgym.sb3 import EpisodeReplayBuffer
from textgym.sb3.rollout_buffer import rows_of
from textgym.testing import assert_close, byte_tokenizer, mock_seq2seq_lm, terms_of

FORWARD = terms_of(mock_seq2seq_lm())

START = 257


@pytest.fixture
def folder(tmp_path: Path) -> str:
    mock_seq2seq_lm(num_layers=1).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    return str(tmp_path / "t5")


def test_rows_of_prompt_and_response_come_back_from_observations(make_env: Any, folder: str) -> None:
    env = make_env(3, decoder_start_ids=[START], tokenizer=folder, reference=folder, stop=())
    observation = env.reset()
    for token in (65, 66):
        observation, *_ = env.step(np.full(3, token))
    rows, lengths, prompt_lengths = rows_of(observation, (START,))
    episodes = env.envs.unwrapped.task.episodes
    assert lengths.tolist() == episodes.lengths.tolist()
    assert prompt_lengths.tolist() == episodes.prompt_lengths.tolist()
    for row, length in enumerate(lengths):
        assert rows[row, :length].tolist() == episodes.input_ids[row, :length].tolist()


def test_ppo_trains_and_scores_minibatches_as_it_acted(
    make_env: Any, make_model: Any, collect: Any, folder: str
) -> None:
    """Rollouts cut episodes in the middle, so that segments begin with a part of a response."""
    env = make_env(decoder_start_ids=[START], tokenizer=folder, reference=None, kl_coef=0.1, kl_mode="deferred")
    model = make_model(env, folder=folder, rollout_buffer_kwargs={"reference": folder, "kl_coef": 0.1}, n_steps=8)
    before = model.policy.actor_critic.lm.shared.weight.detach().clone()
    buffer = collect(model, 2)
    assert any(len(segment.context) > segment.prompt_length for segment in buffer.segments)
    for batch in buffer.get(8):
        values, log_prob, _ = model.policy.evaluate_actions(batch.observations, batch.actions)
        assert_close(log_prob, batch.old_log_prob, terms=FORWARD)
        assert_close(values[:, 0], batch.old_values, terms=FORWARD)
    model.learn(64)
    assert not torch.equal(model.policy.actor_critic.lm.shared.weight, before)


def test_the_replay_buffer_refuses_them_with_a_sentence(make_env: Any, folder: str) -> None:
    env = make_env(decoder_start_ids=[START], tokenizer=folder, reference=folder)
    with pytest.raises(ValueError, match="for an encoder-decoder model use PPO"):
        EpisodeReplayBuffer(8, env.observation_space, env.action_space)
