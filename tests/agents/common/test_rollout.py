"""collect and merge: whole episodes as padded tensors."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from gymnasium.wrappers.vector import NormalizeReward, RecordEpisodeStatistics, TransformReward
from torch import Tensor

from textgym.agents.common.rollout import Rollout, collect, merge
from textgym.models.actor_critic import ActorCritic
from textgym.testing import assert_close, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())

ROWS, MAX_NEW_TOKENS, PAD = 6, 5, 257
STOP = range(50)  # a fifth of the vocabulary, so that a random model ends rows at different times
PROMPTS = [{"prompt": text, "bonus": float(i)} for i, text in enumerate(["one", "three", "a", "hello", "xy", "four"])]


def bonus(completions: list[str], bonus: list[float]) -> list[float]:
    return bonus


def ramp(completion_ids: list[list[int]]) -> list[list[float]]:
    """Token t earns t + 1."""
    return [[float(t + 1) for t in range(len(ids))] for ids in completion_ids]


def make_envs(reward: Any = bonus, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "tokenizer": byte_tokenizer(),
        "kl_mode": "deferred",
        "stop": list(STOP),
        "max_prompt_tokens": 8,
        "max_new_tokens": MAX_NEW_TOKENS,
        "autoreset_mode": "Disabled",
        "array": "torch",
        **changes,
    }
    envs = gym.make_vec("textgym/Text-v0", ROWS, reward=reward, **settings)
    envs.reset(seed=0)
    return envs


def make_policy(critic: str = "shared", seed: int = 0) -> ActorCritic:
    policy = ActorCritic.from_pretrained(mock_lm(), critic=critic)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.nn.init.normal_(policy.value_head.weight)
    policy.seed(seed)
    return policy


class Positions:
    """Counts the positions that a model is run on, and the runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.count, self.runs = 0, 0
        model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.count += kwargs["input_ids"].numel()
        self.runs += 1


def lengths_of(rollout: Rollout) -> list[int]:
    return rollout.sequences.response_lengths.tolist()


def tokens_of(rollout: Rollout) -> list[list[int]]:
    padded = rollout.sequences.pad(rollout.sequences.actions).tolist()
    return [row[:length] for row, length in zip(padded, lengths_of(rollout), strict=True)]


@pytest.mark.parametrize("length_limit", ["terminate", "truncate"])
def test_rows_end_at_their_first_stop_token_or_at_the_limit(length_limit: str) -> None:
    rollout = collect(make_envs(length_limit=length_limit), make_policy())
    lengths = lengths_of(rollout)
    assert len(set(lengths)) > 2, "a test of unequal lengths needs some"
    assert MAX_NEW_TOKENS in lengths
    for tokens, by_stop in zip(tokens_of(rollout), rollout.ended_by_stop.tolist(), strict=True):
        assert not set(tokens[:-1]) & set(STOP)
        assert by_stop == (tokens[-1] in STOP)
        assert by_stop or len(tokens) == MAX_NEW_TOKENS
    assert rollout.response_mask.sum(1).tolist() == lengths


def test_rows_that_ended_stay_untouched() -> None:
    rollout = collect(make_envs(), make_policy())
    for row, length in enumerate(rollout.sequences.lengths.tolist()):
        assert (rollout.sequences.input_ids[row, length:] == PAD).all()
    for values in (rollout.log_probs, rollout.values, rollout.rewards):
        assert values.shape == rollout.response_mask.shape
        assert (values[~rollout.response_mask] == 0).all()


def test_ended_rows_are_not_decoded() -> None:
    """Prompts once, then one position for each token; the last tokens of all are never read."""
    envs, policy = VectorWrapper(make_envs()), make_policy()
    positions = Positions(policy.lm.base_model)
    rollout = collect(envs, policy)
    longest = max(lengths_of(rollout))
    prompts = ROWS * int(rollout.sequences.prompt_lengths.max())
    stepped = prompts + sum(min(length, longest - 1) for length in lengths_of(rollout))
    assert positions.count == stepped
    assert positions.runs == longest
    positions.count = 0
    policy.seed(0)
    envs.reset(seed=0)
    assert tokens_of(collect(envs.unwrapped, policy)) == tokens_of(rollout)
    assert positions.count < stepped, "prompts of like length in one pass, and rows let go of as they end"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_whole_responses_are_those_of_stepping(critic: str, deterministic: bool) -> None:
    """With everything that a rollout holds, transcripts and infos too."""
    settings: dict[str, Any] = {"reward": [bonus, ramp], "missing_eos_penalty": 0.5, "min_new_tokens": 2}
    whole, stepped = make_envs(**settings), VectorWrapper(make_envs(**settings))
    for _ in range(2):
        policies = [make_policy(critic), make_policy(critic)]
        mine, expected = (
            collect(whole, policies[0], None, deterministic),
            collect(stepped, policies[1], None, deterministic),
        )
        assert tokens_of(mine) == tokens_of(expected)
        assert mine.ended_by_stop.tolist() == expected.ended_by_stop.tolist()
        assert mine.components.keys() == expected.components.keys()
        for name in ("log_probs", "values", "scores", "raw_scores", "rewards"):
            assert_close(getattr(mine, name), getattr(expected, name), terms=FORWARD)
        for name, values in expected.components.items():
            torch.testing.assert_close(mine.components[name], values)
        assert whole.transcript == stepped.unwrapped.transcript
        assert policies[0].generator.get_state().equal(policies[1].generator.get_state())  # type: ignore[union-attr]


def test_submitted_responses_must_be_whole() -> None:
    envs, tokens = make_envs(), torch.full((ROWS, MAX_NEW_TOKENS), 200)
    tokens[0, 1] = STOP[0]
    lengths = torch.tensor([2, *[MAX_NEW_TOKENS] * (ROWS - 1)])
    for wrong in (lengths - 1, lengths.clamp(min=3)):
        with pytest.raises(ValueError, match="must end with its first stop token"):
            envs.submit(tokens, wrong)
    rewards, infos = envs.submit(tokens, lengths)
    assert infos["ended_by_stop"].tolist() == [True, *[False] * (ROWS - 1)]
    assert rewards.tolist() == infos["reward/bonus"].tolist()
    with pytest.raises(ValueError, match="submitted only once"):
        envs.submit(tokens, lengths)
    envs = make_envs(stop=["!"])
    with pytest.raises(ValueError, match="without stop strings"):
        envs.submit(tokens, lengths)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_log_probs_and_values_are_those_of_the_states(critic: str) -> None:
    envs, policy = make_envs(), make_policy(critic)
    runs = Positions(policy.lm.base_model if policy.critic is None else policy.critic)
    rollout = collect(envs, policy)
    if critic == "separate":
        assert runs.runs == 1, "a separate critic reads whole episodes in one pass"
    expected = policy.evaluate(rollout.sequences)
    assert_close(rollout.log_probs, expected.log_prob.detach(), terms=FORWARD)
    assert_close(rollout.values, expected.value.detach(), terms=FORWARD)
    assert not rollout.log_probs.requires_grad
    assert not rollout.values.requires_grad


def test_stop_tokens_are_masked_before_the_minimum() -> None:
    rollout = collect(make_envs(min_new_tokens=3), make_policy())
    assert min(lengths_of(rollout)) >= 4, "the fourth token is the first that may end a row"
    for tokens in tokens_of(rollout):
        assert not set(tokens[:3]) & set(STOP)


def test_scores_and_columns_belong_to_their_rows() -> None:
    envs, chosen = make_envs([bonus, ramp], reward_weights=[10.0, 0.0]), [3, 5, 0, 1, 1, 4]
    rollout = collect(envs, make_policy(), {"prompt_index": chosen})
    assert rollout.scores.tolist() == [10.0 * index for index in chosen]
    for row, index in enumerate(chosen):
        length = int(rollout.sequences.prompt_lengths[row])
        assert bytes(rollout.sequences.input_ids[row, :length].tolist()).decode() == PROMPTS[index]["prompt"]
    assert rollout.components["reward/bonus"].tolist() == chosen
    assert rollout.components["reward/ramp"].tolist() == [n * (n + 1) / 2 for n in lengths_of(rollout)]


def test_the_score_is_paid_at_the_last_token() -> None:
    rollout = collect(make_envs(missing_eos_penalty=0.5), make_policy())
    rewards = rollout.rewards
    for row, length in enumerate(lengths_of(rollout)):
        expected = torch.zeros(rewards.shape[1])
        expected[length - 1] = rollout.scores[row]
        assert torch.equal(rewards[row], expected)
    assert (rollout.scores % 1 == torch.where(rollout.ended_by_stop, 0.0, 0.5)).all()


def test_token_rewards_are_paid_at_their_tokens() -> None:
    """Beside a whole score and a penalty, which go to the last token."""
    rollout = collect(make_envs([ramp, bonus], reward_weights=[0.1, 1.0], missing_eos_penalty=0.5), make_policy())
    rewards = rollout.rewards
    whole = rollout.components["reward/bonus"] - 0.5 * ~rollout.ended_by_stop
    for row, length in enumerate(lengths_of(rollout)):
        expected = torch.zeros(rewards.shape[1])
        expected[:length] = 0.1 * torch.arange(1, length + 1)
        expected[length - 1] += whole[row]
        torch.testing.assert_close(rewards[row], expected)
    torch.testing.assert_close(rewards.sum(1), rollout.scores)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone() -> None:
    policies = [make_policy(seed=seed) for seed in (0, 0, 1)]
    before = torch.get_rng_state()
    first, again, other = (collect(make_envs(), policy) for policy in policies)
    assert tokens_of(first) == tokens_of(again) != tokens_of(other)
    assert torch.equal(torch.get_rng_state(), before)
    greedy = [tokens_of(collect(make_envs(), make_policy(seed=seed), deterministic=True)) for seed in (0, 1)]
    assert greedy[0] == greedy[1] != tokens_of(first)


def test_merge_pads_to_the_longest() -> None:
    envs, policy = make_envs([ramp, bonus]), make_policy()
    parts = [collect(envs, policy) for _ in range(3)]
    short = parts[0][torch.tensor(lengths_of(parts[0])).argmin() :][:1]  # narrower than the others
    assert short.log_probs.shape[1] < MAX_NEW_TOKENS
    whole = merge([short, *parts])
    assert len(whole) == 1 + 3 * ROWS
    assert tokens_of(whole) == [row for part in (short, *parts) for row in tokens_of(part)]
    for name in ("log_probs", "values", "rewards"):
        joined: Tensor = getattr(whole, name)
        assert joined.shape == whole.response_mask.shape
        for start, part in zip((0, 1, 1 + ROWS, 1 + 2 * ROWS), (short, *parts), strict=True):
            width = part.response_mask.shape[1]
            rows = joined[start : start + len(part)]
            assert torch.equal(rows[:, :width], getattr(part, name))
            assert (rows[:, width:] == 0).all()
    assert whole.scores.tolist() == [score for part in (short, *parts) for score in part.scores.tolist()]
    assert whole.components["reward/bonus"].tolist() == [
        value for part in (short, *parts) for value in part.components["reward/bonus"].tolist()
    ]
    assert merge(parts[:1]) is parts[0]


def test_slices_are_as_wide_as_their_longest() -> None:
    rollout = collect(make_envs(ramp), make_policy())
    for row in range(ROWS):
        part = rollout[row : row + 1]
        assert tokens_of(part) == tokens_of(rollout)[row : row + 1]
        assert part.log_probs.shape == part.values.shape == part.rewards.shape == (1, lengths_of(part)[0])
        torch.testing.assert_close(part.rewards[0], rollout.rewards[row, : lengths_of(part)[0]])


def doubled(rewards: np.ndarray) -> np.ndarray:
    """As a function for NumPy alone, which a tensor would not do."""
    assert isinstance(rewards, np.ndarray)
    return np.multiply(rewards, 2.0)


@pytest.mark.parametrize("array", ["numpy", "torch"])
def test_wrappers_of_gymnasium_that_want_numpy_are_stepped_through(array: str) -> None:
    policy = make_policy()
    policy.seed(0)
    expected = collect(make_envs(), policy)
    envs = TransformReward(RecordEpisodeStatistics(make_envs(array=array)), doubled)
    policy.seed(0)
    rollout = collect(envs, policy)
    assert envs.unwrapped.array == array
    assert tokens_of(rollout) == tokens_of(expected)
    assert_close(rollout.log_probs, expected.log_probs, terms=FORWARD)
    assert rollout.raw_scores.tolist() == expected.raw_scores.tolist()
    assert rollout.rewards.sum(1).tolist() == (2 * expected.rewards.sum(1)).tolist()
    assert envs.env.episode_count == ROWS
    normalised = collect(NormalizeReward(make_envs(array=array), gamma=1.0), policy)
    assert ((normalised.rewards.sum(1) > 0) == (normalised.raw_scores > 0)).all()
