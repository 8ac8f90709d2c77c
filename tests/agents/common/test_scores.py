"""Scores that are missing, equal, or of any size: rows without one teach nothing, and equal ones nothing either."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from types import MethodType
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from textgym.agents import A2C, DQN, GRPO, NLPO, PPO, REINFORCE, RLOO, ExpertIteration, Pathwise
from textgym.agents.common.means import ROUNDING
from textgym.agents.common.metrics import episode_metrics
from textgym.agents.common.replay_agent import ReplayAgent
from textgym.agents.common.rollout import Rollout
from textgym.agents.common.rollout_agent import RolloutAgent
from textgym.agents.runs.evaluation import generate, measure
from textgym.agents.search.best_of_n import best_of_n
from textgym.models.actor_critic import ActorCritic
from textgym.rewards.engine.completions_to_score import RewardError
from textgym.testing import assert_close, assert_trained_alike, byte_tokenizer, mock_lm, terms_of

FORWARD = terms_of(mock_lm())
LEARNING_RATE = 1e-4
ROWS, GROUP = 16, 4
GROUPS = {"group_size": GROUP}
REPLAY = {"learning_starts": 1, "gradient_steps": 1, "batch_size": 8, "target_update_interval": 1}
AGENTS: dict[str, tuple[type[RolloutAgent], dict[str, Any]]] = {
    "reinforce": (REINFORCE, {}),
    "reinforce, learned": (REINFORCE, {"baseline": "learned"}),
    "a2c": (A2C, {"whiten_advantages": True}),
    "ppo": (PPO, {"minibatch_size": 8, "whiten_rewards": True}),
    "nlpo": (NLPO, {"minibatch_size": 8}),
    "grpo": (GRPO, GROUPS),
    "grpo, KL in loss": (GRPO, {**GROUPS, "kl_in": "loss"}),
    "rloo": (RLOO, GROUPS),
    "rloo, batch": (RLOO, {**GROUPS, "normalise": "batch"}),
    "expert iteration": (ExpertIteration, GROUPS),
    "dqn": (DQN, {**REPLAY, "backup": "soft"}),
    "dqn, greedy": (DQN, {**REPLAY, "backup": "greedy", "prioritised": True}),
    "pathwise": (Pathwise, REPLAY),
}
UNSCORED = [0, 5, 8, 9, 10]  # the third group has one score left

pytestmark = pytest.mark.filterwarnings("ignore:sampling is filtered:UserWarning")
patient = settings(
    deadline=None,
    max_examples=10,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def lengths(completion_ids: list[list[int]]) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def make_envs(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "prompts": ["one", "three", "longer"],
        "tokenizer": byte_tokenizer(),
        "reward": lengths,
        "stop": list(range(0, 256, 8)),  # so that lengths differ
        "kl_coef": 0.02,
        "kl_mode": "deferred",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }
    return gym.make_vec("textgym/Text-v0", num_envs=ROWS, **{**arguments, **changes})


def make_agent(name: str, envs: Any = None, **changes: Any) -> RolloutAgent:
    kind, config = AGENTS[name]
    policy = ActorCritic.from_pretrained(mock_lm(), critic="separate")
    return kind(
        policy,
        make_envs(**changes) if envs is None else envs,
        kind.config_class(**{"episodes_per_update": ROWS, "learning_rate": LEARNING_RATE, **config}),
    )


def without_scores(rollout: Rollout, rows: list[int], junk: float = 0.0) -> Rollout:
    """A rollout in which these rows have no score, and junk for rewards."""
    scored = torch.ones(len(rollout), dtype=torch.bool)
    scored[rows] = False
    rewards = torch.where(scored[:, None] | ~rollout.response_mask, rollout.rewards, junk)
    raw_scores = torch.where(scored, rollout.raw_scores, math.nan)
    return replace(rollout, rewards=rewards, raw_scores=raw_scores, scores=torch.where(scored, rollout.scores, junk))


def agent_after_an_update(name: str, change: Any) -> RolloutAgent:
    agent = make_agent(name)
    rollout = change(agent.play())
    agent.update(rollout, agent.measure_kl(rollout))
    return agent


def weights_after_an_update(name: str, change: Any) -> dict[str, Tensor]:
    return agent_after_an_update(name, change).policy.state_dict()


@pytest.mark.numerics
@pytest.mark.parametrize("name", AGENTS)
def test_nothing_is_learned_from_a_row_without_a_score(name: str) -> None:
    """Each weight by itself, so that one with few numbers counts; the scale of the values is no weight."""
    plain = agent_after_an_update(name, lambda rollout: without_scores(rollout, UNSCORED)).policy
    junk = agent_after_an_update(name, lambda rollout: without_scores(rollout, UNSCORED, junk=1e6)).policy
    for part, weight in plain.named_parameters():
        assert_trained_alike(junk.get_parameter(part), weight, LEARNING_RATE)
    for part, scale in plain.value_head.named_buffers():
        assert_close(junk.value_head.get_buffer(part), scale, terms=FORWARD, scale=6.0, what=part)


@pytest.mark.parametrize("name", ["ppo", "grpo", "dqn, greedy"])
def test_something_is_learned_from_a_row_with_a_score(name: str) -> None:
    without = weights_after_an_update(name, lambda rollout: without_scores(rollout, UNSCORED))
    everything = weights_after_an_update(name, lambda rollout: rollout)
    assert not all(torch.equal(without[key], everything[key]) for key in without)


@pytest.mark.parametrize("name", ["reinforce, learned", "ppo", "dqn"])
def test_an_update_is_that_of_the_rows_which_have_a_score(name: str) -> None:
    others = torch.tensor([row for row in range(ROWS) if row not in UNSCORED])
    left_out = weights_after_an_update(name, lambda rollout: without_scores(rollout, UNSCORED))
    alone = weights_after_an_update(name, lambda rollout: rollout[others])
    for key, expected in alone.items():
        torch.testing.assert_close(left_out[key], expected, rtol=1e-3, atol=1e-5)


# --- from the reward function to the metrics ---


def some_unscored(completion_ids: list[list[int]]) -> list[float | None]:
    return [None if ids[0] % 3 == 0 else float(len(ids)) for ids in completion_ids]


def sometimes_broken(completion_ids: list[list[int]]) -> list[float]:
    return [math.nan if ids[0] % 3 == 0 else float(len(ids)) for ids in completion_ids]


@pytest.mark.filterwarnings("ignore:reward function:UserWarning")
@pytest.mark.parametrize("reward", [some_unscored, sometimes_broken])
@pytest.mark.parametrize("stepped", [False, True], ids=["whole responses", "step by step"])
def test_rows_without_a_score_are_counted_and_left_out_of_the_metrics(reward: Any, stepped: bool) -> None:
    envs = make_envs(reward=reward, on_reward_error="skip", missing_eos_penalty=1.0)
    agent = make_agent("ppo", gym.vector.VectorWrapper(envs) if stepped else envs)  # wrappers are stepped through
    rollout = agent.play()
    scored = rollout.scored
    first = rollout.sequences.input_ids.gather(1, rollout.sequences.prompt_lengths[:, None])[:, 0]
    assert scored.tolist() == (first % 3 != 0).tolist()
    assert scored.any()
    assert not scored.all()
    assert rollout.raw_scores.isnan().tolist() == (~scored).tolist()
    assert (rollout.scores[~scored] == 0).all()
    assert (rollout.rewards[~scored] == 0).all()
    task = agent.envs.unwrapped.task
    metrics = episode_metrics(rollout, torch.zeros_like(rollout.rewards), agent.penalty, task.scorer)
    expected = rollout.sequences.response_lengths[scored] - 1.0 * ~rollout.ended_by_stop[scored]
    assert metrics["objective/unscored"] == pytest.approx(1 - float(scored.double().mean()))
    assert metrics["objective/scores"] == pytest.approx(float(expected.mean()))
    assert metrics["objective/scores_std"] == pytest.approx(float(expected.std(correction=0)))
    assert metrics["objective/rlhf_reward"] == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("name", AGENTS)
def test_training_goes_on_without_the_rows_that_have_no_score(name: str) -> None:
    history: list[dict[str, float]] = []
    make_agent(name, reward=some_unscored).learn(2 * ROWS, [lambda _, metrics: history.append(metrics)])
    assert all(0 <= metrics["objective/unscored"] < 1 for metrics in history)
    assert np.isfinite([value for metrics in history for value in metrics.values()]).all()


@pytest.mark.parametrize("name", ["ppo", "grpo", "pathwise"])
def test_a_rollout_without_any_score_is_an_error(name: str) -> None:
    agent = make_agent(name, reward=lambda completions: [None] * len(completions))
    with pytest.raises(RewardError, match=f"none of the {ROWS} episodes has a score"):
        agent.learn(ROWS)


def test_a_group_with_fewer_than_two_scores_teaches_nothing() -> None:
    keep = [3, 4, 5]  # one row of the first group, two of the second
    unscored = [row for row in range(ROWS) if row not in keep]
    for name in ("grpo", "rloo", "rloo, batch", "expert iteration"):
        advantages, rows = trained_on(name, without_scores(rollout_of(name), unscored))
        assert set(rows) <= {4, 5}, name
        if name != "expert iteration":
            assert not advantages[:4].any(), name
            assert not advantages[6:].any(), name


def test_best_of_n_never_chooses_a_row_without_a_score_before_one_that_has_one() -> None:
    calls = iter(range(100))

    def two_of_three_without_a_score(completions: list[str]) -> list[float | None]:
        return [-5.0 if next(calls) % 3 == 0 else None for _ in completions]

    envs = make_envs(reward=two_of_three_without_a_score)
    samples = best_of_n(ActorCritic.from_pretrained(mock_lm()), envs, [0, 1, 2], n=4, seed=0)
    assert samples.rollout.raw_scores.tolist() == [-5.0] * 3, "each prompt has samples of both kinds"


def test_an_evaluation_is_over_the_samples_that_have_a_score() -> None:
    policy, envs = ActorCritic.from_pretrained(mock_lm()), make_envs(reward=some_unscored)
    samples = generate(policy, envs, list(range(3)) * 5, seed=0)
    figures = measure(samples, policy.reference())
    assert figures["score"] == pytest.approx(float(samples.rollout.raw_scores[samples.rollout.scored].mean()))
    nothing = make_envs(reward=lambda completions: [None] * len(completions))
    with pytest.raises(RewardError, match="none of the samples has a score"):
        measure(generate(policy, nothing, [0], seed=0), policy.reference())


# --- properties of the advantages: any scores, any of them missing ---


@lru_cache
def agent_of(name: str) -> RolloutAgent:
    agent = make_agent(name, kl_coef=0.02 if name == "dqn" else 0.0)
    agent.measure_kl(agent.play())
    return agent


@lru_cache
def rollout_of(name: str) -> Rollout:
    rollout = agent_of(name).play()
    return replace(rollout, values=torch.zeros_like(rollout.values))


def paid(name: str, scores: list[float], scored: list[bool]) -> Rollout:
    """A rollout in which each row's last token pays its score, in float32 as ever."""
    rollout = rollout_of(name)
    given = torch.where(torch.tensor(scored), torch.tensor(scores), 0.0)
    last = (rollout.sequences.response_lengths - 1)[:, None]
    rewards = torch.zeros_like(rollout.rewards).scatter_(1, last, given[:, None])
    raw = torch.where(torch.tensor(scored), given, math.nan)
    return replace(rollout, rewards=rewards, scores=given, raw_scores=raw)


def trained_on(name: str, rollout: Rollout, **config: Any) -> tuple[Tensor, list[int]]:
    """The advantages of an update, without its steps, and the rows that it would train on."""
    agent: Any = agent_of(name)
    found: dict[str, Any] = {}

    def note(self: Any, rollout: Rollout, advantages: Tensor, returns: Any = None, rows: Any = None, **_: Any) -> Any:
        found.update(advantages=advantages, rows=rollout.scored.nonzero()[:, 0] if rows is None else rows)
        return iter(())

    agent.minibatches = MethodType(note, agent)
    before, agent.config = agent.config, replace(agent.config, **config)
    try:
        agent.update(rollout, torch.zeros_like(rollout.rewards))
    finally:
        agent.config = before
    return found["advantages"], found["rows"].tolist()


@st.composite
def scores_and_gaps(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    """Scores of a few different values at any offset and scale, as float32, and which rows have one: at least one."""
    offset = draw(st.sampled_from([0.0, 1.0, -7.5, 100.3, -99_999.9, 1e6]))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e5]))
    steps = draw(st.lists(st.integers(-3, 3), min_size=ROWS, max_size=ROWS))
    scored = draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).filter(any))
    return [float(np.float32(offset + scale * step)) for step in steps], scored


def differ(values: np.ndarray) -> bool:
    return len(values) > 1 and bool(values.std(ddof=0) > ROUNDING * abs(values.mean()))


def expected_in_groups(scores: list[float], scored: list[bool], compare: Any) -> np.ndarray:
    """What `compare` makes of the scored values of each group, and 0 for everything else."""
    expected, known, values = np.zeros(ROWS), np.array(scored), np.array(scores)
    for start in range(0, ROWS, GROUP):
        rows = [row for row in range(start, start + GROUP) if known[row]]
        if differ(values[rows]):
            expected[rows] = compare(values[rows])
    return expected


def grpo(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std(ddof=1) + 1e-4)


def rloo(values: np.ndarray) -> np.ndarray:
    return values - (values.sum() - values) / (len(values) - 1)


@patient
@given(scores_and_gaps())
@pytest.mark.parametrize(("name", "compare"), [("grpo", grpo), ("rloo", rloo)])
def test_advantages_in_groups_are_those_of_the_scored_rows(
    name: str, compare: Any, given_scores: tuple[list[float], list[bool]]
) -> None:
    rollout = paid(name, *given_scores)
    advantages, rows = trained_on(name, rollout)
    expected = torch.from_numpy(expected_in_groups(*given_scores, compare)).float()
    mask = rollout.response_mask
    size = float(np.abs(given_scores[0]).max())
    torch.testing.assert_close(
        advantages, torch.where(mask, expected[:, None], 0.0), rtol=1e-4, atol=1e-5 if name == "grpo" else 1e-9 * size
    )
    assert all(given_scores[1][row] for row in rows)
    assert not advantages[(expected == 0)].any()


@patient
@given(scores_and_gaps())
@pytest.mark.parametrize("name", ["ppo", "nlpo", "a2c"])
def test_whitened_advantages_are_those_of_the_scored_rows(
    name: str, given_scores: tuple[list[float], list[bool]]
) -> None:
    """With lambda 1 and values of 0 the advantage of each token is the score of its row."""
    scores, scored = given_scores
    rollout = paid(name, scores, scored)
    config = {} if name == "a2c" else {"whiten_rewards": False}
    # On a running scale the values of a new critic are the mean of the returns, and the agent is used for all examples.
    config["normalise_values"] = False
    advantages, rows = trained_on(name, rollout, lam=1.0, whiten_advantages=True, **config)
    learned = rollout.response_mask & torch.tensor(scored)[:, None]
    tokens = torch.tensor(scores, dtype=torch.float64)[:, None].expand(learned.shape)[learned].numpy()
    expected = np.zeros_like(tokens)
    if differ(tokens):
        expected = (tokens - tokens.mean()) / np.sqrt(tokens.var() + 1e-8)
    torch.testing.assert_close(advantages[learned], torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    assert not advantages[~learned].any()
    assert rows == np.flatnonzero(scored).tolist()


@patient
@given(scores_and_gaps())
def test_the_baseline_of_reinforce_is_that_of_the_scored_rows(given_scores: tuple[list[float], list[bool]]) -> None:
    scores, scored = given_scores
    rollout = paid("reinforce", scores, scored)
    advantages, _ = trained_on("reinforce", rollout)
    learned = (rollout.response_mask & torch.tensor(scored)[:, None]).numpy()
    values = np.array(scores)
    for row, column in zip(*learned.nonzero(), strict=True):
        others = values[learned[:, column] & (np.arange(ROWS) != row)]
        expected = values[row] - (others.mean() if len(others) else 0.0)
        assert advantages[row, column] == pytest.approx(expected, rel=1e-4, abs=3e-7 * np.abs(values).max())
    assert not advantages.numpy()[~learned].any()


@patient
@given(scores_and_gaps())
def test_expert_iteration_keeps_the_best_of_the_scored_rows(given_scores: tuple[list[float], list[bool]]) -> None:
    scores, scored = given_scores
    _, rows = trained_on("expert iteration", paid("expert iteration", scores, scored))
    for start in range(0, ROWS, GROUP):
        known = [row for row in range(start, start + GROUP) if scored[row]]
        kept = [row for row in rows if row in range(start, start + GROUP)]
        assert len(kept) == (len(known) > 1)
        assert all(scored[row] and scores[row] == max(scores[other] for other in known) for row in kept)


@patient
@given(scores_and_gaps())
@pytest.mark.parametrize("name", ["dqn", "pathwise"])
def test_only_rows_with_a_score_are_remembered(name: str, given_scores: tuple[list[float], list[bool]]) -> None:
    scores, scored = given_scores
    agent = agent_of(name)
    assert isinstance(agent, ReplayAgent)
    before = agent.memory.added
    rollout = paid(name, scores, scored)
    agent.remember(rollout, torch.zeros_like(rollout.rewards))
    count = sum(scored)
    assert agent.memory.added == before + count
    slots = torch.arange(before, before + count) % agent.memory.capacity
    known = torch.tensor(scores)[torch.tensor(scored)]
    assert torch.equal(agent.memory.tensors["rewards"][slots].sum(1), known)
    kept = agent.memory.tensors["response_lengths"][slots]
    assert torch.equal(kept, rollout.sequences.response_lengths[torch.tensor(scored)])


@patient
@given(scores_and_gaps())
def test_metrics_are_those_of_the_scored_rows(given_scores: tuple[list[float], list[bool]]) -> None:
    scores, scored = given_scores
    agent = agent_of("ppo")
    rollout = paid("ppo", scores, scored)
    scorer = agent.envs.unwrapped.task.scorer
    metrics = episode_metrics(rollout, torch.zeros_like(rollout.rewards), agent.penalty, scorer)
    known = np.array(scores)[scored]
    size = float(np.abs(known).max())
    assert metrics["objective/scores"] == pytest.approx(known.mean(), rel=1e-5, abs=1e-6 * size)
    assert metrics["objective/scores_std"] == pytest.approx(known.std(), rel=1e-3, abs=1e-6 * size)
    assert metrics["objective/unscored"] == pytest.approx(1 - np.mean(scored))


EQUAL = [100.3, -99_999.9, 1e-20, 3.4e30]


@pytest.mark.parametrize("score", EQUAL)
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ppo", {"lam": 1.0, "whiten_rewards": False}),
        ("nlpo", {"lam": 1.0, "whiten_rewards": False}),
        ("a2c", {"lam": 1.0}),
        ("reinforce", {}),
        ("grpo", {}),
        ("grpo", {"scale": "none"}),
        ("rloo", {}),
        ("rloo, batch", {}),
    ],
)
@pytest.mark.parametrize("missing", [[], UNSCORED])
def test_equal_scores_have_no_advantage(name: str, config: dict[str, Any], score: float, missing: list[int]) -> None:
    rollout = paid(name, [score] * ROWS, [row not in missing for row in range(ROWS)])
    advantages, _ = trained_on(name, rollout, **config)
    assert (advantages == 0).all()


@pytest.mark.parametrize("name", ["grpo", "rloo", "rloo, batch"])
def test_token_rewards_that_add_up_to_the_same_have_no_advantage(name: str) -> None:
    """As float32 they add up to the same but for rounding."""
    rollout = rollout_of(name)
    lengths = rollout.sequences.response_lengths[:, None]
    rewards = torch.where(rollout.response_mask, 33.7 / lengths, 0.0)
    assert len(rewards.double().sum(1).unique()) > 1
    advantages, _ = trained_on(name, replace(rollout, rewards=rewards))
    assert (advantages == 0).all()


def test_whitened_rewards_that_are_equal_keep_their_mean() -> None:
    rollout = rollout_of("ppo")
    rewards = torch.where(rollout.response_mask, 100.3, 0.0)
    settings = {"whiten_rewards": True, "whiten_advantages": False, "normalise_values": False}  # values of 0
    advantages, _ = trained_on("ppo", replace(rollout, rewards=rewards), gamma=0.0, **settings)
    assert_close(advantages[rollout.response_mask].unique(), torch.tensor([100.3]))
