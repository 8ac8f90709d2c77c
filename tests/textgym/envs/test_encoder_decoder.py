"""Environments for encoder-decoder models: prompt and response apart in the observation, all else the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import textgym  # noqa: F401  (registers the ids)
from textgym.envs.text import TextEnv
from textgym.errors import CutPromptsWarning
from textgym.models.actor_critic import ActorCritic
from textgym.models.token_model import TokenModel
from textgym.testing import assert_close, byte_tokenizer, check_text_env, mock_lm, mock_seq2seq_lm, terms_of
from textgym.wrappers import TextObservation, TokenHistory, TopKActions

FORWARD = terms_of(mock_seq2seq_lm())

START = (257,)


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "reference": mock_seq2seq_lm(), "decoder_start_ids": list(START)}


def test_the_contract_of_text_environments_holds(settings: dict[str, Any]) -> None:
    env = gym.make("textgym/Text-v0", **settings)
    check_text_env(env, gym.make_vec("textgym/Text-v0", num_envs=3, **settings))


def test_prompt_and_response_are_apart_and_one_decoder_slot_is_filled(settings: dict[str, Any]) -> None:
    env = gym.make("textgym/Text-v0", **settings | {"decoder_start_ids": [257, 9]})
    spaces = {key: (space.shape, space.dtype.name) for key, space in env.observation_space.items()}
    assert spaces == {
        "input_ids": ((8,), "int64"),
        "attention_mask": ((8,), "int64"),
        "decoder_input_ids": ((7,), "int64"),
        "decoder_attention_mask": ((7,), "int64"),
    }
    observation, _ = env.reset(seed=0, options={"prompt_index": 3})
    assert observation["input_ids"].tolist() == [*b"four", 257, 257, 257, 257]
    assert observation["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert observation["decoder_input_ids"].tolist() == [257, 9, 257, 257, 257, 257, 257]
    assert observation["decoder_attention_mask"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    for step, token in enumerate((257, 65)):  # the padding id is a token like any other: masks come from lengths
        following = env.step(token)[0]
        assert following["decoder_input_ids"][2 + step] == token
        assert following["decoder_attention_mask"].sum() == 3 + step
        changed = {key for key, value in following.items() if (value != observation[key]).any()}
        assert changed <= {"decoder_input_ids", "decoder_attention_mask"}
        observation = following


def test_a_prompt_may_take_all_positions_of_the_encoder() -> None:
    reference = mock_seq2seq_lm(architecture="bart", max_position_embeddings=16)
    with pytest.warns(CutPromptsWarning, match="more than 16 tokens and lose 4 tokens"):
        env = TextEnv(
            ["x" * 20], byte_tokenizer(), "builtins:len", reference=reference, decoder_start_ids=START, max_new_tokens=5
        )
    assert env.observation_space["input_ids"].shape == (16,)


def test_start_tokens_are_plain_json_and_reach_agents_in_the_action_space(settings: dict[str, Any]) -> None:
    env = gym.make("textgym/Sentiment-v0", decoder_start_ids=[3], kl_coef=0, reference=None)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.observation_space == env.observation_space
    for space in (again.action_space, pickle.loads(pickle.dumps(env.action_space)), copy.deepcopy(env.action_space)):
        assert space.decoder_start == (3,)


@pytest.mark.parametrize("kl_mode", ["reference", "exact"])
def test_the_environment_pays_the_kl_of_an_encoder_decoder_reference(settings: dict[str, Any], kl_mode: str) -> None:
    """Per-token KL terms of the two modes that the environment pays, against the log-probs of whole sequences."""
    envs = gym.make_vec(
        "textgym/Text-v0", num_envs=3, **settings, kl_mode=kl_mode, autoreset_mode="Disabled", array="torch"
    )
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(seed=1))
    policy.seed(0)
    envs.unwrapped.attach_policy(policy)
    observation, _ = envs.reset(seed=0)
    total = torch.zeros(3)
    for _ in range(5):
        step = policy.act(observation)
        observation, rewards, *_ = envs.step(step.action)
        total += rewards
    sequences = envs.unwrapped.task.episodes.sequences()
    reference = TokenModel(settings["reference"]).sequence_log_probs(sequences).sum(1)
    own = policy.sequence_log_probs(sequences).sum(1) if kl_mode == "exact" else 0.0
    scores = torch.tensor([len(row["completion"]) for row in envs.unwrapped.transcript], dtype=torch.float32)
    assert_close(total, scores + 0.1 * (reference - own), terms=FORWARD, scale=1.0)


def test_a_view_of_actions_works_and_views_of_the_whole_text_are_refused(settings: dict[str, Any]) -> None:
    env = TopKActions(gym.make("textgym/Text-v0", **settings), 5)
    observation, _ = env.reset(seed=0)
    logits = TokenModel(settings["reference"]).next_logits(observation)[0]
    observation, *_ = env.step(2)
    assert observation["decoder_input_ids"][1] == logits.topk(5).indices[2]
    for view in (TextObservation, lambda env: TokenHistory(env, 4)):
        with pytest.raises(ValueError, match="without decoder_start_ids"):
            view(gym.make("textgym/Text-v0", **settings))


def test_wrong_start_tokens_and_references_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="decoder_start_ids must be token ids from 0 to 257"):
        gym.make("textgym/Text-v0", **settings | {"decoder_start_ids": [258]})
    with pytest.raises(ValueError, match="has no encoder"):
        gym.make("textgym/Text-v0", **settings | {"reference": mock_lm()})
    with pytest.raises(ValueError, match=r"decoder_start_ids=policy\.decoder_start_ids"):
        gym.make("textgym/Text-v0", **settings | {"decoder_start_ids": []})


def test_rows_of_a_batch_wait_or_restart_and_a_policy_reads_them(settings: dict[str, Any]) -> None:
    """Rows that restart on their own, in lock-step with nobody: actions are those of whole forward passes."""
    envs = gym.make_vec("textgym/Text-v0", num_envs=3, **settings, array="torch")
    policy = ActorCritic.from_pretrained(mock_seq2seq_lm(seed=1))
    observation, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(12):
        greedy = policy.act(observation, deterministic=True).action
        for row in range(3):
            size, length = (int(observation[f"{part}attention_mask"][row].sum()) for part in ("", "decoder_"))
            logits = policy.lm(
                input_ids=observation["input_ids"][row : row + 1, :size],
                decoder_input_ids=observation["decoder_input_ids"][row : row + 1, :length],
            ).logits
            assert greedy[row] == logits[0, -1].argmax()
        stop = torch.as_tensor(rng.random(3) < 0.3)
        observation, *_ = envs.step(torch.where(stop, byte_tokenizer().eos_token_id, greedy))
